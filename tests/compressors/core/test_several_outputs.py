"""Networks with several outputs: what they may return, losses, and every step on such a network.

``MULTI_TASK`` of ``models.py`` has three outputs: the logits ``click`` and ``like``, and the
probability ``buy``. The loss of ``like`` has the weight 0.5, and every third row lacks its label.
"""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from error_codes import raises_code
from models import ALONE as METHODS_WITHOUT_EARLIER_STEPS
from models import MULTI_TASK, default_step, write_split
from reason_codes import require_reason
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from compressors.core.batches import Batch, JoinedRows, Rows, batches
from compressors.core.dry_run import dry_run
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import run
from compressors.core.scores import network_scores, score_columns, scores_of
from compressors.core.smoke_test import smoke_test
from compressors.distill.losses import loss_of_teacher
from compressors.distill.recalibrate import Recalibrate, fit_line
from compressors.distill.soft_labels import mean_predictions
from compressors.errors.compression import ModelRefused
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
    gap = soft_loss(SIGNATURE, changed, teacher, batch, temperature=1.0) - soft_loss(
        SIGNATURE, teacher, teacher, batch, temperature=1.0
    )
    like = LIKE.model_copy(update={"loss_weight": 1.0})
    likes = SIGNATURE.model_copy(update={"outputs": (like,)})
    alone = soft_loss(likes, changed[:, 1], teacher[:, 1], batch, temperature=1.0) - soft_loss(
        likes, teacher[:, 1], teacher[:, 1], batch, temperature=1.0
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


def test_joined_rows_keep_the_labels_of_each_output_and_traffic_has_none(tmp_path):
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


def bench_with_drawn_labels(folder):
    """A bench whose validation labels have other probabilities than the scores.

    The probability of an output's label 1 is sigmoid(1.5 * logit - 0.5). Every third label of
    ``like`` is missing.
    """
    bench = MULTI_TASK.bench(folder)
    tables, scores = MULTI_TASK.rows_of_tables(), MULTI_TASK.label_scores
    split = write_split(
        SIGNATURE, tables, folder / "many", seed=3, score_function=scores, rows=4000
    )
    (batch,) = batches(split, SIGNATURE, 4000)
    with torch.no_grad():
        logits = network_scores(MULTI_TASK.model().module, batch.inputs, SIGNATURE)
    logits[:, 2] = torch.logit(logits[:, 2])  # ``buy`` is a probability
    uniform = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
    labels = (uniform < torch.sigmoid(1.5 * logits - 0.5)).float()
    labels[::3, 1] = torch.nan
    path = Path(split.path) / "data.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({**tensors, "@label": labels}, path)
    return bench.model_copy(update={"validation": split})


@pytest.mark.parametrize("form", ["tuple", "mapping", "tensor"])
def test_each_output_has_its_own_calibration_map(form, tmp_path):
    bench = bench_with_drawn_labels(tmp_path / "data")
    source = replace(MULTI_TASK, config={**MULTI_TASK.config, "returns": form}).model()
    result = run(Recalibrate(), source, bench, tmp_path / "out")
    (batch,) = batches(bench.validation, SIGNATURE, 4000)
    with torch.no_grad():
        before, after = (
            score_columns(network_scores(model.module, batch.inputs, SIGNATURE))
            for model in (source, result)
        )
    slopes = []
    for output, old, new, label in zip(
        SIGNATURE.outputs, before, after, score_columns(batch.label), strict=True
    ):
        is_logit = output.form == "logit"
        old_logit, new_logit = (old, new) if is_logit else (torch.logit(old), torch.logit(new))
        line = result.plan.of(f"(output {output.name})")
        assert (line.format, line.steps) == ("platt", ("recalibrate",))
        has_label = ~label.isnan()
        rows = require_reason(line.reasons, "output_mapped").fields["rows"]
        assert rows == int(has_label.sum())
        logit, labels = (x[has_label].double().numpy() for x in (old_logit, label))
        slope, offset = fit_line(logit, labels, offset=True)
        # float32 rounding; the slopes of the three outputs differ by more than 0.1
        torch.testing.assert_close(new_logit, slope * old_logit + offset, atol=1e-4, rtol=1e-4)
        slopes.append(slope)
    assert min(abs(a - b) for a, b in itertools.combinations(slopes, 2)) > 0.1
    predicted = dry_run(Recalibrate(), source, bench)
    assert [line.module for line in predicted.plan.lines] == [
        line.module for line in result.plan.lines
    ]
    assert predicted.plan.bytes_after == result.plan.bytes_after


def test_graph_contains_the_calibration_map_of_each_output(tmp_path):
    bench = bench_with_drawn_labels(tmp_path / "data")
    result = run(Recalibrate(method="isotonic"), MULTI_TASK.model(), bench, tmp_path / "out")
    (served,) = served_graphs(SIGNATURE)
    lower(result.module, served, "onnxruntime", tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    scores = session.scores({name: tensor.numpy() for name, tensor in inputs_of().items()})
    with torch.no_grad():
        expected = network_scores(result.module, inputs_of(), SIGNATURE)
    expected[:, :2] = expected[:, :2].sigmoid()
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)  # float32 in another order
