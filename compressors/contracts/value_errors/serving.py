"""Messages of errors in the profiles of engines, and in models of a Triton repository.

``SENTENCES`` maps the code of an error to its message, in the syntax of ``str.format``.
``value_error`` in ``coded.py`` creates the error and fills in the fields in braces.

A profile has the smallest, the preferred and the largest shape of an engine's input: ``low``,
``best`` and ``high``.
"""

SENTENCES = {
    "target_not_in_triton": "Triton cannot serve target {target!r}; it serves {targets}",
    "profile_ranks_differ": (
        "the shapes low, best and high in the profile of {input!r} must have equal numbers of "
        "dimensions"
    ),
    "profile_order": "the profile of {input!r} needs 0 <= low <= best <= high in every dimension",
    "batches_shrink": "expected batch sizes in ascending order, got {got!r}",
    "tensor_type_unknown": "{tensor!r} has type {dtype}; Triton supports {dtypes!r}",
}
