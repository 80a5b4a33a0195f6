"""Score change: values, intervals, limits on it and what verdicts say about it."""

import numpy as np
import pytest
from error_codes import raises_code, raises_value_error
from reason_codes import codes_of, with_code

from compressors.contracts import Limit
from compressors.contracts.metrics import usual_metrics
from compressors.contracts.reasons import Reason
from compressors.errors.metrics import MetricRefused
from compressors.metrics.full_ranking import Interactions, RankedVectors, ranking_queries
from compressors.metrics.intervals import paired
from compressors.metrics.judge import Measured, Number, judge, quality_numbers, verdict
from compressors.metrics.score_change import change_of_rankings, change_of_rows

SCORE_CHANGES = [name for name, item in usual_metrics().items() if item.kind == "score_change"]


def rows_of(users, seed=0, change=0.05):
    """Probabilities of two models for users of 5 rows; users differ in how much they change."""
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), 5)
    before = random.random(user.size)
    moved = change * (random.normal(size=users)[user] + random.normal(size=user.size))
    return before, (before + moved).clip(0, 1), user


def measured(found, unit="probability", extra=()):
    numbers = [Number(metric=m, against="absolute", estimate=e) for m, e in found.items()]
    return Measured(numbers=(*numbers, *extra), score_unit=unit)


@pytest.mark.parametrize("grouped", [True, False])
def test_values_are_those_of_numpy(grouped):
    before, after, user = rows_of(200)
    found = change_of_rows(before, after, user if grouped else None, "probability")
    assert found["score_correlation"].point == pytest.approx(
        np.corrcoef(before, after)[0, 1], abs=1e-12
    )
    assert found["mean_score_change"].point == pytest.approx(np.abs(after - before).mean())
    assert found["max_score_change"].point == np.abs(after - before).max()
    assert ("changed_top1" in found) == grouped
    for estimate in found.values():
        assert estimate.low <= estimate.point <= estimate.high
        assert estimate.rows == 1000
        assert estimate.groups == (200 if grouped else None)


def test_changes_of_scores_without_a_scale_are_in_standard_deviations_of_the_baseline():
    before, after, user = rows_of(50)
    plain = change_of_rows(before, after, user, "probability")
    for scale in (1e-3, 1e4):
        found = change_of_rows(scale * before, scale * after, user, "spread")
        for metric in ("mean_score_change", "max_score_change"):
            expected = plain[metric].point / before.std()
            assert found[metric].point == pytest.approx(expected, rel=1e-9)
        assert found["score_correlation"].point == pytest.approx(plain["score_correlation"].point)


def test_a_correlation_close_to_one_keeps_its_digits():
    random = np.random.default_rng(0)
    before = random.normal(size=10_000)
    noise = 1e-4 * random.normal(size=10_000)
    found = change_of_rows(before, before + noise, None, "spread")["score_correlation"]
    # 1 - r is half the variance of the noise over that of the scores, known to 1.4 % from 10,000.
    assert 1 - found.point == pytest.approx(0.5e-8, rel=0.05)
    assert found.low < found.point <= found.high <= 1


def test_users_whose_rows_change_together_widen_the_interval():
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(50), 40)
    before = random.random(2000)
    after = before + 0.1 * random.normal(size=50)[user]
    by_user = change_of_rows(before, after, user, "probability")["mean_score_change"]
    by_row = change_of_rows(before, after, None, "probability")["mean_score_change"]
    # 40 equal changes per user: sqrt(40) = 6.3 times as wide.
    assert (by_user.high - by_user.low) / (by_row.high - by_row.low) == pytest.approx(6.3, rel=0.1)


@pytest.mark.parametrize("metric", ["mean_score_change", "score_correlation"])
def test_intervals_of_grouped_rows_cover_95_percent(metric):
    before, after, user = rows_of(200_000, seed=99)
    truth = change_of_rows(before, after, user, "probability")[metric].point
    hits = 0
    for seed in range(300):
        found = change_of_rows(*rows_of(60, seed=seed), "probability")[metric]
        hits += found.low <= truth <= found.high
    # 300 runs have a standard error of 1.3 points; 3 of them.
    assert hits / 300 == pytest.approx(0.95, abs=0.039)


