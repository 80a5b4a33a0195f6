"""The two graphs of a retrieval model: vectors, refused rows, and a table that towers share.

A served graph describes one graph to export: its name, inputs and tower. A row is refused if one of
its ids is outside of its table: the row's vector is NaN.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from error_codes import raises_value_error
from models import METHODS, Reference, write_split
from torch import Tensor, nn

from compressors.contracts import IdInput, PaddedBag, Signature, TargetName, Tower
from compressors.core.random_inputs import generate_edge_inputs, generate_inputs
from compressors.core.runner import rows_of_tables, run
from compressors.core.scores import tower_vectors
from compressors.core.smoke_test import smoke_test
from compressors.distill.fine_tune import FineTune
from compressors.distill.training.settings import Training
from compressors.lower.export import lower
from compressors.lower.graph_weights import weights_of_graph
from compressors.lower.serving_wrapper import served_graphs
from infra.onnxruntime.sessions import Session


class ItemTower(nn.Module):
    """The item tower."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, item: Tensor) -> Tensor:
        vector: Tensor = self.out(self.table(item))
        return vector


class QueryTower(nn.Module):
    """The query tower: the mean of the rows of recent items, in the table of the item tower."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.hidden = nn.Linear(8, 8)

    def forward(self, recent: Tensor) -> Tensor:
        vector: Tensor = torch.relu(self.hidden(self.table(recent).mean(dim=1)))
        return vector


class SharedTable(nn.Module):
    """Two towers that share a table."""

    def __init__(self) -> None:
        super().__init__()
        self.item = ItemTower()
        self.query = QueryTower(self.item.table)

    def forward(self, recent: Tensor, item: Tensor) -> Tensor:
        score: Tensor = (self.query(recent) * self.item(item)).sum(dim=1)
        return score


class MethodTowers(nn.Module):
    """Two towers that are methods, as in torch-rechub; one module looks up the ids of both."""

    def __init__(self) -> None:
        super().__init__()
        self.lookup = Lookup()
        self.of_query, self.of_item = nn.Linear(8, 8), nn.Linear(8, 8)

    def query_tower(self, inputs: dict[str, Tensor]) -> Tensor:
        vector: Tensor = torch.relu(self.of_query(self.lookup(inputs, "person")))
        return vector

    def item_tower(self, inputs: dict[str, Tensor]) -> Tensor:
        vector: Tensor = self.of_item(self.lookup(inputs, "item"))
        return vector

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        score: Tensor = (self.query_tower(inputs) * self.item_tower(inputs)).sum(dim=1)
        return score.sigmoid()


class ColumnTowers(MethodTowers):
    """As ``MethodTowers``, with vectors ``(rows, 1, dim)``, as some towers of torch-rechub."""

    def query_tower(self, inputs: dict[str, Tensor]) -> Tensor:
        return super().query_tower(inputs).unsqueeze(1)

    def item_tower(self, inputs: dict[str, Tensor]) -> Tensor:
        return super().item_tower(inputs).unsqueeze(1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        score: Tensor = (self.query_tower(inputs) * self.item_tower(inputs)).sum(dim=(1, 2))
        return score.sigmoid()


class Lookup(nn.Module):
    """A table per input."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({"person": nn.Embedding(40, 8), "item": nn.Embedding(50, 8)})

    def forward(self, inputs: dict[str, Tensor], name: str) -> Tensor:
        rows: Tensor = self.tables[name](inputs[name])
        return rows


BY_METHOD = Signature.model_validate(
    {
        "inputs": [
            {"kind": "id", "name": name, "table": f"lookup.tables.{name}"}
            for name in ("person", "item")
        ],
        "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}],
        "group": "person",  # the column that identifies the query
        "item": "item",
        "call": "mapping",
        "towers": {
            "query": {"method": "query_tower", "inputs": ["person"]},
            "item": {"method": "item_tower", "inputs": ["item"]},
        },
    }
)


def test_graph_of_a_tower_that_is_a_method_reads_the_weights_of_that_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MethodTowers().eval()
    smoke_test(model, BY_METHOD, "m:MethodTowers")
    inputs = generate_inputs(BY_METHOD, rows_of_tables(model, BY_METHOD), 9)
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    for served, table in zip(served_graphs(BY_METHOD), ("person", "item"), strict=True):
        path = tmp_path / f"{served.name}.onnx"
        lower(model, served, "onnxruntime", path)
        vectors = Session(path, threads=1).scores({table: inputs[table].numpy()})
        expected = getattr(model, f"{served.name}_tower")(inputs).detach().numpy()
        np.testing.assert_allclose(vectors, expected, atol=1e-6)  # float32 rounding
        read = {names[id(tensor)] for tensor in weights_of_graph(model, served)}
        layer = f"of_{served.name}"
        assert read == {f"lookup.tables.{table}.weight", f"{layer}.weight", f"{layer}.bias"}


