"""Steps that train a model with two towers, on interactions drawn from the network's scores.

``TOWERS`` is such a network. Noise in a tensor lowers its recall, which training recovers; random
weights have the recall of a random order. The field ``original`` of a model is the network before
compression, the teacher of these steps.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from error_codes import raises_code
from models import RANKER, Reference
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import Bench, IdInput, Signature, Split
from compressors.core.batches import Rows
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.scores import training_output
from compressors.core.steps.decisions import AppliedStep
from compressors.core.units import Unit, private_copy
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.distill.refit_codes import RefitCodes
from compressors.distill.soft_labels import soft_label_loss
from compressors.distill.training import trainer
from compressors.distill.training.checkpoint import TrainingProgress, store_progress
from compressors.distill.training.item_sampler import ItemSampler
from compressors.distill.training.settings import Training
from compressors.errors.compression import NothingToCompress
from compressors.errors.metrics import MetricRefused
from compressors.metrics.validation_ranking import MAX_QUERIES, ranking_quality
from compressors.metrics.validation_score import quality
from compressors.quantize.dense.qat import QAT
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.table_qat import TableQAT

USERS, ITEMS, DIM = 400, 120, 8
PER_USER = {"train": 12, "validation": 5, "calibration": 2}
"""Number of interactions of each user, by split."""


class Tower(nn.Module):
    """A table and a layer."""

    def __init__(self, name: str, rows: int, dim: int) -> None:
        super().__init__()
        self.name = name
        self.table = nn.Embedding(rows, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, **inputs: Tensor) -> Tensor:
        vector: Tensor = self.out(self.table(inputs[self.name]))
        return vector


class TwoTowers(nn.Module):
    """Towers of ids; a score is the dot product of their vectors."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.query, self.item = Tower("user", USERS, dim), Tower("item", ITEMS, dim)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        score: Tensor = (self.query(user=user) * self.item(item=item)).sum(dim=1)
        return score


SIGNATURE = Signature.model_validate(
    {
        "inputs": [
            IdInput(name="user", table="query.table").model_dump(),
            IdInput(name="item", table="item.table").model_dump(),
        ],
        "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@5"}],
        "group": "user",
        "item": "item",
        "towers": {
            "query": {"module": "query", "inputs": ["user"]},
            "item": {"module": "item", "inputs": ["item"]},
        },
    }
)
TOWERS = Reference(TwoTowers, SIGNATURE)
TRAINING = Training(
    epochs=4, batch=64, learning_rate=0.02, schedule="cosine", warmup=0, tables=True
)


def build_fitted_model(seed: int = 0) -> Model:
    """Return the network from whose scores ``build_bench`` draws, so it needs no training."""
    model = TOWERS.model(seed)
    with torch.no_grad():
        for tower in (model.module.query, model.module.item):
            tower.out.weight.copy_(torch.eye(DIM))
            tower.out.bias.zero_()
    return model


def build_bench(model: Model, folder: Path) -> Bench:
    """Write interactions drawn from the softmax of each user's scores, without repetition."""
    with torch.no_grad():
        users, items = torch.arange(USERS), torch.arange(ITEMS)
        scores = model.module.query(user=users) @ model.module.item(item=items).T
    rng = np.random.default_rng(0)
    gumbel = rng.gumbel(size=scores.shape)
    permutation = np.argsort(-(scores.numpy() + gumbel), axis=1)  # samples without replacement
    parts, begin = {}, 0
    for part, count in PER_USER.items():
        chosen = permutation[:, begin : begin + count]
        begin += count
        tensors = {
            "user": torch.arange(USERS).repeat_interleave(count),
            "item": torch.from_numpy(np.ascontiguousarray(chosen).reshape(-1)),
        }
        tensors |= {"@label": torch.ones(len(tensors["user"])), "@group": tensors["user"].clone()}
        (folder / part).mkdir(parents=True)
        save_file(tensors, folder / part / "data.safetensors")
        # ``begin`` has two digits, so the placeholder of the hash has 64.
        parts[part] = Split(
            path=str(folder / part), sha256=str(begin) * 32, rows=len(tensors["user"])
        )
    (folder / "items").mkdir()
    catalogue = {"item": items, "@label": torch.zeros(ITEMS)}
    save_file(catalogue, folder / "items" / "data.safetensors")
    parts["items"] = Split(path=str(folder / "items"), sha256="9" * 64, rows=ITEMS)
    return Bench(signature=SIGNATURE, **parts)


def recall(model: Model, bench: Bench) -> float:
    """Return Recall@5 on the validation rows."""
    assert bench.validation is not None
    return quality(model.module, SIGNATURE, bench.validation, bench.train)


