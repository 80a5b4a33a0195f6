"""The uncompressed model on its own labels: what is refused, what is warned about, what is not."""

import numpy as np
import pytest
import torch
from reason_codes import codes_of, with_code
from safetensors.torch import save_file
from signatures import with_output
from torch import Tensor, nn

from compressors.contracts import Reason, Signature, Split
from compressors.metrics.baseline_checks import SAMPLE_ROWS, label_problems, score_problems

ROWS = 2 * SAMPLE_ROWS


class Passes(nn.Module):
    """Returns its one dense input, so that a test decides every score."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1)


def signature_of(
    task: str, output: str, group: str | None = None, metric: str = "auc"
) -> Signature:
    inputs = [{"kind": "dense", "name": "x", "shape": [1]}]
    return Signature.model_validate(
        {
            "inputs": inputs,
            "outputs": [
                {"name": "label", "kind": task, "form": output, "label": "label", "metric": metric}
            ],
            "group": group,
        }
    )


CLICKS = signature_of("ctr", "logit")
CHANCES = signature_of("ctr", "probability")
LISTS = signature_of("ranking", "score", "query", "ndcg@10")


def split(tmp_path, score, label, group=None) -> Split:
    tensors = {
        "x": torch.tensor(np.asarray(score), dtype=torch.float32).reshape(-1, 1),
        "@label": torch.tensor(np.asarray(label), dtype=torch.float32),
    }
    if group is not None:
        tensors["@group"] = torch.tensor(np.asarray(group))
    save_file(tensors, tmp_path / "data.safetensors")
    return Split(path=str(tmp_path), sha256="0" * 64, rows=len(label))


def found(signature, tmp_path, score, label, group=None):
    return list(score_problems(Passes(), signature, split(tmp_path, score, label, group)))


def clicks(seed=0, shift=-1.0, spread=1.5):
    """Logits and the labels drawn from them: a perfectly calibrated model."""
    draw = np.random.default_rng(seed)
    logit = draw.normal(shift, spread, ROWS)
    return logit, (draw.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(float)


def sigmoid(logit):
    return 1 / (1 + np.exp(-logit))


@pytest.mark.parametrize("shift", [-6.0, -3.0, -1.0, 0.0, 2.0])
@pytest.mark.parametrize("spread", [0.05, 0.5, 3.0])
def test_calibrated_model_has_no_problem_at_any_base_rate(tmp_path, shift, spread):
    logit, label = clicks(shift=shift, spread=spread)
    assert found(CLICKS, tmp_path, logit, label) == []
    assert found(CHANCES, tmp_path, sigmoid(logit), label) == []


def test_probabilities_declared_as_logits_are_refused(tmp_path):
    logit, label = clicks()
    (problem,) = found(CLICKS, tmp_path, sigmoid(logit), label)
    assert problem.refused
    with_code([problem.reason], "output_misdeclared", declared="logit", fitting="probability")


def test_logits_declared_as_probabilities_are_refused_because_they_leave_the_range(tmp_path):
    logit, label = clicks()
    (problem,) = found(CHANCES, tmp_path, logit, label)
    assert problem.refused
    assert problem.fatal  # log loss of such scores has no value
    with_code([problem.reason], "probability_outside", rows=SAMPLE_ROWS)


def test_logits_that_happen_to_lie_in_the_range_of_probabilities_are_accepted_as_logits(tmp_path):
    draw = np.random.default_rng(0)
    logit = draw.uniform(0.05, 0.95, ROWS)
    label = (draw.random(ROWS) < sigmoid(logit)).astype(float)
    assert found(CLICKS, tmp_path, logit, label) == []
    (problem,) = found(CHANCES, tmp_path, logit, label)
    assert not problem.refused  # the range fits, so it is not certain
    with_code([problem.reason], "output_misdeclared", declared="probability", fitting="logit")


def test_scores_worse_than_the_base_rate_or_chance_are_warned_about(tmp_path):
    logit, label = clicks()
    problems = found(CLICKS, tmp_path, -logit, label)
    assert not any(problem.refused for problem in problems)
    codes = codes_of(problem.reason for problem in problems)
    assert codes == ["worse_than_base_rate", "worse_than_chance"]


def test_a_well_ordered_but_uncalibrated_model_gets_one_warning(tmp_path):
    logit, label = clicks()
    (problem,) = found(CLICKS, tmp_path, logit + 4, label)
    assert not problem.refused
    with_code([problem.reason], "worse_than_base_rate")


@pytest.mark.parametrize("seed", range(5))
def test_random_scores_are_not_called_worse_than_chance(tmp_path, seed):
    _, label = clicks(seed)
    score = np.random.default_rng(seed + 100).normal(np.log(0.35 / 0.65), 1e-3, ROWS)
    problems = found(CLICKS, tmp_path, score, label)
    assert "worse_than_chance" not in codes_of(problem.reason for problem in problems)


def test_a_few_rows_prove_nothing(tmp_path):
    assert found(CLICKS, tmp_path, [0.9, 0.8, 0.1], [0, 0, 1]) == []


def test_equal_and_missing_scores_are_named(tmp_path):
    _, label = clicks()
    (constant,) = found(CLICKS, tmp_path, np.full(ROWS, 0.3), label)
    assert not constant.refused
    reason = with_code([constant.reason], "scores_equal", rows=SAMPLE_ROWS)
    assert reason.fields["score"] == pytest.approx(0.3)  # stored as float32
    score = clicks()[0]
    score[::2] = np.nan
    (missing,) = found(CLICKS, tmp_path, score, label)
    assert missing.fatal
    with_code([missing.reason], "scores_not_finite", rows=SAMPLE_ROWS)


def test_lists_in_reverse_order_are_warned_about_and_random_ones_are_not(tmp_path):
    draw = np.random.default_rng(0)
    label = draw.integers(0, 4, ROWS)
    group = np.arange(ROWS) // 8
    (problem,) = found(LISTS, tmp_path, -label + draw.normal(0, 0.1, ROWS), label, group)
    assert not problem.refused
    with_code([problem.reason], "worse_than_random_order", groups=SAMPLE_ROWS // 8)
    assert found(LISTS, tmp_path, draw.normal(size=ROWS), label, group) == []
    assert found(LISTS, tmp_path, label + draw.normal(size=ROWS), label, group) == []


def test_the_sample_spreads_over_a_split_that_is_sorted_by_label(tmp_path):
    logit, label = clicks()
    order = np.argsort(label, kind="stable")
    problems = found(CLICKS, tmp_path, -logit[order], label[order])
    with_code([problem.reason for problem in problems], "worse_than_chance")


# --- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_one_class_is_refused_in_test_and_validation_and_a_warning_elsewhere(value):
    label = np.full(50, value)
    for name in ("test", "validation"):
        (problem,) = label_problems(CLICKS, name, label, None)
        assert problem.refused
        fields = {"split": name, "rows": 50, "label": value, "column": "label"}
        assert problem.reason == Reason("labels_equal", **fields)
    (problem,) = label_problems(CLICKS, "train", label, None)
    assert not problem.refused


def test_interactions_without_a_label_above_zero_are_refused_in_test_and_validation():
    signature = with_output(signature_of("ranking", "score", "user", "ndcg@10"), kind="retrieval")
    for name, fatal in (("test", True), ("validation", False)):
        (problem,) = label_problems(signature, name, np.zeros(50), None)
        assert (problem.refused, problem.fatal) == (True, fatal)
        fields = {"split": name, "rows": 50, "column": "label"}
        assert problem.reason == Reason("interactions_missing", **fields)
    assert list(label_problems(signature, "test", np.array([0.0, 1.0]), None)) == []


def test_lists_of_equal_labels_are_refused_because_no_order_differs():
    group = np.repeat(np.arange(10), 5)
    label = np.repeat(np.arange(10) % 2, 5).astype(float)
    (problem,) = label_problems(LISTS, "test", label, group)
    assert problem.refused
    with_code([problem.reason], "group_labels_equal", metrics=("ndcg@10",), group="query")
    label[0] = 1 - label[0]
    assert list(label_problems(LISTS, "test", label, group)) == []


def test_a_group_column_without_mixed_groups_is_refused_with_its_removal():
    signature = signature_of("ctr", "logit", "user")
    group = np.repeat(np.arange(10), 5)
    label = np.repeat(np.arange(10) % 2, 5).astype(float)
    (problem,) = label_problems(signature, "test", label, group)
    assert problem.fatal  # gauc has no value
    with_code([problem.reason], "optional_group_labels_equal", metrics=("gauc",))
    assert list(label_problems(signature, "validation", label, group)) == []  # judged by auc alone
    judged = signature_of("ctr", "logit", "user", "gauc")
    (problem,) = label_problems(judged, "validation", label, group)
    assert problem.refused
    with_code([problem.reason], "group_labels_equal", metrics=("gauc",))
