"""``judge`` and ``verdict``: outcomes of limits on measured numbers, and their reasons.

A ``Number`` is the estimate of a metric: absolute, or compared with the baseline or champion (a
difference for quality, a ratio for bytes and latency).
``judge`` compares each limit with its number and returns one judgement per limit: its outcome and
reasons. ``verdict`` combines the judgements of one target.
"""

import math

import pytest
from error_codes import raises_code, raises_value_error
from hypothesis import given
from hypothesis import strategies as st
from reason_codes import codes_of, require_reason

from compressors.contracts import Estimate, Limit
from compressors.contracts.reasons import Reason
from compressors.errors.metrics import LimitRefused
from compressors.metrics.intervals import PairedEstimate
from compressors.metrics.judge import judge, verdict
from compressors.metrics.measured import (
    Measured,
    Number,
    byte_numbers,
    exact_estimate,
    latency_numbers,
    quality_numbers,
)

STRICTNESS = {"accepted": 0, "undecided": 1, "rejected": 2}
AUC_LIMIT = Limit(metric="auc", against="baseline", at_least=-0.001)


def auc_change(point, low, high, rows=20_000):
    """A measured change of the AUC against the baseline, with its interval."""
    estimate = Estimate(point=point, low=low, high=high, rows=rows)
    return Measured(numbers=(Number(metric="auc", against="baseline", estimate=estimate),))


def judge_one(limit, measured):
    (judgement,) = judge((limit,), measured)
    return judgement


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.0009, 0.0002, "accepted"),
        (-0.001, 0.0002, "accepted"),  # a low bound at the limit satisfies it
        (-0.0010001, 0.0002, "undecided"),
        (-0.003, -0.001, "undecided"),  # the high bound still satisfies it
        (-0.003, -0.0010001, "rejected"),
        (-0.001, -0.001, "accepted"),
    ],
)
def test_at_least_limit_compares_the_bounds_of_the_interval(low, high, outcome):
    assert judge_one(AUC_LIMIT, auc_change((low + high) / 2, low, high)).outcome == outcome


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
def test_at_most_limit_compares_the_bounds_of_the_interval(low, high, outcome):
    limit = Limit(metric="p99_ms@64", against="absolute", at_most=2.0)
    estimate = Estimate(point=(low + high) / 2, low=low, high=high)
    measured = Measured(
        numbers=latency_numbers("p99_ms@64", estimate, to_baseline=exact_estimate(1.0))
    )
    judgement = judge_one(limit, measured)
    assert judgement.outcome == outcome
    assert judgement.rows_to_decide is None


floats = st.floats(-1, 1, allow_nan=False)


@given(st.lists(floats, min_size=3, max_size=3), st.tuples(floats, floats), st.booleans())
def test_tightening_a_limit_never_makes_the_outcome_milder(values, bounds, is_at_least):
    low, point, high = sorted(values)
    loose, tight = sorted(bounds) if is_at_least else sorted(bounds, reverse=True)
    bound_name = "at_least" if is_at_least else "at_most"
    outcomes = [
        judge_one(Limit(metric="auc", **{bound_name: bound}), auc_change(point, low, high)).outcome
        for bound in (loose, tight)
    ]
    assert STRICTNESS[outcomes[0]] <= STRICTNESS[outcomes[1]]


@given(st.lists(floats, min_size=3, max_size=3), floats, st.booleans())
def test_negated_numbers_and_limit_have_the_same_outcome(values, bound, is_at_least):
    low, point, high = sorted(values)
    bound_names = ("at_least", "at_most") if is_at_least else ("at_most", "at_least")
    original = judge_one(
        Limit(metric="auc", **{bound_names[0]: bound}), auc_change(point, low, high)
    )
    mirrored = judge_one(
        Limit(metric="auc", **{bound_names[1]: -bound}), auc_change(-point, -high, -low)
    )
    assert (original.outcome, original.rows_to_decide) == (
        mirrored.outcome,
        mirrored.rows_to_decide,
    )


@given(st.lists(floats, min_size=3, max_size=3), floats)
def test_with_rows_to_decide_the_interval_no_longer_contains_the_limit(values, bound):
    low, point, high = sorted(values)
    limit = Limit(metric="auc", at_least=bound)
    judgement = judge_one(limit, auc_change(point, low, high))
    rows = judgement.rows_to_decide
    if rows is None:
        return
    assert judgement.outcome == "undecided"
    assert rows > 20_000
    # With exactly this number, an end of the interval is at the limit. A billionth more avoids
    # rounding errors.
    factor = math.sqrt(20_000 / (rows * (1 + 1e-9)))
    scaled_interval = point - (point - low) * factor, point + (high - point) * factor
    # The tolerance is above float64 rounding, but smaller than the effect of one row.
    is_decided = (
        scaled_interval[0] >= bound - 1e-9 if point >= bound else scaled_interval[1] < bound + 1e-9
    )
    assert is_decided