def test_changed_top1_counts_groups_whose_best_row_is_another_one():
    user = np.array(["a", "a", "b", "b", "c", "c", "single"])
    before = np.array([0.9, 0.1, 0.2, 0.8, 0.5, 0.4, 0.3])
    after = np.array([0.6, 0.5, 0.7, 0.3, 0.5, 0.5, 0.9])
    found = change_of_rows(before, after, user, "probability")["changed_top1"]
    # a: same; b: another; c: two best rows, one of them is the baseline's; 'single' has no choice.
    assert found.point == pytest.approx((0 + 1 + 0.5) / 3)
    assert found.groups == 3


def test_no_changed_top1_among_few_groups_does_not_prove_that_none_changes():
    before, _, user = rows_of(50)
    found = change_of_rows(before, before, user, "probability")["changed_top1"]
    # Wilson's upper end at 0 of n: z^2 / (n + z^2).
    assert (found.low, found.point) == (0, 0)
    assert found.high == pytest.approx(1.96**2 / (50 + 1.96**2), rel=1e-3)
    limit = Limit.parse("changed_top1 <= 0.02")
    (judgement,) = judge((limit,), measured({"changed_top1": found}))
    assert judgement.outcome == "undecided"


def test_equal_scores_do_not_change():
    before, _, user = rows_of(50)
    found = change_of_rows(before, before.copy(), user, "probability")
    assert found["score_correlation"].low == found["score_correlation"].high == 1
    for metric in ("mean_score_change", "max_score_change"):
        assert (found[metric].low, found[metric].point, found[metric].high) == (0, 0, 0)


def test_a_candidate_with_one_score_for_all_rows_has_correlation_zero():
    before, _, user = rows_of(50)
    found = change_of_rows(before, np.full(before.size, 0.5), user, "probability")
    assert found["score_correlation"].point == 0


@pytest.mark.parametrize("unit", ["probability", "spread"])
def test_few_groups_give_no_interval_and_are_undecided(unit):
    before, after, user = rows_of(4)
    found = change_of_rows(before, after, user, unit)
    limits = (Limit.parse("score_correlation >= 0.5"), Limit.parse("mean_score_change <= 0.9"))
    for judgement in judge(limits, measured(found, unit)):
        assert judgement.outcome == "undecided"
        cause = with_code(judgement.reasons, "no_interval").fields["cause"]
        assert "4 groups in the data" in cause


def test_scores_that_cannot_be_compared_are_refused():
    with raises_code(MetricRefused, "scores_not_finite"):
        change_of_rows(np.array([1.0, np.nan]), np.ones(2), None, "spread")
    with raises_code(MetricRefused, "scores_unpaired"):
        change_of_rows(np.ones(3), np.ones(2), None, "spread")


def retrieval_models(queries=40, items=60, seed=0, noise=0.1):
    random = np.random.default_rng(seed)
    test = Interactions(np.arange(queries), random.integers(0, items, queries), np.ones(queries))
    hidden = Interactions(np.arange(queries), (np.asarray(test.item) + 1) % items, np.ones(queries))
    what = ranking_queries(test, [hidden], np.arange(items))
    query, item = random.normal(size=(2, max(queries, items), 8)).astype(np.float32)
    query, item = query[:queries], item[:items]
    moved = [(v + noise * random.normal(size=v.shape)).astype(np.float32) for v in (query, item)]
    return RankedVectors(query, item, what), RankedVectors(*moved, what)


@pytest.mark.parametrize("at_once", [None, 240])
def test_score_changes_of_retrieval_are_those_of_all_shown_pairs(at_once, monkeypatch):
    if at_once is not None:
        monkeypatch.setattr("compressors.metrics.score_change.SCORES_AT_ONCE", 4 * at_once)
    before, after = retrieval_models()
    found = change_of_rankings(before, after, rows=40)
    scores = [model.query @ model.item.T for model in (before, after)]
    shown = np.ones(scores[0].shape, bool)
    shown.reshape(-1)[before.what.hidden] = False
    x, y = (s[shown].astype(float) for s in scores)
    # float32 products in another order.
    close = {"rel": 1e-5}
    assert found["score_correlation"].point == pytest.approx(np.corrcoef(x, y)[0, 1], **close)
    change = np.abs(y - x) / x.std()
    assert found["mean_score_change"].point == pytest.approx(change.mean(), **close)
    assert found["max_score_change"].point == pytest.approx(change.max(), **close)
    ranked = [np.argsort(np.where(shown, -s, np.inf), axis=1) for s in scores]
    assert found["changed_top1"].point == (ranked[0][:, 0] != ranked[1][:, 0]).mean()
    overlap = [len({*a[:20]} & {*b[:20]}) / 20 for a, b in zip(*ranked, strict=True)]
    assert found["top20_overlap"].point == pytest.approx(np.mean(overlap))
    assert {estimate.groups for estimate in found.values()} == {40}


