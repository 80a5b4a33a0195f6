"""Reasons of a verdict that describe how much the candidate's scores changed.

The baseline is the uncompressed model. A model with several outputs has a reason for each.
"""

import math

from compressors.contracts import Limit, Metric, ScoreUnit
from compressors.contracts.metrics import score_changes
from compressors.contracts.metrics.metric import metric_name_of_output
from compressors.contracts.reasons import Reason
from compressors.metrics.measured import Measured

SCORE_UNITS: dict[ScoreUnit, str] = {
    "probability": "probability",
    "spread": "standard deviations of the baseline's scores",
}
"""Description of each unit of score changes."""

LEAST_CORRELATION = 0.99
"""A smaller correlation of scores causes a warning if no limit covers score changes."""

LARGEST_CHANGE: dict[ScoreUnit, float] = {"probability": 0.1, "spread": 1.0}
"""A larger change of a score causes a warning if no limit covers score changes."""


def score_summary(measured: Measured) -> list[Reason]:
    """Return the score changes as one reason per output; no reason if they were not measured."""
    return [reason for output in measured.outputs for reason in _score_summary(measured, output)]


def _score_summary(measured: Measured, output: str | None) -> list[Reason]:
    correlation, mean, largest_change, top, overlap = (
        measured.of(_name(change, output), "absolute")
        for change in (
            score_changes.CORRELATION,
            score_changes.MEAN,
            score_changes.LARGEST,
            score_changes.TOP1,
            score_changes.TOP20,
        )
    )
    if correlation is None or mean is None or largest_change is None:
        return []
    score_unit = measured.find_unit(_name(score_changes.MEAN, output))
    unit = None if score_unit is None else SCORE_UNITS[score_unit]
    largest = largest_change.point
    changes = [
        Reason("correlation", correlation=_round_down(correlation.point)),
        Reason("mean_change", change=mean.point),
        Reason("largest_change_in", change=largest, unit=unit)
        if unit
        else Reason("largest_change", change=largest),
    ]
    if top is not None and top.groups is not None:
        changes.append(Reason("other_top1", share=top.point, groups=top.groups))
    if overlap is not None:
        changes.append(Reason("top20_overlap", share=overlap.point))
    if output is not None:
        return [Reason("score_changes_of_output", output=output, changes=tuple(changes))]
    return [Reason("score_changes", changes=tuple(changes))]


def score_warning(limits: tuple[Limit, ...], measured: Measured) -> list[Reason]:
    """Return a warning for each output with large score changes that no limit covers."""
    covered = {limit.declared.output for limit in limits if limit.declared.kind == "score_change"}
    return [
        reason
        for output in measured.outputs
        if output not in covered
        for reason in _score_warning(measured, output)
    ]


def _score_warning(measured: Measured, output: str | None) -> list[Reason]:
    correlation = measured.of(_name(score_changes.CORRELATION, output), "absolute")
    largest_change = measured.of(_name(score_changes.LARGEST, output), "absolute")
    unit = measured.find_unit(_name(score_changes.LARGEST, output))
    changes = []
    if correlation is not None and correlation.point < LEAST_CORRELATION:
        low, least = _round_down(correlation.point), LEAST_CORRELATION
        changes.append(Reason("low_correlation", correlation=low, least=least))
    if (
        largest_change is not None
        and unit is not None
        and largest_change.point > LARGEST_CHANGE[unit]
    ):
        change, limit = largest_change.point, LARGEST_CHANGE[unit]
        changes.append(
            Reason("probability_change", change=change, most=limit)
            if unit == "probability"
            else Reason("score_change", change=change, most=limit)
        )
    if not changes:
        return []
    if output is not None:
        return [Reason("large_score_changes_of_output", output=output, changes=tuple(changes))]
    return [Reason("large_score_changes", changes=tuple(changes))]


def _name(change: Metric, output: str | None) -> str:
    """Return the name of a metric, for one of several outputs if ``output`` is not None."""
    return change.name if output is None else metric_name_of_output(change.name, output)


def _round_down(correlation: float) -> float:
    """Round a correlation down to six digits, so that it is printed as 1 only if it is 1."""
    return math.floor(correlation * 1e6) / 1e6
