import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressors.contracts import Estimate
from infra.pages.pictures import (
    MOST_SEGMENTS,
    BarSegment,
    Curve,
    Mark,
    composition,
    curves,
    pair,
    strip,
)

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)
PLACES = re.compile(r'\b(?:x|x1|x2|cx|width)="(-?[\d.]+)%"')
ROUNDING = 0.02  # percent; places are written with two digits, a sum of two may be off by both


def estimate(*numbers):
    low, point, high = sorted(numbers)
    return Estimate(point=point, low=low, high=high)


def places(drawn, kind):
    """Where the shapes of one class lie across, in percent."""
    found = re.findall(rf'<\w+ class="{kind}[^>]*>', drawn)
    return [float(place) for shape in found for place in PLACES.findall(shape)]


@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.sampled_from(["below", "above"]))
def test_a_number_its_interval_and_its_limit_always_lie_on_the_line_in_order(
    low, point, high, reference, limit, side
):
    found = estimate(low, point, high)
    marks = Mark(at=reference, label="no change"), Mark(at=limit, label="limit")
    drawn = strip(found, "held", "title", *marks, refused=side)
    assert all(0 <= float(place) <= 100 for place in PLACES.findall(drawn))
    interval, (at,) = places(drawn, "interval"), places(drawn, "point")
    if interval:
        assert interval[0] <= at + ROUNDING <= interval[1] + 2 * ROUNDING
    else:
        assert found.low == found.high
    edge = places(drawn, "limit")[0]
    start, width = places(drawn, "refused")
    assert (start + width if side == "below" else start) == pytest.approx(edge, abs=ROUNDING)
    assert (at < edge - ROUNDING) <= (found.point < limit)
    assert (at > edge + ROUNDING) <= (found.point > limit)


def test_twice_the_bytes_are_twice_the_length():
    parts = [
        BarSegment(name=name, role="table", size=size) for name, size in (("a", 100), ("b", 50))
    ]
    bars = [("before", parts), ("after", [part for part in parts if part.name == "b"])]
    drawn = composition(bars, "title")
    assert places(drawn, "table") == pytest.approx([0, 66.67, 66.67, 33.33, 0, 33.33])
    (upper, lower) = [
        float(w) for w in re.findall(r'width="([\d.]+)%"', pair(80, 20, 100, "dense"))
    ]
    assert (upper, lower) == (80, 20)


@given(
    st.lists(st.integers(0, 10**12), max_size=12)
    | st.lists(st.integers(1, 10**12), min_size=2 * MOST_SEGMENTS, max_size=100)
)
def test_parts_lie_end_to_end_and_none_is_lost(sizes):
    parts = [
        BarSegment(name=str(place), role=("table", "dense", "other")[place % 3], size=size)
        for place, size in enumerate(sizes)
    ]
    drawn = composition([("all", parts)], "title")
    rectangles = re.findall(r'<rect class="(\w+)[^>]* x="([\d.]+)%"[^>]* width="([\d.]+)%"', drawn)
    assert len(rectangles) <= MOST_SEGMENTS + 3
    bytes_said = sum(int(said.replace(",", "")) for said in re.findall(r": ([\d,]+) bytes", drawn))
    assert bytes_said == sum(sizes)
    for (_, x, width), (_, following, _) in pairwise(rectangles):
        assert float(x) + float(width) == pytest.approx(float(following), abs=ROUNDING)
    roles = [role for role, _, _ in rectangles]
    assert roles == sorted(roles, key=("table", "dense", "other").index)


def test_what_is_there_at_all_is_seen_and_what_is_not_there_is_not():
    widths = re.findall(r'width="([\d.]+)%"', pair(1, 0, 10**9, "table"))
    assert float(widths[0]) > 0.5
    assert float(widths[1]) == 0
    assert re.findall(r'width="([\d.]+)%"', pair(0, 0, 0, "table")) == ["0.00", "0.00"]


@given(
    st.lists(
        st.tuples(st.floats(1e-4, 1e4), st.floats(0.05, 0.95), st.floats(0.05, 0.95)),
        min_size=1,
        max_size=6,
    )
)
def test_a_curve_stays_in_its_picture_and_a_larger_number_lies_higher(rows):
    points = tuple(
        (4**place, Estimate(point=value, low=value * down, high=value / up))
        for place, (value, down, up) in enumerate(rows)
    )
    listed = [Curve(kind="before", points=points), Curve(kind="after", points=points[::-1][::-1])]
    drawn = curves(listed, "ms", {size: (str(size),) for size, _ in points}, "title")
    heights = [float(y) for y in re.findall(r'<circle[^>]*before"[^>]*cy="([\d.]+)"', drawn)]
    assert len(heights) == len(points)
    assert all(0 < height < 214 for height in heights)
    for (y, (_, one)), (other_y, (_, other)) in pairwise(zip(heights, points, strict=True)):
        # Heights are written with one digit.
        assert y < other_y + 0.1 if one.point > other.point else other_y < y + 0.1
    assert all(0 < float(place) <= 100 for place in places(drawn, "point"))


def test_words_are_escaped_and_every_picture_is_named():
    found = estimate(1, 2, 3)
    listed = [Curve(kind="after", points=((1, found),))]
    for drawn in (
        strip(found, "plain", "<b>", Mark(at=0, label="<i>"), Mark(at=1, label="<i>")),
        composition([("<i>", [BarSegment(name="<i>", role="table", size=1)])], "<b>"),
        curves(listed, "<i>", {1: ("<i>",)}, "<b>"),
    ):
        assert "<i>" not in drawn
        assert "<title>&lt;b&gt;</title>" in drawn
        assert 'role="img"' in drawn
