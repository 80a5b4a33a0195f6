"""Intervals when rows belong to groups: coverage, exactness, speed, and too few groups."""

import math
import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from reason_codes import with_code

from benchmarks.interval_coverage import METRICS, coverage, heavy_tailed_sizes, simulate
from compressors.contracts import Limit
from compressors.contracts import metric as metric_named
from compressors.metrics import point_estimates
from compressors.metrics.intervals import PairedRows, paired
from compressors.metrics.judge import Measured, judge, quality_numbers

ALL = (*METRICS, "gauc", "ndcg@10")


def assert_coverage(users, runs, slack):
    """Every interval covers 95 % within 1 point plus ``slack`` standard errors of ``runs`` runs."""
    noise = slack * math.sqrt(0.95 * 0.05 / runs)
    for metric, found in coverage(users, runs).items():
        for name, share in found._asdict().items():
            assert share == pytest.approx(0.95, abs=0.01 + noise), (users, metric, name, share)


# 300 runs have a standard error of 1.3 points; 3 of them make 12 comparisons with fixed seeds safe.
@pytest.mark.parametrize("users", [30, 100])
def test_intervals_cover_95_percent_when_users_have_1_to_200_rows(users):
    assert_coverage(users, runs=300, slack=3)


# 4,000 runs have a standard error of 0.34 points.
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("users", [30, 100, 500])
def test_intervals_cover_95_percent_in_4000_simulated_test_sets(users):
    assert_coverage(users, runs=4000, slack=2)


def simulated(users, seed=0):
    random = np.random.default_rng(seed)
    return simulate(random, heavy_tailed_sizes(random, users))


def plain(metric, label, score, group):
    """The metric as ``metrics.py`` computes it."""
    return {
        "auc": lambda: point_estimates.auc(label, score),
        "logloss": lambda: point_estimates.logloss(label, score),
        "normalized_entropy": lambda: point_estimates.normalized_entropy(label, score),
        "gauc": lambda: point_estimates.gauc(label, score, group),
        "ndcg@10": lambda: point_estimates.ndcg(label, score, group, 10),
    }[metric]()


def grouped(metric, label, score, group):
    """The metric on all rows, and without each group."""
    rows = PairedRows(label, score, score, group)
    return metric_named(metric).estimator("rows").of_groups(rows).before


@given(st.data())
def test_every_value_without_a_group_is_the_metric_of_the_other_rows(data):
    rows, users = data.draw(st.integers(30, 80)), data.draw(st.integers(3, 8))
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    user = random.permutation(np.r_[np.arange(users), random.integers(0, users, rows - users)])
    label = random.random(rows) < 0.5
    # Few distinct scores: ties within and across users.
    score = random.integers(1, 9, rows) / 10
    mixed = [u for u in range(users) if 0 < label[user == u].sum() < (user == u).sum()]
    assume(len(mixed) >= 2)
    counted = {"gauc": mixed, "ndcg@10": [u for u in range(users) if label[user == u].any()]}
    for metric in ALL:
        value = grouped(metric, label, score, user)
        assert value.point == pytest.approx(plain(metric, label, score, user), abs=1e-12)
        for place, left in enumerate(counted.get(metric, range(users))):
            rest = user != left
            if 0 < label[rest].sum() < rest.sum():
                expected = plain(metric, label[rest], score[rest], user[rest])
                assert value.left_out[place] == pytest.approx(expected, abs=1e-12), (metric, left)


