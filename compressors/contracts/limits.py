"""Limits of an order, and checks for limits that are likely mistakes.

An order is a request to compress a model. The candidate is the compressed model, the baseline the
uncompressed one, and the champion the version that is in production.

``limit_problems`` and ``limit_warnings`` check the limits of a new order; stored limits are read
without these checks. The checks use the properties of a metric (``metrics/metric.py``), never its
name. ``compared`` is how two models are compared: by ``difference``, by ``ratio``, or ``never``. It
is ``never`` for score changes, such as the correlation of the candidate's and the baseline's
scores, which are themselves comparisons. ``loosest_bound`` is the largest loss or ratio that a
plausible limit on a comparison allows, and ``low`` and ``high`` are the ends of the range of
plausible limits on the metric itself.

``position`` in the JSON schema of a field is its position in the form of Prefect's UI for orders.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.metrics import Metric, MetricName
from compressors.contracts.metrics.families import find_metric, metric
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error

Against = Literal["absolute", "baseline", "champion"]
"""What a bound refers to: the metric itself, or a comparison with the named model."""

LARGEST_GAIN = 0.2
"""An improvement of a quality metric by this much or more is implausible after compression."""


class Limit(Frozen):
    """A bound on one metric of the candidate.

    With ``against`` ``absolute``, the bound is on the metric itself. With ``baseline`` (the
    uncompressed model) or ``champion``, it is on a comparison with that model: the difference
    (candidate minus other) for quality, the ratio (candidate / other) for bytes and latency. Score
    changes are computed against the baseline, so a limit on them is always ``absolute``.
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
        """Set ``against`` to ``absolute`` if a limit on a score change does not have it."""
        if isinstance(data, dict) and "against" not in data:
            known_metric = find_metric(str(data.get("metric")))
            if known_metric is not None and known_metric.compared == "never":
                return {**data, "against": "absolute"}
        return data

    @model_validator(mode="after")
    def _require_possible_reference(self) -> Self:
        if self.declared.compared == "never" and self.against != "absolute":
            raise value_error(
                "score_change_with_reference", metric=self.metric, against=self.against
            )
        return self

    @model_validator(mode="after")
    def _require_one_bound(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise value_error("bound_count", metric=self.metric)
        return self

    @model_validator(mode="after")
    def _require_possible_bound(self) -> Self:
        if self.against == "absolute" and self.bound < 0:
            if self.declared.compared == "never":
                raise value_error("score_change_bound_negative", metric=self.metric)
            raise value_error("absolute_bound_negative", metric=self.metric)
        return self

    @property
    def declared(self) -> Metric:
        """The properties of the metric."""
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

        A limit on one of several outputs names it, as in ``auc[click] vs baseline >= -0.002``.

        Raises:
            ValueError: the text does not have this form.
        """
        match = re.fullmatch(
            r"\s*(?P<metric>[\w@]+(\[\w+\])?)(\s+vs\s+(?P<against>baseline|champion))?"
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
        reference = "" if self.against == "absolute" else f" vs {self.against}"
        if self.at_least is not None:
            return f"{self.metric}{reference} >= {self.at_least:g}"
        return f"{self.metric}{reference} <= {self.at_most:g}"


def limit_problems(limits: Sequence[Limit]) -> tuple[Reason, ...]:
    """Find limits that are likely mistakes: return why, and what was probably intended.

    Args:
        limits: the limits of one order.

    Returns:
        One reason per such limit, and per contradiction of two limits; empty if there is none.
    """
    problems = [*_find_contradictions(limits)]
    for limit in limits:
        why = _find_mistake(limit)
        if why is None:
            continue
        plausible = (
            str(intended)
            for intended in _generate_likely_intents(limit)
            if _find_mistake(intended) is None
        )
        intents, text = tuple(dict.fromkeys(plausible)), str(limit)
        problems.append(
            Reason("limit_with_intents", limit=text, why=why, intents=intents)
            if intents
            else Reason(
                "limit_with_example", limit=text, why=why, example=str(_build_example_limit(limit))
            )
        )
    return tuple(problems)


def limit_warnings(limits: Sequence[Limit]) -> tuple[Reason, ...]:
    """Return a warning for each limit that demands an improvement over the baseline.

    Such a limit is rarely intended, but allowed, because distillation from several teachers or a
    recalibration can improve a model. Limits against the champion are not checked: a new version
    often has to be better than the champion.
    """
    return tuple(
        Reason(
            "improvement_demanded",
            limit=str(limit),
            metric=limit.metric,
            loss=str(_replace_bound(limit, -limit.bound, limit.against)),
        )
        for limit in limits
        if limit.against == "baseline"
        and limit.declared.compared == "difference"
        and _compute_demanded_gain(limit) > 0
    )


def _find_contradictions(limits: Sequence[Limit]) -> Iterator[Reason]:
    """Yield a reason for each pair of limits on the same metric that no value satisfies."""
    for index, first in enumerate(limits):
        for second in limits[index + 1 :]:
            if (first.metric, first.against) != (second.metric, second.against):
                continue
            lower_bound = max(
                (b for b in (first.at_least, second.at_least) if b is not None), default=-math.inf
            )
            upper_bound = min(
                (b for b in (first.at_most, second.at_most) if b is not None), default=math.inf
            )
            if lower_bound > upper_bound:
                yield Reason("limits_contradict", first=str(first), second=str(second))


def _find_mistake(limit: Limit) -> Reason | None:
    """Return why a limit is likely a mistake, or None.

    A limit on a difference of a quality metric may neither demand an improvement of
    ``LARGEST_GAIN`` or more, nor allow a loss of ``Metric.loosest_bound`` or more.
    """
    spec, bound, name = limit.declared, limit.bound, limit.metric
    if (limit.at_least is not None) != spec.higher_is_better:
        better = "higher" if spec.higher_is_better else "lower"
        return Reason("bounds_best", better=better, metric=name)
    if limit.against == "absolute":
        return _find_absolute_mistake(limit)
    if spec.compared == "ratio":
        if bound <= 0:
            return Reason("ratio_not_positive")
        if bound > spec.loosest_bound:
            return Reason("ratio_too_large", ratio=bound, against=limit.against, metric=name)
        return None
    if _compute_demanded_gain(limit) >= LARGEST_GAIN:
        return Reason("gain_too_large", metric=name, against=limit.against, gain=abs(bound))
    if -_compute_demanded_gain(limit) >= spec.loosest_bound:
        return Reason("loss_too_large", metric=name, loss=abs(bound))
    return None


def _find_absolute_mistake(limit: Limit) -> Reason | None:
    """Return why a limit with ``against`` ``absolute`` is likely a mistake, or None."""
    spec, bound, name = limit.declared, limit.bound, limit.metric
    # A score change can reach its best value (equal scores); for quality that is implausible.
    is_score_change = spec.compared == "never"
    if spec.higher_is_better:
        if bound > spec.high or (bound == spec.high and not is_score_change):
            return Reason("above_highest", metric=name, highest=spec.high)
        if bound < spec.low:
            return Reason("below_random", metric=name, lowest=spec.low)
        if bound <= 0:
            return Reason("below_zero", metric=name)
        return None
    if (bound <= 0 and not is_score_change) or bound < spec.low:
        if not spec.low:
            return Reason("not_above_zero", metric=name)
        return Reason("below_lowest", metric=name, lowest=spec.low, unit=spec.unit)
    if bound >= spec.high:
        return Reason(
            "beyond_highest",
            metric=name,
            highest=spec.high,
            unit=spec.unit,
        )
    return None


def _generate_likely_intents(limit: Limit) -> Iterator[Limit]:
    """Yield the limits that were probably intended instead, the most likely one first.

    Common mistakes are a bound on how good the result may be, a bound in percent or in seconds, and
    a comparison in place of the metric itself or the reverse.
    """
    spec, bound = limit.declared, limit.bound
    reference: Against = "baseline" if limit.against == "absolute" else limit.against
    loss = -abs(bound) if spec.higher_is_better else abs(bound)
    if (limit.at_least is not None) != spec.higher_is_better:  # bounds how good the result may be
        is_difference = limit.against != "absolute" and spec.compared == "difference"
        intended = _replace_bound(limit, loss if is_difference else abs(bound), limit.against)
        yield from (
            [intended] if _find_mistake(intended) is None else _generate_likely_intents(intended)
        )
    elif spec.compared == "never":
        yield _replace_bound(limit, bound / 100, "absolute")  # if the bound is in percent
    elif spec.compared == "difference" and limit.against == "absolute":
        if bound > 1:  # probably in percent
            yield _replace_bound(limit, bound / 100, "absolute")
        # A small bound may be an allowed loss: in percent if it is at least 1.
        if bound <= 100 * LARGEST_GAIN:
            yield _replace_bound(limit, loss / 100 if bound >= 1 else loss, reference)
    elif spec.compared == "difference":
        if 0 < bound <= 1:  # probably the metric itself, not a difference
            yield _replace_bound(limit, bound, "absolute")
        yield _replace_bound(limit, loss / 100, reference)  # if the bound is in percent
    elif limit.against == "absolute":
        yield _replace_bound(limit, bound, reference)  # if the bound is a ratio
        if bound > 1:  # or a ratio in percent
            yield _replace_bound(limit, bound / 100, reference)
        if spec.batch is not None:  # a latency
            yield _replace_bound(limit, bound * 1000, "absolute")  # if the bound is in seconds
    else:
        if -1 < bound < 0:  # a relative change: -0.1 is the ratio 0.9
            yield _replace_bound(limit, 1 + bound, reference)
        if 0 < bound <= 100:  # a ratio in percent
            yield _replace_bound(limit, bound / 100, reference)
        yield _replace_bound(limit, abs(bound), "absolute")  # bytes or ms instead of a ratio


def _build_example_limit(limit: Limit) -> Limit:
    """Return a typical limit on the same metric, for an example in a message."""
    spec = limit.declared
    if spec.compared == "never":
        return _replace_bound(limit, 0.999 if spec.higher_is_better else 0.05, "absolute")
    typical_bound = 1.0 if spec.compared == "ratio" else -0.002 if spec.higher_is_better else 0.002
    return _replace_bound(limit, typical_bound, "baseline")


def _replace_bound(limit: Limit, bound: float, against: Against) -> Limit:
    """Return a limit on the same metric with another bound, which excludes worse values."""
    bound_field = "at_least" if limit.declared.higher_is_better else "at_most"
    changes = {
        "at_least": None,
        "at_most": None,
        bound_field: float(f"{bound:.12g}") + 0.0,  # without rounding error, and not -0.0
        "against": against,
    }
    return limit.model_copy(update=changes)


def _compute_demanded_gain(limit: Limit) -> float:
    """Return the improvement that a difference limit demands; negative if it allows a loss."""
    return limit.bound if limit.declared.higher_is_better else -limit.bound