def test_equal_vectors_rank_equally():
    before, _ = retrieval_models()
    found = change_of_rankings(before, before, rows=40)
    assert found["score_correlation"].low == 1
    assert found["max_score_change"].point == found["changed_top1"].point == 0
    assert found["top20_overlap"].point == 1


@pytest.mark.parametrize("metric", SCORE_CHANGES)
@pytest.mark.parametrize("against", ["baseline", "champion"])
def test_score_changes_have_no_other_reference(metric, against):
    with raises_value_error("score_change_with_reference", metric=metric, against=against):
        Limit.parse(f"{metric} vs {against} >= 0.5")
    with raises_value_error("score_change_with_reference", metric=metric, against=against):
        Limit(metric=metric, against=against, at_most=0.5)


@pytest.mark.parametrize("metric", SCORE_CHANGES)
def test_a_limit_of_an_order_file_on_a_score_change_needs_no_reference(metric):
    assert Limit.model_validate({"metric": metric, "at_most": 0.5}).against == "absolute"
    assert str(Limit.parse(f"{metric} <= 0.5")) == f"{metric} <= 0.5"


def quality():
    random = np.random.default_rng(0)
    label = random.random(500) < 0.5
    pair = paired("auc", label, random.random(500), random.random(500))
    return quality_numbers("auc", pair)


def judged(change, *limits):
    before, after, user = rows_of(300, change=change)
    found = change_of_rows(before, after, user, "probability")
    parsed = tuple(Limit.parse(text) for text in limits)
    return verdict("onnxruntime", parsed, measured(found, extra=quality()), built=True), found


def test_an_accepted_verdict_reports_the_score_change():
    said, found = judged(0.005, "auc >= 0.3")
    assert said.outcome == "accepted"
    assert codes_of(said.reasons) == ["one_limit_holds", "score_changes"]
    largest = found["max_score_change"].point
    with_code(said.reasons, "largest_change_in", change=largest, unit="probability")
    with_code(said.reasons, "other_top1", share=found["changed_top1"].point, groups=300)
    correlation = with_code(said.reasons, "correlation").fields["correlation"]
    # Rounded down to six places.
    assert found["score_correlation"].point - 1e-6 <= correlation
    assert correlation <= found["score_correlation"].point


@pytest.mark.parametrize("limit", ["auc >= 0.3", "auc >= 0.9", "auc >= 0.5"])
def test_large_score_changes_without_a_limit_are_a_warning_for_every_outcome(limit):
    said, _ = judged(0.1, limit)
    with_code(said.reasons, "large_score_changes")
    with_code(said.reasons, "probability_change", most=0.1)
    with_code(said.reasons, "low_correlation", least=0.99)


def test_a_limit_on_score_change_replaces_the_warning_and_is_named_when_it_fails():
    said, found = judged(0.1, "auc >= 0.3", "max_score_change <= 0.05")
    assert said.outcome == "rejected"
    point = found["max_score_change"].point
    assert said.reasons == (
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
    said, _ = judged(0.1, "auc >= 0.3", "mean_score_change <= 0.001")
    assert codes_of(said.reasons) == ["number_in_interval", "limit_missed"]
    with_code(said.reasons, "number_in_interval", metric="mean score change")


def test_measurements_stored_before_score_changes_load_and_are_judged():
    old = Measured(numbers=quality()).model_dump()
    del old["score_unit"]
    for number in old["numbers"]:
        for field in ("groups", "unresolved"):
            del number["estimate"][field]
    loaded = Measured.model_validate(old)
    said = verdict("onnxruntime", (Limit.parse("auc >= 0.3"),), loaded, built=True)
    assert codes_of(said.reasons) == ["one_limit_holds"]