@pytest.mark.parametrize("metric", ALL)
def test_the_order_of_rows_and_the_names_of_groups_do_not_change_an_interval(metric):
    rows = simulated(50)
    order = np.random.default_rng(1).permutation(rows.label.size)
    names = np.array([f"user {u * 7 % 50:02}" for u in rows.user])
    once = paired(metric, *rows)
    other = paired(metric, *(column[order] for column in rows[:3]), names[order])
    for first, second in zip(once, other, strict=True):
        if first[0] != "resolves":
            # Sums in another order.
            assert first[1].low == pytest.approx(second[1].low, abs=1e-9)
            assert first[1].high == pytest.approx(second[1].high, abs=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_groups_of_one_row_give_the_interval_of_independent_rows(metric):
    rows = simulate(np.random.default_rng(0), np.ones(4000, dtype=np.intp))
    grouped, by_row = paired(metric, *rows), paired(metric, *rows[:3], samples=2000)
    # 2,000 replicates know the width within 3 %; three times that.
    assert grouped.resolves == pytest.approx(by_row.resolves, rel=0.1)


def test_intervals_of_rows_that_are_copies_of_one_another_do_not_shrink():
    rows = simulate(np.random.default_rng(0), np.ones(200, dtype=np.intp))
    copies = [np.repeat(column, 25) for column in rows]
    for metric in METRICS:
        once, repeated = paired(metric, *rows), paired(metric, *copies)
        # A copy carries no information; the difference is the bias of pairs within a user.
        assert repeated.resolves == pytest.approx(once.resolves, rel=0.05)


@pytest.mark.parametrize("metric", ALL)
def test_equal_scores_of_grouped_rows_differ_by_exactly_nothing(metric):
    label, before, _, user = simulated(40)
    found = paired(metric, label, before, before.copy(), user).difference
    assert (found.low, found.point, found.high) == (0, 0, 0)


@pytest.mark.parametrize("users", [1, 2, 9])
@pytest.mark.parametrize("metric", ALL)
def test_fewer_than_ten_groups_are_undecided_and_say_why(metric, users):
    rows = simulate(np.random.default_rng(0), np.full(users, 60))
    found = paired(metric, *rows)
    assert found.difference.low == -found.difference.high
    assert found.difference.unresolved is not None
    limit = Limit(metric=metric, against="baseline", at_least=-0.5)
    numbers = quality_numbers(metric, found)
    (judgement,) = judge((limit,), Measured(numbers=numbers))
    assert judgement.outcome == "undecided"
    assert judgement.rows_to_decide is None
    cause = with_code(judgement.reasons, "no_interval").fields["cause"]
    assert f"{users} group" in cause
    assert "at least 10" in cause


def test_positives_of_few_users_are_undecided_however_many_users_there_are():
    label, before, after, user = simulated(100)
    label = label & (user < 5)
    for metric in ("auc", "normalized_entropy"):
        reason = paired(metric, label, before, after, user).difference.unresolved
        assert reason is not None
        assert "with a positive row" in reason
    assert paired("logloss", label, before, after, user).difference.unresolved is None


def test_an_undecided_limit_on_grouped_rows_counts_rows_and_groups():
    rows = simulated(100)
    found = paired("auc", *rows)
    bound = found.difference.point - 0.5 * found.resolves
    limit = Limit(metric="auc", against="baseline", at_least=bound)
    (judgement,) = judge((limit,), Measured(numbers=quality_numbers("auc", found)))
    assert judgement.outcome == "undecided"
    used = rows.label.size
    assert judgement.groups_to_decide == math.ceil(100 * judgement.rows_to_decide / used)
    with_code(judgement.reasons, "more_groups_decide", rows=used, groups=100)


def test_ends_stay_inside_the_range_of_the_metric():
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(12), 4)
    label = np.tile([0, 0, 1, 1], 12)
    score = label + 0.3 * random.normal(size=48)
    found = paired("auc", label, score, score + 0.3 * random.normal(size=48), user)
    assert 0 <= found.baseline.low <= found.baseline.point <= found.baseline.high <= 1


def test_a_million_rows_with_groups_take_seconds():
    random = np.random.default_rng(0)
    rows = simulate(random, heavy_tailed_sizes(random, 27_000))
    start = time.process_time()
    for metric in METRICS:
        paired(metric, *rows)
    # 2.3 s on an idle core; about five times that for a busy machine.
    assert time.process_time() - start < 12
