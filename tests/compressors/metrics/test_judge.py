"""The gate: what it says, and that it can only get stricter with the limit."""

import math

import pytest
from error_codes import raises_code, raises_value_error
from hypothesis import given
from hypothesis import strategies as st
from reason_codes import codes_of, with_code

from compressors.contracts import Estimate, Limit
from compressors.contracts.reasons import Reason
from compressors.errors.metrics import LimitRefused
from compressors.metrics.intervals import PairedEstimate
from compressors.metrics.judge import (
    Measured,
    Number,
    byte_numbers,
    exact,
    judge,
    latency_numbers,
    quality_numbers,
    verdict,
)

STRICTNESS = {"accepted": 0, "undecided": 1, "rejected": 2}
AUC_LIMIT = Limit(metric="auc", against="baseline", at_least=-0.001)


def auc_change(point, low, high, rows=20_000):
    estimate = Estimate(point=point, low=low, high=high, rows=rows)
    return Measured(numbers=(Number(metric="auc", against="baseline", estimate=estimate),))


def only(limit, measured):
    (judgement,) = judge((limit,), measured)
    return judgement


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.0009, 0.0002, "accepted"),
        (-0.001, 0.0002, "accepted"),  # a bound exactly at the limit is inside
        (-0.0010001, 0.0002, "undecided"),
        (-0.003, -0.001, "undecided"),  # the other bound exactly at the limit is inside as well
        (-0.003, -0.0010001, "rejected"),
        (-0.001, -0.001, "accepted"),
    ],
)
def test_at_least_is_judged_on_the_bounds_of_the_interval(low, high, outcome):
    assert only(AUC_LIMIT, auc_change((low + high) / 2, low, high)).outcome == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (1.0, 1.9, "accepted"),
        (1.0, 2.0, "accepted"),
        (1.0, 2.0000001, "undecided"),
        (2.0, 2.5, "undecided"),
        (2.0000001, 2.5, "rejected"),
    ],
)
def test_at_most_is_judged_on_the_bounds_of_the_interval(low, high, outcome):
    limit = Limit(metric="p99_ms@64", against="absolute", at_most=2.0)
    estimate = Estimate(point=(low + high) / 2, low=low, high=high)
    measured = Measured(numbers=latency_numbers("p99_ms@64", estimate, exact(1.0)))
    judgement = only(limit, measured)
    assert judgement.outcome == outcome
    assert judgement.rows_to_decide is None


floats = st.floats(-1, 1, allow_nan=False)


@given(st.lists(floats, min_size=3, max_size=3), st.tuples(floats, floats), st.booleans())
def test_tightening_a_limit_never_makes_the_outcome_milder(values, bounds, upwards):
    low, point, high = sorted(values)
    loose, tight = sorted(bounds) if upwards else sorted(bounds, reverse=True)
    kind = "at_least" if upwards else "at_most"
    outcomes = [
        only(Limit(metric="auc", **{kind: bound}), auc_change(point, low, high)).outcome
        for bound in (loose, tight)
    ]
    assert STRICTNESS[outcomes[0]] <= STRICTNESS[outcomes[1]]


@given(st.lists(floats, min_size=3, max_size=3), floats, st.booleans())
def test_mirroring_numbers_and_limit_mirrors_nothing_in_the_outcome(values, bound, upwards):
    low, point, high = sorted(values)
    kinds = ("at_least", "at_most") if upwards else ("at_most", "at_least")
    ours = only(Limit(metric="auc", **{kinds[0]: bound}), auc_change(point, low, high))
    mirror = only(Limit(metric="auc", **{kinds[1]: -bound}), auc_change(-point, -high, -low))
    assert (ours.outcome, ours.rows_to_decide) == (mirror.outcome, mirror.rows_to_decide)


@given(st.lists(floats, min_size=3, max_size=3), floats)
def test_at_the_rows_to_decide_the_shrunk_interval_decides_for_the_side_of_the_point(values, bound):
    low, point, high = sorted(values)
    limit = Limit(metric="auc", at_least=bound)
    judgement = only(limit, auc_change(point, low, high))
    rows = judgement.rows_to_decide
    if rows is None:
        return
    assert judgement.outcome == "undecided"
    assert rows > 20_000
    # Exactly enough rows bring the bound onto the limit; a billionth more clears it.
    shrink = math.sqrt(20_000 / (rows * (1 + 1e-9)))
    shrunk = point - (point - low) * shrink, point + (high - point) * shrink
    # 1e-9 of the reach is above float64 rounding of numbers below 1, and far below 1 row.
    decided = shrunk[0] >= bound - 1e-9 if point >= bound else shrunk[1] < bound + 1e-9
    assert decided


