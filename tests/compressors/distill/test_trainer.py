"""The trainer: early stopping, trained parameters, learning rates, and resuming after a crash."""

import json
import math
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import models
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from models import ATTENTION, BENCH_ROWS, NORMED, RANKER, SHORT_TRAINING, Reference
from signatures import replace_output
from torch import Tensor, nn

from compressors.contracts import Bench, Split
from compressors.core.batches import Batch, Rows, batches
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.distill.training import trainer
from compressors.distill.training.checkpoint import (
    TrainingProgress,
    read_progress,
    store_progress,
    write_progress,
)
from compressors.distill.training.settings import Training
from compressors.distill.training.trainable import trainable_tensors
from compressors.distill.training.trainer import train
from compressors.errors.steps import TrainingFailed
from compressors.metrics.validation_score import quality
from compressors.prune.dense.magnitude import Magnitude
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.task_kinds.loss import hard_loss, shuffled_rows


def train_copy(
    model: Model, bench: Bench, training: Training = SHORT_TRAINING, folder: Path | None = None
) -> tuple[nn.Module, tuple[trainer.Epoch, ...]]:
    """Train a copy of a model; return it and its epochs. Epoch 0 is the state before training."""
    module = model.private().module

    def loss(output: Tensor, batch: Batch, row_numbers: Tensor) -> Tensor:
        return hard_loss(bench.signature, output, batch)

    assert bench.train is not None
    assert bench.validation is not None
    epochs = train(
        module,
        bench.signature,
        bench.train,
        bench.validation,
        loss,
        training,
        seed=0,
        checkpoints=None if folder is None else str(folder),
    )
    return module, epochs


def equal_tensors(first: nn.Module, second: nn.Module) -> bool:
    first_state, second_state = first.state_dict(), second.state_dict()
    return first_state.keys() == second_state.keys() and all(
        torch.equal(first_state[k], second_state[k]) for k in first_state
    )


SELECTED_BY_MRR = replace(ATTENTION, signature=replace_output(ATTENTION.signature, metric="mrr@5"))


@pytest.mark.parametrize(
    "reference",
    [RANKER, ATTENTION, SELECTED_BY_MRR, NORMED],
    ids=["auc", "ndcg", "mrr", "norm"],
)
def test_training_improves_quality_and_returns_the_best_epoch(reference, tmp_path):
    bench = reference.bench(tmp_path)
    module, epochs = train_copy(reference.model(), bench)
    best = max(epochs, key=lambda epoch: epoch.quality)
    assert best.number > 0
    assert best.quality > epochs[0].quality
    assert quality(module, bench.signature, bench.validation) == best.quality
    assert not module.training
    assert not any(parameter.requires_grad for parameter in tables_of(module))


def validation_with_opposite_labels(reference: Reference, folder: Path) -> Split:
    """Validation rows whose labels are the opposite of those of the training rows."""
    return models.write_split(
        reference.signature,
        reference.rows_of_tables(),
        folder / "opposite",
        seed=9,
        score_function=lambda inputs: -reference.label_scores(inputs),
    )


def tables_of(module: nn.Module) -> list[nn.Parameter]:
    kinds = nn.Embedding | nn.EmbeddingBag
    return [part.weight for part in module.modules() if isinstance(part, kinds)]


def test_training_without_improvement_stops_after_patience_and_returns_the_start(tmp_path):
    """Validation labels are the opposite of training labels, so every epoch lowers the quality."""
    bench = RANKER.bench(tmp_path / "data")
    opposite = validation_with_opposite_labels(RANKER, tmp_path)
    source = RANKER.model()
    training = SHORT_TRAINING.model_copy(update={"patience": 3})
    module, epochs = train_copy(source, bench.model_copy(update={"validation": opposite}), training)
    assert len(epochs) == 1 + 3
    assert equal_tensors(module, source.module)


