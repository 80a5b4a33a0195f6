"""Names of the metrics of several outputs, and limits that apply to each of them."""

import pytest
from error_codes import raises_value_error

from compressors.contracts import Limit, Output, limits_of_outputs, metric
from compressors.contracts.metrics.families import find_metric
from compressors.contracts.output_metrics import (
    additional_metrics,
    default_batch_sizes_of_outputs,
    metrics_measured_for_limits,
    quality_metrics_of_outputs,
)

CLICK = Output(name="click", kind="ctr", form="logit", label="click", metric="auc")
BUY = Output(name="buy", kind="ctr", form="logit", label="buy", metric="gauc")
GRADE = Output(name="grade", kind="ranking", form="score", label="grade", metric="ndcg@10")
OUTPUTS = (CLICK, GRADE)


def resolve_limits(*texts, outputs=OUTPUTS, grouped=True):
    """Parse limits and return, as text, the limits of the outputs that they stand for."""
    limits = tuple(Limit.parse(text) for text in texts)
    return [str(limit) for limit in limits_of_outputs(limits, outputs, grouped=grouped)]


def test_metric_of_an_output_differs_from_the_plain_metric_only_in_name_label_and_output():
    plain, of_click = metric("ndcg@5"), metric("ndcg@5[click]")
    assert (of_click.name, of_click.label) == ("ndcg@5[click]", "NDCG@5 of click")
    assert (plain.output, of_click.output) == (None, "click")
    assert of_click.estimators == plain.estimators
    assert of_click.loosest_bound == plain.loosest_bound


@pytest.mark.parametrize(
    "name",
    ["bytes[click]", "p99_ms@64[click]", "auc[]", "auc[1x]", "auc[a][b]", "auc[a", "nope[a]"],
)
def test_metric_of_the_whole_model_or_of_a_malformed_output_is_unknown(name):
    assert find_metric(name) is None
    with raises_value_error("metric_unknown", metric=name):
        Limit(metric=name, at_most=1)


def test_limit_without_an_output_applies_to_each_output_that_has_the_metric():
    assert resolve_limits("auc vs baseline >= -0.001", outputs=(CLICK, BUY)) == [
        "auc[click] vs baseline >= -0.001",
        "auc[buy] vs baseline >= -0.001",
    ]
    assert resolve_limits("auc >= 0.7", "score_correlation >= 0.99") == [
        "auc[click] >= 0.7",  # not measured for the grades of a ranking
        "score_correlation[click] >= 0.99",
        "score_correlation[grade] >= 0.99",
    ]


def test_limits_on_a_named_output_or_on_the_whole_model_are_unchanged():
    texts = ("ndcg@10[grade] vs champion >= -0.001", "bytes vs baseline <= 0.5", "p50_ms@1 <= 2")
    assert resolve_limits(*texts) == list(texts)


def test_limit_that_no_output_can_measure_is_unchanged_and_refused_later():
    # ``gauc`` is an AUC per group, so it is not measured without groups.
    assert resolve_limits("gauc vs baseline >= -0.001", grouped=False) == [
        "gauc vs baseline >= -0.001"
    ]
    assert resolve_limits("auc[other] >= 0.7") == ["auc[other] >= 0.7"]


def test_limit_of_a_model_with_one_output_may_name_the_output_or_omit_it():
    assert resolve_limits("auc[click] >= 0.7", "auc >= 0.6", outputs=(CLICK,)) == [
        "auc >= 0.7",
        "auc >= 0.6",
    ]
    assert resolve_limits("auc[buy] >= 0.7", outputs=(CLICK,)) == ["auc[buy] >= 0.7"]


def test_default_and_additional_quality_metrics_are_measured_for_each_output():
    additional = ("ndcg@5[grade]", "bytes", "p99_ms@256")  # two of them are no quality metrics
    assert quality_metrics_of_outputs(OUTPUTS, grouped=False, additional=additional) == (
        "auc[click]",
        "logloss[click]",
        "normalized_entropy[click]",
        "ndcg@10[grade]",
        "ndcg@5[grade]",
    )
    assert quality_metrics_of_outputs((GRADE,), grouped=True, additional=("ndcg@5",)) == (
        "ndcg@10",
        "ndcg@5",
    )


def test_additional_metrics_are_the_names_that_are_no_default_metrics():
    names = ("ndcg@5[grade]", "ndcg@10[grade]", "ndcg@10[click]", "auc[click]", "p99_ms@256")
    assert additional_metrics(OUTPUTS, names) == ("ndcg@10[click]", "ndcg@5[grade]", "p99_ms@256")
    names = ("ndcg@5", "bytes", "p99_ms@256", "ndcg@10")
    assert additional_metrics((GRADE,), names) == ("ndcg@5", "p99_ms@256")


def test_metrics_measured_for_limits_include_a_default_p99_and_exclude_a_default_median():
    # The median is always measured, but the p99 of a slow model only if a limit names it.
    limits = tuple(map(Limit.parse, ("p99_ms@64 <= 5", "p50_ms@64 <= 5", "ndcg@3[grade] >= 0.1")))
    assert metrics_measured_for_limits(OUTPUTS, limits) == ("ndcg@3[grade]", "p99_ms@64")


def test_default_batch_sizes_of_several_outputs_contain_each_size_once():
    # Every task kind has the same batch sizes, so GRADE adds none.
    assert default_batch_sizes_of_outputs(OUTPUTS) == default_batch_sizes_of_outputs((CLICK,))
