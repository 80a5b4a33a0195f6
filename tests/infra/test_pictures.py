"""Charts as SVG: positions, lengths, escaping.

A strip shows one value with its interval, a reference value and a limit; ``refused`` is the side of
the limit whose values are rejected. A composition has stacked bars of bytes. A pair is two bars,
before and after; the third argument of ``draw_pair`` is the number of bytes of a bar with the full
width. The second argument of ``draw_strip`` is a tone, which selects the colour.
"""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressors.contracts import Estimate
from infra.pages.pictures import (
    MAX_SEGMENTS,
    BarSegment,
    Curve,
    Mark,
    draw_composition,
    draw_curves,
    draw_pair,
    draw_strip,
)

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
POSITIONS = re.compile(r'\b(?:x|x1|x2|cx|width)="(-?[\d.]+)%"')
ROUNDING = 0.02  # percent; positions have two decimals, and some are sums of two rounded values


def estimate(*numbers):
    """Return an estimate whose low end, value and high end are three numbers, sorted."""
    low, point, high = sorted(numbers)
    return Estimate(point=point, low=low, high=high)


def positions(svg, kind):
    """Return horizontal positions and widths of the shapes of one class, in percent."""
    shapes = re.findall(rf'<\w+ class="{kind}[^>]*>', svg)
    return [float(position) for shape in shapes for position in POSITIONS.findall(shape)]


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.sampled_from(["below", "above"]))
def test_strip_places_value_interval_and_limit_in_order_within_the_chart(
    low, point, high, reference, limit, refused_side
):
    value = estimate(low, point, high)
    marks = Mark(value=reference, label="no change"), Mark(value=limit, label="limit")
    svg = draw_strip(value, "held", "title", *marks, refused=refused_side)
    assert all(0 <= float(place) <= 100 for place in POSITIONS.findall(svg))
    interval, (position,) = positions(svg, "interval"), positions(svg, "point")
    if interval:
        assert interval[0] <= position + ROUNDING <= interval[1] + 2 * ROUNDING
    else:
        assert value.low == value.high
    edge = positions(svg, "limit")[0]
    start, width = positions(svg, "refused")
    assert (start + width if refused_side == "below" else start) == pytest.approx(
        edge, abs=ROUNDING
    )
    # A point on one side of the limit in the chart is on the same side of it as a number.
    assert (position < edge - ROUNDING) <= (value.point < limit)
    assert (position > edge + ROUNDING) <= (value.point > limit)


def test_bar_lengths_are_proportional_to_bytes():
    parts = [
        BarSegment(name=name, role="table", size=size) for name, size in (("a", 100), ("b", 50))
    ]
    bars = [("before", parts), ("after", [part for part in parts if part.name == "b"])]
    svg = draw_composition(bars, "title")
    assert positions(svg, "table") == pytest.approx([0, 66.67, 66.67, 33.33, 0, 33.33])
    (upper, lower) = [
        float(w) for w in re.findall(r'width="([\d.]+)%"', draw_pair(80, 20, 100, "dense"))
    ]
    assert (upper, lower) == (80, 20)


@given(
    st.lists(st.integers(0, 10**12), max_size=12)
    | st.lists(st.integers(1, 10**12), min_size=2 * MAX_SEGMENTS, max_size=100)
)
def test_composition_segments_are_adjacent_and_sum_to_all_bytes(sizes):
    parts = [
        BarSegment(name=str(place), role=("table", "dense", "other")[place % 3], size=size)
        for place, size in enumerate(sizes)
    ]
    svg = draw_composition([("all", parts)], "title")
    rectangles = re.findall(r'<rect class="(\w+)[^>]* x="([\d.]+)%"[^>]* width="([\d.]+)%"', svg)
    assert len(rectangles) <= MAX_SEGMENTS + 3  # and one for the small segments of each role
    total_bytes = sum(int(text.replace(",", "")) for text in re.findall(r": ([\d,]+) bytes", svg))
    assert total_bytes == sum(sizes)
    for (_, x, width), (_, following, _) in pairwise(rectangles):
        assert float(x) + float(width) == pytest.approx(float(following), abs=ROUNDING)
    roles = [role for role, _, _ in rectangles]
    assert roles == sorted(roles, key=("table", "dense", "other").index)


def test_pair_draws_a_minimum_length_for_positive_sizes_only():
    widths = re.findall(r'width="([\d.]+)%"', draw_pair(1, 0, 10**9, "table"))
    assert float(widths[0]) > 0.5
    assert float(widths[1]) == 0
    assert re.findall(r'width="([\d.]+)%"', draw_pair(0, 0, 0, "table")) == ["0.00", "0.00"]


@given(
    st.lists(
        st.tuples(st.floats(1e-4, 1e4), st.floats(0.05, 0.95), st.floats(0.05, 0.95)),
        min_size=1,
        max_size=6,
    )
)
def test_curve_stays_in_the_chart_and_larger_values_are_higher(rows):
    points = tuple(
        (4**place, Estimate(point=value, low=value * down, high=value / up))
        for place, (value, down, up) in enumerate(rows)
    )
    both_curves = [
        Curve(kind="before", points=points),
        Curve(kind="after", points=points),
    ]
    svg = draw_curves(both_curves, "ms", {size: (str(size),) for size, _ in points}, "title")
    heights = [float(y) for y in re.findall(r'<circle[^>]*before"[^>]*cy="([\d.]+)"', svg)]
    assert len(heights) == len(points)
    assert all(0 < height < 214 for height in heights)  # 214: the height without axis labels
    for (y, (_, value)), (next_y, (_, next_value)) in pairwise(zip(heights, points, strict=True)):
        # Heights are measured from the top and have one decimal.
        assert y < next_y + 0.1 if value.point > next_value.point else next_y < y + 0.1
    assert all(0 < float(place) <= 100 for place in positions(svg, "point"))


def test_charts_escape_text_and_have_a_title():
    value = estimate(1, 2, 3)
    one_curve = [Curve(kind="after", points=((1, value),))]
    for svg in (
        draw_strip(value, "plain", "<b>", Mark(value=0, label="<i>"), Mark(value=1, label="<i>")),
        draw_composition([("<i>", [BarSegment(name="<i>", role="table", size=1)])], "<b>"),
        draw_curves(one_curve, "<i>", {1: ("<i>",)}, "<b>"),
    ):
        assert "<i>" not in svg
        assert "<title>&lt;b&gt;</title>" in svg
        assert 'role="img"' in svg
