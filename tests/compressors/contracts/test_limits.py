"""Limits that cannot mean what was typed are refused, each with what was probably meant."""

from typing import get_args

import pytest
from error_codes import HasReason, raises_value_error
from hypothesis import given
from hypothesis import strategies as st
from reason_codes import with_code

from compressors.contracts import (
    MEASURES,
    Limit,
    Measure,
    Metric,
    Reason,
    Signature,
    limit_problems,
    limit_warnings,
    measured_metrics,
    quality_metrics,
)
from flows.terms import Terms
from infra.bundle.json_reader import parse

SHARES = [name for name, facts in MEASURES.items() if facts.selects]
REFERENCES = {
    name: ("absolute",) if facts.compared == "never" else ("absolute", "baseline", "champion")
    for name, facts in MEASURES.items()
}
"""What a limit on each metric may compare with."""


def problems(*texts: str) -> tuple[Reason, ...]:
    return limit_problems([Limit.parse(text) for text in texts])


def suggested(reason: Reason) -> tuple[str, ...]:
    """The limits to write instead of one that cannot be meant."""
    fields = reason.fields
    return fields["intents"] if reason.code == "limit_with_intents" else (fields["example"],)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        # the side that bounds how good the result may be
        ("auc vs baseline <= 0.002", ["auc vs baseline >= -0.002"]),
        ("auc vs baseline <= -0.002", ["auc vs baseline >= -0.002"]),
        ("auc vs champion <= 0", ["auc vs champion >= 0"]),
        ("auc <= 0.8", ["auc >= 0.8"]),
        ("auc <= 0.002", ["auc vs baseline >= -0.002"]),
        ("logloss vs baseline >= -0.002", ["logloss vs baseline <= 0.002"]),
        ("logloss >= 0.4", ["logloss <= 0.4"]),
        ("p99_ms@64 vs baseline >= 0.9", ["p99_ms@64 vs baseline <= 0.9"]),
        ("bytes vs baseline >= 50", ["bytes vs baseline <= 0.5"]),
        ("bytes >= 100000", ["bytes <= 100000"]),
        # a share or a ratio where bytes or milliseconds belong, and the reverse
        ("bytes <= 0.5", ["bytes vs baseline <= 0.5"]),
        ("bytes <= 50", ["bytes vs baseline <= 0.5"]),
        ("bytes vs baseline <= 200000", ["bytes <= 200000"]),
        ("bytes vs champion <= 200000", ["bytes <= 200000"]),
        ("p99_ms@1 vs baseline <= 50", ["p99_ms@1 vs baseline <= 0.5", "p99_ms@1 <= 50"]),
        ("p99_ms@1 <= 0.0005", ["p99_ms@1 vs baseline <= 0.0005", "p99_ms@1 <= 0.5"]),
        # percent
        ("auc >= 80", ["auc >= 0.8"]),
        ("recall@20 >= 20", ["recall@20 >= 0.2"]),
        ("auc vs baseline >= -2", ["auc vs baseline >= -0.02"]),
        ("bytes vs baseline <= 50", ["bytes vs baseline <= 0.5"]),
        # a difference where the metric itself belongs, and the reverse
        ("auc >= 0.002", ["auc vs baseline >= -0.002"]),
        ("auc >= 1.5", ["auc vs baseline >= -0.015"]),
        ("auc vs baseline >= 0.9", ["auc >= 0.9"]),
        ("logloss vs baseline <= 0.45", ["logloss <= 0.45"]),
        ("bytes vs baseline <= -0.5", ["bytes vs baseline <= 0.5"]),
        # never or always true
        ("p50_ms@1024 <= 0", ["p50_ms@1024 vs baseline <= 1"]),
        ("bytes vs baseline <= 0", ["bytes vs baseline <= 1"]),
        ("bytes <= 0", ["bytes vs baseline <= 1"]),
        ("logloss <= 0", ["logloss vs baseline <= 0"]),
        ("logloss <= 45", ["logloss <= 0.45"]),
        ("ndcg@10 >= 0", ["ndcg@10 vs baseline >= 0"]),
        ("auc >= 1", ["auc vs baseline >= -0.01"]),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused_with_the_intent(typed, meant):
    (problem,) = problems(typed)
    assert problem.fields["limit"] == typed
    assert set(meant) <= set(suggested(problem))


