"""Sentences about the inputs and the signature of a model."""

SENTENCES = {
    "input_shape_differs": (
        "input {name!r} reads {columns} column(s), so its shape must be {expected!r}, got {got!r}"
    ),
    "dense_shape_form": "dense input {name!r} needs shape [width]",
    "dense_columns_count": (
        "dense input {name!r} of width {width} needs 1 list column or {width} scalar "
        "columns, got {columns}"
    ),
    "row_too_large": "input {name!r} has {values} values in a row, more than {most}: a batch of "
    "such rows does not fit in memory",
    "bag_shape_form": "bag {name!r} needs shape [length] with a length of at least 1",
    "bag_columns_count": "bag {name!r} must read exactly one list column",
    "inputs_repeated": "the name(s) {names} are used by several inputs",
    "task_unknown": "unknown task {task!r}; use one of {known}",
    "output_form": "task {task!r} needs output {forms: or }; got {got!r}",
    "outputs_count": (
        "a model must have one output, got {count}. Models with several outputs are "
        "not supported yet"
    ),
    "label_missing": "task {task!r} needs a label column, but label is missing",
    "metric_not_measured": "{reason}",
    "towers_unexpected": (
        "towers and item are only for a task that ranks a catalogue, such as "
        "'retrieval', not for {task!r}"
    ),
    "towers_missing": (
        "task {task!r} needs towers (query and item) and item, the input with the item's id"
    ),
    "tower_inputs_differ": (
        "every input must belong to exactly one tower; inputs are {inputs}, the towers read {read}"
    ),
    "item_not_in_tower": "item {item!r} must be among the item tower's inputs",
    "item_no_single_id": "item {item!r} must be an id input of one column",
}