def test_trainable_tensors_are_dense_layers_and_scales_and_tables_only_on_request(tmp_path):
    source = RANKER.model()
    dense = {"cross", "hidden", "capped", "plain", "out"}
    assert {
        name.partition(".")[0] for name in trainable_tensors(source.module, tables=False)
    } == dense
    trained_with_tables = {
        name.partition(".")[0] for name in trainable_tensors(source.module, tables=True)
    }
    assert trained_with_tables == dense | {"user", "item", "city", "genres", "history", "tags"}
    bench = RANKER.bench(tmp_path / "data")
    # ``packed`` has int8 codes in place of the weights of ``hidden``.
    packed = run(StaticInt8(layers=("hidden",)), source, bench, tmp_path / "packed")
    trained_in_hidden = {
        n for n in trainable_tensors(packed.module, tables=False) if n.startswith("hidden")
    }
    assert trained_in_hidden
    assert all(packed.module.get_buffer(name).dtype == torch.float32 for name in trained_in_hidden)


def test_tables_are_trained_only_with_tables_true(tmp_path):
    bench = RANKER.bench(tmp_path)
    source = RANKER.model()
    before = source.module.item.weight.detach().clone()
    for tables in (False, True):
        training = SHORT_TRAINING.model_copy(update={"tables": tables})
        module, _ = train_copy(source, bench, training)
        assert torch.equal(module.item.weight, before) != tables
    assert torch.equal(source.module.item.weight, before)


def test_table_l2_lowers_the_norm_of_tables(tmp_path):
    bench = RANKER.bench(tmp_path)
    norms = []
    for penalty in (0.0, 0.1):
        training = SHORT_TRAINING.model_copy(update={"tables": True, "table_l2": penalty})
        module, _ = train_copy(RANKER.model(), bench, training)
        norms.append(float(module.item.weight.detach().norm()))
    assert norms[1] < norms[0]


