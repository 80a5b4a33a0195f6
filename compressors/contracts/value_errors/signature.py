"""Messages of errors in the inputs and the signature of a model.

``SENTENCES`` maps the code of an error to its message, in the syntax of ``str.format``.
``value_error`` in ``coded.py`` creates the error and fills in the fields in braces.
"""

SENTENCES = {
    "input_shape_differs": (
        "input {name!r} reads {columns} column(s), so its shape must be {expected!r}, got {got!r}"
    ),
    "dense_shape_form": "dense input {name!r} needs shape [width] with a width of at least 1",
    "dense_columns_count": (
        "dense input {name!r} of width {width} needs 1 list column or {width} scalar "
        "columns, got {columns}"
    ),
    "row_too_large": "input {name!r} has {values} values in a row; at most {most} are allowed, "
    "so that a batch fits in memory",
    "bag_shape_form": "bag {name!r} needs shape [length] with a length of at least 1",
    "bag_columns_count": "bag {name!r} must read exactly one list column",
    "inputs_repeated": "the name(s) {names} are used by several inputs; rename all but one of them",
    "task_unknown": "unknown task {task!r}; use one of {known}",
    "output_form": "task {task!r} needs output {forms: or }; got {got!r}",
    "outputs_count": (
        "a model must have one output, got {count}. Models with several outputs are "
        "not supported yet"
    ),
    "label_missing": "task {task!r} needs a label column, but label is missing",
    "metric_not_measured": "{reason}",  # a ``Reason`` of ``reasons/limits.py``
    "towers_unexpected": (
        "'towers' and 'item' are only for a task that ranks a catalogue, such as "
        "'retrieval'; remove them for task {task!r}"
    ),
    "towers_missing": (
        "task {task!r} needs 'towers', with 'query' and 'item', and the name of the input "
        "with the item's id as 'item'"
    ),
    "tower_inputs_differ": (
        "every input must belong to exactly one tower; the signature has inputs {inputs}, the "
        "towers list {read}"
    ),
    "item_not_in_tower": "'item' names {item!r}, which must be among the item tower's inputs",
    "item_no_single_id": "'item' names {item!r}, which must be an id input of one column",
}
