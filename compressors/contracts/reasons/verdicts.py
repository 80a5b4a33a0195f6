"""Reasons of the outcome of a limit (accepted, rejected, undecided) and of a target's verdict.

``SENTENCES`` maps the code of a reason to its sentence, in the syntax of ``str.format``.
``Reason`` in ``reason.py`` fills in the fields in braces.

A round is one repetition of a latency measurement. The audit of a target checks that its graph or
engine stores the weights in the formats of the plan. Groups are the values of the signature's group
column, such as users. ``cause`` says why there is no interval. ``number`` is the measured value,
``relation`` is ``>=`` or ``<=``, and ``changes`` contains other reasons of this file.
"""

SENTENCES = {
    # limits
    "no_champion": "accepted: there is no champion yet to compare {metric} with",
    "exact_number": "{metric} is {number}; the limit is {relation} {limit}",
    "number_in_interval": "{metric} is {number} [{low}, {high}]; the limit is {relation} {limit}",
    "most_of_rows": (
        "{metric} is {number} on {rows:,} test rows (other rows may change more); the limit is "
        "{relation} {limit}"
    ),
    "limit_met": "accepted",
    "limit_missed": "rejected",
    "no_interval": "undecided: {cause}. Add test rows of other groups",
    "more_rows_decide": "undecided: about {needed:,} rows would decide, {rows:,} were used",
    "more_groups_decide": (
        "undecided: about {needed:,} rows of {needed_groups:,} groups would decide, {rows:,} of "
        "{groups:,} were used"
    ),
    "on_the_limit": "undecided: the number is at the limit, and more rows may not decide it",
    "more_rounds_decide": "undecided: measuring more rounds would narrow the interval",
    # targets
    "cannot_run": "built and audited, but not measured, because it cannot run on this machine",
    "not_built": "not built, or its audit failed, so there is nothing to serve",
    "one_limit_holds": "the one limit holds",
    "all_limits_hold": "all {limits} limits hold",
    "score_changes_of_output": "scores of {output} against the baseline: {changes:,}",
    "score_changes": "scores against the baseline: {changes:,}",
    "correlation": "correlation {correlation:.6g}",
    "mean_change": "mean change {change:.2g}",
    "largest_change": "largest change {change:.2g}",
    "largest_change_in": "largest change {change:.2g} ({unit})",
    "other_top1": "a different first row in {share:.1%} of {groups:,} groups",
    "top20_overlap": "top-20 overlap {share:.1%}",
    "large_score_changes": (
        "warning: some scores change much ({changes}), and no limit covers that. Add "
        "max_score_change or score_correlation to the limits if single scores matter"
    ),
    "large_score_changes_of_output": (
        "warning: some scores of {output} change much ({changes}), and no limit covers that. Add "
        "max_score_change[{output}] or score_correlation[{output}] to the limits if single scores "
        "matter"
    ),
    "low_correlation": (
        "the correlation with the baseline's scores is {correlation:.6g}, below {least:g}"
    ),
    "probability_change": "a probability changes by {change:.2g}, more than {most:g}",
    "score_change": ("a score changes by {change:.2g} standard deviations, more than {most:g}"),
}
