"""Limits of an order, and checks for limits that are likely mistakes.

Types only. A stored limit is read without these checks; ``limit_problems`` is for new orders. Each
check depends on what the metric declares (``metrics/metric.py``), not on its name.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from compressors.contracts.inputs import Frozen
from compressors.contracts.metrics import Metric, MetricName
from compressors.contracts.metrics.families import find_metric, metric
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error

Against = Literal["absolute", "baseline", "champion"]

LARGEST_GAIN = 0.2
"""No compression improves a quality metric by this much: such a bound is not a difference."""


class Limit(Frozen):
    """One promise about one measured number.

    ``absolute`` compares the number itself. ``baseline`` and ``champion`` compare with that
    model: the difference (candidate minus other) for quality, the ratio (candidate / other) for
    bytes and latency. Score changes compare with the baseline already and are always ``absolute``.
    """

    metric: MetricName = Field(
        description="Quality, change of scores, bytes served, or latency: p99_ms@64 is the 99th "
        "percentile in milliseconds at batch 64.",
        json_schema_extra={"position": 0},
    )
    against: Against = Field(
        "baseline",
        description="Quality: difference to it. Bytes and latency: ratio to it.",
        json_schema_extra={"position": 1},
    )
    at_least: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Give one of at_least and at_most.",
        json_schema_extra={"position": 2},
    )
    at_most: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Give one of at_least and at_most.",
        json_schema_extra={"position": 3},
    )

    @model_validator(mode="before")
    @classmethod
    def _score_change_is_absolute(cls, data: Any) -> Any:
        """Read a limit on a score change that names no reference as ``absolute``."""
        if isinstance(data, dict) and "against" not in data:
            found = find_metric(str(data.get("metric")))
            if found is not None and found.compared == "never":
                return {**data, "against": "absolute"}
        return data

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.declared.compared == "never" and self.against != "absolute":
            raise value_error(
                "score_change_with_reference", metric=self.metric, against=self.against
            )
        return self

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise value_error("bound_count", metric=self.metric)
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.against == "absolute" and self.bound < 0:
            if self.declared.compared == "never":
                raise value_error("score_change_bound_negative", metric=self.metric)
            raise value_error("absolute_bound_negative", metric=self.metric)
        return self

    @property
    def declared(self) -> Metric:
        """What the metric declares."""
        return metric(self.metric)

    @property
    def bound(self) -> float:
        """The value of ``at_least`` or ``at_most``."""
        bound = self.at_least if self.at_least is not None else self.at_most
        assert bound is not None  # noqa: S101 - the validator ensures it
        return bound

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the text form of a limit: ``auc vs baseline >= -0.002``, ``bytes <= 500000``.

        Raises:
            ValueError: the text does not have this form.
        """
        match = re.fullmatch(
            r"\s*(?P<metric>[\w@]+)(\s+vs\s+(?P<against>baseline|champion))?"
            r"\s*(?P<sign>>=|<=)\s*(?P<value>\S+)\s*",
            text,
        )
        if match is None:
            raise value_error("limit_form", text=text)
        bound = "at_least" if match["sign"] == ">=" else "at_most"
        return cls.model_validate(
            {
                "metric": match["metric"],
                "against": match["against"] or "absolute",
                bound: match["value"],
            }
        )

    def __str__(self) -> str:
        versus = "" if self.against == "absolute" else f" vs {self.against}"
        if self.at_least is not None:
            return f"{self.metric}{versus} >= {self.at_least:g}"
        return f"{self.metric}{versus} <= {self.at_most:g}"


def limit_problems(limits: Sequence[Limit]) -> tuple[Reason, ...]:
    """Report limits that are likely mistakes: why, and what was probably intended.

    Args:
        limits: the limits of one order.

    Returns:
        One reason per such limit; empty if all of them are plausible.
    """
    problems = [*_contradictions(limits)]
    for limit in limits:
        why = _reason(limit)
        if why is None:
            continue
        meant = (str(other) for other in _intents(limit) if _reason(other) is None)
        intents, text = tuple(dict.fromkeys(meant)), str(limit)
        problems.append(
            Reason("limit_with_intents", limit=text, why=why, intents=intents)
            if intents
            else Reason("limit_with_example", limit=text, why=why, example=str(_example(limit)))
        )
    return tuple(problems)


def limit_warnings(limits: Sequence[Limit]) -> tuple[Reason, ...]:
    """Warn about limits that demand an improvement over the baseline, which is rarely intended.

    They are allowed, because several teachers or a recalibration can improve a model. Against the
    champion such a limit is common.
    """
    return tuple(
        Reason(
            "improvement_demanded",
            limit=str(limit),
            metric=limit.metric,
            loss=str(_limit(limit, -limit.bound, limit.against)),
        )
        for limit in limits
        if limit.against == "baseline"
        and limit.declared.compared == "difference"
        and _gain(limit) > 0
    )


