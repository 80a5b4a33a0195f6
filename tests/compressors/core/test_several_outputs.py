"""Networks with several outputs: what they may return, losses, and every step on such a network."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from error_codes import raises_code
from models import ALONE as METHODS_WITHOUT_EARLIER_STEPS
from models import MULTI_TASK, default_step
from torch.nn import functional as F

from compressors.core.batches import Batch, JoinedRows, Rows, batches
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import run
from compressors.core.scores import network_scores, score_columns, scores_of
from compressors.core.smoke_test import smoke_test
from compressors.distill.losses import loss_of_teacher
from compressors.distill.recalibrate import Recalibrate
from compressors.distill.soft_labels import mean_predictions
from compressors.errors.compression import ModelRefused, NothingToCompress
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.metrics.validation_score import quality
from compressors.rewrite.equalize import Equalize
from compressors.rewrite.fold import Fold
from compressors.task_kinds.loss import hard_loss, soft_loss
from infra.onnxruntime.sessions import Session

SIGNATURE = MULTI_TASK.signature
CLICK, LIKE, BUY = SIGNATURE.outputs


def inputs_of(rows=9):
    return generate_inputs(SIGNATURE, MULTI_TASK.rows_of_tables(), rows, seed=3)


def module_returning(form):
    """Return the network, which returns its outputs as a tuple, mapping or tensor."""
    reference = replace(MULTI_TASK, config={**MULTI_TASK.config, "returns": form})
    return reference.model().module


# --- what a network returns --------------------------------------------------------------------


@torch.no_grad()
def test_tuple_mapping_and_tensor_give_the_same_scores():
    by_form = {
        form: network_scores(module_returning(form), inputs_of(), SIGNATURE)
        for form in ("tuple", "mapping", "tensor")
    }
    assert by_form["tuple"].shape == (9, 3)
    for scores in by_form.values():
        torch.testing.assert_close(scores, by_form["tuple"], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(9,), (9, 1)])
def test_scores_of_the_only_output_have_one_dimension(shape):
    signature = SIGNATURE.model_copy(update={"outputs": (CLICK,)})
    values = torch.arange(9.0)
    returned = values.reshape(shape)
    for form in (returned, (returned,), {"click": returned}):
        torch.testing.assert_close(scores_of(form, signature), values)


@pytest.mark.parametrize(
    ("returned", "error", "words"),
    [
        (None, TypeError, "got NoneType"),
        (torch.zeros(9), ValueError, "expected (rows, 3), got (9,)"),
        (torch.zeros(9, 2), ValueError, "expected (rows, 3), got (9, 2)"),
        ((torch.zeros(9),) * 2, ValueError, "expected 3 output(s), got 2"),
        ((torch.zeros(9),) * 2 + (torch.zeros(9, 4),), ValueError, "output 'buy', got (9, 4)"),
        ((torch.zeros(9),) * 2 + (1.0,), ValueError, "output 'buy', got float"),
        ({"click": torch.zeros(9), "like": torch.zeros(9)}, ValueError, "no 'buy'"),
    ],
)
def test_other_returned_values_are_refused_by_name(returned, error, words):
    with pytest.raises(error) as caught:
        scores_of(returned, SIGNATURE)
    assert words in str(caught.value)


def test_smoke_test_refuses_a_network_that_lacks_an_output():
    smoke_test(module_returning("mapping"), SIGNATURE, "m:MultiTaskNet")
    outputs = (*SIGNATURE.outputs, CLICK.model_copy(update={"name": "share"}))
    four = SIGNATURE.model_copy(update={"outputs": outputs})
    with raises_code(ModelRefused, "outputs_shape", outputs=("click", "like", "buy", "share")):
        smoke_test(module_returning("tuple"), four, "m:MultiTaskNet")


def test_one_output_of_a_mapping_passes_the_smoke_test_and_is_served_as_the_score(tmp_path):
    network = module_returning("mapping")
    signature = SIGNATURE.model_copy(update={"outputs": (BUY,)})
    smoke_test(network, signature, "m:MultiTaskNet")
    (served,) = served_graphs(signature)
    lower(network, served, "onnxruntime", tmp_path / "model.onnx")
    inputs = inputs_of()
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    with torch.no_grad():
        expected = network(**inputs)["buy"].reshape(-1).numpy()
    scores = Session(tmp_path / "model.onnx", threads=1).scores(arrays)
    np.testing.assert_allclose(scores, expected, atol=1e-6)  # float32 rounding
    other = SIGNATURE.model_copy(update={"outputs": (BUY.model_copy(update={"name": "share"}),)})
    with raises_code(ModelRefused, "outputs_shape", outputs=("share",)):
        smoke_test(network, other, "m:MultiTaskNet")


# --- losses and metrics -----------------------------------------------------------------------


def random_batch(rows=40):
    """Return scores ``(rows, 3)`` and labels, of which a third of ``like`` is missing."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(rows, 3, generator=generator)
    scores[:, 2] = scores[:, 2].sigmoid()
    label = (torch.rand(rows, 3, generator=generator) < 0.4).float()
    label[::3, 1] = torch.nan
    return scores.requires_grad_(True), Batch({}, label, None)


