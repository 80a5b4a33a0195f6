"""Limits that are likely mistakes are reported, and each task kind measures its metrics."""

import re

import pytest
from error_codes import HasReason, raises_value_error
from hypothesis import given
from hypothesis import strategies as st
from reason_codes import require_reason

from compressors.contracts import (
    Limit,
    Reason,
    Signature,
    limit_problems,
    limit_warnings,
    measured_metrics,
    quality_metrics,
)
from compressors.contracts.metrics import FAMILIES, default_metrics, metric
from compressors.contracts.metrics.families import can_be_measured, find_metric
from compressors.contracts.task_kind import TASK_KINDS
from flows.terms import Terms
from infra.bundle.json_reader import parse

METRICS = default_metrics()
SELECTABLE_METRICS = [name for name, spec in METRICS.items() if spec.selects]
"""Names of the metrics by which a signature may judge its model."""

REFERENCES = {
    name: ("absolute",) if spec.compared == "never" else ("absolute", "baseline", "champion")
    for name, spec in METRICS.items()
}
"""Possible values of ``against`` (what a limit compares with) for each metric.

A metric that is compared ``never`` is itself a comparison with the baseline: a score change.
"""


def problems(*texts: str) -> tuple[Reason, ...]:
    """Return the problems of limits in text form."""
    return limit_problems([Limit.parse(text) for text in texts])


def suggest_limits(reason: Reason) -> tuple[str, ...]:
    """Return the limits that a reason suggests to write instead."""
    fields = reason.fields
    return fields["intents"] if reason.code == "limit_with_intents" else (fields["example"],)


@pytest.mark.parametrize(
    ("text", "intents"),
    [
        # a bound on the best side, such as a largest AUC
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
        # a ratio in place of bytes or milliseconds, and the reverse
        ("bytes <= 0.5", ["bytes vs baseline <= 0.5"]),
        ("bytes <= 50", ["bytes vs baseline <= 0.5"]),
        ("bytes vs baseline <= 200000", ["bytes <= 200000"]),
        ("bytes vs champion <= 200000", ["bytes <= 200000"]),
        ("p99_ms@1 vs baseline <= 50", ["p99_ms@1 vs baseline <= 0.5", "p99_ms@1 <= 50"]),
        ("p99_ms@1 <= 0.0005", ["p99_ms@1 vs baseline <= 0.0005", "p99_ms@1 <= 0.5"]),
        # percent
        ("auc >= 80", ["auc >= 0.8"]),
        ("recall@20 >= 20", ["recall@20 >= 0.2"]),
        ("hit@20 >= 90", ["hit@20 >= 0.9"]),
        ("auc vs baseline >= -2", ["auc vs baseline >= -0.02"]),
        ("bytes vs baseline <= 50", ["bytes vs baseline <= 0.5"]),
        # a loss, as a share or in percent, in place of the metric itself, and the reverse
        ("auc >= 0.002", ["auc vs baseline >= -0.002"]),
        ("auc >= 1.5", ["auc vs baseline >= -0.015"]),
        ("auc vs baseline >= 0.9", ["auc >= 0.9"]),
        ("logloss vs baseline <= 0.45", ["logloss <= 0.45"]),
        ("bytes vs baseline <= -0.5", ["bytes vs baseline <= 0.5"]),
        # limits that never or always hold
        ("p50_ms@1024 <= 0", ["p50_ms@1024 vs baseline <= 1"]),
        ("bytes vs baseline <= 0", ["bytes vs baseline <= 1"]),
        ("bytes <= 0", ["bytes vs baseline <= 1"]),
        ("logloss <= 0", ["logloss vs baseline <= 0"]),
        ("logloss <= 45", ["logloss <= 0.45"]),
        ("ndcg@10 >= 0", ["ndcg@10 vs baseline >= 0"]),
        ("auc >= 1", ["auc vs baseline >= -0.01"]),
    ],
)
def test_implausible_limit_is_reported_with_the_likely_intents(text, intents):
    (problem,) = problems(text)
    assert problem.fields["limit"] == text
    assert set(intents) <= set(suggest_limits(problem))