def test_vectors_of_towers_may_have_a_dimension_of_size_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ColumnTowers().eval()
    smoke_test(model, BY_METHOD, "m:ColumnTowers")
    inputs = generate_inputs(BY_METHOD, rows_of_tables(model, BY_METHOD), 9)
    for served, table in zip(served_graphs(BY_METHOD), ("person", "item"), strict=True):
        expected = getattr(model, f"{served.name}_tower")(inputs).detach()
        assert expected.shape == (9, 1, 8)
        vectors = tower_vectors(model, inputs, BY_METHOD, served.name)
        torch.testing.assert_close(vectors, expected[:, 0], rtol=0, atol=0)
        path = tmp_path / f"{served.name}.onnx"
        lower(model, served, "onnxruntime", path)
        served_vectors = Session(path, threads=1).scores({table: inputs[table].numpy()})
        np.testing.assert_allclose(served_vectors, vectors.detach(), atol=1e-6)  # float32 rounding


def test_tower_without_module_and_method_is_refused() -> None:
    with raises_value_error("tower_is_network"):
        Tower(inputs=("person",))


SIGNATURE = Signature.model_validate(
    {
        "inputs": [
            PaddedBag(name="recent", table="item.table", shape=(3,)).model_dump(),
            IdInput(name="item", table="item.table").model_dump(),
        ],
        "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}],
        "group": "person",
        "item": "item",
        "towers": {
            "query": {"module": "query", "inputs": ["recent"]},
            "item": {"module": "item", "inputs": ["item"]},
        },
    }
)
SHARED = Reference(SharedTable, SIGNATURE)
TARGETS: tuple[TargetName, ...] = ("onnxruntime", "tensorrt-rtx")
ROWS_OF_TABLE = {"item.table": 50}
_SCRATCH = tempfile.TemporaryDirectory(prefix="towers-")


@functools.cache
def graphs_as_trained() -> dict[str, Path]:
    """Return the graph of each tower of the uncompressed model, for ONNX Runtime."""
    model, paths = SHARED.model().module, {}
    for served_graph in served_graphs(SIGNATURE):
        paths[served_graph.name] = Path(_SCRATCH.name) / f"{served_graph.name}.onnx"
        lower(model, served_graph, "onnxruntime", paths[served_graph.name])
    return paths


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        # In the default tier, each format has one target, in turn.
        pytest.param(kind, target, marks=() if (index + target_index) % 2 else pytest.mark.nightly)
        for index, kind in enumerate(("rowwise_int8", "rowwise_int4", "float16", "static_int8"))
        for target_index, target in enumerate(TARGETS)
    ],
)
def test_graphs_of_both_towers_return_the_vectors_of_torch(kind, target, tmp_path):
    (method,) = (item for item in METHODS if item.model_fields["kind"].default == kind)
    model = run(method(), SHARED.model(), SHARED.bench(tmp_path / "data"), tmp_path / "out").module
    for served_graph in served_graphs(SIGNATURE):
        path = tmp_path / f"{served_graph.name}.onnx"
        lowered = lower(model, served_graph, target, path)
        inputs = generate_inputs(served_graph.signature, ROWS_OF_TABLE, 40)
        with torch.no_grad():
            expected = served_graph.part(model)(**inputs).numpy()
        vectors = Session(path, threads=1).scores({k: v.numpy() for k, v in inputs.items()})
        assert vectors.shape == expected.shape == (40, 8)
        # Inputs of int8 layers may differ by one level; others by float16 rounding.
        np.testing.assert_allclose(vectors, expected, atol=0.05 if kind == "static_int8" else 2e-3)
        assert [table.module for table in lowered.tables] == ["item.table"]


def test_graph_returns_nan_vectors_for_refused_rows_only():
    for served_graph in served_graphs(SIGNATURE):
        # The first two rows have an id out of range.
        inputs = generate_edge_inputs(served_graph.signature, ROWS_OF_TABLE, 8)
        vectors = Session(graphs_as_trained()[served_graph.name], threads=1).scores(
            {k: v.numpy() for k, v in inputs.items()}
        )
        assert np.isnan(vectors[:2]).all()
        assert np.isfinite(vectors[2:]).all()


def test_graph_of_a_tower_contains_only_weights_of_that_tower():
    weights = {}
    for name, path in graphs_as_trained().items():
        graph = onnx.load(path).graph
        weights[name] = {item.name.removeprefix("model.") for item in graph.initializer}
        assert [item.name for item in graph.output] == ["vector"]
    # The shared table is ``item.table`` and ``query.table``; graphs use the second name.
    assert "query.table.weight" in weights["query"] & weights["item"]
    assert not any(name.startswith("item.out") for name in weights["query"])
    assert not any(name.startswith("query.hidden") for name in weights["item"])


def test_training_keeps_a_table_that_both_towers_share(tmp_path):
    """Training changes a copy of the modules (``private``), in which the table stays shared."""
    model = SHARED.model()
    bench = SHARED.bench(tmp_path / "data")
    other = write_split(SIGNATURE, ROWS_OF_TABLE, tmp_path / "other", seed=3)
    bench = bench.model_copy(update={"train": bench.calibration, "validation": other})
    training = Training(epochs=1, batch=16, warmup=0, learning_rate=0.1, tables=True)
    trained = (
        FineTune(training=training)
        .apply(model.private(), bench, FineTune(training=training).plan(model, bench))
        .model.module
    )
    assert trained.query.table.weight is trained.item.table.weight