def test_an_undecided_limit_has_the_number_of_rows_to_decide():
    judgement = judge_one(AUC_LIMIT, auc_change(-0.0004, -0.0011, 0.0003))
    # The distance of the low end from the point, 0.0007, must shrink to 0.0006, the distance of the
    # limit. This takes (7/6)^2 times 20,000 rows, 27,222; the reason rounds up to two digits.
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


def test_a_point_on_the_limit_has_no_number_of_rows_to_decide():
    judgement = judge_one(AUC_LIMIT, auc_change(-0.001, -0.002, 0.0))
    assert judgement.outcome == "undecided"
    assert judgement.rows_to_decide is None
    require_reason(judgement.reasons, "on_the_limit")


def test_limits_on_bytes_compare_exact_numbers():
    numbers = Measured(numbers=byte_numbers(candidate=262_144, baseline=1_000_000))
    small = judge_one(Limit(metric="bytes", against="absolute", at_most=262_144), numbers)
    assert small.outcome == "accepted"
    large = judge_one(Limit(metric="bytes", against="absolute", at_most=262_143), numbers)
    require_reason(large.reasons, "exact_number", number="262,144 bytes", limit="262,143 bytes")
    require_reason(large.reasons, "limit_missed")
    ratio = judge_one(Limit(metric="bytes", against="baseline", at_most=0.25), numbers)
    exact_reason = require_reason(
        ratio.reasons, "exact_number", metric="size vs baseline", relation="<="
    )
    assert (exact_reason.fields["number"], exact_reason.fields["limit"]) == (
        "0.262 times",
        "0.250 times",
    )


def test_a_bound_close_to_the_limit_is_printed_with_more_digits():
    judgement = judge_one(AUC_LIMIT, auc_change(-0.0005, -0.00100002, 0.0))
    fields = require_reason(judgement.reasons, "number_in_interval", relation=">=").fields
    assert (fields["low"], fields["high"]) == ("-0.00100002", "+0.00000000")
    assert fields["limit"] == "-0.00100000"


def test_reasons_of_latency_limits_have_milliseconds():
    limit = Limit(metric="p99_ms@64", against="absolute", at_most=2.0)
    estimate = Estimate(point=2.0625, low=1.5, high=2.25)
    measured = Measured(
        numbers=latency_numbers("p99_ms@64", estimate, to_baseline=exact_estimate(0.5))
    )
    reasons = judge_one(limit, measured).reasons
    # A latency is measured in rounds of calls instead of rows.
    assert codes_of(reasons) == ["number_in_interval", "more_rounds_decide"]
    assert reasons[0].fields == {
        "metric": "p99 latency at batch 64",
        "number": "2.062 ms",
        "low": "1.500",
        "high": "2.250",
        "relation": "<=",
        "limit": "2.000 ms",
    }


def test_quality_numbers_have_the_candidate_and_the_differences_to_baseline_and_champion():
    first, second, third = (
        Estimate(point=x, low=x - 1, high=x + 1, rows=9) for x in (1.0, 2.0, 3.0)
    )
    # ``resolves``, half the width of an interval, is not used here.
    pair = PairedEstimate(baseline=first, candidate=second, difference=third, resolves=1.0)
    measured = Measured(numbers=quality_numbers("gauc", pair, pair), has_champion=True)
    assert measured.of("gauc", "absolute") == second
    assert measured.of("gauc", "baseline") == third
    assert measured.of("gauc", "champion") == third
    assert measured.of("auc", "baseline") is None


CHAMPION_LIMIT = Limit(metric="auc", against="champion", at_least=0.0)


def test_a_limit_against_a_missing_champion_is_accepted_with_a_reason():
    judgement = judge_one(CHAMPION_LIMIT, auc_change(0, 0, 0))
    assert judgement.outcome == "accepted"
    assert judgement.measured is None  # no estimate to compare
    assert codes_of(judgement.reasons) == ["no_champion"]


def test_a_limit_against_an_unmeasured_champion_raises_limit_refused():
    measured = auc_change(0, 0, 0).model_copy(update={"has_champion": True})
    with raises_code(LimitRefused, "number_missing", measured=("auc vs baseline",)):
        judge((CHAMPION_LIMIT,), measured)