def test_an_undecided_limit_says_how_many_rows_would_decide():
    judgement = only(AUC_LIMIT, auc_change(-0.0004, -0.0011, 0.0003))
    # The lower reach 0.0007 has to shrink to the distance 0.0006: (7/6)^2 of 20,000 rows.
    assert judgement.rows_to_decide == pytest.approx(20_000 * (7 / 6) ** 2, abs=1)
    assert judgement.reasons == (
        Reason(
            "number_in_interval",
            metric="AUC vs baseline",
            number="-0.0004",
            low="-0.0011",
            high="+0.0003",
            relation=">=",
            limit="-0.0010",
        ),
        Reason("more_rows_decide", needed=28_000, rows=20_000),
    )


def test_a_point_on_the_limit_promises_no_number_of_rows():
    judgement = only(AUC_LIMIT, auc_change(-0.001, -0.002, 0.0))
    assert judgement.outcome == "undecided"
    assert judgement.rows_to_decide is None
    with_code(judgement.reasons, "on_the_limit")


def test_bytes_are_exact_and_say_both_numbers():
    numbers = Measured(numbers=byte_numbers(candidate=262_144, baseline=1_000_000))
    small = only(Limit(metric="bytes", against="absolute", at_most=262_144), numbers)
    assert small.outcome == "accepted"
    large = only(Limit(metric="bytes", against="absolute", at_most=262_143), numbers)
    with_code(large.reasons, "exact_number", number="262,144 bytes", limit="262,143 bytes")
    with_code(large.reasons, "limit_missed")
    ratio = only(Limit(metric="bytes", against="baseline", at_most=0.25), numbers)
    compared = with_code(ratio.reasons, "exact_number", metric="size vs baseline", relation="<=")
    assert (compared.fields["number"], compared.fields["limit"]) == ("0.262 times", "0.250 times")


def test_a_bound_just_past_the_limit_is_not_printed_as_the_limit():
    judgement = only(AUC_LIMIT, auc_change(-0.0005, -0.00100002, 0.0))
    printed = with_code(judgement.reasons, "number_in_interval", relation=">=").fields
    assert (printed["low"], printed["high"]) == ("-0.00100002", "+0.00000000")
    assert printed["limit"] == "-0.00100000"


def test_latency_is_said_in_words_and_milliseconds():
    limit = Limit(metric="p99_ms@64", against="absolute", at_most=2.0)
    estimate = Estimate(point=2.0625, low=1.5, high=2.25)
    measured = Measured(numbers=latency_numbers("p99_ms@64", estimate, exact(0.5)))
    reasons = only(limit, measured).reasons
    assert codes_of(reasons) == ["number_in_interval", "more_rounds_decide"]
    assert reasons[0].fields == {
        "metric": "p99 latency at batch 64",
        "number": "2.062 ms",
        "low": "1.500",
        "high": "2.250",
        "relation": "<=",
        "limit": "2.000 ms",
    }


def test_quality_numbers_carry_the_candidate_and_both_differences():
    one, two, three = (Estimate(point=x, low=x - 1, high=x + 1, rows=9) for x in (1.0, 2.0, 3.0))
    pair = PairedEstimate(baseline=one, candidate=two, difference=three, resolves=1.0)
    measured = Measured(numbers=quality_numbers("gauc", pair, pair), has_champion=True)
    assert measured.of("gauc", "absolute") == two
    assert measured.of("gauc", "baseline") == three
    assert measured.of("gauc", "champion") == three
    assert measured.of("auc", "baseline") is None


CHAMPION_LIMIT = Limit(metric="auc", against="champion", at_least=0.0)


def test_without_a_champion_a_limit_against_it_holds_and_says_so():
    judgement = only(CHAMPION_LIMIT, auc_change(0, 0, 0))
    assert judgement.outcome == "accepted"
    assert judgement.measured is None
    assert codes_of(judgement.reasons) == ["no_champion"]


