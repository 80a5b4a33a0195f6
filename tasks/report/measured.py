"""The measurements of the report's page: limits, quality, latency. No Prefect."""

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
from compressors.metrics.judge import Number
from infra.pages import pictures
from infra.pages.html import many
from infra.pages.pictures import Curve, Mark, Tone
from tasks.orchestration.documents import Measurement, Report, TargetReport
from tasks.report.cells import change_of, is_kind, label, score_change_of
from tasks.report.tables import timed

TONES: dict[Outcome, Tone] = {
    "accepted": "held",
    "rejected": "broken",
    "undecided": "unsure",
    "built-unmeasured": "unsure",
}
WORDS = {"held": "good", "broken": "bad", "unsure": "open", "plain": "soft"}


@dataclass(frozen=True)
class LimitRow:
    """A row of the page: a limit, or a number without a limit.

    Attributes:
        name: name of the limit or the number.
        note: text below the name; may be empty.
        picture: SVG of the number on its scale; empty if nothing was measured.
        point: the number; empty if nothing was measured.
        interval: interval of the number, in brackets; empty if it has none.
        outcome: outcome of the limit, or that there is no limit.
        tone: class of the outcome's colour.
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
    """Latency of one quantile by batch size; ``picture`` is None if not measured.

    ``title`` is the quantile, and the target if there are several.
    """

    title: str
    picture: Markup | None


@dataclass(frozen=True)
class LatencySection:
    """The latency charts, and the machines of the measurements."""

    note: str
    charts: tuple[Chart, ...]


def limit_rows(report: Report) -> tuple[LimitRow, ...]:
    """Return every limit with its number, then the quality numbers without a limit."""
    rows, judged = [], set()
    for target in report.targets:
        found = report.measured.get(target.target)
        unit = None if found is None else found.numbers.score_unit
        for item in target.verdict.judgements:
            judged.add((target.target, item.limit.metric, item.limit.against))
            rows.append(_judged(item, target, unit))
    if not rows:
        rows = [
            _limit_row(str(limit), "", Markup(), "", "not measured", "open", "")
            for limit in report.limits
        ]
    for name, number, unit in _unpromised(report, judged):
        higher = metric(number.metric).higher_is_better
        up = "higher" if higher else "lower"
        if is_kind(number.metric, "score_change"):
            title = label(number.metric)
            said = score_change_of(number.metric, number.estimate, unit)
            same = Mark(at=1.0 if higher else 0.0, label="no change")
        else:
            title = f"{label(number.metric)} vs {number.against}"
            said = change_of(number.estimate, ratio=False)
            same = Mark(at=0, label="no change")
        picture = Markup(
            pictures.strip(number.estimate, "plain", f"{title} is {said}; no limit", same)
        )
        note = f"{up} is better"
        if len(report.measured) > 1:
            note = f"{name}, {note}"
        rows.append(_limit_row(title, note, picture, said, "no limit", "soft", ""))
    return tuple(rows)


def _judged(item: Judgement, target: TargetReport, unit: ScoreUnit | None) -> LimitRow:
    limit, found = item.limit, item.measured
    tone = TONES[item.outcome]
    picture, said = Markup(), ""
    if found is not None:
        bound = limit.at_least if limit.at_least is not None else limit.at_most
        if bound is None:  # a limit has one of the two: Limit validates this
            raise ValueError(f"limit {limit} has no bound")
        picture = Markup(
            pictures.strip(
                found,
                tone,
                item.reason,
                _no_change(limit),
                Mark(at=bound, label=f"limit {bound:g}"),
                "below" if limit.at_least is not None else "above",
            )
        )
        said = _said(limit, found, unit)
    return _limit_row(
        str(limit), target.target, picture, said, item.outcome, WORDS[tone], item.reason
    )


def _limit_row(
    name: str, note: str, picture: Markup, said: str, outcome: str, tone: str, reason: str
) -> LimitRow:
    point, _, interval = said.partition(" [")
    interval = interval and f"[{interval}"
    return LimitRow(name, note, picture, point, interval, outcome, tone, reason)


def _no_change(limit: Limit) -> Mark | None:
    if limit.declared.compared == "never":
        return Mark(at=1.0 if limit.declared.higher_is_better else 0.0, label="no change")
    if limit.against == "absolute":
        return None
    return Mark(at=1.0 if limit.declared.compared == "ratio" else 0.0, label="no change")


def _said(limit: Limit, found: Estimate, score_unit: ScoreUnit | None) -> str:
    declared = limit.declared
    if limit.against != "absolute":
        return change_of(found, ratio=declared.compared == "ratio")
    if declared.kind == "bytes":
        return f"{found.point:,.0f}"
    if declared.kind == "score_change":
        return score_change_of(limit.metric, found, score_unit)
    return f"{found.point:.5g}{declared.unit} [{found.low:.5g}, {found.high:.5g}]"


def _unpromised(
    report: Report, judged: Collection[tuple[str, str, str]]
) -> Iterator[tuple[str, Number, ScoreUnit | None]]:
    """Yield changes of quality and scores without a limit, with the target and the unit."""
    for target, measured in report.measured.items():
        for number in measured.numbers.numbers:
            of_scores = is_kind(number.metric, "quality", "score_change")
            promised = (target, number.metric, number.against) in judged
            compared = number.against != "absolute" or is_kind(number.metric, "score_change")
            if of_scores and compared and not promised:
                yield target, number, measured.numbers.score_unit


def latency_section(report: Report) -> LatencySection:
    """Draw latency by batch size, and describe the machine of the measurement."""
    if not report.measured:
        return LatencySection(note="Nothing was measured on this machine.", charts=())
    notes = [
        "Both models are called in turn, so what slows the machine slows both. Whiskers are 95 % "
        "intervals.",
        *timed(report),
    ]
    return LatencySection(
        note=" ".join([_machines(report), *notes]),
        charts=tuple(
            _chart(measured, quantile, f"{target} {quantile}" if several else quantile)
            for several in [len(report.measured) > 1]
            for target, measured in report.measured.items()
            for quantile in QUANTILES
        ),
    )


def _machines(report: Report) -> str:
    """Describe the machine of each measurement and its runtime."""
    return " ".join(
        f"Measured on {machine.processor}, {machine.cores} cores, {machine.system}, "
        f"{machine.runtime} {machine.version} with {many(machine.threads, 'thread')}, "
        f"{'with' if machine.int8_dot else 'without'} int8 dot products."
        for machine in (measured.machine for measured in report.measured.values())
    )


def _chart(measured: Measurement, quantile: str, title: str) -> Chart:
    before = _over_sizes(measured.baseline.numbers, quantile)
    after = _over_sizes(measured.numbers.numbers, quantile)
    if not before or not after:
        return Chart(title, None)
    ends = ", ".join(
        f"{old.point:.3g} to {new.point:.3g} ms at batch {size}"
        for (size, old), (_, new) in zip(before, after, strict=True)
    )
    drawn = Markup(
        pictures.curves(
            [Curve(kind="before", points=before), Curve(kind="after", points=after)],
            "ms",
            {size: (f"batch {size:,}", _ratio_at(measured, quantile, size)) for size, _ in after},
            f"{title} latency, before to after: {ends}",
        )
    )
    return Chart(title, drawn)


def _ratio_at(measured: Measurement, quantile: str, size: int) -> str:
    ratio = measured.numbers.of(latency(quantile, size).name, "baseline")
    return "" if ratio is None else f"{ratio.point:.2f}x"


def _over_sizes(numbers: Iterable[Number], quantile: str) -> tuple[tuple[int, Estimate], ...]:
    absolute = ((find_metric(n.metric), n.estimate) for n in numbers if n.against == "absolute")
    found = {
        item.batch: estimate
        for item, estimate in absolute
        if item is not None and item.batch is not None and item.quantile == QUANTILES[quantile]
    }
    return tuple(sorted(found.items()))
