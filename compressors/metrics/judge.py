"""Judge limits on measured numbers: accepted, rejected or undecided, with reasons.

A ``Judgement`` is the outcome of one limit, a ``Verdict`` that of all limits of a target. The 95 %
interval decides, not the point estimate. A limit is accepted if all values of the interval satisfy
it, rejected if none does, and undecided otherwise. Exact numbers (bytes) have an interval of width
0 and are never undecided. An estimate without an interval is undecided; its ``unresolved`` says why
there is none. A number equal to the limit satisfies it.
"""

import math
from typing import Literal

from compressors.contracts import Estimate, Judgement, Limit, Outcome, ScoreUnit, Verdict
from compressors.contracts.reasons import Reason
from compressors.errors.metrics import LimitRefused
from compressors.metrics.measured import Measured
from compressors.metrics.score_reasons import score_summary, score_warning

MAX_SHRINKING = 1000.0
"""Largest factor by which an interval may have to shrink so that a limit is decided.

It takes a million times the rows. If a larger factor is needed, no number of rows is reported.
"""


def judge(limits: tuple[Limit, ...], measured: Measured) -> tuple[Judgement, ...]:
    """Judge every limit, in the given order.

    Args:
        limits: the limits of the order.
        measured: the numbers of one target.

    Returns:
        One judgement per limit. If a limit on quality is undecided, ``rows_to_decide`` is the
        number of test rows with which the interval would no longer contain the limit. This assumes
        that the point stays the same and the width is proportional to one over the square root of
        the rows. If rows belong to groups, the width depends on the number of groups instead, so
        more rows must belong to new groups, and ``groups_to_decide`` is set too. Both numbers are
        only orders of magnitude, because a larger test set also changes the point.

    Raises:
        LimitRefused: there are no limits; a number or limit is NaN or infinite; or the number of a
            limit was not measured, except if the limit is against a champion that does not exist.
    """
    _require_limits(limits)
    for number in measured.numbers:
        _require_valid(str(number), number.estimate)
    return tuple(_judge_one(limit, measured) for limit in limits)


def verdict(
    target: str, limits: tuple[Limit, ...], measured: Measured | None, built: bool
) -> Verdict:
    """Decide the verdict of one target.

    Args:
        target: where the result is served.
        limits: the limits of the order; the same for every target.
        measured: the target's numbers, or None if it cannot run on this machine.
        built: whether the target was built and passed its audit. If not, it is rejected.

    Returns:
        The verdict: ``rejected`` if any limit is rejected, else ``undecided`` if any is undecided,
        else ``accepted``; ``built-unmeasured`` for a built target without numbers. Its reasons
        include a summary of how much scores changed, and a warning if they changed much and no
        limit covers that.

    Raises:
        LimitRefused: ``judge`` raises it, or there are numbers of a target that was not built.
    """
    _require_limits(limits)
    if measured is None:
        if built:
            unmeasured = (Reason("cannot_run"),)
            return Verdict(target=target, outcome="built-unmeasured", reasons=unmeasured)
        return Verdict(target=target, outcome="rejected", reasons=(Reason("not_built"),))
    if not built:
        raise LimitRefused("measured_but_not_built", target=target)
    judgements = judge(limits, measured)
    warning = score_warning(limits, measured)
    for outcome in ("rejected", "undecided"):
        causes = [why for item in judgements if item.outcome == outcome for why in item.reasons]
        if causes:
            reasons = (*causes, *warning)
            return Verdict(target=target, outcome=outcome, judgements=judgements, reasons=reasons)
    all_hold = Reason("all_limits_hold", limits=len(limits))
    if len(limits) == 1:
        all_hold = Reason("one_limit_holds")
    reasons = (all_hold, *score_summary(measured), *warning)
    return Verdict(target=target, outcome="accepted", judgements=judgements, reasons=reasons)


def _judge_one(limit: Limit, measured: Measured) -> Judgement:
    bound = _bound(limit)
    estimate = measured.of(limit.metric, limit.against)
    if estimate is None:
        if limit.against == "champion" and not measured.has_champion:
            reasons = (Reason("no_champion", metric=limit.declared.label),)
            return Judgement(limit=limit, measured=None, outcome="accepted", reasons=reasons)
        raise LimitRefused(
            "number_missing", limit=str(limit), measured=tuple(map(str, measured.numbers))
        )
    # Numbers are multiplied by this sign, so that every limit is "at least": a number is at most 3
    # if minus the number is at least -3.
    sign = 1 if limit.at_least is not None else -1
    goal, point = sign * bound, sign * estimate.point
    worst, best = sorted((sign * estimate.low, sign * estimate.high))
    outcome = _decide_outcome(goal, worst, best) if estimate.unresolved is None else "undecided"
    rows = groups = None
    may_decide = outcome == "undecided" and estimate.unresolved is None
    if may_decide and estimate.rows is not None and _counts_rows(limit):
        reach = point - worst if point > goal else best - point
        rows = _estimate_rows_to_decide(estimate.rows, reach, abs(point - goal))
        if rows is not None and estimate.groups is not None:
            groups = math.ceil(estimate.groups * rows / estimate.rows)
    return Judgement(
        limit=limit,
        measured=estimate,
        outcome=outcome,
        rows_to_decide=rows,
        groups_to_decide=groups,
        reasons=(
            _describe_measured_and_limit(limit, estimate, measured.find_unit(limit.metric)),
            _describe_conclusion(estimate, outcome, rows, groups),
        ),
    )


