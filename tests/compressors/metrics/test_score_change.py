"""Score changes (how much a candidate's scores differ): values, intervals and limits.

Changes of probabilities are absolute. Changes of other scores have the unit ``spread``, the
standard deviation of the baseline's scores. In warnings, ``most`` and ``least`` are the largest
change and the smallest correlation that give no warning. ``changed_top1`` is the share of users
(groups of rows) or queries whose best row or item is another one.
"""

import numpy as np
import pytest
from error_codes import raises_code, raises_value_error
from reason_codes import codes_of, require_reason

from compressors.contracts import Limit
from compressors.contracts.metrics import default_metrics
from compressors.contracts.reasons import Reason
from compressors.errors.metrics import MetricRefused
from compressors.metrics.full_ranking import Interactions, RankedVectors, ranking_queries
from compressors.metrics.intervals import estimate_pair
from compressors.metrics.judge import judge, verdict
from compressors.metrics.measured import Measured, Number, quality_numbers
from compressors.metrics.score_change import change_of_rankings, change_of_rows

SCORE_CHANGES = [name for name, item in default_metrics().items() if item.kind == "score_change"]


def rows_of_users(users, seed=0, change=0.05):
    """Probabilities of two models, and users of 5 rows each; changes differ between users."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), 5)
    before = rng.random(user.size)
    change_of_row = change * (rng.normal(size=users)[user] + rng.normal(size=user.size))
    return before, (before + change_of_row).clip(0, 1), user


def measured_of(estimates, score_unit="probability", extra=()):
    """Measured numbers: an absolute number of each estimate, and the numbers ``extra``."""
    numbers = [Number(metric=m, against="absolute", estimate=e) for m, e in estimates.items()]
    return Measured(numbers=(*numbers, *extra), score_unit=score_unit)


@pytest.mark.parametrize("has_groups", [True, False])
def test_score_changes_equal_a_computation_in_numpy(has_groups):
    before, after, user = rows_of_users(200)
    estimates = change_of_rows(before, after, user if has_groups else None, "probability")
    assert estimates["score_correlation"].point == pytest.approx(
        np.corrcoef(before, after)[0, 1], abs=1e-12
    )
    assert estimates["mean_score_change"].point == pytest.approx(np.abs(after - before).mean())
    assert estimates["max_score_change"].point == np.abs(after - before).max()
    assert ("changed_top1" in estimates) == has_groups
    for estimate in estimates.values():
        assert estimate.low <= estimate.point <= estimate.high
        assert estimate.rows == 1000
        assert estimate.groups == (200 if has_groups else None)


def test_changes_in_spread_are_in_standard_deviations_of_the_baseline():
    before, after, user = rows_of_users(50)
    of_probabilities = change_of_rows(before, after, user, "probability")
    for scale in (1e-3, 1e4):
        estimates = change_of_rows(scale * before, scale * after, user, "spread")
        for metric in ("mean_score_change", "max_score_change"):
            expected = of_probabilities[metric].point / before.std()
            assert estimates[metric].point == pytest.approx(expected, rel=1e-9)
        assert estimates["score_correlation"].point == pytest.approx(
            of_probabilities["score_correlation"].point
        )


def test_a_correlation_close_to_one_is_exact_to_its_distance_from_one():
    rng = np.random.default_rng(0)
    before = rng.normal(size=10_000)
    noise = 1e-4 * rng.normal(size=10_000)
    estimate = change_of_rows(before, before + noise, None, "spread")["score_correlation"]
    # 1 - r is half the ratio of the variances of noise and scores; its standard error is 1.4 %.
    assert 1 - estimate.point == pytest.approx(0.5e-8, rel=0.05)
    assert estimate.low < estimate.point <= estimate.high <= 1


def test_equal_changes_within_users_widen_the_interval():
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(50), 40)
    before = rng.random(2000)
    after = before + 0.1 * rng.normal(size=50)[user]
    by_user = change_of_rows(before, after, user, "probability")["mean_score_change"]
    by_row = change_of_rows(before, after, None, "probability")["mean_score_change"]
    # Each user has 40 rows with equal changes, so the interval is sqrt(40) = 6.3 times as wide.
    assert (by_user.high - by_user.low) / (by_row.high - by_row.low) == pytest.approx(6.3, rel=0.1)


@pytest.mark.parametrize("metric", ["mean_score_change", "score_correlation"])
def test_intervals_of_grouped_rows_cover_95_percent(metric):
    before, after, user = rows_of_users(200_000, seed=99)
    truth = change_of_rows(before, after, user, "probability")[metric].point
    hits = 0
    for seed in range(300):
        estimate = change_of_rows(*rows_of_users(60, seed=seed), "probability")[metric]
        hits += estimate.low <= truth <= estimate.high
    # The share of 300 runs has a standard error of 1.3 percentage points; three are allowed.
    assert hits / 300 == pytest.approx(0.95, abs=0.039)


def test_changed_top1_is_the_share_of_groups_with_another_best_row():
    user = np.array(["a", "a", "b", "b", "c", "c", "single"])
    before = np.array([0.9, 0.1, 0.2, 0.8, 0.5, 0.4, 0.3])
    after = np.array([0.6, 0.5, 0.7, 0.3, 0.5, 0.5, 0.9])
    estimate = change_of_rows(before, after, user, "probability")["changed_top1"]
    # User a has the same best row, and b another one. User c has two best rows, one of which is the
    # baseline's. The user with a single row does not count.
    assert estimate.point == pytest.approx((0 + 1 + 0.5) / 3)
    assert estimate.groups == 3


def test_changed_top1_of_zero_among_50_groups_has_a_positive_upper_bound():
    before, _, user = rows_of_users(50)
    estimate = change_of_rows(before, before, user, "probability")["changed_top1"]
    # For 0 of n groups, the upper end of Wilson's interval is z^2 / (n + z^2).
    assert (estimate.low, estimate.point) == (0, 0)
    assert estimate.high == pytest.approx(1.96**2 / (50 + 1.96**2), rel=1e-3)
    limit = Limit.parse("changed_top1 <= 0.02")
    (judgement,) = judge((limit,), measured_of({"changed_top1": estimate}))
    assert judgement.outcome == "undecided"


def test_score_changes_of_equal_scores_are_zero():
    before, _, user = rows_of_users(50)
    estimates = change_of_rows(before, before.copy(), user, "probability")
    assert estimates["score_correlation"].low == estimates["score_correlation"].high == 1
    for metric in ("mean_score_change", "max_score_change"):
        assert (estimates[metric].low, estimates[metric].point, estimates[metric].high) == (0, 0, 0)


def test_a_candidate_with_one_score_for_all_rows_has_correlation_zero():
    before, _, user = rows_of_users(50)
    estimates = change_of_rows(before, np.full(before.size, 0.5), user, "probability")
    assert estimates["score_correlation"].point == 0


@pytest.mark.parametrize("unit", ["probability", "spread"])
def test_few_groups_give_no_interval_and_are_undecided(unit):
    before, after, user = rows_of_users(4)
    estimates = change_of_rows(before, after, user, unit)
    limits = (Limit.parse("score_correlation >= 0.5"), Limit.parse("mean_score_change <= 0.9"))
    for judgement in judge(limits, measured_of(estimates, unit)):
        assert judgement.outcome == "undecided"
        cause = require_reason(judgement.reasons, "no_interval").fields["cause"]
        assert "4 groups in the data" in cause


def test_nan_or_unpaired_scores_raise_metric_refused():
    with raises_code(MetricRefused, "scores_not_finite"):
        change_of_rows(np.array([1.0, np.nan]), np.ones(2), None, "spread")
    with raises_code(MetricRefused, "scores_unpaired"):
        change_of_rows(np.ones(3), np.ones(2), None, "spread")


def retrieval_models(queries=40, items=60, seed=0, noise=0.1):
    """Random vectors without and with noise; each query has a relevant and a hidden (seen) item."""
    rng = np.random.default_rng(seed)
    test = Interactions(np.arange(queries), rng.integers(0, items, queries), np.ones(queries))
    hidden = Interactions(np.arange(queries), (np.asarray(test.item) + 1) % items, np.ones(queries))
    ranking = ranking_queries(test, [hidden], np.arange(items))
    query, item = rng.normal(size=(2, max(queries, items), 8)).astype(np.float32)
    query, item = query[:queries], item[:items]
    changed = [(v + noise * rng.normal(size=v.shape)).astype(np.float32) for v in (query, item)]
    return RankedVectors(query, item, ranking), RankedVectors(*changed, ranking)


@pytest.mark.parametrize("queries_at_once", [None, 4])
def test_score_changes_of_retrieval_compare_all_ranked_pairs(queries_at_once, monkeypatch):
    if queries_at_once is not None:
        # ``change_of_rankings`` has four arrays of scores at once, each with 60 items per query.
        scores_at_once = 4 * 60 * queries_at_once
        monkeypatch.setattr("compressors.metrics.score_change.SCORES_AT_ONCE", scores_at_once)
    before, after = retrieval_models()
    estimates = change_of_rankings(before, after, rows=40)
    scores = [model.query @ model.item.T for model in (before, after)]
    is_ranked = np.ones(scores[0].shape, bool)
    is_ranked.reshape(-1)[before.queries.hidden] = False
    x, y = (s[is_ranked].astype(float) for s in scores)
    # float32 sums in another order
    tolerance = {"rel": 1e-5}
    assert estimates["score_correlation"].point == pytest.approx(
        np.corrcoef(x, y)[0, 1], **tolerance
    )
    change = np.abs(y - x) / x.std()
    assert estimates["mean_score_change"].point == pytest.approx(change.mean(), **tolerance)
    assert estimates["max_score_change"].point == pytest.approx(change.max(), **tolerance)
    ranked = [np.argsort(np.where(is_ranked, -s, np.inf), axis=1) for s in scores]
    assert estimates["changed_top1"].point == (ranked[0][:, 0] != ranked[1][:, 0]).mean()
    overlap = [len({*a[:20]} & {*b[:20]}) / 20 for a, b in zip(*ranked, strict=True)]
    assert estimates["top20_overlap"].point == pytest.approx(np.mean(overlap))
    assert {estimate.groups for estimate in estimates.values()} == {40}


def test_score_changes_of_equal_vectors_are_zero():
    before, _ = retrieval_models()
    estimates = change_of_rankings(before, before, rows=40)
    assert estimates["score_correlation"].low == 1
    assert estimates["max_score_change"].point == estimates["changed_top1"].point == 0
    assert estimates["top20_overlap"].point == 1


@pytest.mark.parametrize("metric", SCORE_CHANGES)
@pytest.mark.parametrize("against", ["baseline", "champion"])
def test_a_score_change_limit_with_a_reference_raises_a_value_error(metric, against):
    with raises_value_error("score_change_with_reference", metric=metric, against=against):
        Limit.parse(f"{metric} vs {against} >= 0.5")
    with raises_value_error("score_change_with_reference", metric=metric, against=against):
        Limit(metric=metric, against=against, at_most=0.5)


@pytest.mark.parametrize("metric", SCORE_CHANGES)
def test_a_limit_of_an_order_file_on_a_score_change_needs_no_reference(metric):
    assert Limit.model_validate({"metric": metric, "at_most": 0.5}).against == "absolute"
    assert str(Limit.parse(f"{metric} <= 0.5")) == f"{metric} <= 0.5"


def auc_numbers():
    """Measured AUC of random scores."""
    rng = np.random.default_rng(0)
    label = rng.random(500) < 0.5
    pair = estimate_pair("auc", label, rng.random(500), rng.random(500))
    return quality_numbers("auc", pair)


def verdict_for_change(change, *limits):
    """The verdict on limits if scores change by about ``change``, and the measured estimates."""
    before, after, user = rows_of_users(300, change=change)
    estimates = change_of_rows(before, after, user, "probability")
    parsed = tuple(Limit.parse(text) for text in limits)
    return verdict(
        "onnxruntime", parsed, measured_of(estimates, extra=auc_numbers()), built=True
    ), estimates


def test_an_accepted_verdict_reports_the_score_change():
    result, estimates = verdict_for_change(0.005, "auc >= 0.3")
    assert result.outcome == "accepted"
    assert codes_of(result.reasons) == ["one_limit_holds", "score_changes"]
    max_change = estimates["max_score_change"].point
    require_reason(result.reasons, "largest_change_in", change=max_change, unit="probability")
    require_reason(result.reasons, "other_top1", share=estimates["changed_top1"].point, groups=300)
    correlation = require_reason(result.reasons, "correlation").fields["correlation"]
    # Rounded down to six places.
    assert estimates["score_correlation"].point - 1e-6 <= correlation
    assert correlation <= estimates["score_correlation"].point


# The AUC is about 0.5, so these limits are accepted, rejected and undecided.
@pytest.mark.parametrize("limit", ["auc >= 0.3", "auc >= 0.9", "auc >= 0.5"])
def test_large_score_changes_without_a_limit_are_a_warning_for_every_outcome(limit):
    result, _ = verdict_for_change(0.1, limit)
    require_reason(result.reasons, "large_score_changes")
    require_reason(result.reasons, "probability_change", most=0.1)
    require_reason(result.reasons, "low_correlation", least=0.99)


def test_a_limit_on_score_change_replaces_the_warning_and_is_named_when_it_fails():
    result, estimates = verdict_for_change(0.1, "auc >= 0.3", "max_score_change <= 0.05")
    assert result.outcome == "rejected"
    point = estimates["max_score_change"].point
    assert result.reasons == (
        Reason(
            "most_of_rows",
            metric="largest score change",
            number=f"{point:.4f}",
            rows=1500,
            relation="<=",
            limit="0.0500",
        ),
        Reason("limit_missed"),
    )
    result, _ = verdict_for_change(0.1, "auc >= 0.3", "mean_score_change <= 0.001")
    assert codes_of(result.reasons) == ["number_in_interval", "limit_missed"]
    require_reason(result.reasons, "number_in_interval", metric="mean score change")


def test_each_of_several_outputs_has_a_summary_and_a_warning_unless_a_limit_covers_it():
    before, after, user = rows_of_users(300, change=0.1)
    small, large = (
        change_of_rows(before, scores, user, "probability") for scores in (before, after)
    )
    estimates = {f"{name}[calm]": value for name, value in small.items()}
    estimates |= {f"{name}[wild]": value for name, value in large.items()}
    numbers = [Number(metric=m, against="absolute", estimate=e) for m, e in estimates.items()]
    units = {"calm": "probability", "wild": "probability"}
    measured = Measured(numbers=tuple(numbers), units_of_outputs=units)
    assert measured.find_unit("mean_score_change[wild]") == "probability"

    def reasons_with(limit):
        result = verdict("onnxruntime", (Limit.parse(limit),), measured, built=True)
        return {
            (reason.code, reason.fields["output"])
            for reason in result.reasons
            if "output" in reason.fields
        }

    summaries = {("score_changes_of_output", "calm"), ("score_changes_of_output", "wild")}
    warning = ("large_score_changes_of_output", "wild")
    assert reasons_with("score_correlation[calm] >= 0.999") == {*summaries, warning}
    assert reasons_with("max_score_change[wild] <= 0.9") == summaries


def test_measurements_stored_before_score_changes_load_and_are_judged():
    old = Measured(numbers=auc_numbers()).model_dump()
    del old["score_unit"]
    for number in old["numbers"]:
        for field in ("groups", "unresolved"):
            del number["estimate"][field]
    loaded = Measured.model_validate(old)
    result = verdict("onnxruntime", (Limit.parse("auc >= 0.3"),), loaded, built=True)
    assert codes_of(result.reasons) == ["one_limit_holds"]
