"""Render the report's charts as inline SVG text.

Plotting libraries are not used, because they lack some of these properties:

- Horizontal lengths are percentages and text is not scaled, so a chart is readable in a narrow
  window. Vertical lengths are in pixels.
- Colours are CSS variables of the page, so a chart follows light and dark mode.
- Equal data result in equal bytes on every machine.
- Every chart has a text description (``title``).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Literal, get_args

from compressors.contracts import Estimate, Frozen

STYLE = """
:root { --before: #8b949c; --table: #2f6690; --dense: #c27c0e; --rest: #77808a; }
@media (prefers-color-scheme: dark) {
  :root { --before: #7d868f; --table: #7fb3dc; --dense: #e2a94e; --rest: #98a1aa; }
}
svg { display: block; width: 100%; overflow: visible; }
svg text { font-size: 12.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .value { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg .name { fill: var(--ink); font-size: 14px; }
svg .table { fill: var(--table); } svg .dense { fill: var(--dense); }
svg .other { fill: var(--rest); } svg .faded { opacity: 0.38; }
svg .cut { stroke: var(--card); stroke-width: 1; }
svg .axis { stroke: var(--line); stroke-width: 1.5; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .reference { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 2 3; }
svg .limit { stroke: var(--bad); stroke-width: 2; }
svg .refused { fill: var(--bad-wash); }
svg .interval { stroke-width: 5; stroke-linecap: round; opacity: 0.55; }
svg .point { stroke: var(--card); stroke-width: 1.5; }
svg .curve { stroke-width: 2.25; stroke-linecap: round; }
svg .whisker { stroke-width: 1.5; }
svg line.before { stroke: var(--before); } svg circle.before { fill: var(--before); }
svg line.after { stroke: var(--table); } svg circle.after, svg text.after { fill: var(--table); }
svg line.held { stroke: var(--good); } svg circle.held { fill: var(--good); }
svg line.broken { stroke: var(--bad); } svg circle.broken { fill: var(--bad); }
svg line.unsure { stroke: var(--open); } svg circle.unsure { fill: var(--open); }
svg line.plain { stroke: var(--ink); } svg circle.plain { fill: var(--ink); }
.key { display: inline-block; width: 0.75em; height: 0.75em; border-radius: 3px;
  margin: 0 0.4em 0 0; }
.key.table, .key.after { background: var(--table); } .key.dense { background: var(--dense); }
.key.other { background: var(--rest); } .key.before { background: var(--before); }
"""
"""CSS of the charts and of their legends; the page defines the other variables, such as --ink."""

Role = Literal["table", "dense", "other"]
"""CSS class of a unit's colour: an embedding table, a dense layer, or anything else."""
Tone = Literal["held", "broken", "unsure", "plain"]
"""CSS class of an estimate's colour: the limit is met, missed, undecided, or there is no limit."""
BAR_PITCH = 58  # pixels from the top of one bar's label to the next
BAR_TRIM = 6  # pixels of the last pitch that are cut off, because no label follows
LINE_PITCH = 18  # pixels from one line of text below an axis to the next
MARGIN_SHARE = 0.14  # share of an axis's range that is added at both ends
MIN_LOG_MARGIN = 0.05  # least margin of a logarithmic axis, in powers of ten
MIN_VISIBLE_PERCENT = 0.6  # width of the thinnest bar of a positive size
MAX_SEGMENTS = 40  # per bar; more segments would be too thin to distinguish
MIN_PERCENT_WITH_GAP = 0.8  # width of a segment; a gap around a thinner one would hide it


class BarSegment(Frozen):
    """One part of a model (a table or layer), drawn as a segment of a bar; ``size`` is in bytes."""

    name: str
    role: Role
    size: int


class Mark(Frozen):
    """A value that is marked on the horizontal axis of a chart.

    Attributes:
        value: the value.
        label: text next to the mark.
    """

    value: float
    label: str


class Curve(Frozen):
    """A curve of positive estimates, such as latencies by batch size.

    Attributes:
        kind: whether the curve is of the model before or after compression; decides the colour.
        points: size (such as a batch size) and estimate, in ascending order of size.
    """

    kind: Literal["before", "after"]
    points: tuple[tuple[int, Estimate], ...]


def draw_composition(bars: Sequence[tuple[str, Sequence[BarSegment]]], title: str) -> str:
    """Draw stacked bars on one scale, one below the other, with a segment for each model part.

    Args:
        bars: label and model parts of each bar.
        title: text description of the chart.

    Returns:
        The SVG as text. The other functions return it too.
    """
    max_size = max((sum(part.size for part in parts) for _, parts in bars), default=0)
    shapes = []
    for index, (name, parts) in enumerate(bars):
        top = BAR_PITCH * index
        shapes.append(f'<text class="name" x="0" y="{top + 15}">{escape(name)}</text>')
        x = 0.0
        for part in _merge_smallest(parts):
            width = 100 * part.size / max_size if max_size else 0.0
            cut = " cut" if width >= MIN_PERCENT_WITH_GAP else ""  # CSS class: with a gap around it
            shapes.append(
                f'<rect class="{part.role}{cut}" x="{_format_percent(x)}" y="{top + 24}" '
                f'width="{_format_percent(width)}" height="24">'
                f"<title>{escape(part.name)}: {part.size:,} bytes</title></rect>"
            )
            x += width
    return _wrap_in_svg(BAR_PITCH * len(bars) - BAR_TRIM, title, shapes)


def draw_pair(before: int, after: int, full_width: int, role: Role) -> str:
    """Draw two thin bars, one below the other, for a row of an HTML table with the same numbers.

    Args:
        before: the upper bar's length.
        after: the lower bar's length.
        full_width: the length that corresponds to the width of the cell.
        role: the kind of unit, which determines the colour.
    """
    shapes = [
        f'<rect class="{role}{faded}" y="{y}" width="{_format_percent(width)}" height="7" rx="2"/>'
        for y, width, faded in (
            (2, _compute_visible_percent(before, full_width), " faded"),
            (11, _compute_visible_percent(after, full_width), ""),
        )
    ]
    return f'<svg height="20" aria-hidden="true">{"".join(shapes)}</svg>'


def draw_strip(
    estimate: Estimate,
    tone: Tone,
    title: str,
    reference: Mark | None = None,
    limit: Mark | None = None,
    refused: Literal["below", "above"] = "below",
) -> str:
    """Draw an estimate and its interval on a line, with a reference value and a limit.

    Args:
        estimate: the measured value.
        tone: its colour, which depends on the verdict.
        title: text description of the chart.
        reference: the value that means no change; its label is above the line.
        limit: the limit; its label is below the line.
        refused: the side of the limit whose values are rejected.
    """
    marks = [mark.value for mark in (reference, limit) if mark is not None]
    low = min(estimate.low, *marks, estimate.point)
    high = max(estimate.high, *marks, estimate.point)
    # If all values are equal, the margin is a share of the value; it is positive also for zero.
    margin = (high - low) * MARGIN_SHARE or max(abs(high) * MARGIN_SHARE, 1e-9)
    low, high = low - margin, high + margin

    def x_of(value: float) -> float:
        return 100 * (value - low) / (high - low)

    # Pixels from the top: the reference's label at 12, marks from 18 to 40 with the axis at 29, the
    # limit's label at 55.
    shapes = []
    if limit is not None:
        edge = x_of(limit.value)
        start, width = (0.0, edge) if refused == "below" else (edge, 100 - edge)
        shapes.append(
            f'<rect class="refused" x="{_format_percent(start)}" y="18" '
            f'width="{_format_percent(width)}" height="22" rx="3"/>'
        )
    shapes.append('<line class="axis" x1="0%" x2="100%" y1="29" y2="29"/>')
    if reference is not None:
        shapes += _draw_mark(x_of(reference.value), reference.label, "reference", text_y=12)
    if limit is not None:
        shapes += _draw_mark(x_of(limit.value), limit.label, "limit", text_y=55)
    if estimate.low < estimate.high:
        shapes.append(
            f'<line class="interval {tone}" x1="{_format_percent(x_of(estimate.low))}" '
            f'x2="{_format_percent(x_of(estimate.high))}" y1="29" y2="29"/>'
        )
    shapes.append(
        f'<circle class="point {tone}" cx="{_format_percent(x_of(estimate.point))}" cy="29" r="6"/>'
    )
    return _wrap_in_svg(60, title, shapes)


def draw_curves(
    all_curves: Sequence[Curve], unit: str, below: Mapping[int, tuple[str, ...]], title: str
) -> str:
    """Draw curves of estimates by size on logarithmic scales, with intervals as whiskers.

    Args:
        all_curves: the curves, all over the same sizes; every point is labelled with its value.
        unit: unit of the values.
        below: lines of text below the horizontal axis, by size.
        title: text description of the chart.
    """
    estimates = [estimate for curve in all_curves for _, estimate in curve.points]
    low = math.log10(min(estimate.low for estimate in estimates))
    high = math.log10(max(estimate.high for estimate in estimates))
    margin = max((high - low) * MARGIN_SHARE, MIN_LOG_MARGIN)
    low, high = low - margin, high + margin
    min_log, max_log = math.log2(min(below)), math.log2(max(below))

    def x_of(size: int) -> float:
        """Return 20 % to 88 % of the width; the labels of the vertical axis are left of it."""
        if max_log == min_log:
            return 54.0  # the center
        return 20 + 68 * (math.log2(size) - min_log) / (max_log - min_log)

    def y_of(value: float) -> float:
        """Return 10 (the highest value) to 210 pixels from the top."""
        return 210 - 200 * (math.log10(value) - low) / (high - low)

    shapes = []
    for value in _choose_ticks(10**low, 10**high):
        y = y_of(value)
        shapes.append(f'<line class="grid" x1="0%" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text x="0" y="{y - 4:.1f}">{value:g} {escape(unit)}</text>')
    for size, lines in below.items():
        for index, line in enumerate(lines):
            shapes.append(
                f'<text x="{_format_percent(x_of(size))}" y="{232 + LINE_PITCH * index}" '
                f'text-anchor="middle">{escape(line)}</text>'
            )
    drawn_curves = [_draw_curve(curve, all_curves, x_of, y_of) for curve in all_curves]
    # All lines first, then all points, then all labels: so lines cover no points or labels.
    shapes += [item for layer in zip(*drawn_curves, strict=True) for item in layer]
    return _wrap_in_svg(214 + LINE_PITCH * max(map(len, below.values())), title, shapes)


def _draw_curve(
    curve: Curve,
    all_curves: Sequence[Curve],
    x_of: Callable[[int], float],
    y_of: Callable[[float], float],
) -> tuple[str, str, str]:
    """Draw one curve; return the SVG of its lines, of its points with whiskers, of its labels.

    ``x_of`` and ``y_of`` return the position of a size (percent) and of a value (pixels).
    """
    # Curves are moved apart horizontally, by 0.9 %, so that no whisker hides another.
    offset = 0.9 * (all_curves.index(curve) - (len(all_curves) - 1) / 2)
    lines, points, labels = [], [], []
    for (size, estimate), (next_size, next_estimate) in pairwise(curve.points):
        lines.append(
            f'<line class="curve {curve.kind}" x1="{_format_percent(x_of(size) + offset)}" '
            f'x2="{_format_percent(x_of(next_size) + offset)}" y1="{y_of(estimate.point):.1f}" '
            f'y2="{y_of(next_estimate.point):.1f}"/>'
        )
    for size, estimate in curve.points:
        x, above, below = (
            _format_percent(x_of(size) + offset),
            y_of(estimate.high),
            y_of(estimate.low),
        )
        # The label of the highest value is above its point, the others are below.
        same_size = [
            (e.point, -all_curves.index(c)) for c in all_curves for s, e in c.points if s == size
        ]
        is_highest = (estimate.point, -all_curves.index(curve)) == max(same_size)
        y = above - 9 if is_highest else below + 19
        points.append(
            f'<line class="whisker {curve.kind}" x1="{x}" x2="{x}" y1="{above:.1f}" '
            f'y2="{below:.1f}"/>'
            f'<circle class="point {curve.kind}" cx="{x}" cy="{y_of(estimate.point):.1f}" r="5"/>'
        )
        labels.append(
            f'<text class="value {curve.kind}" x="{x}" y="{y:.1f}" '
            f'text-anchor="middle">{estimate.point:.3g}</text>'
        )
    return "".join(lines), "".join(points), "".join(labels)


def _wrap_in_svg(height: int, title: str, shapes: Sequence[str]) -> str:
    """Wrap shapes in an SVG element; screen readers and tooltips use its title."""
    return (
        f'<svg height="{height}" role="img"><title>{escape(title)}</title>{"".join(shapes)}</svg>'
    )


def _draw_mark(percent: float, label: str, css_class: str, text_y: int) -> list[str]:
    """Draw a vertical line at a horizontal position, with a label aligned to stay in the chart.

    The label begins at a line on the left, ends at a line on the right, and is centered between.
    """
    anchor = "start" if percent < 30 else "end" if percent > 70 else "middle"
    x = _format_percent(percent)
    return [
        f'<line class="{css_class}" x1="{x}" x2="{x}" y1="18" y2="40"/>',
        f'<text x="{x}" y="{text_y}" text-anchor="{anchor}">{escape(label)}</text>',
    ]


def _merge_smallest(parts: Sequence[BarSegment]) -> list[BarSegment]:
    """Keep the largest parts and merge the others of each role; sort by role, then by size."""
    ordered = sorted(parts, key=lambda part: (-part.size, part.name))
    shown, others = ordered[:MAX_SEGMENTS], ordered[MAX_SEGMENTS:]
    for role in get_args(Role):
        sizes = [part.size for part in others if part.role == role]
        if sizes:
            shown.append(
                BarSegment(name=f"{len(sizes):,} smaller ones", role=role, size=sum(sizes))
            )
    roles = get_args(Role)
    # The sort is stable: within a role the largest part is first and the merged part last.
    return sorted((part for part in shown if part.size), key=lambda part: roles.index(part.role))


def _choose_ticks(low: float, high: float) -> list[float]:
    """Choose the axis ticks in a range: 1, 2, 5, 10 ... or, for a wide one, 1, 10, 100 ..."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 60 else (1,)
    values = [float(f"{digit}e{power}") for power in exponents for digit in digits]
    return [value for value in values if low <= value <= high]


def _compute_visible_percent(size: int, full_width: int) -> float:
    """Compute ``size`` in percent of ``full_width``, large enough to be visible if positive."""
    return max(100 * size / full_width, MIN_VISIBLE_PERCENT) if size and full_width else 0.0


def _format_percent(value: float) -> str:
    """Format a length in percent for SVG."""
    return f"{value:.2f}%"
