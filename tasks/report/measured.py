"""Render the page's sections with measurements: limits, quality and latency. No Prefect."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from markupsafe import Markup

from compressors.contracts import (
    Estimate,
    Judgement,
    Limit,
    Outcome,
    ScoreUnit,
    metric,
)
from compressors.contracts.metrics.families import find_metric
from compressors.contracts.metrics.serving import QUANTILES, latency
from compressors.metrics.measured import Number
from infra.pages import pictures
from infra.pages.html import format_count
from infra.pages.pictures import Curve, Mark, Tone
from tasks.orchestration.documents import Measurement, Report, TargetReport
from tasks.report.cells import format_change, format_score_change, is_kind, metric_label
from tasks.report.tables import latency_remarks

TONES: dict[Outcome, Tone] = {
    "accepted": "held",
    "rejected": "broken",
    "undecided": "unsure",
    "built-unmeasured": "unsure",
}
"""Colour of each outcome in charts and banners, as a CSS class."""
TEXT_CLASSES = {"held": "good", "broken": "bad", "unsure": "open", "plain": "soft"}
"""CSS class of text in the colour of each tone."""
NO_PICTURE = Markup()


@dataclass(frozen=True)
class LimitRow:
    """A row of the table of limits: a limit, or a measured number without a limit.

    Attributes:
        name: name of the limit or the number.
        note: text below the name; may be empty.
        picture: SVG of the number on its scale; empty if nothing was measured.
        point: the number as text; empty if nothing was measured.
        interval: interval of the number, in brackets; empty if it has none.
        outcome: outcome of the limit, or "no limit".
        tone: CSS class of the outcome's colour.
        reason: reason of the outcome; empty if there is none.
    """

    name: str
    note: str
    picture: Markup
    point: str
    interval: str
    outcome: str
    tone: str
    reason: str


@dataclass(frozen=True)
class Chart:
    """The latency of one quantile by batch size.

    Attributes:
        title: the quantile, after the name of the target if there are several.
        picture: SVG of the chart; None if nothing was measured.
    """

    title: str
    picture: Markup | None


@dataclass(frozen=True)
class LatencySection:
    """The latency charts; ``note`` describes the machines of the measurements."""

    note: str
    charts: tuple[Chart, ...]


def limit_rows(report: Report) -> tuple[LimitRow, ...]:
    """Return every limit with its measured number, then the quality numbers without a limit."""
    rows, limited = [], set()
    for target in report.targets:
        measurement = report.measured.get(target.target)
        for judgement in target.verdict.judgements:
            limit = judgement.limit
            limited.add((target.target, limit.metric, limit.against))
            unit = None if measurement is None else measurement.numbers.find_unit(limit.metric)
            rows.append(_build_judgement_row(judgement, target, unit))
    if not rows:
        rows = [
            _build_row(name=str(limit), outcome="not measured", tone=TEXT_CLASSES["unsure"])
            for limit in report.limits
        ]
    for target_name, number, unit in _find_numbers_without_limit(report, limited):
        is_higher_better = metric(number.metric).higher_is_better
        if is_kind(number.metric, "score_change"):
            title = metric_label(number.metric)
            text = format_score_change(number.metric, number.estimate, unit)
            no_change = Mark(value=1.0 if is_higher_better else 0.0, label="no change")
        else:
            title = f"{metric_label(number.metric)} vs {number.against}"
            text = format_change(number.estimate, ratio=False)
            no_change = Mark(value=0, label="no change")
        picture = Markup(
            pictures.draw_strip(number.estimate, "plain", f"{title} is {text}; no limit", no_change)
        )
        note = f"{'higher' if is_higher_better else 'lower'} is better"
        if len(report.measured) > 1:
            note = f"{target_name}, {note}"
        rows.append(
            _build_row(
                name=title,
                note=note,
                picture=picture,
                measured=text,
                outcome="no limit",
                tone=TEXT_CLASSES["plain"],
            )
        )
    return tuple(rows)


def _build_judgement_row(
    judgement: Judgement, target: TargetReport, unit: ScoreUnit | None
) -> LimitRow:
    """Return the row of a judged limit; ``unit`` is the unit of the model's scores."""
    limit, measured = judgement.limit, judgement.measured
    tone = TONES[judgement.outcome]
    picture, text = Markup(), ""
    if measured is not None:
        bound = limit.at_least if limit.at_least is not None else limit.at_most
        if bound is None:  # impossible: Limit validates that it has one of the two
            raise ValueError(f"limit {limit} has no bound")
        picture = Markup(
            pictures.draw_strip(
                measured,
                tone,
                judgement.reason,
                reference=_build_no_change_mark(limit),
                limit=Mark(value=bound, label=f"limit {bound:g}"),
                # the side of the limit whose values are rejected
                refused="below" if limit.at_least is not None else "above",
            )
        )
        text = _format_measured(limit, measured, unit)
    return _build_row(
        name=str(limit),
        note=target.target,
        picture=picture,
        measured=text,
        outcome=judgement.outcome,
        tone=TEXT_CLASSES[tone],
        reason=judgement.reason,
    )


