"""The numbers measured for one target, which limits are compared with.

A ``Number`` is a metric of the candidate, or its comparison with the baseline or the champion.
"""

import operator
from typing import Literal, Self

from pydantic import Field, model_validator

from compressors.contracts import Estimate, Frozen, ScoreUnit
from compressors.contracts import metric as declared_metric
from compressors.contracts.metrics import serving
from compressors.contracts.value_errors import value_error
from compressors.errors.metrics import LimitRefused
from compressors.metrics.intervals import PairedEstimate

Against = Literal["absolute", "baseline", "champion"]


class Number(Frozen):
    """One measured number; ``metric`` and ``against`` have the values that a ``Limit`` has.

    Attributes:
        metric: name of the metric.
        against: ``absolute`` if it is the candidate's number. ``baseline`` or ``champion`` if it is
            the difference from that model (quality) or the ratio to it (bytes and latency).
        estimate: the number with its interval.
    """

    metric: str
    against: Against
    estimate: Estimate

    def __str__(self) -> str:
        return self.metric if self.against == "absolute" else f"{self.metric} vs {self.against}"


class Measured(Frozen):
    """All numbers of one target.

    Attributes:
        numbers: the numbers; each pair of ``metric`` and ``against`` occurs once.
        has_champion: whether a champion exists. If not, a limit against it is accepted; if it does,
            a missing number is an error.
        score_unit: unit of the mean and the largest score change; None in stored measurements that
            have no score changes, and for a model with several outputs.
        units_of_outputs: the same for each of several outputs, by the output's name.
    """

    numbers: tuple[Number, ...]
    has_champion: bool = False
    score_unit: ScoreUnit | None = None
    units_of_outputs: dict[str, ScoreUnit] = Field(default_factory=dict, exclude_if=operator.not_)

    @model_validator(mode="after")
    def _require_distinct_numbers(self) -> Self:
        names = [str(number) for number in self.numbers]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise value_error("numbers_repeated", numbers=tuple(repeated))
        return self

    def of(self, metric: str, against: Against) -> Estimate | None:
        """Return the number that a limit refers to, or None."""
        for number in self.numbers:
            if (number.metric, number.against) == (metric, against):
                return number.estimate
        return None

    def find_unit(self, metric: str) -> ScoreUnit | None:
        """Return the unit of the scores that a metric describes, or None."""
        output = declared_metric(metric).output
        return self.score_unit if output is None else self.units_of_outputs.get(output)

    @property
    def outputs(self) -> tuple[str | None, ...]:
        """The names of several outputs; ``(None,)`` for one, which metric names do not contain."""
        return tuple(self.units_of_outputs) or (None,)


def quality_numbers(
    metric: str, to_baseline: PairedEstimate, to_champion: PairedEstimate | None = None
) -> tuple[Number, ...]:
    """Return the candidate's quality and its differences, from ``intervals.estimate_pair``."""
    numbers = [
        Number(metric=metric, against="absolute", estimate=to_baseline.candidate),
        Number(metric=metric, against="baseline", estimate=to_baseline.difference),
    ]
    if to_champion is not None:
        numbers.append(Number(metric=metric, against="champion", estimate=to_champion.difference))
    return tuple(numbers)


def byte_numbers(candidate: int, baseline: int, champion: int | None = None) -> tuple[Number, ...]:
    """Return the candidate's bytes and their exact ratios.

    Raises:
        LimitRefused: a size below 1 byte.
    """
    if min(candidate, baseline, baseline if champion is None else champion) < 1:
        raise LimitRefused(
            "sizes_below_one", candidate=candidate, baseline=baseline, champion=champion
        )
    numbers = [
        Number(metric=serving.BYTES.name, against="absolute", estimate=exact_estimate(candidate)),
        Number(
            metric=serving.BYTES.name,
            against="baseline",
            estimate=exact_estimate(candidate / baseline),
        ),
    ]
    if champion is not None:
        ratio = exact_estimate(candidate / champion)
        numbers.append(Number(metric=serving.BYTES.name, against="champion", estimate=ratio))
    return tuple(numbers)


def latency_numbers(
    metric: str, candidate: Estimate, to_baseline: Estimate, to_champion: Estimate | None = None
) -> tuple[Number, ...]:
    """Return a latency such as ``p99_ms@64``, in ms from ``intervals.latency``, and its ratios."""
    numbers = [
        Number(metric=metric, against="absolute", estimate=candidate),
        Number(metric=metric, against="baseline", estimate=to_baseline),
    ]
    if to_champion is not None:
        numbers.append(Number(metric=metric, against="champion", estimate=to_champion))
    return tuple(numbers)


def exact_estimate(value: float) -> Estimate:
    """Return an estimate without uncertainty: every measurement gives the same number."""
    return Estimate(point=value, low=value, high=value)
