"""Checks of the uncompressed model's scores and labels: refused problems, and warnings.

``recpress bundle pack`` refuses a bundle with a problem that ``prevents_packing``. A problem
``prevents_measurement`` if a metric has no value, so that every measurement of the model fails.
Other problems are warnings.
"""

import numpy as np
import pytest
import torch
from reason_codes import codes_of, require_reason
from safetensors.torch import save_file
from signatures import replace_output
from torch import Tensor, nn

from compressors.contracts import Reason, Signature, Split
from compressors.metrics.baseline_checks import (
    SAMPLE_ROWS,
    find_label_problems,
    find_score_problems,
)

# Checks score a sample of ``SAMPLE_ROWS`` rows, which is half of the rows here.
ROWS = 2 * SAMPLE_ROWS


class ScoreInputNet(nn.Module):
    """Returns its only input, so that a test chooses every score."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1)


def signature_of(task: str, form: str, group: str | None = None, metric: str = "auc") -> Signature:
    inputs = [{"kind": "dense", "name": "x", "shape": [1]}]
    return Signature.model_validate(
        {
            "inputs": inputs,
            "outputs": [
                {"name": "label", "kind": task, "form": form, "label": "label", "metric": metric}
            ],
            "group": group,
        }
    )


CLICKS = signature_of("ctr", "logit")
PROBABILITIES = signature_of("ctr", "probability")
LISTS = signature_of("ranking", "score", "query", "ndcg@10")


def split(tmp_path, score, label, group=None) -> Split:
    # In a stored split, the names of the label and the group begin with "@".
    tensors = {
        "x": torch.tensor(np.asarray(score), dtype=torch.float32).reshape(-1, 1),
        "@label": torch.tensor(np.asarray(label), dtype=torch.float32),
    }
    if group is not None:
        tensors["@group"] = torch.tensor(np.asarray(group))
    save_file(tensors, tmp_path / "data.safetensors")
    return Split(path=str(tmp_path), sha256="0" * 64, rows=len(label))


def problems_of(signature, tmp_path, score, label, group=None):
    """The problems of a model with these scores on rows with these labels."""
    return list(
        find_score_problems(ScoreInputNet(), signature, split(tmp_path, score, label, group))
    )


def calibrated_clicks(seed=0, mean=-1.0, deviation=1.5):
    """Random logits, and labels drawn with their probabilities: a calibrated model.

    ``mean`` and ``deviation`` (the standard deviation) are those of the logits.
    """
    rng = np.random.default_rng(seed)
    logit = rng.normal(mean, deviation, ROWS)
    return logit, (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(float)


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


@pytest.mark.parametrize("mean", [-6.0, -3.0, -1.0, 0.0, 2.0])
@pytest.mark.parametrize("deviation", [0.05, 0.5, 3.0])
def test_calibrated_model_has_no_problem_at_any_base_rate(tmp_path, mean, deviation):
    logit, label = calibrated_clicks(mean=mean, deviation=deviation)
    assert problems_of(CLICKS, tmp_path, logit, label) == []
    assert problems_of(PROBABILITIES, tmp_path, sigmoid(logit), label) == []


def test_probabilities_declared_as_logits_are_refused(tmp_path):
    logit, label = calibrated_clicks()
    (problem,) = problems_of(CLICKS, tmp_path, sigmoid(logit), label)
    assert problem.prevents_packing
    require_reason([problem.reason], "output_misdeclared", declared="logit", fitting="probability")


def test_logits_outside_0_to_1_declared_as_probabilities_are_refused(tmp_path):
    logit, label = calibrated_clicks()
    (problem,) = problems_of(PROBABILITIES, tmp_path, logit, label)
    assert problem.prevents_packing
    assert problem.prevents_measurement  # log loss is undefined
    require_reason([problem.reason], "probability_outside", rows=SAMPLE_ROWS)


def test_logits_between_0_and_1_are_accepted_as_logits_and_give_a_warning_as_probabilities(
    tmp_path,
):
    rng = np.random.default_rng(0)
    logit = rng.uniform(0.05, 0.95, ROWS)
    label = (rng.random(ROWS) < sigmoid(logit)).astype(float)
    assert problems_of(CLICKS, tmp_path, logit, label) == []
    (problem,) = problems_of(PROBABILITIES, tmp_path, logit, label)
    assert not problem.prevents_packing  # in the range of probabilities, so only a warning
    require_reason([problem.reason], "output_misdeclared", declared="probability", fitting="logit")


def test_reversed_scores_give_warnings_for_base_rate_and_chance(tmp_path):
    logit, label = calibrated_clicks()
    problems = problems_of(CLICKS, tmp_path, -logit, label)
    assert not any(problem.prevents_packing for problem in problems)
    codes = codes_of(problem.reason for problem in problems)
    assert codes == ["worse_than_base_rate", "worse_than_chance"]


def test_a_well_ordered_but_uncalibrated_model_gets_one_warning(tmp_path):
    logit, label = calibrated_clicks()
    (problem,) = problems_of(CLICKS, tmp_path, logit + 4, label)
    assert not problem.prevents_packing
    require_reason([problem.reason], "worse_than_base_rate")


@pytest.mark.parametrize("seed", range(5))
def test_random_scores_give_no_warning_of_being_worse_than_chance(tmp_path, seed):
    _, label = calibrated_clicks(seed)
    # Scores near the logit of 0.35, about the share of clicks: random, but not uncalibrated.
    score = np.random.default_rng(seed + 100).normal(np.log(0.35 / 0.65), 1e-3, ROWS)
    problems = problems_of(CLICKS, tmp_path, score, label)
    assert "worse_than_chance" not in codes_of(problem.reason for problem in problems)


def test_three_rows_are_too_few_for_a_warning(tmp_path):
    assert problems_of(CLICKS, tmp_path, [0.9, 0.8, 0.1], [0, 0, 1]) == []


def test_equal_scores_give_a_warning_and_nan_scores_prevent_measurement(tmp_path):
    _, label = calibrated_clicks()
    (constant,) = problems_of(CLICKS, tmp_path, np.full(ROWS, 0.3), label)
    assert not constant.prevents_packing
    reason = require_reason([constant.reason], "scores_equal", rows=SAMPLE_ROWS)
    assert reason.fields["score"] == pytest.approx(0.3)  # stored as float32
    score = calibrated_clicks()[0]
    score[::2] = np.nan
    (missing,) = problems_of(CLICKS, tmp_path, score, label)
    assert missing.prevents_measurement
    require_reason([missing.reason], "scores_not_finite", rows=SAMPLE_ROWS)


def test_lists_in_reverse_order_give_a_warning_and_random_ones_none(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, ROWS)
    group = np.arange(ROWS) // 8
    (problem,) = problems_of(LISTS, tmp_path, -label + rng.normal(0, 0.1, ROWS), label, group)
    assert not problem.prevents_packing
    require_reason([problem.reason], "worse_than_random_order", groups=SAMPLE_ROWS // 8)
    assert problems_of(LISTS, tmp_path, rng.normal(size=ROWS), label, group) == []
    assert problems_of(LISTS, tmp_path, label + rng.normal(size=ROWS), label, group) == []


def test_the_sample_covers_a_split_that_is_sorted_by_label(tmp_path):
    logit, label = calibrated_clicks()
    permutation = np.argsort(label, kind="stable")
    problems = problems_of(CLICKS, tmp_path, -logit[permutation], label[permutation])
    require_reason([problem.reason for problem in problems], "worse_than_chance")


# --- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_labels_of_one_class_are_refused_in_test_and_validation_and_a_warning_in_train(value):
    label = np.full(50, value)
    for name in ("test", "validation"):
        (problem,) = find_label_problems(CLICKS, name, label, None)
        assert problem.prevents_packing
        fields = {"split": name, "rows": 50, "label": value, "column": "label"}
        assert problem.reason == Reason("labels_equal", **fields)
    (problem,) = find_label_problems(CLICKS, "train", label, None)
    assert not problem.prevents_packing


def test_interactions_without_a_label_above_zero_are_refused_in_test_and_validation():
    signature = replace_output(
        signature_of("ranking", "score", "user", "ndcg@10"), kind="retrieval"
    )
    # Only a problem of the test rows prevents measurement.
    for name, prevents_measurement in (("test", True), ("validation", False)):
        (problem,) = find_label_problems(signature, name, np.zeros(50), None)
        assert problem.prevents_packing
        assert problem.prevents_measurement == prevents_measurement
        fields = {"split": name, "rows": 50, "column": "label"}
        assert problem.reason == Reason("interactions_missing", **fields)
    assert list(find_label_problems(signature, "test", np.array([0.0, 1.0]), None)) == []


def test_lists_of_equal_labels_are_refused():
    group = np.repeat(np.arange(10), 5)
    label = np.repeat(np.arange(10) % 2, 5).astype(float)
    (problem,) = find_label_problems(LISTS, "test", label, group)
    assert problem.prevents_packing
    require_reason([problem.reason], "group_labels_equal", metrics=("ndcg@10",), group="query")
    label[0] = 1 - label[0]
    assert list(find_label_problems(LISTS, "test", label, group)) == []


def test_groups_of_equal_labels_are_refused_where_gauc_is_needed():
    signature = signature_of("ctr", "logit", "user")
    group = np.repeat(np.arange(10), 5)
    label = np.repeat(np.arange(10) % 2, 5).astype(float)
    (problem,) = find_label_problems(signature, "test", label, group)
    assert problem.prevents_measurement  # gauc is undefined
    require_reason([problem.reason], "optional_group_labels_equal", metrics=("gauc",))
    # validation uses only auc
    assert list(find_label_problems(signature, "validation", label, group)) == []
    signature_with_gauc = signature_of("ctr", "logit", "user", "gauc")
    (problem,) = find_label_problems(signature_with_gauc, "validation", label, group)
    assert problem.prevents_packing
    require_reason([problem.reason], "group_labels_equal", metrics=("gauc",))
