"""The two graphs of a retrieval model: vectors, refused rows, a table that both towers read."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import METHODS, Reference
from torch import Tensor, nn

from compressors.contracts import IdInput, PaddedBag, Signature, TargetName
from compressors.core.batches import edge_example, example
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from infra.onnxruntime.sessions import Session


class Items(nn.Module):
    """An item's vector."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, item: Tensor) -> Tensor:
        vector: Tensor = self.out(self.table(item))
        return vector


class Reader(nn.Module):
    """A person's vector: the mean of what they read lately, from the items' own table."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.hidden = nn.Linear(8, 8)

    def forward(self, lately: Tensor) -> Tensor:
        vector: Tensor = torch.relu(self.hidden(self.table(lately).mean(dim=1)))
        return vector


class SharedTable(nn.Module):
    """Two towers over one table."""

    def __init__(self) -> None:
        super().__init__()
        self.item = Items()
        self.query = Reader(self.item.table)

    def forward(self, lately: Tensor, item: Tensor) -> Tensor:
        score: Tensor = (self.query(lately) * self.item(item)).sum(dim=1)
        return score


SCHEMA = Signature.model_validate(
    {
        "inputs": [
            PaddedBag(name="lately", table="item.table", shape=(3,)).model_dump(),
            IdInput(name="item", table="item.table").model_dump(),
        ],
        "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}],
        "group": "person",
        "item": "item",
        "towers": {
            "query": {"module": "query", "inputs": ["lately"]},
            "item": {"module": "item", "inputs": ["item"]},
        },
    }
)
SHARED = Reference(SharedTable, SCHEMA)
TARGETS: tuple[TargetName, ...] = ("onnxruntime", "tensorrt-rtx")
TABLES = {"item.table": 50}
_SCRATCH = tempfile.TemporaryDirectory(prefix="towers-")


@functools.cache
def graphs_as_trained() -> dict[str, Path]:
    """The graph of each tower for ONNX Runtime."""
    model, paths = SHARED.model().module, {}
    for form in served_graphs(SCHEMA):
        paths[form.name] = Path(_SCRATCH.name) / f"{form.name}.onnx"
        lower(model, form, "onnxruntime", paths[form.name])
    return paths


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        # In the default tier each has one target, in turn.
        pytest.param(kind, target, marks=() if (place + turn) % 2 else pytest.mark.nightly)
        for place, kind in enumerate(("rowwise_int8", "rowwise_int4", "float16", "static_int8"))
        for turn, target in enumerate(TARGETS)
    ],
)
def test_both_graphs_give_the_modules_vectors_also_of_a_table_they_share(kind, target, tmp_path):
    (method,) = (item for item in METHODS if item.model_fields["kind"].default == kind)
    model = run(method(), SHARED.model(), SHARED.bench(tmp_path / "data"), tmp_path / "out").module
    for form in served_graphs(SCHEMA):
        path = tmp_path / f"{form.name}.onnx"
        lowered = lower(model, form, target, path)
        inputs = example(form.signature, TABLES, 40)
        with torch.no_grad():
            expected = form.part(model)(**inputs).numpy()
        found = Session(path, threads=1).scores({k: v.numpy() for k, v in inputs.items()})
        assert found.shape == expected.shape == (40, 8)
        # A level of the inputs apart where layers are int8, float16 rounding elsewhere.
        np.testing.assert_allclose(found, expected, atol=0.05 if kind == "static_int8" else 2e-3)
        assert [table.module for table in lowered.tables] == ["item.table"]


def test_a_refused_row_is_a_vector_of_nan_and_the_others_are_not():
    for form in served_graphs(SCHEMA):
        inputs = edge_example(form.signature, TABLES, 8)  # the first two rows hold a bad id
        found = Session(graphs_as_trained()[form.name], threads=1).scores(
            {k: v.numpy() for k, v in inputs.items()}
        )
        assert np.isnan(found[:2]).all()
        assert np.isfinite(found[2:]).all()


def test_a_graph_holds_its_own_towers_weights_alone():
    held = {}
    for name, path in graphs_as_trained().items():
        graph = onnx.load(path).graph
        held[name] = {item.name.removeprefix("model.") for item in graph.initializer}
        assert [item.name for item in graph.output] == ["vector"]
    assert "query.table.weight" in held["query"] & held["item"]  # one of the two names it has
    assert not any(name.startswith("item.out") for name in held["query"])
    assert not any(name.startswith("query.hidden") for name in held["item"])


@pytest.mark.parametrize("kind", ["channels", "fine_tune", "distill"])
def test_steps_that_train_say_they_have_no_loss_for_pairs(kind, tmp_path):
    (method,) = (item for item in METHODS if item.model_fields["kind"].default == kind)
    bench = SHARED.bench(tmp_path / "data")
    split = bench.calibration
    whole = bench.model_copy(update={"train": split, "validation": split, "soft_labels": split})
    with pytest.raises(NothingToCompress):
        run(method(), SHARED.model(), whole, tmp_path / "out")
