"""Sentences about limits and about measured numbers."""

SENTENCES = {
    "limit_form": (
        "expected a limit like 'auc vs baseline >= -0.002' (vs baseline, vs champion "
        "or neither; >= or <=), got {text!r}"
    ),
    "metric_unknown": "unknown metric {metric!r}; use one of {known}",
    "score_change_with_reference": "{metric} already compares the candidate's scores with the "
    "baseline's, so it has no value vs {against}; write '{metric}' without 'vs {against}' "
    "(against: absolute)",
    "bound_count": "a limit on {metric!r} needs either at_least or at_most",
    "score_change_bound_negative": "a limit on {metric} needs a bound of at least 0",
    "absolute_bound_negative": "{metric} itself is never below 0; to limit a change write "
    "'{metric} vs baseline'",
    "limits_not_meant": "{reasons:; }",
    "numbers_repeated": "measured more than once: {numbers}",
}