def test_with_a_champion_a_number_that_was_not_measured_is_an_error():
    measured = auc_change(0, 0, 0).model_copy(update={"has_champion": True})
    with raises_code(LimitRefused, "number_missing", measured=("auc vs baseline",)):
        judge((CHAMPION_LIMIT,), measured)


def test_a_limit_on_something_unmeasured_names_what_is_measured():
    limit = Limit(metric="gauc", at_least=-0.001)
    with raises_code(
        LimitRefused,
        "number_missing",
        limit="gauc vs baseline >= -0.001",
        measured=("auc vs baseline",),
    ):
        judge((limit,), auc_change(0, 0, 0))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["point", "low", "high"])
def test_nan_and_infinity_are_refused_never_accepted(broken, where):
    numbers = {"point": 0.0, "low": 0.0, "high": 0.0, where: broken}
    with raises_code(LimitRefused, "number_broken"):
        judge((AUC_LIMIT,), auc_change(**numbers))


def test_nan_in_a_metric_without_a_limit_is_refused():
    numbers = auc_change(0, 0, 0).numbers
    broken = Number(metric="logloss", against="absolute", estimate=exact(math.nan))
    with raises_code(LimitRefused, "number_broken", number="logloss"):
        judge((AUC_LIMIT,), Measured(numbers=(*numbers, broken)))


@pytest.mark.parametrize("bound", [math.nan, math.inf, -math.inf])
def test_a_limit_without_a_finite_bound_is_refused(bound):
    with raises_value_error("finite_number"):
        Limit(metric="auc", at_least=bound)


def test_an_interval_turned_around_is_refused():
    with raises_code(LimitRefused, "number_broken"):
        judge((AUC_LIMIT,), auc_change(0, 0.1, -0.1))


@pytest.mark.parametrize("measured", [None, auc_change(0, 0, 0)])
def test_no_limits_is_an_error(measured):
    with raises_code(LimitRefused, "limits_missing"):
        verdict("onnxruntime", (), measured, built=True)


def test_a_number_measured_twice_is_refused():
    numbers = auc_change(0, 0, 0).numbers
    with raises_value_error("numbers_repeated", numbers=("auc vs baseline",)):
        Measured(numbers=numbers * 2)


def test_an_empty_model_has_no_ratio_of_bytes():
    with raises_code(LimitRefused, "sizes_below_one"):
        byte_numbers(candidate=10, baseline=0)


GOOD = Limit(metric="bytes", against="absolute", at_most=100.0)
BAD = Limit(metric="bytes", against="absolute", at_most=1.0)
OPEN = Limit(metric="auc", against="baseline", at_least=-0.001)


@pytest.mark.parametrize(
    ("limits", "outcome", "expected"),
    [
        ((GOOD,), "accepted", ["one_limit_holds"]),
        ((GOOD, GOOD), "accepted", ["all_limits_hold"]),
        ((GOOD, OPEN), "undecided", ["number_in_interval", "more_rows_decide"]),
        ((GOOD, OPEN, BAD), "rejected", ["exact_number", "limit_missed"]),
    ],
)
def test_the_outcome_of_a_target_is_its_worst_limit(limits, outcome, expected):
    numbers = (*auc_change(-0.0004, -0.0011, 0.0003).numbers, *byte_numbers(10, 40))
    result = verdict("onnxruntime", limits, Measured(numbers=numbers), built=True)
    assert result.outcome == outcome
    assert codes_of(result.reasons) == expected
    assert tuple(item.limit for item in result.judgements) == limits


def test_a_built_target_that_cannot_run_here_is_neither_accepted_nor_rejected():
    result = verdict("tensorrt-rtx", (GOOD,), None, built=True)
    assert result.outcome == "built-unmeasured"
    assert result.judgements == ()
    assert codes_of(result.reasons) == ["cannot_run"]


def test_a_target_that_was_not_built_is_rejected():
    result = verdict("tensorrt-rtx", (GOOD,), None, built=False)
    assert (result.outcome, result.judgements) == ("rejected", ())


def test_numbers_of_a_target_that_was_not_built_are_refused():
    with raises_code(LimitRefused, "measured_but_not_built"):
        verdict("tensorrt-rtx", (GOOD,), Measured(numbers=byte_numbers(10, 40)), built=False)


def test_measured_numbers_survive_json():
    measured = Measured(numbers=byte_numbers(10, 40, champion=20), has_champion=True)
    assert Measured.model_validate_json(measured.model_dump_json()) == measured
