"""Training a compressed network on: early stopping, what may change, and going on after a crash."""

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import models
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from models import ATTENTION, BENCH_ROWS, NORMED, QUICKLY, RANKER, Reference
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
from compressors.distill.training.trainable import trainable
from compressors.distill.training.trainer import train
from compressors.errors.steps import TrainingFailed
from compressors.metrics.validation_score import quality
from compressors.prune.dense.magnitude import Magnitude
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.task_kinds.loss import hard_loss, shuffled_rows


def trained(
    model: Model, bench: Bench, how: Training = QUICKLY, folder: Path | None = None, seed: int = 0
) -> tuple[nn.Module, tuple[trainer.Epoch, ...]]:
    module = model.private().module

    def loss(output: Tensor, held: Batch, numbers: Tensor) -> Tensor:
        return hard_loss(bench.signature, output, held)

    assert bench.train is not None
    assert bench.validation is not None
    epochs = train(
        module,
        bench.signature,
        bench.train,
        bench.validation,
        loss,
        how,
        seed=seed,
        checkpoints=None if folder is None else str(folder),
    )
    return module, epochs


def same(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("reference", [RANKER, ATTENTION, NORMED], ids=["auc", "ndcg", "norm"])
def test_training_learns_and_ends_as_in_its_best_epoch(reference, tmp_path):
    bench = reference.bench(tmp_path)
    module, epochs = trained(reference.model(), bench)
    best = max(epochs, key=lambda epoch: epoch.quality)
    assert best.number > 0
    assert best.quality > epochs[0].quality
    found = quality(module, bench.signature, bench.validation)
    assert found == best.quality
    assert not module.training
    assert not any(parameter.requires_grad for parameter in tables_of(module))


def turned_round(reference: Reference, folder: Path) -> Split:
    """Validation rows whose labels say the opposite of the training rows'."""
    return models.prepared(
        reference.signature,
        reference.rows_of_tables(),
        folder / "turned",
        9,
        lambda inputs: -reference._opposite(inputs),
    )


def tables_of(module: nn.Module) -> list[nn.Parameter]:
    held = (nn.Embedding, nn.EmbeddingBag)
    return [part.weight for part in module.modules() if isinstance(part, held)]


def test_it_stops_when_nothing_improves_and_gives_back_what_it_was_given(tmp_path):
    """Labels of the validation rows are turned round, so every epoch only harms."""
    bench = RANKER.bench(tmp_path / "data")
    turned = turned_round(RANKER, tmp_path)
    source = RANKER.model()
    how = QUICKLY.model_copy(update={"patience": 3})
    module, epochs = trained(source, bench.model_copy(update={"validation": turned}), how)
    assert len(epochs) == 1 + 3
    assert same(module, source.module)


def test_what_is_trained(tmp_path):
    source = RANKER.model()
    dense = {"cross", "hidden", "capped", "plain", "out"}
    assert {name.partition(".")[0] for name in trainable(source.module, tables=False)} == dense
    every = {name.partition(".")[0] for name in trainable(source.module, tables=True)}
    assert every == dense | {"user", "item", "city", "genres", "history", "tags"}
    bench = RANKER.bench(tmp_path / "data")
    packed = run(StaticInt8(layers=("hidden",)), source, bench, tmp_path / "packed")
    inside = {n for n in trainable(packed.module, tables=False) if n.startswith("hidden")}
    assert inside
    assert all(packed.module.get_submodule("hidden").get_buffer(n[7:]).dtype == torch.float32
               for n in inside)  # fmt: skip


def test_tables_are_trained_only_with_tables_true(tmp_path):
    bench = RANKER.bench(tmp_path)
    source = RANKER.model()
    before = source.module.item.weight.detach().clone()
    for tables in (False, True):
        how = QUICKLY.model_copy(update={"tables": tables})
        module, _ = trained(source, bench, how)
        assert torch.equal(module.item.weight, before) != tables
    assert torch.equal(source.module.item.weight, before)


def test_a_penalty_on_tables_makes_them_smaller(tmp_path):
    bench = RANKER.bench(tmp_path)
    norms = []
    for penalty in (0.0, 0.1):
        how = QUICKLY.model_copy(update={"tables": True, "table_l2": penalty})
        module, _ = trained(RANKER.model(), bench, how)
        norms.append(float(module.item.weight.detach().norm()))
    assert norms[1] < norms[0]


@pytest.mark.parametrize("method", [FineTune, Distill])
def test_what_was_pruned_stays_pruned(method, tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    pruned = run(Magnitude(share=0.7), RANKER.model(), bench, tmp_path / "pruned")
    result = run(method(training=QUICKLY), pruned, bench, tmp_path / "out")
    for name in ("cross", "hidden", "out"):
        before = pruned.module.get_submodule(name).weight
        after = result.module.get_submodule(name).weight
        assert not torch.equal(before, after)
        assert bool((after[before == 0] == 0).all())
        assert bool((after[before != 0] != 0).any())


def test_training_of_quantized_layers_moves_scales_and_keeps_codes(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    packed = run(StaticInt8(), RANKER.model(), bench, tmp_path / "packed")
    result = run(FineTune(training=QUICKLY), packed, bench, tmp_path / "out")
    before, after = packed.module.state_dict(), result.module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(before[name].dtype == torch.float32 for name in moved)
    codes = [name for name in before if before[name].dtype == torch.int8]
    assert codes
    assert not moved & set(codes)


def test_nothing_to_train_is_said(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    with raises_code(TrainingFailed, "nothing_trainable"):
        trained(Reference(Still, NORMED.signature).model(), bench)


class Still(nn.Module):
    """A table and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        score: Tensor = torch.sigmoid(self.user(user) + price[:, :1])
        return score


def test_a_training_that_diverges_says_what_to_do(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    how = QUICKLY.model_copy(update={"learning_rate": 1e30})
    with raises_code(TrainingFailed, "diverged"):
        trained(RANKER.model(), bench, how)


def test_rates_rise_fall_and_are_divided(tmp_path):
    bench = RANKER.bench(tmp_path)

    def rates(**settings) -> list[float]:
        run = trainer._Run(
            RANKER.model().private().module,
            RANKER.signature,
            Rows(bench.train, RANKER.signature),
            bench.validation,
            lambda *_: torch.zeros(()),
            Training(batch=48, learning_rate=1.0, **settings),
            0,
        )
        found = []
        for step in range(21):
            run.steps = step
            found.append(run._rate())
        run.factor = 0.1
        return [*found, run._rate()]

    plateau = rates(warmup=4)
    assert plateau[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert plateau[-1] == pytest.approx(0.1)
    cosine = rates(warmup=0, schedule="cosine", epochs=10)  # 2 steps an epoch, 20 in all
    assert cosine[0] == 1.0
    assert cosine[10] == pytest.approx(0.5)
    assert cosine[20] == pytest.approx(0.0, abs=1e-12)


# --- going on after a crash ------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
@pytest.mark.parametrize("reference", [RANKER, NORMED], ids=["plain", "norm and dropout"])
def test_a_killed_training_ends_with_the_same_bits(reference, schedule, tmp_path, monkeypatch):
    bench = reference.bench(tmp_path / "data")
    how = QUICKLY.model_copy(update={"schedule": schedule, "epochs": 6, "patience": 6})
    whole, epochs = trained(reference.model(), bench, how, tmp_path / "whole")
    assert len(epochs) == 7

    def dying(folder: str, progress: TrainingProgress) -> None:
        store_progress(folder, progress)
        if len(progress.facts["epochs"]) == 4:
            raise Killed

    monkeypatch.setattr(trainer, "store_progress", dying)
    with pytest.raises(Killed):
        trained(reference.model(), bench, how, tmp_path / "killed")
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(
        trainer, "shuffled_rows", lambda *a, **k: seen.append(1) or shuffled_rows(*a, **k)
    )
    again, found = trained(reference.model(), bench, how, tmp_path / "killed")
    # Epochs 4 to 6 of six, and once to count the batches where the schedule needs the count.
    assert len(seen) == 3 + (schedule == "cosine")
    assert same(again, whole)
    assert found[1:] == epochs[1:]
    assert found[0].quality == epochs[0].quality


def test_a_crash_while_progress_is_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    tensors = {"now/a": torch.ones(3), "best/a": torch.ones(3)}
    facts = {"epochs": [[0, math.nan, 0.5]]}
    write_progress(str(tmp_path), TrainingProgress(tensors, facts))

    def refused(*_: object) -> None:
        raise Killed

    monkeypatch.setattr("compressors.distill.training.checkpoint.os.replace", refused)
    later = TrainingProgress(
        {"now/a": torch.zeros(3)}, {"epochs": [*facts["epochs"], [1, 0.3, 0.6]]}
    )
    with pytest.raises(Killed):
        write_progress(str(tmp_path), later)
    monkeypatch.undo()
    found = read_progress(str(tmp_path), {"a": torch.empty(3)})
    assert found is not None
    assert torch.equal(found.tensors["now/a"], torch.ones(3))
    assert len(found.facts["epochs"]) == 1


def test_progress_of_another_network_is_not_taken_up(tmp_path):
    assert read_progress(str(tmp_path / "none"), {}) is None
    facts = {"epochs": [[0, 0.1, 0.5]]}
    held = {"now/a": torch.ones(3), "best/a": torch.ones(3)}
    write_progress(str(tmp_path), TrainingProgress(held, facts))
    assert read_progress(str(tmp_path), {"a": torch.empty(4)}) is None
    assert read_progress(str(tmp_path), {"b": torch.empty(3)}) is None
    assert read_progress(str(tmp_path), {"a": torch.empty(3)}) is not None


@given(st.integers(1, 5))
def test_only_the_newest_progress_is_kept(tmp_path_factory, epochs):
    folder = tmp_path_factory.mktemp("progress")
    for count in range(1, epochs + 1):
        facts = {"epochs": [[number, 0.1, 0.5] for number in range(count)]}
        write_progress(str(folder), TrainingProgress({"now/a": torch.full((2,), count)}, facts))
    assert len(list(folder.iterdir())) == 2
    named = json.loads((folder / "progress.json").read_text())["tensors"]
    assert (folder / named).exists()


def test_damaged_progress_counts_as_none(tmp_path, caplog):
    held = {"a": torch.ones(3)}
    whole = {"now/a": torch.ones(3), "best/a": torch.ones(3)}
    for number, damage in enumerate(("truncated", "empty", "gone", "without best")):
        folder = tmp_path / str(number)
        kept = {k: v for k, v in whole.items() if k != "best/a" or damage != "without best"}
        write_progress(str(folder), TrainingProgress(kept, {"epochs": [[0, 0.1, 0.5]]}))
        (file,) = folder.glob("*.safetensors")
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:-4])
        elif damage == "empty":
            (folder / "progress.json").write_text("")
        elif damage == "gone":
            file.unlink()
        assert read_progress(str(folder), held) is None, damage
    assert caplog.text.count("cannot be read, so") == 3


def test_two_at_once_leave_a_progress_that_can_be_read(tmp_path, monkeypatch):
    held = {"a": torch.ones(3)}
    whole = {"now/a": torch.ones(3), "best/a": torch.ones(3)}
    for process, epochs in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 3)):
        monkeypatch.setattr(
            "compressors.distill.training.checkpoint.os.getpid", lambda process=process: process
        )
        facts = {"epochs": [[number, 0.1, 0.5] for number in range(epochs)]}
        write_progress(str(tmp_path), TrainingProgress(whole, facts))
        found = read_progress(str(tmp_path), held)
        assert found is not None
        assert len(found.facts["epochs"]) == epochs
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # one of each


def test_unwritable_progress_is_logged_and_training_completes(tmp_path, caplog):
    bench = RANKER.bench(tmp_path / "data")
    (tmp_path / "file").write_text("not a folder")
    module, epochs = trained(RANKER.model(), bench, QUICKLY, tmp_path / "file")
    assert len(epochs) > 1
    assert "progress could not be written" in caplog.text
    assert same(module, trained(RANKER.model(), bench, QUICKLY)[0])


# --- what training must not do ---------------------------------------------------------------


class Drifting(nn.Module):
    """A gate that begins closed, a tied weight, and a statistic of its own that training moves."""

    seen: Tensor

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 4)
        self.again = nn.Linear(4, 15)
        self.again.weight = self.user.weight
        self.gate = nn.Linear(2, width)
        self.hidden = nn.Linear(19, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 1)
        self.register_buffer("seen", torch.zeros(2))
        nn.init.zeros_(self.gate.weight)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * price.detach().mean(dim=0)
        rows = self.user(user)
        x = self.hidden(torch.cat([rows, self.again(rows)], dim=1))
        x = torch.relu(self.norm(x)) * torch.sigmoid(self.gate(price - self.seen))
        score: Tensor = torch.sigmoid(self.out(x))
        return score


DRIFTING = Reference(Drifting, NORMED.signature)


def test_layers_that_begin_at_zero_learn_unless_they_were_pruned(tmp_path):
    bench = DRIFTING.bench(tmp_path / "data")
    result = run(FineTune(training=QUICKLY), DRIFTING.model(), bench, tmp_path / "out")
    assert bool((result.module.gate.weight != 0).all())


def test_a_last_batch_of_one_row_joins_the_one_before(tmp_path):
    bench = DRIFTING.bench(tmp_path)
    drawn = shuffled_rows(Rows(bench.train, DRIFTING.signature), DRIFTING.signature, 19, seed=1)
    assert [len(numbers) for numbers in drawn] == [19, 19, 19, 19, 20]
    trained(DRIFTING.model(), bench, QUICKLY.model_copy(update={"batch": 19}))


def test_statistics_of_any_module_go_back_with_the_weights(tmp_path):
    bench = DRIFTING.bench(tmp_path / "data")
    turned = turned_round(DRIFTING, tmp_path)
    source = DRIFTING.model()
    module, epochs = trained(source, bench.model_copy(update={"validation": turned}))
    assert max(epochs, key=lambda epoch: epoch.quality).number == 0
    assert same(module, source.module)
    learned, epochs = trained(source, bench)
    assert max(epochs, key=lambda epoch: epoch.quality).number > 0
    assert not torch.equal(learned.seen, source.module.seen)
    assert not bool(source.module.seen.any())


def test_a_killed_training_with_statistics_of_its_own_ends_with_the_same_bits(
    tmp_path, monkeypatch
):
    bench = DRIFTING.bench(tmp_path / "data")
    how = QUICKLY.model_copy(update={"epochs": 4, "patience": 4})
    whole, _ = trained(DRIFTING.model(), bench, how)

    def dying(folder: str, progress: TrainingProgress) -> None:
        store_progress(folder, progress)
        if len(progress.facts["epochs"]) == 3:
            raise Killed

    monkeypatch.setattr(trainer, "store_progress", dying)
    with pytest.raises(Killed):
        trained(DRIFTING.model(), bench, how, tmp_path / "killed")
    monkeypatch.undo()
    again, _ = trained(DRIFTING.model(), bench, how, tmp_path / "killed")
    assert same(again, whole)


def test_a_weight_that_a_table_shares_with_a_layer_stays_with_the_table(tmp_path):
    bench = DRIFTING.bench(tmp_path / "data")
    source = DRIFTING.model()
    result = run(FineTune(training=QUICKLY), source, bench, tmp_path / "out")
    assert result.module.again.weight is result.module.user.weight
    assert torch.equal(result.module.user.weight, source.module.user.weight)
    assert sum(line.bytes_after for line in result.plan.lines) == sum(
        line.bytes_before for line in result.plan.lines
    )


def test_weight_decay_is_for_dense_layers(tmp_path):
    bench = RANKER.bench(tmp_path)
    how = QUICKLY.model_copy(update={"tables": True, "weight_decay": 0.5, "epochs": 1})
    source = RANKER.model()
    module, _ = trained(source, bench, how)
    (rows,) = batches(bench.train, RANKER.signature, BENCH_ROWS)
    unseen = torch.ones(300, dtype=torch.bool)
    unseen[rows.inputs["item"]] = False
    assert bool(unseen.any())
    assert torch.equal(module.item.weight[unseen], source.module.item.weight[unseen])