def test_a_limit_on_an_unmeasured_metric_raises_limit_refused_with_the_measured_metrics():
    limit = Limit(metric="gauc", at_least=-0.001)
    with raises_code(
        LimitRefused,
        "number_missing",
        limit="gauc vs baseline >= -0.001",
        measured=("auc vs baseline",),
    ):
        judge((limit,), auc_change(0, 0, 0))


@pytest.mark.parametrize("invalid", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["point", "low", "high"])
def test_nan_and_infinity_raise_limit_refused(invalid, field):
    numbers = {"point": 0.0, "low": 0.0, "high": 0.0, field: invalid}
    with raises_code(LimitRefused, "number_broken"):
        judge((AUC_LIMIT,), auc_change(**numbers))


def test_nan_in_a_metric_without_a_limit_raises_limit_refused():
    numbers = auc_change(0, 0, 0).numbers
    invalid = Number(metric="logloss", against="absolute", estimate=exact_estimate(math.nan))
    with raises_code(LimitRefused, "number_broken", number="logloss"):
        judge((AUC_LIMIT,), Measured(numbers=(*numbers, invalid)))


@pytest.mark.parametrize("bound", [math.nan, math.inf, -math.inf])
def test_a_limit_without_a_finite_bound_raises_a_value_error(bound):
    with raises_value_error("finite_number"):
        Limit(metric="auc", at_least=bound)


def test_an_interval_with_low_above_high_raises_limit_refused():
    with raises_code(LimitRefused, "number_broken"):
        judge((AUC_LIMIT,), auc_change(0, 0.1, -0.1))


@pytest.mark.parametrize("measured", [None, auc_change(0, 0, 0)])
def test_a_verdict_without_limits_raises_limit_refused(measured):
    with raises_code(LimitRefused, "limits_missing"):
        verdict("onnxruntime", (), measured, built=True)


def test_a_number_measured_twice_raises_a_value_error():
    numbers = auc_change(0, 0, 0).numbers
    with raises_value_error("numbers_repeated", numbers=("auc vs baseline",)):
        Measured(numbers=numbers * 2)


def test_a_baseline_of_zero_bytes_raises_limit_refused():
    with raises_code(LimitRefused, "sizes_below_one"):
        byte_numbers(candidate=10, baseline=0)


MET_LIMIT = Limit(metric="bytes", against="absolute", at_most=100.0)
MISSED_LIMIT = Limit(metric="bytes", against="absolute", at_most=1.0)
UNDECIDED_LIMIT = Limit(metric="auc", against="baseline", at_least=-0.001)


@pytest.mark.parametrize(
    ("limits", "outcome", "expected"),
    [
        ((MET_LIMIT,), "accepted", ["one_limit_holds"]),
        ((MET_LIMIT, MET_LIMIT), "accepted", ["all_limits_hold"]),
        ((MET_LIMIT, UNDECIDED_LIMIT), "undecided", ["number_in_interval", "more_rows_decide"]),
        ((MET_LIMIT, UNDECIDED_LIMIT, MISSED_LIMIT), "rejected", ["exact_number", "limit_missed"]),
    ],
)
def test_the_outcome_of_a_target_is_the_outcome_of_its_worst_limit(limits, outcome, expected):
    numbers = (*auc_change(-0.0004, -0.0011, 0.0003).numbers, *byte_numbers(10, 40))
    result = verdict("onnxruntime", limits, Measured(numbers=numbers), built=True)
    assert result.outcome == outcome
    assert codes_of(result.reasons) == expected
    assert tuple(item.limit for item in result.judgements) == limits


def test_a_target_that_was_built_but_not_measured_is_built_unmeasured():
    result = verdict("tensorrt-rtx", (MET_LIMIT,), None, built=True)
    assert result.outcome == "built-unmeasured"
    assert result.judgements == ()
    assert codes_of(result.reasons) == ["cannot_run"]


def test_a_target_that_was_not_built_is_rejected():
    result = verdict("tensorrt-rtx", (MET_LIMIT,), None, built=False)
    assert (result.outcome, result.judgements) == ("rejected", ())


def test_numbers_of_a_target_that_was_not_built_raise_limit_refused():
    with raises_code(LimitRefused, "measured_but_not_built"):
        verdict("tensorrt-rtx", (MET_LIMIT,), Measured(numbers=byte_numbers(10, 40)), built=False)


def test_measured_numbers_have_a_json_round_trip():
    measured = Measured(numbers=byte_numbers(10, 40, champion=20), has_champion=True)
    assert Measured.model_validate_json(measured.model_dump_json()) == measured