def test_loss_is_the_weighted_sum_over_the_rows_with_a_label():
    scores, batch = random_batch()
    has_label = ~batch.label[:, 1].isnan()
    expected = (
        F.binary_cross_entropy_with_logits(scores[:, 0], batch.label[:, 0])
        + 0.5 * F.binary_cross_entropy_with_logits(scores[has_label, 1], batch.label[has_label, 1])
        + F.binary_cross_entropy(scores[:, 2], batch.label[:, 2])
    )
    torch.testing.assert_close(hard_loss(SIGNATURE, scores, batch), expected)


def test_output_without_a_label_in_the_batch_adds_nothing_to_the_loss():
    scores, batch = random_batch()
    batch.label[:, 1] = torch.nan
    loss = hard_loss(SIGNATURE, scores, batch)
    loss.backward()
    assert math.isfinite(loss.item())
    assert not scores.grad[:, 1].any()
    assert scores.grad[:, 0].all()


def test_distillation_loss_is_smallest_at_the_scores_of_the_teacher():
    teacher, batch = random_batch()
    teacher = teacher.detach()
    for name in ("task", "pointwise", "margin", "listwise"):
        student = teacher.clone().requires_grad_(True)
        loss = loss_of_teacher(name, SIGNATURE, student, teacher, batch, temperature=2.0, top=5)
        (gradient,) = torch.autograd.grad(loss, student)
        assert float(gradient.abs().max()) < 1e-6, name  # float32 rounding of probabilities
    changed = teacher.clone()
    changed[:, 1] += 1.0  # only the output with weight 0.5
    gap = soft_loss(SIGNATURE, changed, teacher, batch, 1.0) - soft_loss(
        SIGNATURE, teacher, teacher, batch, 1.0
    )
    like = LIKE.model_copy(update={"loss_weight": 1.0})
    likes = SIGNATURE.model_copy(update={"outputs": (like,)})
    alone = soft_loss(likes, changed[:, 1], teacher[:, 1], batch, 1.0) - soft_loss(
        likes, teacher[:, 1], teacher[:, 1], batch, 1.0
    )
    torch.testing.assert_close(gap, 0.5 * alone)


def test_mean_of_teachers_averages_probabilities_as_logits():
    first, second = torch.tensor([[0.0, 0.2]]), torch.tensor([[2.0, 0.8]])
    mean = mean_predictions([first, second], ("logit", "probability"))
    torch.testing.assert_close(mean, torch.tensor([[1.0, 0.5]]))


def test_validation_score_is_the_weighted_mean_of_the_metrics(tmp_path):
    bench, module = MULTI_TASK.bench(tmp_path), MULTI_TASK.model().module
    (rows,) = batches(bench.validation, SIGNATURE, 1000)
    with torch.no_grad():
        scores = score_columns(network_scores(module, rows.inputs, SIGNATURE))
    aucs = []
    for score, label in zip(scores, score_columns(rows.label), strict=True):
        has_label = ~label.isnan()
        positive, negative = (score[has_label & (label == value)] for value in (1, 0))
        aucs.append(float((positive[:, None] > negative[None, :]).double().mean()))
    expected = np.average(aucs, weights=[1.0, 0.5, 1.0])
    assert quality(module, SIGNATURE, bench.validation) == pytest.approx(expected, abs=1e-9)


def test_labelled_rows_and_traffic_keep_the_labels_of_each_output(tmp_path):
    """Traffic has logged requests without labels, here the calibration rows."""
    bench = MULTI_TASK.bench(tmp_path)
    labelled = Rows(bench.train, SIGNATURE)
    joined = JoinedRows(labelled, Rows(bench.calibration, SIGNATURE))
    assert joined.label.shape == (2 * len(labelled), 3)
    torch.testing.assert_close(joined.label[: len(labelled)], labelled.label, equal_nan=True)
    assert joined.label[len(labelled) :].isnan().all()


# --- every method ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", METHODS_WITHOUT_EARLIER_STEPS, ids=lambda method: method.__name__
)
def test_every_method_keeps_three_outputs(method, tmp_path):
    step, bench = default_step(method), MULTI_TASK.bench(tmp_path / "data")
    source = MULTI_TASK.model()
    if method is Equalize:  # it needs layers without norms
        source = run(Fold(), source, bench, tmp_path / "folded")
    result = run(step, source, bench, tmp_path / "out")
    with torch.no_grad():
        scores = network_scores(result.module, inputs_of(), SIGNATURE)
    assert scores.shape == (9, 3)
    assert bool(scores.isfinite().all())


def test_recalibration_of_several_outputs_is_refused(tmp_path):
    bench = MULTI_TASK.bench(tmp_path / "data")
    with raises_code(NothingToCompress, "several_outputs", step="recalibrate"):
        run(Recalibrate(), MULTI_TASK.model(), bench, tmp_path / "out")