def test_quality_is_the_recall_of_a_ranking_without_items_of_the_training_rows(tmp_path):
    model = build_fitted_model()
    bench = build_bench(model, tmp_path)
    assert bench.train is not None
    assert bench.validation is not None
    train, validation = (Rows(split, SIGNATURE) for split in (bench.train, bench.validation))
    known = set(zip(train.group.tolist(), train.item.tolist(), strict=True))
    catalogue = sorted({*train.item.tolist(), *validation.item.tolist()})
    with torch.no_grad():
        scores = (
            model.module.query(user=torch.arange(USERS))
            @ model.module.item(item=torch.tensor(catalogue)).T
        )
    recalls = []
    for user in range(USERS):
        relevant = set(validation.item[validation.group == user].tolist())
        ranked = [
            catalogue[place]
            for place in scores[user].argsort(descending=True).tolist()
            if (user, catalogue[place]) not in known
        ]
        recalls.append(len(relevant & set(ranked[:5])) / len(relevant))
    assert recall(model, bench) == pytest.approx(np.mean(recalls), abs=1e-9)


def test_at_most_5000_queries_are_ranked(tmp_path, monkeypatch):
    model = build_fitted_model()
    bench = build_bench(model, tmp_path)
    assert MAX_QUERIES == 5_000
    monkeypatch.setattr("compressors.metrics.validation_ranking.MAX_QUERIES", 2)
    validation = Rows(bench.validation, SIGNATURE)
    value = ranking_quality(model.module, SIGNATURE, validation, None)
    # Recall@5 of a user with 3 relevant items is a number of thirds; of two users, of sixths.
    assert value * 6 == pytest.approx(round(value * 6), abs=1e-9)


def damage(model: Model, names: tuple[str, ...]) -> Model:
    """Return the network with noise in some tensors; its recall is far below the original's."""
    module = private_copy(model.module)
    generator = torch.Generator().manual_seed(3)
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        tensor = getattr(owner, leaf).detach()
        noise = torch.randn(tensor.shape, generator=generator) * tensor.std()
        changed = tensor + noise
        is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
        setattr(owner, leaf, nn.Parameter(changed) if is_parameter else changed)
    return replace(model, module=module)


@pytest.mark.parametrize("negatives", [0, 40])
def test_fine_tune_trains_random_towers(negatives, tmp_path):
    bench = build_bench(build_fitted_model(), tmp_path / "data")
    start = TOWERS.model(seed=1)
    changes = {"learning_rate": 0.1, "epochs": 8, "negatives": negatives}
    training = TRAINING.model_copy(update=changes)
    result = run(FineTune(training=training), start, bench, tmp_path / "out")
    # Recall@5 of a random order of the items that are not in the user's training rows.
    random_order = 5 / (ITEMS - PER_USER["train"])
    assert recall(start, bench) < 2 * random_order
    assert recall(result, bench) > 3 * random_order


@pytest.mark.parametrize(("loss", "negatives"), [("task", 0), ("margin", 0), ("task", 40)])
def test_distill_recovers_a_damaged_layer_from_the_vectors_of_the_original(
    loss, negatives, tmp_path
):
    original = build_fitted_model()
    bench = build_bench(original, tmp_path / "data")
    start = replace(damage(original, ("item.out.weight",)), original=original.module)
    training = TRAINING.model_copy(update={"tables": False, "negatives": negatives})
    step = Distill(loss=loss, training=training, soft_share=1.0)
    result = run(step, start, bench, tmp_path / "out")
    before, lost, recovered = (recall(model, bench) for model in (original, start, result))
    assert lost < 0.8 * before
    assert recovered > 0.95 * before


def test_refit_codes_recovers_damaged_codebooks(tmp_path):
    original = build_fitted_model()
    bench = build_bench(original, tmp_path / "data")
    codes = ProductCodes(parts=4, bits=6, codebook_share=1.0)
    packed = run(codes, original, bench, tmp_path / "codes")
    names = ("item.table.codebook",)
    start = replace(damage(packed, names), original=original.module)
    step = RefitCodes(rounds=1, share=0, training=TRAINING.model_copy(update={"tables": False}))
    result = run(step, start, bench, tmp_path / "out")
    before, lost, recovered = (recall(model, bench) for model in (packed, start, result))
    assert lost < 0.8 * before
    assert recovered > 0.5 * (before + lost)


def test_qat_trains_the_layers_of_both_towers(tmp_path):
    original = build_fitted_model()
    bench = build_bench(original, tmp_path / "data")
    training = TRAINING.model_copy(update={"tables": False, "epochs": 1})
    result = run(
        QAT(training=training), replace(original, original=original.module), bench, tmp_path / "out"
    )
    assert {line.format for line in result.plan.lines if line.module.endswith("out")} == {
        "static_int8"
    }
    assert recall(result, bench) > 0.9 * recall(original, bench)


def test_table_qat_trains_the_tables_of_both_towers_with_negatives_of_the_catalogue(tmp_path):
    original = build_fitted_model()
    bench = build_bench(original, tmp_path / "data")
    training = TRAINING.model_copy(update={"negatives": 20, "epochs": 1})
    step = TableQAT(bits=8, training=training)
    assert "items" in step.needs
    source = replace(original, original=original.module)
    result = run(step, source, bench, tmp_path / "out")
    tables = [unit.format for unit in Unit.of(result.module) if unit.role == "table"]
    assert set(tables) == {"rowwise_int8"}
    assert recall(result, bench) > 0.9 * recall(original, bench)


