"""Reasons why a limit is likely a mistake, or why a signature cannot name a metric.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

A field ``why`` is one of the clauses below "why a limit is likely a mistake". ``intents`` are the
limits that were probably meant; their separator ``' or '`` includes the quotes of the limits.
"""

SENTENCES = {
    "limits_contradict": "limits '{first}' and '{second}' contradict each other. Keep one of them",
    "limit_with_intents": "limit '{limit}' {why}. Write '{intents:' or '}'",
    "limit_with_example": "limit '{limit}' {why}. Write for example '{example}'",
    "improvement_demanded": "limit '{limit}' demands a better {metric} than the uncompressed model "
    "has. To allow a loss instead, write '{loss}'",
    # --- why a limit is likely a mistake
    "bounds_best": "bounds how good the result may be: a {better} {metric} is better",
    "ratio_not_positive": "can never hold: it compares by the ratio, which is above 0",
    "ratio_too_large": "allows {ratio:g} times the {against}'s {metric}",
    "gain_too_large": "demands {metric} to be better than the {against}'s by {gain:g}",
    "loss_too_large": "accepts a useless model: it allows {metric} to be worse by {loss:g}",
    "above_highest": "can never hold: {metric} is at most {highest:g}",
    "below_random": "always holds: scores at random reach {metric} {lowest:g}",
    "below_zero": "always holds: {metric} is never below 0",
    "below_lowest": "can never hold: {metric} is never below {lowest:g}{unit}",
    "not_above_zero": "can never hold: {metric} is above 0",
    "beyond_highest": "always holds: {metric} is below {highest:g}{unit}",
    # --- metrics of a signature
    "metric_without_group": "metric {metric!r} needs a group column; name it in 'group'",
    "metric_of_groups_alone": "metric {metric!r} is not measured for task {task!r}; with a group "
    "column {grouped} is. Name the column in 'group' and set 'metric'",
    "metric_of_other_task": "task {task!r} needs metric {metrics: or }; got {metric!r}, which is "
    "not measured for it. Change 'metric'",
    "metric_of_other_task_or_group": "task {task!r} needs metric {metrics: or } (with a group "
    "column also {grouped}); got {metric!r}, which is not measured for it. Change 'metric'",
}