def _decide_outcome(
    goal: float, worst: float, best: float
) -> Literal["accepted", "rejected", "undecided"]:
    """Decide a limit "at least ``goal``" for an interval from ``worst`` to ``best``."""
    if worst >= goal:
        return "accepted"
    return "rejected" if best < goal else "undecided"


def recompute_outcome(verdict: Verdict) -> Outcome:
    """Recompute a stored verdict's outcome from its judgements.

    Each judgement is decided again from its limit and interval. The result is the worst of these
    outcomes and the stored outcomes of the judgements. A verdict without judgements keeps its
    outcome.
    """
    outcomes: set[Outcome] = {item.outcome for item in verdict.judgements}
    for item in verdict.judgements:
        if item.measured is None:
            # Only a comparison with a champion that does not exist needs no number.
            outcomes.add("accepted" if item.limit.against == "champion" else "undecided")
        elif item.measured.unresolved is not None:
            outcomes.add("undecided")
        else:
            sign = 1 if item.limit.at_least is not None else -1
            worst, best = sorted((sign * item.measured.low, sign * item.measured.high))
            outcomes.add(_decide_outcome(sign * _bound(item.limit), worst, best))
    worst_first: tuple[Outcome, ...] = ("rejected", "undecided", "accepted")
    return next((outcome for outcome in worst_first if outcome in outcomes), verdict.outcome)


def _estimate_rows_to_decide(rows: int, reach: float, distance: float) -> int | None:
    """Return the number of rows with which the half-width ``reach`` shrinks to ``distance``.

    ``distance`` is the distance of the point from the limit. The result is None if a million times
    the rows or more would be needed: then the values of the additional rows decide on which side of
    the limit the point is, not their number.
    """
    if distance * MAX_SHRINKING <= reach:
        return None
    return max(rows + 1, math.ceil(rows * (reach / distance) ** 2))


def _bound(limit: Limit) -> float:
    if limit.at_least is not None:
        return limit.at_least
    if limit.at_most is not None:
        return limit.at_most
    raise LimitRefused("bound_missing", metric=limit.metric)


def _require_limits(limits: tuple[Limit, ...]) -> None:
    if not limits:
        raise LimitRefused("limits_missing")


def _require_valid(name: str, estimate: Estimate) -> None:
    """Raise ``LimitRefused`` for NaN, infinity, or an interval whose ends are swapped."""
    numbers = (estimate.point, estimate.low, estimate.high)
    if not all(math.isfinite(number) for number in numbers) or estimate.low > estimate.high:
        raise LimitRefused(
            "number_broken", number=name, point=estimate.point, low=estimate.low, high=estimate.high
        )


def _counts_rows(limit: Limit) -> bool:
    """Whether the number is estimated from rows of data, so that more rows narrow its interval."""
    return limit.declared.kind in ("quality", "score_change")


def _describe_measured_and_limit(
    limit: Limit, estimate: Estimate, score_unit: ScoreUnit | None
) -> Reason:
    """Describe a number and its limit.

    For example "AUC vs baseline is -0.0004 [-0.0011, +0.0003]; the limit is >= -0.0010".
    """
    bound, declared, absolute = _bound(limit), limit.declared, limit.against == "absolute"
    sign = "+" if declared.compared == "difference" and not absolute else ""
    unit, decimals = declared.unit, declared.decimals
    if declared.compared == "ratio" and not absolute:
        unit, decimals = " times", 3
    elif declared.in_score_units and score_unit == "spread":
        unit = " standard deviations"
    values = (estimate.point, estimate.low, estimate.high)
    # Print enough digits that a value is shown equal to the limit only if it is equal.
    while decimals < 12 and (
        float(f"{bound:.{decimals}f}") != bound
        or any(
            value != bound and f"{value:.{decimals}f}" == f"{bound:.{decimals}f}"
            for value in values
        )
    ):
        decimals += 1
    point, low, high, edge = (f"{value:{sign},.{decimals}f}" for value in (*values, bound))
    metric = declared.label + ("" if absolute else f" vs {limit.against}")
    relation = ">=" if limit.at_least is not None else "<="
    number, edge, rows = f"{point}{unit}", f"{edge}{unit}", estimate.rows
    if not declared.has_interval and rows is not None:  # the largest change of the measured rows
        return Reason(
            "most_of_rows", metric=metric, number=number, rows=rows, relation=relation, limit=edge
        )
    if estimate.low == estimate.high:
        return Reason("exact_number", metric=metric, number=number, relation=relation, limit=edge)
    return Reason(
        "number_in_interval",
        metric=metric,
        number=number,
        low=low,
        high=high,
        relation=relation,
        limit=edge,
    )


def _describe_conclusion(
    estimate: Estimate, outcome: str, rows: int | None, groups: int | None
) -> Reason:
    """Return the reason for an outcome; for an undecided one, it says what would decide it."""
    if outcome != "undecided":
        return Reason("limit_met") if outcome == "accepted" else Reason("limit_missed")
    if estimate.unresolved is not None:
        return Reason("no_interval", cause=estimate.unresolved)
    if estimate.rows is None:  # a latency, which is measured in rounds
        return Reason("more_rounds_decide")
    if rows is None:
        return Reason("on_the_limit")
    if groups is None or estimate.groups is None:
        return Reason("more_rows_decide", needed=_round_up(rows), rows=estimate.rows)
    return Reason(
        "more_groups_decide",
        needed=_round_up(rows),
        needed_groups=_round_up(groups),
        rows=estimate.rows,
        groups=estimate.groups,
    )


def _round_up(count: int) -> int:
    """Round up to two significant digits, because the estimate is not more precise."""
    second_digit: int = 10 ** max(0, len(str(count)) - 2)
    return math.ceil(count / second_digit) * second_digit
