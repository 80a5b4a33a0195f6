"""Sentences about the inputs and the signature of a model."""

SENTENCES = {
    "input_shape_differs": "input {name!r} reads {columns} column(s), so its shape is "
    "{expected!r}; found {got!r}",
    "dense_shape_form": "dense input {name!r} needs shape [width]",
    "dense_columns_count": "dense input {name!r} of width {width} needs 1 list column or {width} "
    "scalar columns; found {columns}",
    "row_too_large": "input {name!r} has {values} values in a row, more than {most}: a batch of "
    "such rows does not fit in memory",
    "bag_shape_form": "bag {name!r} needs shape [length], at least 1",
    "bag_columns_count": "bag {name!r} reads exactly one list column",
    "inputs_repeated": "inputs share the name(s) {names}",
    "task_unknown": "unknown task {task!r}; use one of {known}",
    "output_form": "task {task!r} needs output {forms: or }; got {got!r}",
    "outputs_count": "a model has one output; found {count}. Models of several outputs are not "
    "supported yet",
    "label_missing": "label is missing; task {task!r} needs a label column",
    "metric_not_measured": "{reason}",
    "towers_unexpected": "towers and item belong to a task that ranks a catalogue, such as "
    "'retrieval', not {task!r}",
    "towers_missing": "task {task!r} needs towers (query and item) and item, the id",
    "tower_inputs_differ": "every input belongs to exactly one tower; inputs are {inputs}, the "
    "towers read {read}",
    "item_not_in_tower": "item {item!r} is not among the item tower's inputs",
    "item_no_single_id": "item {item!r} must be an id input of one column",
}