def test_settings_that_two_towers_do_not_support_are_refused(tmp_path):
    original = build_fitted_model()
    bench = build_bench(original, tmp_path / "data")
    with raises_code(NothingToCompress, "towers_setting", setting="loss", value="pointwise"):
        run(Distill(loss="pointwise"), original, bench, tmp_path / "out")
    with raises_code(NothingToCompress, "towers_setting", setting="hints", value=("query.out",)):
        run(Distill(hints=("query.out",)), original, bench, tmp_path / "out")


def test_a_list_loss_of_two_towers_does_not_keep_the_rows_of_a_query_in_one_batch(
    tmp_path, monkeypatch
):
    original = build_fitted_model()
    bench = build_bench(original, tmp_path / "data")
    whole_lists = []
    monkeypatch.setattr(
        "compressors.distill.distill.train_model",
        lambda model, *_, **options: (
            whole_lists.append(options["whole_lists"]) or AppliedStep(model)
        ),
    )
    start = replace(original, original=original.module)
    step = Distill(loss="margin")
    step.apply(start, bench, step.plan(start, bench))
    assert whole_lists == [False]


def test_validation_rows_without_a_positive_label_raise(tmp_path):
    model = build_fitted_model()
    bench = build_bench(model, tmp_path)
    assert bench.validation is not None
    validation = Rows(bench.validation, SIGNATURE)
    validation.label = torch.zeros(len(validation))
    with raises_code(MetricRefused, "new_items_missing"):
        ranking_quality(model.module, SIGNATURE, validation, None)


def test_drawn_items_have_the_vectors_of_the_item_tower_and_no_query(tmp_path):
    """The output has the vectors of query and item, ``(rows, 2, dim)``; drawn items follow."""
    model = build_fitted_model()
    bench = build_bench(model, tmp_path)
    rows = Rows(bench.train, SIGNATURE)
    sampled = ItemSampler(bench.items, SIGNATURE, rows, count=30).draw()
    batch = rows.take(torch.arange(5))
    with torch.no_grad():
        output = training_output(model.module, batch.inputs, SIGNATURE, sampled)
        alone = training_output(model.module, batch.inputs, SIGNATURE)
        drawn = model.module.item(item=sampled.item)
    # Products of other batch sizes may add in another order.
    torch.testing.assert_close(output[:5], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output[5:, 1], drawn, rtol=1e-6, atol=1e-6)
    assert not output[5:, 0].any()


def test_original_and_network_are_compared_on_the_same_drawn_items(tmp_path):
    original = build_fitted_model()
    bench = build_bench(original, tmp_path)
    rows = Rows(bench.train, SIGNATURE)
    numbers = torch.arange(20)
    sampled = ItemSampler(bench.items, SIGNATURE, rows, count=30).draw()
    batch = replace(rows.take(numbers), sampled=sampled)
    loss = soft_label_loss(
        bench,
        soft_share=1.0,
        temperature=1.0,
        kind="distill",
        name="margin",
        original=original.module,
    )
    same = training_output(original.module, batch.inputs, SIGNATURE, sampled)
    assert float(loss(same, batch, numbers).detach()) == 0
    changed = same.detach().clone()
    changed[len(numbers) :, 1] += 1.0  # only the vectors of drawn items
    assert float(loss(changed, batch, numbers)) > 0.1


def test_killed_training_with_negatives_resumes_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    bench = build_bench(build_fitted_model(), tmp_path / "data")
    training = TRAINING.model_copy(update={"epochs": 3, "negatives": 16})

    def trained(checkpoints: Path, seed: int = 0) -> Tensor:
        changes = {"checkpoints": str(checkpoints), "seed": seed}
        step, start = FineTune(training=training), TOWERS.model(seed=1).private()
        with_progress = bench.model_copy(update=changes)
        result = step.apply(start, with_progress, step.plan(start, with_progress))
        return result.model.module.item.out.weight

    whole = trained(tmp_path / "whole")
    assert not torch.equal(whole, trained(tmp_path / "other", seed=1))

    def store_then_raise(folder: str, progress: TrainingProgress) -> None:
        store_progress(folder, progress)
        if len(progress.json_values["epochs"]) == 3:  # the start and the first two epochs
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "store_progress", store_then_raise)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed")
    monkeypatch.undo()
    assert torch.equal(whole, trained(tmp_path / "killed"))


def test_negatives_are_refused_without_a_catalogue(tmp_path):
    step = FineTune(training=Training(epochs=1, negatives=8))
    model = RANKER.model()
    with raises_code(NothingToCompress, "negatives_without_catalogue", negatives=8, task="ctr"):
        run(step, model, RANKER.bench(tmp_path / "ctr"), tmp_path / "out")
    bench = build_bench(build_fitted_model(), tmp_path / "data").model_copy(update={"items": None})
    with raises_code(NothingToCompress, "rows_missing", missing=("items",)):
        run(step, build_fitted_model(), bench, tmp_path / "out")