@pytest.mark.parametrize("method", [FineTune, Distill])
def test_training_keeps_pruned_weights_at_zero(method, tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    pruned = run(Magnitude(share=0.7), RANKER.model(), bench, tmp_path / "pruned")
    result = run(method(training=SHORT_TRAINING), pruned, bench, tmp_path / "out")
    for name in ("cross", "hidden", "out"):
        before = pruned.module.get_submodule(name).weight
        after = result.module.get_submodule(name).weight
        assert not torch.equal(before, after)
        assert bool((after[before == 0] == 0).all())
        assert bool((after[before != 0] != 0).any())


def test_training_of_quantized_layers_changes_scales_and_keeps_codes(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    packed = run(StaticInt8(), RANKER.model(), bench, tmp_path / "packed")
    result = run(FineTune(training=SHORT_TRAINING), packed, bench, tmp_path / "out")
    before, after = packed.module.state_dict(), result.module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(before[name].dtype == torch.float32 for name in changed)
    codes = [name for name in before if before[name].dtype == torch.int8]
    assert codes
    assert not changed & set(codes)


def test_training_a_network_without_dense_layers_raises_nothing_trainable(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    with raises_code(TrainingFailed, "nothing_trainable"):
        train_copy(Reference(OnlyTableNet, NORMED.signature).model(), bench)


class OnlyTableNet(nn.Module):
    """A network whose only parameter is a table."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        score: Tensor = torch.sigmoid(self.user(user) + price[:, :1])
        return score


def test_a_diverging_training_raises_training_failed(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    training = SHORT_TRAINING.model_copy(update={"learning_rate": 1e30})
    with raises_code(TrainingFailed, "diverged"):
        train_copy(RANKER.model(), bench, training)


def test_learning_rate_follows_warmup_schedule_and_factor(tmp_path):
    bench = RANKER.bench(tmp_path)

    def learning_rates(**settings) -> list[float]:
        run = trainer._Run(
            RANKER.model().private().module,
            RANKER.signature,
            Rows(bench.train, RANKER.signature),
            bench.validation,
            lambda *_: torch.zeros(()),
            Training(batch=48, learning_rate=1.0, **settings),
            seed=0,
        )
        result = []
        for step in range(21):
            run.steps = step  # of the optimizer
            result.append(run._compute_rate())
        run.rate_factor = 0.1  # by which the plateau schedule multiplies the learning rate
        return [*result, run._compute_rate()]

    plateau = learning_rates(warmup=4)
    assert plateau[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert plateau[-1] == pytest.approx(0.1)
    cosine = learning_rates(warmup=0, schedule="cosine", epochs=10)  # 96 rows: 2 batches an epoch
    assert cosine[0] == 1.0
    assert cosine[10] == pytest.approx(0.5)
    assert cosine[20] == pytest.approx(0.0, abs=1e-12)


# --- resuming after a crash ------------------------------------------------------------------
#
# Stored progress has tensors of the current weights (``now/``) and of the best epoch (``best/``).
# ``json_values["epochs"]`` has a number, a training loss and a validation quality per epoch.
# ``write_progress`` raises if it cannot write; ``store_progress`` logs that and returns False.


class Killed(Exception):
    """Raised where the process is assumed to be killed."""


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
@pytest.mark.parametrize("reference", [RANKER, NORMED], ids=["plain", "norm and dropout"])
def test_a_killed_training_resumes_and_ends_with_the_same_bits(
    reference, schedule, tmp_path, monkeypatch
):
    bench = reference.bench(tmp_path / "data")
    training = SHORT_TRAINING.model_copy(update={"schedule": schedule, "epochs": 6, "patience": 6})
    uninterrupted, epochs = train_copy(reference.model(), bench, training, tmp_path / "whole")
    assert len(epochs) == 7

    def store_then_raise(folder: str, progress: TrainingProgress) -> None:
        store_progress(folder, progress)
        if len(progress.json_values["epochs"]) == 4:
            raise Killed

    monkeypatch.setattr(trainer, "store_progress", store_then_raise)
    with pytest.raises(Killed):
        train_copy(reference.model(), bench, training, tmp_path / "killed")
    monkeypatch.undo()
    shuffles = []
    monkeypatch.setattr(
        trainer, "shuffled_rows", lambda *a, **k: shuffles.append(1) or shuffled_rows(*a, **k)
    )
    resumed, resumed_epochs = train_copy(reference.model(), bench, training, tmp_path / "killed")
    # The resumed run has epochs 4 to 6. The cosine schedule shuffles once more, to count batches.
    assert len(shuffles) == 3 + (schedule == "cosine")
    assert equal_tensors(resumed, uninterrupted)
    assert resumed_epochs[1:] == epochs[1:]  # the loss of epoch 0 is NaN, which equals nothing
    assert resumed_epochs[0].quality == epochs[0].quality


def test_an_interrupted_write_of_progress_keeps_the_previous_progress(tmp_path, monkeypatch):
    tensors = {"now/a": torch.ones(3), "best/a": torch.ones(3)}
    json_values = {"epochs": [[0, math.nan, 0.5]]}
    write_progress(str(tmp_path), TrainingProgress(tensors, json_values))

    def fail_to_replace(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("compressors.distill.training.checkpoint.os.replace", fail_to_replace)
    later = TrainingProgress(
        {"now/a": torch.zeros(3)}, {"epochs": [*json_values["epochs"], [1, 0.3, 0.6]]}
    )
    with pytest.raises(Killed):
        write_progress(str(tmp_path), later)
    monkeypatch.undo()
    result = read_progress(str(tmp_path), {"a": torch.empty(3)})
    assert result is not None
    assert torch.equal(result.tensors["now/a"], torch.ones(3))
    assert len(result.json_values["epochs"]) == 1


def test_progress_of_another_network_is_not_read(tmp_path):
    assert read_progress(str(tmp_path / "none"), {}) is None
    json_values = {"epochs": [[0, 0.1, 0.5]]}
    tensors = {"now/a": torch.ones(3), "best/a": torch.ones(3)}
    write_progress(str(tmp_path), TrainingProgress(tensors, json_values))
    assert read_progress(str(tmp_path), {"a": torch.empty(4)}) is None
    assert read_progress(str(tmp_path), {"b": torch.empty(3)}) is None
    assert read_progress(str(tmp_path), {"a": torch.empty(3)}) is not None


@given(st.integers(1, 5))
def test_only_the_newest_progress_is_kept(tmp_path_factory, epochs):
    folder = tmp_path_factory.mktemp("progress")
    for count in range(1, epochs + 1):
        json_values = {"epochs": [[number, 0.1, 0.5] for number in range(count)]}
        write_progress(
            str(folder), TrainingProgress({"now/a": torch.full((2,), count)}, json_values)
        )
    assert len(list(folder.iterdir())) == 2  # progress.json and one file of tensors
    tensor_file = json.loads((folder / "progress.json").read_text())["tensors"]
    assert (folder / tensor_file).exists()


def test_damaged_progress_is_logged_and_ignored(tmp_path, caplog):
    state = {"a": torch.ones(3)}
    complete = {"now/a": torch.ones(3), "best/a": torch.ones(3)}
    for number, damage in enumerate(("truncated", "empty", "missing", "without best")):
        folder = tmp_path / str(number)
        tensors = {k: v for k, v in complete.items() if k != "best/a" or damage != "without best"}
        write_progress(str(folder), TrainingProgress(tensors, {"epochs": [[0, 0.1, 0.5]]}))
        (file,) = folder.glob("*.safetensors")
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:-4])
        elif damage == "empty":
            (folder / "progress.json").write_text("")
        elif damage == "missing":
            file.unlink()
        assert read_progress(str(folder), state) is None, damage
    # The file without tensors of the best epoch can be read; it is ignored without a message.
    assert caplog.text.count("cannot be read, so") == 3


def test_progress_written_by_two_processes_can_be_read(tmp_path, monkeypatch):
    state = {"a": torch.ones(3)}
    complete = {"now/a": torch.ones(3), "best/a": torch.ones(3)}
    for process, epochs in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 3)):
        monkeypatch.setattr(
            "compressors.distill.training.checkpoint.os.getpid", lambda process=process: process
        )
        json_values = {"epochs": [[number, 0.1, 0.5] for number in range(epochs)]}
        write_progress(str(tmp_path), TrainingProgress(complete, json_values))
        result = read_progress(str(tmp_path), state)
        assert result is not None
        assert len(result.json_values["epochs"]) == epochs
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # one per process


def test_unwritable_progress_is_logged_and_training_completes(tmp_path, caplog):
    bench = RANKER.bench(tmp_path / "data")
    (tmp_path / "file").write_text("not a folder")
    module, epochs = train_copy(RANKER.model(), bench, SHORT_TRAINING, tmp_path / "file")
    assert len(epochs) > 1
    assert "progress could not be written" in caplog.text
    assert equal_tensors(module, train_copy(RANKER.model(), bench, SHORT_TRAINING)[0])


# --- buffers, shared weights and single rows -------------------------------------------------


class StatisticsNet(nn.Module):
    """A network with a buffer that training updates, a shared weight, and a gate of zeros.

    ``running_price`` is the buffer; the layer ``tied`` has the weight of the table ``user``.
    """

    running_price: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 4)
        self.tied = nn.Linear(4, 15)
        self.tied.weight = self.user.weight
        self.gate = nn.Linear(2, width)
        self.hidden = nn.Linear(19, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 1)
        self.register_buffer("running_price", torch.zeros(2))
        nn.init.zeros_(self.gate.weight)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        if self.training:
            self.running_price = 0.9 * self.running_price + 0.1 * price.detach().mean(dim=0)
        rows = self.user(user)
        x = self.hidden(torch.cat([rows, self.tied(rows)], dim=1))
        x = torch.relu(self.norm(x)) * torch.sigmoid(self.gate(price - self.running_price))
        score: Tensor = torch.sigmoid(self.out(x))
        return score


STATISTICS = Reference(StatisticsNet, NORMED.signature)


def test_layers_initialized_with_zeros_are_trained(tmp_path):
    bench = STATISTICS.bench(tmp_path / "data")
    result = run(FineTune(training=SHORT_TRAINING), STATISTICS.model(), bench, tmp_path / "out")
    assert bool((result.module.gate.weight != 0).all())


def test_a_last_batch_of_one_row_is_added_to_the_previous_batch(tmp_path):
    # 96 rows; batch norm cannot be trained on one row.
    bench = STATISTICS.bench(tmp_path)
    batches_drawn = shuffled_rows(
        Rows(bench.train, STATISTICS.signature), STATISTICS.signature, 19, seed=1
    )
    assert [len(row_numbers) for row_numbers in batches_drawn] == [19, 19, 19, 19, 20]
    train_copy(STATISTICS.model(), bench, SHORT_TRAINING.model_copy(update={"batch": 19}))


def test_buffers_that_training_updates_are_restored_with_the_weights(tmp_path):
    bench = STATISTICS.bench(tmp_path / "data")
    opposite = validation_with_opposite_labels(STATISTICS, tmp_path)
    source = STATISTICS.model()
    module, epochs = train_copy(source, bench.model_copy(update={"validation": opposite}))
    assert max(epochs, key=lambda epoch: epoch.quality).number == 0
    assert equal_tensors(module, source.module)
    trained_module, epochs = train_copy(source, bench)
    assert max(epochs, key=lambda epoch: epoch.quality).number > 0
    assert not torch.equal(trained_module.running_price, source.module.running_price)
    assert not bool(source.module.running_price.any())


def test_a_killed_training_with_updated_buffers_resumes_and_ends_with_the_same_bits(
    tmp_path, monkeypatch
):
    bench = STATISTICS.bench(tmp_path / "data")
    training = SHORT_TRAINING.model_copy(update={"epochs": 4, "patience": 4})
    uninterrupted, _ = train_copy(STATISTICS.model(), bench, training)

    def store_then_raise(folder: str, progress: TrainingProgress) -> None:
        store_progress(folder, progress)
        if len(progress.json_values["epochs"]) == 3:
            raise Killed

    monkeypatch.setattr(trainer, "store_progress", store_then_raise)
    with pytest.raises(Killed):
        train_copy(STATISTICS.model(), bench, training, tmp_path / "killed")
    monkeypatch.undo()
    resumed, _ = train_copy(STATISTICS.model(), bench, training, tmp_path / "killed")
    assert equal_tensors(resumed, uninterrupted)


def test_a_weight_shared_by_a_table_and_a_layer_is_not_trained_by_default(tmp_path):
    bench = STATISTICS.bench(tmp_path / "data")
    source = STATISTICS.model()
    result = run(FineTune(training=SHORT_TRAINING), source, bench, tmp_path / "out")
    assert result.module.tied.weight is result.module.user.weight
    assert torch.equal(result.module.user.weight, source.module.user.weight)
    # The shared weight is still stored once.
    assert sum(line.bytes_after for line in result.plan.lines) == sum(
        line.bytes_before for line in result.plan.lines
    )


def test_weight_decay_does_not_change_unread_rows_of_tables(tmp_path):
    bench = RANKER.bench(tmp_path)
    training = SHORT_TRAINING.model_copy(update={"tables": True, "weight_decay": 0.5, "epochs": 1})
    source = RANKER.model()
    module, _ = train_copy(source, bench, training)
    (rows,) = batches(bench.train, RANKER.signature, BENCH_ROWS)
    is_unread = torch.ones(300, dtype=torch.bool)
    is_unread[rows.inputs["item"]] = False
    assert bool(is_unread.any())
    assert torch.equal(module.item.weight[is_unread], source.module.item.weight[is_unread])
