"""Messages of errors in the limits of an order and in measured numbers.

``SENTENCES`` maps the code of an error to its message, in the syntax of ``str.format``.
``value_error`` in ``coded.py`` creates the error and fills in the fields in braces.
"""

SENTENCES = {
    "limit_form": (
        "expected a limit like 'auc vs baseline >= -0.002' (with 'vs baseline', 'vs champion' "
        "or neither; with >= or <=), got {text!r}"
    ),
    "metric_unknown": "unknown metric {metric!r}; use one of {known}",
    "score_change_with_reference": "{metric} already compares the candidate's scores with the "
    "baseline's, so it has no value vs {against}; write '{metric}' without 'vs {against}' "
    "(against: absolute)",
    "bound_count": "a limit on {metric!r} needs either at_least or at_most",
    "score_change_bound_negative": "a limit on {metric} needs a bound of at least 0",
    "absolute_bound_negative": "{metric} itself is never below 0; to limit a change of it, write "
    "'{metric} vs baseline'",
    "limits_not_meant": "{reasons:; }",  # reasons of ``reasons/limits.py``
    "numbers_repeated": (
        "expected one measurement of each number; measured more than once: {numbers}"
    ),
}
