"""Messages of errors in the inputs and the signature of a model.

``SENTENCES`` maps the code of an error to its message, in the syntax of ``str.format``; a format
such as ``{values: or }`` joins a sequence with " or " (``SentenceFormatter``). ``value_error`` in
``coded.py`` creates the error and fills in the fields in braces.
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
    "id_fields_count": (
        "input {name!r} reads {columns} column(s) but has {fields} entries in 'fields'; write one "
        "entry for each column, or none"
    ),
    "integer_bounds": "input {name!r} has low {low}, which exceeds high {high}; exchange them",
    "sequence_lengths": (
        "sequence {name!r} has min_length {low}, which exceeds its longest list, shape [{high}]; "
        "change one of them"
    ),
    "sequence_not_there": (
        "'same_length_as' of sequence {name!r} names {other!r}, which is not another sequence; the "
        "sequences are {known}"
    ),
    "sequences_differ": (
        "sequences {name!r} and {other!r} share their lengths ('same_length_as') but differ in "
        "shape, min_length or padding; make these equal"
    ),
    "tokens_share_length": (
        "tokens {name!r} have 'same_length_as' {other!r}, but the number of tokens of a text is "
        "known only after tokenization; remove it"
    ),
    "key_columns_count": "key {name!r} must read exactly one column, got {columns}",
    "matrix_floats": (
        "matrix {name!r} has dtype {dtype!r}, but its fields {fields} have floats; use dtype "
        "'float32', or remove these fields"
    ),
    "keys_unexpected": (
        "input(s) {keys} of kind 'key' are only for a task that ranks a catalogue; remove them for "
        "task {task!r}"
    ),
    "keys_unused": "only the input that 'item' names, {item!r}, may have the kind 'key'; got the "
    "keys {keys}",
    "inputs_repeated": "the name(s) {names} are used by several inputs; rename all but one of them",
    "task_unknown": "unknown task {task!r}; use one of {known}",
    "output_form": "task {task!r} needs output {forms: or }; got {got!r}",
    "outputs_count": ("a model must have 1 to {most} outputs, got {count}"),
    "loss_weight_unused": (
        "'loss_weight' of output {output!r} is for models with several outputs; this model has "
        "one: remove it"
    ),
    "outputs_repeated": (
        "the output name(s) {names} are used by several outputs, or by an input; rename all but one"
    ),
    "outputs_of_ranked_catalogue": (
        "a model with several outputs needs one score per row for each of them; task {task!r} "
        "ranks a catalogue. Write a separate model for this output"
    ),
    "label_condition_unused": (
        "'label_where' of output {output!r} selects labelled rows, but task {task!r} has no labels "
        "of rows here. Remove it, or add 'label'"
    ),
    "metric_of_an_output": (
        "the metric of output {output!r} must be written without the name of an output, such as "
        "'auc' instead of 'auc[click]'; got {metric!r}"
    ),
    "label_missing": "task {task!r} needs a label column, but label is missing",
    "metric_not_measured": "{reason}",  # a ``Reason`` of ``reasons/limits.py``
    "towers_unexpected": (
        "'towers' and 'item' are only for a task that ranks a catalogue, such as "
        "'retrieval'; remove them for task {task!r}"
    ),
    "towers_not_there": (
        "'scored_by' is 'towers', but a model for task {task!r} has no towers; remove it"
    ),
    "towers_missing": (
        "task {task!r} needs 'towers', with 'query' and 'item', and the name of the input "
        "with the item's id as 'item'"
    ),
    "tower_inputs_differ": (
        "every input must belong to exactly one tower; the signature has inputs {inputs}, the "
        "towers list {read}"
    ),
    "tower_is_network": (
        "a tower needs 'module', the path of a submodule, or 'method', the name of a method of the "
        "network"
    ),
    "item_not_in_tower": (
        "'item' names {item!r}, which must be among the item tower's inputs or an input of kind "
        "'key'"
    ),
    "item_no_single_id": "'item' names {item!r}, which must be an id input of one column",
}