@pytest.mark.parametrize(
    "typed",
    [
        "auc vs baseline >= -0.002",
        "auc vs baseline >= 0",
        "auc vs baseline >= 0.002",  # teachers and recalibration can improve a model
        "auc vs champion >= 0.001",
        "auc >= 0.72",
        "auc >= 0.5",
        "gauc vs baseline >= -0.2",
        "ndcg@10 >= 0.05",
        "recall@20 >= 0.004",
        "logloss <= 0.002",  # clicks can be rare
        "logloss vs baseline <= 0.01",
        "logloss vs baseline <= -0.001",
        "normalized_entropy <= 0.9",
        "bytes <= 1024",
        "bytes <= 500000",
        "bytes vs baseline <= 0.001",
        "bytes vs baseline <= 1.05",
        "p99_ms@64 <= 0.05",
        "p99_ms@64 vs baseline <= 1.2",
        "p50_ms@1 vs champion <= 4",
        "score_correlation >= 0.999",
        "score_correlation >= 1",
        "max_score_change <= 0.05",
        "max_score_change <= 0",
        "changed_top1 <= 0.02",
    ],
)
def test_a_limit_that_makes_sense_is_accepted(typed):
    assert problems(typed) == ()


@pytest.mark.parametrize(
    ("metric", "against"), [(name, each) for name, every in REFERENCES.items() for each in every]
)
@given(bound=st.floats(0, 1e9))
def test_the_side_that_bounds_how_good_a_result_is_is_refused_for_every_metric(
    metric, against, bound
):
    side = "at_most" if MEASURES[metric].higher_is_better else "at_least"
    limit = Limit(metric=metric, against=against, **{side: bound})
    assert limit_problems([limit])


@given(
    reference=st.sampled_from(
        [(name, each) for name, every in sorted(REFERENCES.items()) for each in every]
    ),
    side=st.sampled_from(["at_least", "at_most"]),
    bound=st.floats(-1e6, 1e9),
)
def test_every_suggestion_makes_sense_itself(reference, side, bound):
    metric, against = reference
    if against == "absolute":
        bound = abs(bound)
    limit = Limit(metric=metric, against=against, **{side: bound})
    for problem in limit_problems([limit]):
        assert suggested(problem)
        for suggestion in suggested(problem):
            assert problems(suggestion) == (), suggestion


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("metric", ["auc vs baseline >=", "bytes <=", "p99_ms@1 vs champion <="])
def test_a_bound_that_is_not_finite_is_refused(metric, value):
    with raises_value_error("finite_number"):
        Limit.parse(f"{metric} {value}")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("max_score_change >= 0.05", "max_score_change <= 0.05"),
        ("score_correlation <= 0.999", "score_correlation >= 0.999"),
        ("changed_top1 <= 2", "changed_top1 <= 0.02"),
        ("score_correlation >= 99.9", "score_correlation >= 0.999"),
    ],
)
def test_a_limit_on_a_score_change_that_cannot_be_meant_is_refused_with_the_intent(typed, meant):
    (problem,) = problems(typed)
    assert meant in suggested(problem)


@pytest.mark.parametrize("metric", SHARES)
def test_a_negative_share_is_refused_with_the_comparison(metric):
    with raises_value_error("absolute_bound_negative", metric=metric):
        Limit.parse(f"{metric} >= -0.002")


def test_limits_that_contradict_each_other_are_refused_by_name():
    first, second = "auc vs baseline >= -0.001", "auc vs baseline <= -0.002"
    with_code(problems(first, second), "limits_contradict", first=first, second=second)
    assert problems("auc vs baseline >= -0.001", "auc vs champion >= 0", "auc >= 0.7") == ()


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("auc <= 0.8", Reason("bounds_best", better="higher", metric="auc")),
        ("bytes vs baseline <= 0", Reason("ratio_not_positive")),
        (
            "bytes vs champion <= 50",
            Reason("ratio_too_large", ratio=50.0, against="champion", metric="bytes"),
        ),
        (
            "auc vs baseline >= 0.9",
            Reason("gain_too_large", metric="auc", against="baseline", gain=0.9),
        ),
        ("auc vs baseline >= -2", Reason("loss_too_large", metric="auc", loss=2.0)),
        ("auc >= 1.5", Reason("above_highest", metric="auc", highest=1.0)),
        ("auc >= 0.002", Reason("below_random", metric="auc", lowest=0.5)),
        ("ndcg@10 >= 0", Reason("below_zero", metric="ndcg@10")),
        ("bytes <= 50", Reason("below_lowest", metric="bytes", lowest=1024.0, unit=" bytes")),
        ("logloss <= 0", Reason("not_above_zero", metric="logloss")),
        ("logloss <= 45", Reason("beyond_highest", metric="logloss", highest=15.95, unit="")),
    ],
)
def test_reason_says_why_a_limit_cannot_be_meant(typed, why):
    (problem,) = problems(typed)
    assert problem.fields["why"] == why