@pytest.mark.parametrize(
    "text",
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
        "mrr@10 vs baseline >= -0.01",
        "map@100 >= 0.3",
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
def test_plausible_limit_is_not_reported(text):
    assert problems(text) == ()


@pytest.mark.parametrize(
    ("metric", "against"),
    [(name, against) for name, possible in REFERENCES.items() for against in possible],
)
@given(bound=st.floats(0, 1e9))
def test_bound_on_the_best_side_is_reported_for_every_metric(metric, against, bound):
    side = "at_most" if METRICS[metric].higher_is_better else "at_least"
    limit = Limit(metric=metric, against=against, **{side: bound})
    assert limit_problems([limit])


@given(
    reference=st.sampled_from(
        [(name, against) for name, possible in sorted(REFERENCES.items()) for against in possible]
    ),
    side=st.sampled_from(["at_least", "at_most"]),
    bound=st.floats(-1e6, 1e9),
)
def test_every_suggested_limit_is_plausible(reference, side, bound):
    metric, against = reference
    if against == "absolute":
        bound = abs(bound)
    limit = Limit(metric=metric, against=against, **{side: bound})
    for problem in limit_problems([limit]):
        assert suggest_limits(problem)
        for suggestion in suggest_limits(problem):
            assert problems(suggestion) == (), suggestion


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("metric", ["auc vs baseline >=", "bytes <=", "p99_ms@1 vs champion <="])
def test_bound_that_is_not_finite_is_refused(metric, value):
    with raises_value_error("finite_number"):
        Limit.parse(f"{metric} {value}")


@pytest.mark.parametrize(
    ("text", "intent"),
    [
        ("max_score_change >= 0.05", "max_score_change <= 0.05"),
        ("score_correlation <= 0.999", "score_correlation >= 0.999"),
        ("changed_top1 <= 2", "changed_top1 <= 0.02"),
        ("score_correlation >= 99.9", "score_correlation >= 0.999"),
    ],
)
def test_implausible_limit_on_a_score_change_is_reported_with_the_likely_intent(text, intent):
    (problem,) = problems(text)
    assert intent in suggest_limits(problem)


@pytest.mark.parametrize("metric", SELECTABLE_METRICS)
def test_negative_absolute_bound_is_refused(metric):
    with raises_value_error("absolute_bound_negative", metric=metric):
        Limit.parse(f"{metric} >= -0.002")


def test_contradicting_limits_are_reported_with_both():
    first, second = "auc vs baseline >= -0.001", "auc vs baseline <= -0.002"
    require_reason(problems(first, second), "limits_contradict", first=first, second=second)
    assert problems("auc vs baseline >= -0.001", "auc vs champion >= 0", "auc >= 0.7") == ()


@pytest.mark.parametrize(
    ("text", "why"),
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
        # Probabilities are clipped, so the log loss of a row is at most 15.95.
        ("logloss <= 45", Reason("beyond_highest", metric="logloss", highest=15.95, unit="")),
    ],
)
def test_reported_limit_has_the_reason_why_it_is_implausible(text, why):
    (problem,) = problems(text)
    assert problem.fields["why"] == why


def test_limit_that_demands_an_improvement_results_in_a_warning():
    limits = [Limit.parse("auc vs baseline >= 0.002"), Limit.parse("logloss vs baseline <= -0.01")]
    first, second = limit_warnings(limits)
    # The field ``loss`` is the limit that would allow a loss of the same size.
    assert first.code == second.code == "improvement_demanded"
    assert (first.fields["metric"], first.fields["loss"]) == ("auc", "auc vs baseline >= -0.002")
    assert second.fields["loss"] == "logloss vs baseline <= 0.01"
    plausible = [
        "auc vs baseline >= -0.002",
        "auc vs champion >= 0.002",
        "bytes vs baseline <= 0.5",
    ]
    assert limit_warnings([Limit.parse(text) for text in plausible]) == ()


def test_order_with_an_implausible_limit_is_refused_but_a_stored_limit_is_read():
    limit = {"metric": "auc", "against": "baseline", "at_most": 0.002}
    with raises_value_error("limits_not_meant", reasons=HasReason("limit_with_intents")):
        Terms.model_validate({"model": "clicks", "limits": [limit]})
    assert Limit.model_validate(limit).at_most == 0.002


# --- metrics of task kinds -------------------------------------------------------------------


def test_every_default_metric_is_registered_and_measured_for_a_task_kind():
    assert {name: metric(name) for name in METRICS} == METRICS
    for item in METRICS.values():
        assert any(can_be_measured(item, task, grouped=True) for task in TASK_KINDS), item.name
    assert {item.kind for item in METRICS.values()} == {
        "quality", "score_change", "bytes", "latency",
    }  # fmt: skip


@given(st.sampled_from([f for f in FAMILIES.values() if f.number]), st.integers(1, 70_000))
def test_family_has_a_metric_for_every_number_up_to_the_largest(family, number):
    """The metrics of a family differ only in a number, such as ``ndcg@5`` and ``ndcg@10``.

    ``max_number`` is the largest number of a family, such as 10,000 in ``ndcg@10000``.
    The largest of all families is the batch size 65,536 of the latency metrics.
    """
    member = find_metric(f"{family.name}{number}")
    if number > family.max_number:
        assert member is None
        return
    assert member is not None
    assert member.name == f"{family.name}{number}"
    assert number in (member.depth, member.batch)
    limit = Limit(metric=member.name, against="baseline", at_most=1.5)
    assert Limit.parse(str(limit)) == limit