def _contradictions(limits: Sequence[Limit]) -> Iterator[Reason]:
    """Yield a reason for each pair of limits on one number that no value satisfies."""
    for place, first in enumerate(limits):
        for second in limits[place + 1 :]:
            if (first.metric, first.against) != (second.metric, second.against):
                continue
            least = max(
                (b for b in (first.at_least, second.at_least) if b is not None), default=-math.inf
            )
            most = min(
                (b for b in (first.at_most, second.at_most) if b is not None), default=math.inf
            )
            if least > most:
                yield Reason("limits_contradict", first=str(first), second=str(second))


def _reason(limit: Limit) -> Reason | None:
    """Return why a limit is likely a mistake, or None."""
    facts, bound, name = limit.declared, limit.bound, limit.metric
    if (limit.at_least is not None) != facts.higher_is_better:
        better = "higher" if facts.higher_is_better else "lower"
        return Reason("bounds_best", better=better, metric=name)
    if limit.against == "absolute":
        return _absolute_reason(limit)
    if facts.compared == "ratio":
        if bound <= 0:
            return Reason("ratio_not_positive")
        if bound > facts.largest:
            return Reason("ratio_too_large", ratio=bound, against=limit.against, metric=name)
        return None
    if _gain(limit) >= LARGEST_GAIN:
        return Reason("gain_too_large", metric=name, against=limit.against, gain=abs(bound))
    if -_gain(limit) >= facts.largest:
        return Reason("loss_too_large", metric=name, loss=abs(bound))
    return None


def _absolute_reason(limit: Limit) -> Reason | None:
    facts, bound, name = limit.declared, limit.bound, limit.metric
    unchanged = facts.compared == "never"  # then the best value can be reached: no score changes
    if facts.higher_is_better:
        if bound > facts.high or (bound == facts.high and not unchanged):
            return Reason("above_highest", metric=name, highest=facts.high)
        if bound < facts.low:
            return Reason("below_random", metric=name, lowest=facts.low)
        if bound <= 0:
            return Reason("below_zero", metric=name)
        return None
    if (bound <= 0 and not unchanged) or bound < facts.low:
        if not facts.low:
            return Reason("not_above_zero", metric=name)
        return Reason("below_lowest", metric=name, lowest=facts.low, unit=facts.unit)
    if bound >= facts.high:
        return Reason("beyond_highest", metric=name, highest=facts.high, unit=facts.unit)
    return None


def _intents(limit: Limit) -> Iterator[Limit]:
    """Yield the limits that were probably intended instead, the likeliest first."""
    facts, bound = limit.declared, limit.bound
    versus: Against = "baseline" if limit.against == "absolute" else limit.against
    loss = -abs(bound) if facts.higher_is_better else abs(bound)
    if (limit.at_least is not None) != facts.higher_is_better:
        difference = limit.against != "absolute" and facts.compared == "difference"
        other = _limit(limit, loss if difference else abs(bound), limit.against)
        yield from [other] if _reason(other) is None else _intents(other)
    elif facts.compared == "never":
        yield _limit(limit, bound / 100, "absolute")  # percent
    elif facts.compared == "difference" and limit.against == "absolute":
        if bound > 1:  # percent
            yield _limit(limit, bound / 100, "absolute")
        if bound <= 100 * LARGEST_GAIN:
            yield _limit(limit, loss / 100 if bound >= 1 else loss, versus)
    elif facts.compared == "difference":
        if 0 < bound <= 1:
            yield _limit(limit, bound, "absolute")
        yield _limit(limit, loss / 100, versus)
    elif limit.against == "absolute":
        yield _limit(limit, bound, versus)
        if bound > 1:  # percent; a ratio that is also a percentage is read as the ratio
            yield _limit(limit, bound / 100, versus)
        if facts.batch is not None:
            yield _limit(limit, bound * 1000, "absolute")  # seconds
    else:
        if -1 < bound < 0:
            yield _limit(limit, 1 + bound, versus)
        if 0 < bound <= 100:
            yield _limit(limit, bound / 100, versus)
        yield _limit(limit, abs(bound), "absolute")


def _example(limit: Limit) -> Limit:
    """Return a typical limit on the same metric."""
    facts = limit.declared
    if facts.compared == "never":
        return _limit(limit, 0.999 if facts.higher_is_better else 0.05, "absolute")
    usual = 1.0 if facts.compared == "ratio" else -0.002 if facts.higher_is_better else 0.002
    return _limit(limit, usual, "baseline")


def _limit(limit: Limit, bound: float, against: Against) -> Limit:
    """Return a limit on the same metric that bounds its loss."""
    side = "at_least" if limit.declared.higher_is_better else "at_most"
    other = {
        "at_least": None,
        "at_most": None,
        side: float(f"{bound:.12g}") + 0.0,
        "against": against,
    }
    return limit.model_copy(update=other)


def _gain(limit: Limit) -> float:
    """Return the improvement that a difference limit demands; negative if it allows a loss."""
    return limit.bound if limit.declared.higher_is_better else -limit.bound
