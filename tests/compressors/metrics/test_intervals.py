"""Bootstrap intervals: exact per replicate, honest in coverage, cheap."""

import time

import numpy as np
import pytest
from error_codes import raises_code
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import norm

from compressors.errors.metrics import MetricRefused
from compressors.metrics import point_estimates
from compressors.metrics.estimators.auc import auc_statistic
from compressors.metrics.intervals import (
    latency,
    latency_ratio,
    paired,
    rounds_needed,
)

ROW_METRICS = ("auc", "logloss", "normalized_entropy")
METRICS = (*ROW_METRICS, "gauc", "ndcg@10")
# Sums in another order than the metric's own: a few float64 roundings.
EXACT = 1e-12


def impressions(rows, seed=0, noise=0.3):
    """Clicks, the probabilities of two related models, and users."""
    random = np.random.default_rng(seed)
    label = (random.random(rows) < 0.3).astype(np.float32)
    score = random.normal(size=rows) + label
    other = score + noise * random.normal(size=rows)
    sigmoid = [1 / (1 + np.exp(-logit)) for logit in (score, other)]
    return label, *sigmoid, random.integers(0, max(2, rows // 12), rows)


@given(st.data())
def test_the_weighted_auc_equals_the_auc_of_the_rows_written_out(data):
    rows = data.draw(st.integers(2, 40))
    draw = lambda values: np.array(  # noqa: E731
        data.draw(st.lists(values, min_size=rows, max_size=rows))
    )
    label, score = draw(st.integers(0, 1)), draw(st.sampled_from([-1.0, 0.0, 0.5, 0.25]))
    counts = draw(st.integers(0, 3))
    assume(0 < label.sum() < rows)
    drawn = np.repeat(np.arange(rows), counts)
    value = auc_statistic(label, score)(counts)
    if drawn.size and 0 < label[drawn].sum() < drawn.size:
        # Both are one integer count over twice the pairs: equal to the last bit.
        assert value == point_estimates.auc(label[drawn], score[drawn])
    else:
        assert np.isnan(value)


@pytest.mark.parametrize("metric", METRICS)
def test_points_are_the_metrics_own_and_the_difference_is_theirs(metric):
    label, before, after, group = impressions(600)
    plain = {
        "auc": lambda s: point_estimates.auc(label, s),
        "logloss": lambda s: point_estimates.logloss(label, s),
        "normalized_entropy": lambda s: point_estimates.normalized_entropy(label, s),
        "gauc": lambda s: point_estimates.gauc(label, s, group),
        "ndcg@10": lambda s: point_estimates.ndcg(label, s, group, 10),
    }[metric]
    got = paired(metric, label, before, after, group, samples=200)
    assert got.baseline.point == pytest.approx(plain(before), abs=EXACT)
    assert got.candidate.point == pytest.approx(plain(after), abs=EXACT)
    assert got.difference.point == pytest.approx(plain(after) - plain(before), abs=EXACT)
    assert got.resolves == (got.difference.high - got.difference.low) / 2
    assert got.baseline.rows == got.candidate.rows == got.difference.rows == 600
    assert got.baseline.low < got.baseline.point < got.baseline.high


@pytest.mark.parametrize("metric", ROW_METRICS)
def test_the_same_seed_gives_the_same_interval_and_another_seed_another(metric):
    data = impressions(600)[:3]
    once, again = (paired(metric, *data, samples=100, seed=5) for _ in range(2))
    assert once == again
    assert once.difference.low != paired(metric, *data, samples=100, seed=6).difference.low


@pytest.mark.parametrize("metric", METRICS)
def test_a_candidate_that_scores_the_same_differs_by_exactly_nothing(metric):
    label, before, _, group = impressions(600)
    got = paired(metric, label, before, before.copy(), group, samples=100)
    assert (got.difference.low, got.difference.point, got.difference.high) == (0, 0, 0)
    assert got.resolves == 0
    assert got.baseline == got.candidate


@pytest.mark.parametrize("metric", ["auc", "logloss", "normalized_entropy"])
def test_equal_scores_of_rows_without_groups_differ_by_exactly_nothing(metric):
    label, before, _, _ = impressions(600)
    got = paired(metric, label, before, before.copy(), samples=100)
    assert (got.difference.low, got.difference.point, got.difference.high) == (0, 0, 0)


def test_the_interval_of_a_mean_loss_is_the_normal_one_of_95_percent():
    random = np.random.default_rng(4)
    label = random.random(5000) < 0.3
    first, second = 0.2 + 0.2 * random.random((2, 5000))
    got = paired("logloss", label, first, second, samples=2000)
    losses = [-np.log(np.where(label, score, 1 - score)) for score in (first, second)]
    for estimate, values in (
        (got.baseline, losses[0]),
        (got.candidate, losses[1]),
        (got.difference, losses[1] - losses[0]),
    ):
        reach = 1.96 * values.std(ddof=1) / values.size**0.5
        # A 2.5 % quantile of 2000 replicates varies by 3 % of the reach; three of that.
        assert (estimate.high - estimate.low) / 2 == pytest.approx(reach, rel=0.09)


def test_pairing_makes_the_difference_far_narrower_than_either_model():
    got = paired("auc", *impressions(2000, noise=0.05)[:3], samples=200)
    assert got.resolves < (got.baseline.high - got.baseline.low) / 2 / 5


def test_four_times_the_rows_halve_what_is_resolved():
    small = paired("auc", *impressions(4_000, seed=1)[:3], samples=600).resolves
    large = paired("auc", *impressions(16_000, seed=2)[:3], samples=600).resolves
    # The half-width of 600 replicates itself varies by about 5 %, so the ratio by 7 %; 3 sigma.
    assert small / large == pytest.approx(2, rel=0.21)


def covered(metric, truth, draw, runs=100, samples=300):
    """In how many of ``runs`` test sets the interval of the difference holds the truth."""
    hits = 0
    for seed in range(runs):
        label, before, after, group = draw(np.random.default_rng(1000 + seed))
        got = paired(metric, label, before, after, group, samples=samples, seed=seed)
        hits += got.difference.low <= truth <= got.difference.high
    return hits


# 100 runs of a 95 % interval hold the truth 95 +- 2.2 times. 88 to 99 is three sigma down (the
# percentile interval of a small sample is a little short) and two up. Seeds are fixed.
def test_the_auc_interval_holds_the_true_difference_as_often_as_it_says():
    def draw(random):
        label = np.repeat([1, 0], [150, 250])
        shared, own, other = random.normal(size=(3, 400))
        return label, shared + own + 1.0 * label, shared + other + 0.8 * label, None

    # Two normals of variance 2 whose means lie d apart: AUC = Phi(d / 2).
    truth = norm.cdf(0.8 / 2) - norm.cdf(1.0 / 2)
    assert 88 <= covered("auc", truth, draw) <= 99


def test_the_logloss_interval_holds_the_true_difference_as_often_as_it_says():
    chance = np.array([0.1, 0.5, 0.8])

    def loss(guess):
        return float((-chance * np.log(guess) - (1 - chance) * np.log(1 - guess)).mean())

    guesses = np.array([0.15, 0.45, 0.7]), np.array([0.2, 0.5, 0.75])

    def draw(random):
        kind = random.integers(0, 3, 300)
        label = random.random(300) < chance[kind]
        return label, guesses[0][kind], guesses[1][kind], None

    truth = loss(guesses[1]) - loss(guesses[0])
    assert 88 <= covered("logloss", truth, draw) <= 99


def clustered(random):
    """60 users of 12 rows who differ in how much worse the candidate is for them."""
    group = np.repeat(np.arange(60), 12)
    label = np.tile(np.repeat([1, 0], 6), 60)
    # Half of the users are served well by both, half only by the baseline.
    suits = (random.random(60) < 0.5)[group]
    noise = random.normal(size=(2, group.size))
    return label, noise[0] + 1.0 * label, noise[1] + 2.0 * suits * label, group


def test_the_gauc_interval_holds_the_truth_when_users_differ():
    # Normals of variance 1 whose means lie d apart: AUC = Phi(d / sqrt 2).
    good, none, base = norm.cdf(2 / np.sqrt(2)), 0.5, norm.cdf(1 / np.sqrt(2))
    assert 88 <= covered("gauc", (good + none) / 2 - base, clustered) <= 99


def test_gauc_draws_whole_users_not_rows():
    label, before, after, group = clustered(np.random.default_rng(0))
    got = paired("gauc", label, before, after, group, samples=1000)
    per_user = (
        point_estimates.group_auc(label, after, group)[0]
        - point_estimates.group_auc(label, before, group)[0]
    )
    # Equal users: the t interval of a mean over users, whose 97.5 % quantile is 2.001.
    assert got.resolves == pytest.approx(2.001 * per_user.std(ddof=1) / np.sqrt(60), rel=1e-3)


def test_twenty_thousand_rows_and_a_thousand_samples_take_two_seconds():
    label, before, after, _ = impressions(20_000)
    start = time.process_time()
    paired("auc", label, before, after, samples=1000)
    # 0.2 s on an idle core; ten times that for a busy machine.
    assert time.process_time() - start < 2


@pytest.mark.parametrize("quantile", [0.5, 0.99])
def test_the_latency_interval_holds_the_true_quantile_as_often_as_it_says(quantile):
    truth = float(np.exp(norm.ppf(quantile)))
    hits = 0
    for seed in range(100):
        times = np.random.default_rng(seed).lognormal(size=1000)
        got = latency(times, quantile, samples=200, seed=seed)
        hits += got.low <= truth <= got.high
    # As above; a bootstrap of the 99th percentile of 1000 rounds has ten rounds beyond it.
    assert 87 <= hits <= 100


def test_interleaved_rounds_are_drawn_together_so_that_a_shared_slowdown_cancels():
    times = np.random.default_rng(0).lognormal(size=500)
    together = latency_ratio(times, times / 4, 0.99)
    assert (together.low, together.point, together.high) == (0.25, 0.25, 0.25)
    apart = latency_ratio(times, times[:-1] / 4, 0.99)
    assert apart.low < 0.25 < apart.high


def test_latency_is_deterministic_and_in_milliseconds():
    times = np.random.default_rng(0).uniform(2, 3, size=1000)
    once, again = latency(times, 0.5, seed=3), latency(times, 0.5, seed=3)
    assert once == again
    assert once.point == np.median(times)
    assert once.low < once.point < once.high
    assert once.rows is None


def test_blocks_do_not_change_the_latency_interval(monkeypatch):
    times = np.random.default_rng(0).uniform(2, 3, size=500)
    whole = latency(times, 0.99)
    monkeypatch.setattr("compressors.metrics.intervals.LATENCY_BLOCK_BYTES", 100_000)
    assert latency(times, 0.99) == whole


def test_rounds_needed_is_where_the_slowest_round_passes_the_quantile_with_97_5_percent():
    for quantile in (0.5, 0.9, 0.99):
        rounds = rounds_needed(quantile)
        assert quantile**rounds <= 0.025 < quantile ** (rounds - 1)
    assert (rounds_needed(0.5), rounds_needed(0.99)) == (6, 368)


FINE = impressions(100)


@pytest.mark.parametrize(
    ("call", "code", "fields"),
    [
        (lambda: paired("recall", *FINE), "interval_metric_unknown", {"metric": "recall"}),
        (lambda: paired("ndcg@0", *FINE), "interval_metric_unknown", {"metric": "ndcg@0"}),
        (lambda: paired("gauc", *FINE[:3]), "metric_needs_groups", {"metric": "gauc"}),
        (
            lambda: paired("auc", *FINE, samples=99),
            "bootstrap_samples_few",
            {"least": 100, "got": 99},
        ),
        (
            lambda: paired("auc", FINE[0], FINE[1], FINE[2][:-1]),
            "lengths_differ",
            {"lengths": (100, 99)},
        ),
        (
            lambda: paired("auc", FINE[0], FINE[1], np.full(100, np.nan)),
            "column_not_finite",
            {"column": "score", "count": 100},
        ),
        (
            lambda: paired("logloss", FINE[0], FINE[1], FINE[2] + 9),
            "probabilities_outside",
            {"count": 100, "rows": 100},
        ),
        (
            lambda: paired("auc", np.arange(100) < 9, *FINE[1:3]),
            "units_few",
            {"least": 10, "units": "positive rows", "got": 9},
        ),
        (
            lambda: paired("auc", np.arange(100) > 8, *FINE[1:3]),
            "units_few",
            {"least": 10, "units": "negative rows", "got": 9},
        ),
        (
            lambda: paired("logloss", *(column[:9] for column in FINE[:3])),
            "units_few",
            {"least": 10, "units": "rows", "got": 9},
        ),
        (lambda: paired("gauc", *FINE[:3], np.arange(100)), "groups_of_one_class", {}),
        (lambda: paired("ndcg@5", 0 * FINE[0], *FINE[1:]), "relevant_items_missing", {}),
        (lambda: latency(np.ones(367), 0.99), "rounds_few", {"least": 368, "got": 367}),
        (
            lambda: latency(np.r_[np.ones(500), np.nan], 0.5),
            "durations_unusable",
            {"shape": (501,), "count": 1},
        ),
        (lambda: latency(np.zeros(500), 0.5), "durations_unusable", {"count": 500}),
        (lambda: latency(np.ones(500), 99), "quantile_outside", {"quantile": 99}),
        (
            lambda: latency_ratio(np.ones(500), np.ones(300), 0.99),
            "rounds_few",
            {"times": "candidate latency", "got": 300},
        ),
    ],
)
def test_what_has_no_interval_is_refused(call, code, fields):
    with raises_code(MetricRefused, code, **fields):
        call()
