"""Names of the metrics of several outputs, and limits that apply to each of them."""

import pytest
from error_codes import raises_value_error

from compressors.contracts import Limit, Output, limits_of_outputs, metric
from compressors.contracts.metrics.families import find_metric
from compressors.contracts.output_metrics import (
    further_metrics,
    metrics_to_measure,
    quality_metrics_of_outputs,
    usual_batches_of_outputs,
)

CLICK = Output(name="click", kind="ctr", form="logit", label="click", metric="auc")
BUY = Output(name="buy", kind="ctr", form="logit", label="buy", metric="gauc")
GRADE = Output(name="grade", kind="ranking", form="score", label="grade", metric="ndcg@10")
OUTPUTS = (CLICK, GRADE)


def applied(*texts, outputs=OUTPUTS, grouped=True):
    limits = tuple(Limit.parse(text) for text in texts)
    return [str(limit) for limit in limits_of_outputs(limits, outputs, grouped=grouped)]


def test_metric_of_an_output_differs_only_in_name_label_and_output():
    plain, of_click = metric("ndcg@5"), metric("ndcg@5[click]")
    assert (of_click.name, of_click.label) == ("ndcg@5[click]", "NDCG@5 of click")
    assert (plain.output, of_click.output) == (None, "click")
    assert of_click.estimators == plain.estimators
    assert of_click.largest == plain.largest


@pytest.mark.parametrize(
    "name",
    ["bytes[click]", "p99_ms@64[click]", "auc[]", "auc[1x]", "auc[a][b]", "auc[a", "nope[a]"],
)
def test_metric_of_the_whole_model_or_of_a_malformed_output_is_unknown(name):
    assert find_metric(name) is None
    with raises_value_error("metric_unknown", metric=name):
        Limit(metric=name, at_most=1)


def test_limit_without_an_output_applies_to_each_output_that_has_the_metric():
    assert applied("auc vs baseline >= -0.001", outputs=(CLICK, BUY)) == [
        "auc[click] vs baseline >= -0.001",
        "auc[buy] vs baseline >= -0.001",
    ]
    assert applied("auc >= 0.7", "score_correlation >= 0.99") == [
        "auc[click] >= 0.7",  # not measured for the grades of a ranking
        "score_correlation[click] >= 0.99",
        "score_correlation[grade] >= 0.99",
    ]


def test_limits_on_one_output_or_on_the_whole_model_are_unchanged():
    texts = ("ndcg@10[grade] vs champion >= -0.001", "bytes vs baseline <= 0.5", "p50_ms@1 <= 2")
    assert applied(*texts) == list(texts)


def test_limit_that_no_output_can_measure_is_unchanged_and_refused_later():
    assert applied("gauc vs baseline >= -0.001", grouped=False) == ["gauc vs baseline >= -0.001"]
    assert applied("auc[other] >= 0.7") == ["auc[other] >= 0.7"]


def test_only_output_needs_no_name_but_may_have_it():
    assert applied("auc[click] >= 0.7", "auc >= 0.6", outputs=(CLICK,)) == [
        "auc >= 0.7",
        "auc >= 0.6",
    ]
    assert applied("auc[buy] >= 0.7", outputs=(CLICK,)) == ["auc[buy] >= 0.7"]


def test_measured_metrics_are_those_of_each_output_and_of_the_limits():
    named = ("ndcg@5[grade]", "bytes", "p99_ms@256")
    assert quality_metrics_of_outputs(OUTPUTS, grouped=False, named=named) == (
        "auc[click]",
        "logloss[click]",
        "normalized_entropy[click]",
        "ndcg@10[grade]",
        "ndcg@5[grade]",
    )
    assert quality_metrics_of_outputs((GRADE,), grouped=True, named=("ndcg@5",)) == (
        "ndcg@10",
        "ndcg@5",
    )


def test_further_metrics_are_those_of_limits_that_no_order_measures_anyway():
    listed = ("ndcg@5[grade]", "ndcg@10[grade]", "ndcg@10[click]", "auc[click]", "p99_ms@256")
    assert further_metrics(OUTPUTS, listed) == ("ndcg@10[click]", "ndcg@5[grade]", "p99_ms@256")
    listed = ("ndcg@5", "bytes", "p99_ms@256", "ndcg@10")
    assert further_metrics((GRADE,), listed) == ("ndcg@5", "p99_ms@256")


def test_limits_on_a_p99_are_named_even_if_every_order_measures_it():
    limits = tuple(map(Limit.parse, ("p99_ms@64 <= 5", "p50_ms@64 <= 5", "ndcg@3[grade] >= 0.1")))
    assert metrics_to_measure(OUTPUTS, limits) == ("ndcg@3[grade]", "p99_ms@64")


def test_latency_is_measured_at_the_batches_of_every_kind():
    assert usual_batches_of_outputs(OUTPUTS) == usual_batches_of_outputs((CLICK,))