@pytest.mark.parametrize(
    "name", ["", "ndcg", "ndcg@", "ndcg@0", "ndcg@05", "ndcg@-1", "ndcg@5 ", "ndcg@1e3", "auc@5",
             "ndcg@10001", "p75_ms@1", "NDCG@10", "ndcg@10@10", "mrr", "map@0", "hits@10"]
)  # fmt: skip
def test_unknown_metric_name_is_refused(name):
    with raises_value_error("metric_unknown", metric=name):
        Limit(metric=name, at_least=0)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("mrr@10", "MRR@10"),
        ("map@100", "MAP@100"),
        ("hit@20", "Hit@20"),
        ("recall@20", "Recall@20"),
        ("precision@5", "Precision@5"),
    ],
)
def test_top_k_metrics_are_measured_for_lists_and_for_full_rankings(name, label):
    declared = metric(name)
    assert declared.label == label
    for task, is_measured in {"ranking": True, "retrieval": True, "ctr": False}.items():
        assert can_be_measured(declared, task, grouped=True) == is_measured, task
    assert set(declared.estimators) == {"rows", "queries"}
    for evaluation in declared.estimators:
        assert declared.estimator(evaluation).depth == declared.depth


def test_quality_metrics_of_limits_are_added_to_the_default_metrics():
    names = ("ndcg@5", "bytes", "p99_ms@256", "ndcg@10")
    assert quality_metrics("ranking", grouped=True, additional=names) == ("ndcg@10", "ndcg@5")


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
def test_measured_metrics_depend_on_task_kind_and_group(task, grouped, expected):
    assert quality_metrics(task, grouped=grouped) == expected
    score_changes = {"score_correlation", "mean_score_change", "max_score_change"}
    score_changes |= {"changed_top1"} if grouped else set()
    score_changes |= {"top20_overlap"} if task == "retrieval" else set()
    families = {re.sub("[0-9]+$", "k", name) for name in expected}
    if "ndcg@k" in families:
        families |= {"recall@k", "mrr@k", "map@k", "hit@k", "precision@k"}
    assert set(measured_metrics(task, grouped=grouped, test_rows=63)) == {
        *families, *score_changes, "bytes", "p50_ms@batch", "p99_ms@batch",
    }  # fmt: skip
    batches = [name for name, item in METRICS.items() if item.batch is not None]
    # The default batch sizes are 1, 64 and 1024; 63 test rows fill only the first.
    assert [
        name
        for name in batches
        if can_be_measured(metric(name), task, grouped=grouped, test_rows=63)
    ] == ["p50_ms@1", "p99_ms@1"]


@pytest.mark.parametrize("task", ["ctr", "ranking", "retrieval"])
@pytest.mark.parametrize(
    "name",
    [
        *SELECTABLE_METRICS,
        *("ndcg@7", "recall@1000", "mrr@10", "map@100", "hit@20", "precision@5"),
    ],
)
@pytest.mark.parametrize("group", [None, "user"])
def test_signature_with_a_metric_that_its_task_kind_does_not_measure_is_refused(task, name, group):
    document = {
        "inputs": [
            {"kind": "id", "name": "user", "table": "user"},
            {"kind": "id", "name": "item", "table": "item"},
        ],
        "outputs": [
            {
                "name": "label",
                "kind": task,
                "form": "logit" if task == "ctr" else "score",
                "label": "label",
                "metric": name,
            }
        ],
        "group": group,
    }
    if task == "retrieval":
        document["item"] = "item"
        document["towers"] = {
            "query": {"module": "of_user", "inputs": ["user"]},
            "item": {"module": "of_item", "inputs": ["item"]},
        }
    if can_be_measured(metric(name), task, grouped=group is not None):
        assert Signature.model_validate(document).single_output.metric == name
        return
    with raises_value_error("metric_not_measured") as caught:
        Signature.model_validate(document)
    reason = caught.value.errors()[0]["ctx"]["reason"]
    assert reason.fields["metric"] == name
    usable = {
        family.spelling
        for family in FAMILIES.values()
        if family.any_member().selects and can_be_measured(family.any_member(), task, grouped=True)
    }
    # The error lists the metrics that the task measures; ``grouped`` are those that need groups.
    listed = {*reason.fields.get("metrics", ()), *reason.fields.get("grouped", ())}
    assert listed == (set() if reason.code == "metric_without_group" else usable)
    # Bundles of earlier versions, which did not have this rule, can still be read.
    assert parse(Signature, document, None, stored=True).single_output.metric == name