def test_a_demanded_improvement_is_allowed_with_a_warning():
    limits = [Limit.parse("auc vs baseline >= 0.002"), Limit.parse("logloss vs baseline <= -0.01")]
    first, second = limit_warnings(limits)
    assert first.code == second.code == "improvement_demanded"
    assert (first.fields["metric"], first.fields["loss"]) == ("auc", "auc vs baseline >= -0.002")
    assert second.fields["loss"] == "logloss vs baseline <= 0.01"
    usual = ["auc vs baseline >= -0.002", "auc vs champion >= 0.002", "bytes vs baseline <= 0.5"]
    assert limit_warnings([Limit.parse(text) for text in usual]) == ()


def test_an_order_refuses_such_limits_and_a_stored_limit_is_still_read():
    limit = {"metric": "auc", "against": "baseline", "at_most": 0.002}
    with raises_value_error("limits_not_meant", reasons=HasReason("limit_with_intents")):
        Terms.model_validate({"model": "clicks", "limits": [limit]})
    assert Limit.model_validate(limit).at_most == 0.002


# --- which task measures what ----------------------------------------------------------------


def test_every_metric_has_its_line_and_every_line_a_task():
    assert set(MEASURES) == set(get_args(Measure))
    assert {name for name, facts in MEASURES.items() if facts.selects} == set(get_args(Metric))
    assert all(facts.tasks for facts in MEASURES.values())


@pytest.mark.parametrize(
    ("task", "grouped", "expected"),
    [
        ("ctr", False, ("auc", "logloss", "normalized_entropy")),
        ("ctr", True, ("auc", "logloss", "normalized_entropy", "gauc")),
        ("ranking", True, ("ndcg@10",)),
        ("ranking", False, ()),
        ("retrieval", True, ("recall@20", "ndcg@20")),
    ],
)
def test_a_task_measures_its_own_metrics(task, grouped, expected):
    assert quality_metrics(task, grouped=grouped) == expected
    changes = {"score_correlation", "mean_score_change", "max_score_change"}
    changes |= {"changed_top1"} if grouped else set()
    changes |= {"top20_overlap"} if task == "retrieval" else set()
    everything = measured_metrics(task, grouped=grouped, test_rows=63)
    assert set(everything) == {*expected, *changes, "bytes", "p50_ms@1", "p99_ms@1"}


@pytest.mark.parametrize("task", ["ctr", "ranking", "retrieval"])
@pytest.mark.parametrize("metric", get_args(Metric))
@pytest.mark.parametrize("group", [None, "user"])
def test_a_signature_accepts_a_metric_only_if_its_task_measures_it(task, metric, group):
    document = {
        "task": task,
        "inputs": [
            {"kind": "id", "name": "user", "table": "user"},
            {"kind": "id", "name": "item", "table": "item"},
        ],
        "output": "logit" if task == "ctr" else "score",
        "label": "label",
        "group": group,
        "metric": metric,
    }
    if task == "retrieval":
        document["item"] = "item"
        document["towers"] = {
            "query": {"module": "of_user", "inputs": ["user"]},
            "item": {"module": "of_item", "inputs": ["item"]},
        }
    if metric in quality_metrics(task, grouped=group is not None):
        assert Signature.model_validate(document).metric == metric
        return
    with raises_value_error("metric_not_measured") as refused:
        Signature.model_validate(document)
    reason = refused.value.errors()[0]["ctx"]["reason"]
    assert reason.fields["metric"] == metric
    usable = {n for n in quality_metrics(task, grouped=True) if MEASURES[n].selects}
    named = {*reason.fields.get("metrics", ()), *reason.fields.get("grouped", ())}
    assert named == (set() if reason.code == "metric_without_group" else usable)
    # What was packed before the rule is still read.
    assert parse(Signature, document, None, stored=True).metric == metric