def _build_row(
    *,
    name: str,
    note: str = "",
    picture: Markup = NO_PICTURE,
    measured: str = "",
    outcome: str,
    tone: str,
    reason: str = "",
) -> LimitRow:
    """Return a row, with the point and the interval of ``measured`` in separate fields.

    Args:
        name: name of the limit or the number.
        note: text below the name.
        picture: SVG of the number.
        measured: the number, followed by its interval in brackets if it has one.
        outcome: outcome of the limit.
        tone: CSS class of the outcome's colour.
        reason: reason of the outcome.
    """
    point, _, interval = measured.partition(" [")
    interval = interval and f"[{interval}"
    return LimitRow(name, note, picture, point, interval, outcome, tone, reason)


def _build_no_change_mark(limit: Limit) -> Mark | None:
    """Return the mark of an unchanged model on the scale of a limit; None if it has no place.

    ``compared`` is how a metric of two models is compared: by difference, by ratio, or ``never``
    for a score change, which is itself a comparison with the baseline.
    """
    if limit.declared.compared == "never":
        return Mark(value=1.0 if limit.declared.higher_is_better else 0.0, label="no change")
    if limit.against == "absolute":
        return None
    return Mark(value=1.0 if limit.declared.compared == "ratio" else 0.0, label="no change")


def _format_measured(limit: Limit, measured: Estimate, score_unit: ScoreUnit | None) -> str:
    """Format the number that a limit was compared with, followed by its interval in brackets."""
    declared = limit.declared
    if limit.against != "absolute":
        return format_change(measured, ratio=declared.compared == "ratio")
    if declared.kind == "bytes":
        return f"{measured.point:,.0f}"
    if declared.kind == "score_change":
        return format_score_change(limit.metric, measured, score_unit)
    return f"{measured.point:.5g}{declared.unit} [{measured.low:.5g}, {measured.high:.5g}]"


def _find_numbers_without_limit(
    report: Report, limited: Collection[tuple[str, str, str]]
) -> Iterator[tuple[str, Number, ScoreUnit | None]]:
    """Yield target, number and score unit of every change of quality or scores without a limit.

    Args:
        report: the report.
        limited: target, metric and ``against`` of every number with a limit. ``against`` is what a
            number is compared with: ``baseline``, ``champion``, or ``absolute`` for nothing.
    """
    for target, measurement in report.measured.items():
        for number in measurement.numbers.numbers:
            is_quality = is_kind(number.metric, "quality", "score_change")
            has_limit = (target, number.metric, number.against) in limited
            is_change = number.against != "absolute" or is_kind(number.metric, "score_change")
            if is_quality and is_change and not has_limit:
                yield target, number, measurement.numbers.find_unit(number.metric)


def latency_section(report: Report) -> LatencySection:
    """Draw the latency of each quantile by batch size, and describe the machines."""
    if not report.measured:
        return LatencySection(note="Nothing was measured on this machine.", charts=())
    notes = [
        "The models are called in turn, so other load on the machine affects both equally. "
        "Whiskers are 95 % intervals.",
        *latency_remarks(report),
    ]
    has_several_targets = len(report.measured) > 1
    return LatencySection(
        note=" ".join([_describe_machines(report), *notes]),
        charts=tuple(
            _draw_latency_chart(
                measurement,
                quantile,
                f"{target} {quantile}" if has_several_targets else quantile,
            )
            for target, measurement in report.measured.items()
            for quantile in QUANTILES
        ),
    )


def _describe_machines(report: Report) -> str:
    """Describe the machine of each measurement and its runtime."""
    return " ".join(
        f"Measured on {machine.processor}, {machine.cores} cores, {machine.system}, "
        f"{machine.runtime} {machine.version} with {format_count(machine.threads, 'thread')}, "
        f"{'with' if machine.int8_dot else 'without'} int8 dot products."
        for machine in (measured.machine for measured in report.measured.values())
    )


def _draw_latency_chart(measurement: Measurement, quantile: str, title: str) -> Chart:
    """Draw one quantile of the latency by batch size, before and after compression."""
    before = _sort_latency_by_batch_size(measurement.baseline.numbers, quantile)
    after = _sort_latency_by_batch_size(measurement.numbers.numbers, quantile)
    if not before or not after:
        return Chart(title, None)
    description = ", ".join(
        f"{old.point:.3g} to {new.point:.3g} ms at batch {size}"
        for (size, old), (_, new) in zip(before, after, strict=True)
    )
    labels = {
        size: (f"batch {size:,}", _format_ratio(measurement, quantile, size)) for size, _ in after
    }
    picture = Markup(
        pictures.draw_curves(
            [Curve(kind="before", points=before), Curve(kind="after", points=after)],
            "ms",
            labels,
            f"{title} latency, before to after: {description}",
        )
    )
    return Chart(title, picture)


def _format_ratio(measurement: Measurement, quantile: str, size: int) -> str:
    """Format the ratio of latencies, after to before, at one batch size; empty if not measured."""
    ratio = measurement.numbers.of(latency(quantile, size).name, "baseline")
    return "" if ratio is None else f"{ratio.point:.2f}x"


def _sort_latency_by_batch_size(
    numbers: Iterable[Number], quantile: str
) -> tuple[tuple[int, Estimate], ...]:
    """Return the batch sizes with their latency, by increasing size."""
    absolute = ((find_metric(n.metric), n.estimate) for n in numbers if n.against == "absolute")
    estimates = {
        declared.batch: estimate
        for declared, estimate in absolute
        if declared is not None
        and declared.batch is not None
        and declared.quantile == QUANTILES[quantile]
    }
    return tuple(sorted(estimates.items()))
