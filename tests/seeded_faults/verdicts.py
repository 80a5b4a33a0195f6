"""Faults in limits, judgements and verdicts.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
A judgement is the outcome of one limit; the verdict of a target is derived from its judgements.
"""

from tests.seeded_faults.fault import Fault

LIMITS = "tests/compressors/contracts/test_limits.py"
JUDGE = "tests/compressors/metrics/test_judge.py"

FAULTS = (
    Fault(
        id="judge-accepts-on-the-point",
        file="compressors/metrics/judge.py",
        old='    if worst >= goal:\n        return "accepted"\n',
        new='    if (worst + best) / 2 >= goal:\n        return "accepted"\n',
        effect="A limit is accepted although the interval contains it.",
        tests=(f"{JUDGE}::test_at_least_limit_compares_the_bounds_of_the_interval",),
    ),
    Fault(
        id="judge-rejects-undecided",
        file="compressors/metrics/judge.py",
        old='    return "rejected" if best < goal else "undecided"\n',
        new='    return "rejected"\n',
        effect="A limit inside the interval is rejected instead of undecided.",
        tests=(f"{JUDGE}::test_at_most_limit_compares_the_bounds_of_the_interval",),
    ),
    Fault(
        id="judge-at-most-reversed",
        file="compressors/metrics/judge.py",
        old="    sign = 1 if limit.at_least is not None else -1\n    goal, point",
        new="    sign = 1\n    goal, point",
        effect="An upper limit is judged as a lower one.",
        tests=(f"{JUDGE}::test_at_most_limit_compares_the_bounds_of_the_interval",),
    ),
    Fault(
        id="judge-decides-without-interval",
        file="compressors/metrics/judge.py",
        old='outcome = _decide_outcome(goal, worst, best) if estimate.unresolved is None else "undecided"',
        new="outcome = _decide_outcome(goal, point, point)",
        effect="A limit on data of few groups is decided by the point estimate.",
        tests=(
            "tests/compressors/metrics/test_score_change.py"
            "::test_few_groups_give_no_interval_and_are_undecided",
        ),
    ),
    Fault(
        id="gate-without-limits-accepts",
        file="compressors/metrics/judge.py",
        old="    if not limits:\n        raise LimitRefused(",
        new="    if limits is None:\n        raise LimitRefused(",
        effect="An order without limits accepts all targets.",
        tests=(f"{JUDGE}::test_a_verdict_without_limits_raises_limit_refused",),
    ),
    Fault(
        id="gate-accepts-unmeasured-target",
        file="compressors/metrics/judge.py",
        old='return Verdict(target=target, outcome="built-unmeasured", reasons=unmeasured)',
        new='return Verdict(target=target, outcome="accepted", reasons=unmeasured)',
        effect="A target that never ran is accepted.",
        tests=(f"{JUDGE}::test_a_target_that_was_built_but_not_measured_is_built_unmeasured",),
    ),
    Fault(
        id="gate-takes-the-best-limit",
        file="compressors/metrics/judge.py",
        old='    for outcome in ("rejected", "undecided"):\n',
        new='    for outcome in ("undecided",):\n',
        effect="A rejected limit does not reject the target.",
        tests=(f"{JUDGE}::test_the_outcome_of_a_target_is_the_outcome_of_its_worst_limit",),
    ),
    Fault(
        id="overall-outcome-takes-the-best-target",
        file="compressors/contracts/verdicts.py",
        old='    worst_first: tuple[Outcome, ...] = ("rejected", "undecided", "accepted")\n',
        new='    worst_first: tuple[Outcome, ...] = ("accepted", "undecided", "rejected")\n',
        effect="One accepted target makes an order accepted although another is rejected.",
        tests=(
            "tests/compressors/contracts/test_contracts.py::test_overall_outcome_is_the_worst_of_measured_targets",
        ),
    ),
    Fault(
        id="judge-missing-champion-number-accepted",
        file="compressors/metrics/judge.py",
        old='if limit.against == "champion" and not measured.has_champion:',
        new='if limit.against == "champion":',
        effect="With a champion, a comparison that was not measured counts as passed.",
        tests=(f"{JUDGE}::test_a_limit_against_an_unmeasured_champion_raises_limit_refused",),
    ),
    Fault(
        id="judge-accepts-nan",
        file="compressors/metrics/judge.py",
        old="    if not all(math.isfinite(number) for number in numbers) "
        "or estimate.low > estimate.high:",
        new="    if estimate.low > estimate.high:",
        effect="NaN is judged like a number.",
        tests=(f"{JUDGE}::test_nan_and_infinity_raise_limit_refused",),
    ),
    Fault(
        id="limits-that-cannot-be-meant-accepted",
        file="compressors/contracts/limits.py",
        old="    if (limit.at_least is not None) != spec.higher_is_better:\n        better",
        new="    if limit.bound == math.inf:\n        better",
        effect="'auc vs baseline <= 0.002', which bounds the wrong side, is accepted.",
        tests=(f"{LIMITS}::test_implausible_limit_is_reported_with_the_likely_intents",),
    ),
    Fault(
        id="limits-contradictions-accepted",
        file="compressors/contracts/limits.py",
        old="            if lower_bound > upper_bound:\n",
        new="            if lower_bound > upper_bound + 1:\n",
        effect="Two limits that no value satisfies are accepted.",
        tests=(f"{LIMITS}::test_contradicting_limits_are_reported_with_both",),
    ),
    Fault(
        id="large-score-changes-without-warning",
        file="compressors/metrics/score_reasons.py",
        old="correlation.point < LEAST_CORRELATION:",
        new="correlation.point < -LEAST_CORRELATION:",
        effect="Large score changes that no limit covers give no warning.",
        tests=(
            "tests/compressors/metrics/test_score_change.py"
            "::test_large_score_changes_without_a_limit_are_a_warning_for_every_outcome",
        ),
    ),
    Fault(
        id="metric-of-another-task-accepted",
        file="compressors/contracts/metrics/families.py",
        old="    if item is not None and item.selects and can_be_measured(item, task, grouped=grouped):\n"
        "        return None\n",
        new="    if item is not None:\n        return None\n",
        effect="A ranking model with metric 'auc' is packed and fails after minutes.",
        tests=(
            f"{LIMITS}::test_signature_with_a_metric_that_its_task_kind_does_not_measure_is_refused",
        ),
    ),
)
