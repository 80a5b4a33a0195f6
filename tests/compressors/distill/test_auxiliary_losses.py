"""``distill`` with hints, auxiliary heads and packed tables, and training of tables only.

Hints train a student's layer to predict the output of the original's layer; an auxiliary head
predicts the teacher's scores from a layer. Both are discarded after training. ``soft_share`` is the
weight of the teacher's loss; the loss on labels has the rest. Packed tables and layers have codes
in place of float weights.

The networks are those of ``models.py``. ``RANKER`` has the tables ``TABLE_NAMES`` and dense layers
such as ``hidden`` (40 inputs, ``width`` outputs, 16 by default) and ``plain``; its bench has 96
rows. ``NORMED`` also has a layer ``hidden``, but no ``plain``. ``ATTENTION`` has layers over lists.
"""

from dataclasses import replace

import pytest
import torch
from error_codes import raises_code
from models import ATTENTION, BENCH_ROWS, NORMED, RANKER, SHORT_TRAINING
from reason_codes import codes_of, require_reason
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.core.batches import batches
from compressors.core.dry_run import dry_run
from compressors.core.modules.output_calibration import Recalibration, attach
from compressors.core.runner import run
from compressors.core.state.module_state import map_tensors
from compressors.distill.auxiliary_losses import AuxiliaryLosses, measure_widths, record_outputs
from compressors.distill.distill import Distill
from compressors.distill.training import trainer
from compressors.distill.training.settings import Training
from compressors.errors.steps import DistillationRefused
from compressors.factorize.low_rank import LowRank
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

TABLE_NAMES = ("user", "item", "city", "genres", "history", "tags")
TRAIN_TABLES = SHORT_TRAINING.model_copy(update={"tables": True})


def activations(module: nn.Module, name: str, bench) -> Tensor:
    """Output of a layer for the training rows, ``(rows, width)``."""
    (batch,) = batches(bench.train, bench.signature, BENCH_ROWS)
    with torch.no_grad(), record_outputs(module, (name,)) as outputs:
        module(**batch.inputs)
    return outputs[name]


def unexplained_share(module: nn.Module, original: nn.Module, name: str, bench) -> float:
    """Squared error of the best linear map from the student's layer to the original's.

    It is a share of the mean square of the original layer's output.
    """
    inputs, targets = activations(module, name, bench), activations(original, name, bench)
    with_constant = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    predicted = with_constant @ torch.linalg.lstsq(with_constant, targets).solution
    return float((predicted - targets).square().mean() / targets.square().mean())


def test_with_hints_a_smaller_layer_predicts_the_original_layer_better(tmp_path):
    """Two students are compared, one trained with hints and one without.

    The student's layer has 8 outputs, the original's 16. After training, the best linear map from
    the one to the other is fitted. ``hint_share`` is the weight of the hint loss; without hints it
    has no effect.
    """
    bench = RANKER.bench(tmp_path / "data")
    original = RANKER.model().module
    source = replace(RANKER.model(), original=original)
    training = Training(batch=16, learning_rate=0.01, warmup=0, epochs=15, patience=15)
    results = {}
    for share, hints in ((1.0, ()), (100.0, ("hidden",))):
        step = Distill(student={"width": 8}, hints=hints, hint_share=share, training=training)
        result = run(step, source, bench, tmp_path / f"{share}")
        # no tensor of the hints is stored
        assert set(map_tensors(tmp_path / f"{share}")) == set(original.state_dict())
        assert not result.module.hidden._forward_hooks
        results[bool(hints)] = unexplained_share(result.module, original, "hidden", bench)
    assert results[True] < 0.9 * results[False]


def test_training_with_hints_does_not_change_the_original(tmp_path):
    original = NORMED.model().module.train()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    source = replace(NORMED.model(), original=original)
    bench = NORMED.bench(tmp_path / "normed")
    run(Distill(hints=("hidden", "norm"), training=SHORT_TRAINING), source, bench, tmp_path / "out")
    assert original.training
    torch.testing.assert_close(dict(original.state_dict()), before, rtol=0, atol=0)
    assert not original.hidden._forward_hooks


def test_hints_without_an_original_or_for_unknown_layers_raise_distillation_refused(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    with raises_code(DistillationRefused, "hints_need_original"):
        run(
            Distill(hints=("hidden",), training=SHORT_TRAINING),
            RANKER.model(),
            bench,
            tmp_path / "a",
        )
    with raises_code(DistillationRefused, "layer_missing", layer="hiden", network="network"):
        dry_run(Distill(hints=("hiden",)), RANKER.model(), bench)
    source = replace(RANKER.model(), original=NORMED.model().module)
    with raises_code(DistillationRefused, "layer_missing", layer="plain", network="original"):
        run(Distill(hints=("plain",), training=SHORT_TRAINING), source, bench, tmp_path / "b")


def test_hints_for_layers_without_vector_outputs_raise_distillation_refused(tmp_path):
    (batch,) = batches(NORMED.bench(tmp_path).train, NORMED.signature, BENCH_ROWS)

    class FlatOutputNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total = nn.Flatten(0)

        def forward(self, user: Tensor, price: Tensor) -> Tensor:
            score: Tensor = self.total(price[:, :1])
            return score

    with raises_code(
        DistillationRefused,
        "layer_output_unusable",
        layer="total",
        got=f"torch.float32 of shape ({BENCH_ROWS},)",
    ):
        measure_widths(FlatOutputNet(), ("total",), batch, NORMED.signature)


def test_hint_loss_is_zero_for_matching_outputs_and_independent_of_scale():
    settings = {"hints": ("a",), "auxiliary": None, "seed": 0}
    widths = {"student_widths": {"a": 2}, "teacher_widths": {"a": 3}}
    auxiliary = AuxiliaryLosses(**settings, **widths)
    auxiliary.outputs = {"a": torch.randn(5, 2)}
    with torch.no_grad():
        matching = auxiliary.maps[0](auxiliary.outputs["a"])
    assert auxiliary.hint_loss({"a": matching}).item() < 1e-12
    # The loss is divided by the mean square of the target, so it is large for a target of zeros.
    assert auxiliary.hint_loss({"a": torch.zeros(5, 3)}).item() > 1e6
    doubled = AuxiliaryLosses(**settings, **widths)
    doubled.load_state_dict({key: 2 * value for key, value in auxiliary.state_dict().items()})
    doubled.outputs = auxiliary.outputs
    targets = torch.randn(5, 3)
    torch.testing.assert_close(
        auxiliary.hint_loss({"a": targets}), doubled.hint_loss({"a": 2 * targets})
    )


def test_hints_for_layers_over_sequences_train_the_network(tmp_path):
    bench = ATTENTION.bench(tmp_path / "data")
    source = replace(ATTENTION.model(), original=ATTENTION.model(seed=1).module)
    step = Distill(hints=("key", "value"), training=SHORT_TRAINING)
    result = run(step, source, bench, tmp_path / "out")
    assert "distill" in result.plan.of("key").steps


# --- auxiliary heads -------------------------------------------------------------------------


def test_with_an_auxiliary_head_the_output_follows_the_labels(tmp_path):
    """Labels contradict the teacher. Without a head, the output follows the teacher."""
    bench = RANKER.bench(tmp_path / "data")
    (batch,) = batches(bench.train, RANKER.signature, BENCH_ROWS)
    soft = tmp_path / "soft"
    soft.mkdir()
    # The teacher predicts the opposite of the labels, with large logits.
    save_file({"score": 20 * (0.5 - batch.label)}, soft / "data.safetensors")
    bench = bench.model_copy(
        update={"soft_labels": bench.soft_labels.model_copy(update={"path": str(soft)})}
    )
    training = SHORT_TRAINING.model_copy(update={"epochs": 4, "patience": 4})
    results = {}
    for auxiliary in (None, "hidden"):
        step = Distill(soft_share=0.8, auxiliary=auxiliary, training=training)
        result = run(step, RANKER.model(), bench, tmp_path / str(auxiliary))
        assert set(map_tensors(tmp_path / str(auxiliary))) == set(
            RANKER.model().module.state_dict()
        )
        with torch.no_grad():
            score = result.module(**batch.inputs).reshape(-1)
        results[auxiliary] = float(torch.corrcoef(torch.stack([score, batch.label]))[0, 1])
    # Validation labels agree with the training labels. So without a head, no epoch is better than
    # the network before training, whose correlation is -0.8.
    assert results[None] < 0 < 0.5 < results["hidden"]


def test_layers_before_an_auxiliary_head_learn_from_the_teacher(tmp_path):
    """The teacher has 99 % of the weight, so the layer predicts its scores better than before."""
    bench = RANKER.bench(tmp_path / "data")
    training = SHORT_TRAINING.model_copy(update={"epochs": 6, "patience": 6})
    step = Distill(soft_share=0.99, auxiliary="plain", training=training)
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    (batch,) = batches(bench.train, RANKER.signature, BENCH_ROWS)
    targets = RANKER.label_scores(batch.inputs)[:, None]  # the teacher's scores

    def explained_variance(module: nn.Module) -> float:
        inputs = activations(module, "plain", bench)
        with_constant = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
        residual = with_constant @ torch.linalg.lstsq(with_constant, targets).solution - targets
        return 1 - float(residual.square().mean() / targets.var())

    before = explained_variance(RANKER.model().module)
    assert explained_variance(result.module) > before + 0.1


# --- resuming a training ---------------------------------------------------------------------


def test_a_killed_training_with_hints_and_a_head_resumes_and_ends_with_the_same_bits(
    tmp_path, monkeypatch
):
    bench = RANKER.bench(tmp_path / "data")
    source = replace(RANKER.model(), original=RANKER.model(seed=1).module)
    training = SHORT_TRAINING.model_copy(update={"epochs": 4, "patience": 4})
    step = Distill(hints=("hidden",), auxiliary="plain", training=training)
    uninterrupted = bench.model_copy(update={"checkpoints": str(tmp_path / "whole")})
    run(step, source, uninterrupted, tmp_path / "a")

    class Killed(Exception):
        """Raised in place of the end of the process."""

    def kill(folder, progress, write=trainer.store_progress):
        write(folder, progress)
        if len(progress.json_values["epochs"]) == 3:  # the start and the first two epochs
            raise Killed

    killed_bench = bench.model_copy(update={"checkpoints": str(tmp_path / "cut")})
    monkeypatch.setattr(trainer, "store_progress", kill)
    with pytest.raises(Killed):
        run(step, source, killed_bench, tmp_path / "b")
    assert not source.module.hidden._forward_hooks
    monkeypatch.undo()
    run(step, source, killed_bench, tmp_path / "c")
    torch.testing.assert_close(
        map_tensors(tmp_path / "a"), map_tensors(tmp_path / "c"), rtol=0, atol=0
    )


# --- training tables only, and packed tables -------------------------------------------------


def test_distill_with_dense_false_trains_only_tables(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    step = Distill(dense=False, soft_share=1, training=TRAIN_TABLES)
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    before = RANKER.model().module.state_dict()
    for name, tensor in result.module.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name.partition(".")[0] not in TABLE_NAMES), (
            name
        )
    assert codes_of(result.plan.of("hidden").reasons) == ["dense_not_trained"]
    reasons = result.plan.of("user").reasons
    assert codes_of(reasons)[:2] == ["trained_on_rows", "trained_to_epoch"]
    require_reason(reasons, "trained_on_rows", step="distill", rows=BENCH_ROWS)


def test_distill_with_dense_false_trains_the_scales_of_packed_tables(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    packed = run(RowwiseInt4(scale="float32"), RANKER.model(), bench, tmp_path / "packed")
    step = Distill(dense=False, soft_share=1, training=TRAIN_TABLES)
    result = run(step, packed, bench, tmp_path / "out")
    assert torch.equal(result.module.item.codes, packed.module.item.codes)
    assert not torch.equal(result.module.item.scale, packed.module.item.scale)
    assert torch.equal(result.module.hidden.weight, packed.module.hidden.weight)


@pytest.mark.parametrize("method", [RowwiseInt8(), LowRank(rank=0.5)], ids=lambda m: m.kind)
def test_a_student_keeps_packed_and_composed_tables_unchanged(method, tmp_path):
    """A composed table consists of smaller tables, here the factors of ``LowRank``."""
    bench = RANKER.bench(tmp_path / "data")
    packed = run(method, RANKER.model(), bench, tmp_path / "packed")
    step = Distill(student={"width": 8}, training=SHORT_TRAINING)
    predicted = dry_run(step, packed, bench).plan
    result = run(step, packed, bench, tmp_path / "out")
    assert [(line.module, line.bytes_after) for line in result.plan.lines] == [
        (line.module, line.bytes_after) for line in predicted.lines
    ]
    stored = map_tensors(tmp_path / "out")
    assert sum(line.bytes_after for line in result.plan.lines) == sum(
        tensor.nbytes for tensor in stored.values()
    )
    assert result.network.modules == packed.network.modules
    before = packed.module.state_dict()
    for name in stored:
        if name.startswith(("user", "item", "genres", "history", "tags")):
            assert torch.equal(stored[name], before[name]), name
    assert result.module.hidden.out_features == 8
    assert result.plan.of("item").format == packed.plan.of("item").format
    reasons = result.plan.of("hidden").reasons
    require_reason(reasons, "smaller_in_student", before="16x40", after="8x40")


def test_a_student_with_fewer_columns_in_a_packed_table_raises_distillation_refused(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    packed = run(RowwiseInt8(), RANKER.model(), bench, tmp_path / "packed")
    with raises_code(DistillationRefused, "table_packed", format="rowwise_int8"):
        dry_run(Distill(student={"dim": 4}, training=TRAIN_TABLES), packed, bench)


def test_a_student_of_a_recalibrated_network_raises_distillation_refused(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    source = RANKER.model()
    slope_and_offset = torch.tensor([2.0, 0.0])
    attach(source.module, Recalibration("platt", "logit", line=slope_and_offset))
    with raises_code(DistillationRefused, "already_recalibrated"):
        dry_run(Distill(student={"width": 8}), source, bench)


@pytest.mark.parametrize("method", [StaticInt8(), Float16()], ids=lambda m: m.kind)
def test_a_student_of_packed_layers_raises_distillation_refused(method, tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    packed = run(method, RANKER.model(), bench, tmp_path / "packed")
    with raises_code(DistillationRefused, "layer_packed"):
        dry_run(Distill(student={"width": 8}), packed, bench)
