"""Parity failures: a graph whose scores differ from those of the module it was exported from.

The error contains the row, both scores (``expected`` of the module, ``found`` of the graph), and
the first tensor of the graph that differs. ``is_clear`` of that tensor is whether the difference is
larger than the graph's formats explain.
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import METHODS, Graph, Reference, default_step, only_served_graph
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from compressors.contracts import IdInput, JaggedBag, Output, PaddedBag, Signature, TargetName
from compressors.core.runner import run
from compressors.errors.compression import ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.lower.export import lower
from infra.onnxruntime.sessions import Session
from tasks.evaluation.parity import GraphCheck, runnable_graph
from tasks.evaluation.single_rows import format_row, take_row

each_target = pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "tensorrt-rtx"])


class MaskedMeanNet(nn.Module):
    """A network with a masked mean of a padded list of items, and two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(30, 4)
        self.hidden = nn.Linear(4, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, items: Tensor) -> Tensor:
        mask = (items != 0).to(torch.float32).unsqueeze(-1)  # (rows, 5, 1)
        count = mask.sum(1)
        mean = (self.items(items) * mask).sum(1) / (count + 1e-9)  # (rows, 4)
        score: Tensor = self.out(torch.relu(self.hidden(mean))).squeeze(1)
        return score


MEAN_SIGNATURE = Signature(
    inputs=(PaddedBag(name="items", table="items", shape=(5,)),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


@pytest.fixture(scope="module")
def mean_graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TargetName], Graph]:
    """A function that exports ``MaskedMeanNet`` for a target, once per target."""

    @cache
    def export(target: TargetName) -> Graph:
        model = Reference(MaskedMeanNet, MEAN_SIGNATURE).model()
        path = tmp_path_factory.mktemp("mean") / "model.onnx"
        return Graph(
            model,
            lower(model.module, only_served_graph(MEAN_SIGNATURE), target, path),
            MEAN_SIGNATURE,
            path,
            target,
        )

    return export


class CrossNet(nn.Module):
    """A network with two tables, whose rows are inputs of a cross layer and of a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(40, 6)
        self.item = nn.Embedding(60, 10)
        self.cross = nn.Linear(16, 16)
        self.hidden = nn.Linear(16, 16)
        self.out = nn.Linear(32, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        x = torch.cat([self.user(user), self.item(item)], dim=1)  # (rows, 16)
        crossed = x * self.cross(x) + x
        score: Tensor = self.out(torch.cat([crossed, torch.relu(self.hidden(x))], dim=1))
        return score


CROSS_SIGNATURE = MEAN_SIGNATURE.model_copy(
    update={"inputs": tuple(IdInput(name=name, table=name) for name in ("user", "item"))}
)


def export_quantized(kinds: tuple[str, ...], target: TargetName, folder: Path) -> Graph:
    """Apply steps of these kinds to ``CrossNet``, and export the result.

    Args:
        kinds: kinds of steps, which have their default settings.
        target: the target of the graph.
        folder: folder for the graph and the models.
    """
    reference = Reference(CrossNet, CROSS_SIGNATURE)
    model, bench = reference.model(), reference.bench(folder / "data")
    methods = {method.model_fields["kind"].default: method for method in METHODS}
    for kind in kinds:
        model = run(default_step(methods[kind]), model, bench, folder / kind)
    path = folder / "model.onnx"
    return Graph(
        model,
        lower(model.module, only_served_graph(CROSS_SIGNATURE), target, path),
        CROSS_SIGNATURE,
        path,
        target,
    )


def write_changed_graph(lowered: Graph, folder: Path, **values: NDArray[np.generic]) -> Path:
    """Write a copy of a graph with other values of some stored tensors, and return its path."""
    model = onnx.load(lowered.path)
    initializers = {item.name: item for item in model.graph.initializer}
    for name, value in values.items():
        initializers[name].CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def stored_tensors(lowered: Graph) -> dict[str, NDArray[np.generic]]:
    """Return the stored tensors of a graph by name."""
    initializers = onnx.load(lowered.path).graph.initializer
    return {item.name: numpy_helper.to_array(item) for item in initializers}


def parity_failure(lowered: Graph, path: Path, inputs: dict[str, Tensor]) -> ParityFailure:
    """Compare a module with a changed graph, and return the failure.

    Args:
        lowered: the module, and the result of lowering it, which describes the unchanged graph.
        path: file of the changed graph.
        inputs: the rows to compare.
    """
    plan, target = lowered.model.plan, lowered.target
    with runnable_graph(path, target, plan) as runnable:
        check = GraphCheck(
            lowered.model.module,
            lowered.lowered,
            plan,
            target,
            65_536,  # the largest batch
            runnable,
            Session(runnable, threads=1),
        )
        with pytest.raises(ParityLost) as raised:
            check.parity(inputs, "the data")
    return raised.value.failure


@each_target
def test_missing_epsilon_is_reported_at_its_addition_with_the_failing_row(
    mean_graph, target, tmp_path
):
    lowered = mean_graph(target)
    tensors = stored_tensors(lowered)
    (epsilon,) = [n for n, v in tensors.items() if v.shape == () and 0 < abs(float(v)) < 1e-8]
    path = write_changed_graph(lowered, tmp_path, **{epsilon: np.array(0, np.float32)})
    inputs = {"items": torch.randint(1, 30, (20, 5))}
    inputs["items"][13] = 0  # a list of padding only, so the graph divides 0 by 0
    failure = parity_failure(lowered, path, inputs)
    assert (failure.code, failure.row, failure.inputs) == (
        "parity_nan",
        13,
        {"items": "[0, 0, 0, 0, 0]"},
    )
    assert failure.expected is not None
    assert np.isfinite(failure.expected)
    assert failure.found is not None
    assert np.isnan(failure.found)
    assert failure.tensor is not None
    assert failure.tensor.operator == "Add"
    assert "test_parity_failures.py" in failure.tensor.source
    assert "(count + 1e-9)" in failure.tensor.source
    assert (failure.tensor.expected, failure.tensor.found) == (pytest.approx(1e-9), 0)
    assert "Row 13 of the data (items=[0, 0, 0, 0, 0])" in str(failure)


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        ("hidden", "onnxruntime"),
        ("out", "tensorrt"),
        ("hidden", "tensorrt-rtx"),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (("out", "onnxruntime"), ("hidden", "tensorrt"), ("out", "tensorrt-rtx"))
        ),
    ],
)
def test_wrong_bias_is_reported_at_its_layer(mean_graph, layer, target, tmp_path):
    lowered = mean_graph(target)
    name = f"model.{layer}.bias"
    path = write_changed_graph(
        lowered, tmp_path, **{name: stored_tensors(lowered)[name] + np.float32(3)}
    )
    failure = parity_failure(lowered, path, {"items": torch.randint(1, 30, (20, 5))})
    assert failure.code == "parity_limit"
    assert failure.tensor is not None
    assert (failure.tensor.submodule, failure.tensor.is_clear) == (layer, True)
    assert failure.tensor.found - failure.tensor.expected == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize(
    ("kinds", "module", "target"),
    [
        (("rowwise_int8",), "item", "onnxruntime"),
        (("rowwise_int8", "static_int8"), "cross", "tensorrt-rtx"),
        (("rowwise_int4", "bfloat16_dense"), "hidden", "tensorrt-rtx"),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (
                (("rowwise_int8",), "item", "tensorrt-rtx"),
                (("rowwise_int8", "static_int8"), "cross", "onnxruntime"),
                (("rowwise_int4", "bfloat16_dense"), "hidden", "onnxruntime"),
            )
        ),
    ],
)
def test_wrong_quantized_tensor_is_reported_at_its_module(kinds, module, target, tmp_path):
    lowered = export_quantized(kinds, target, tmp_path)
    tensors = stored_tensors(lowered)
    names_of_module = [name for name in tensors if f"model.{module}." in name]
    name = next(name for name in names_of_module if name.endswith(("scale", "weight")))
    wrong = (tensors[name] * 4).astype(tensors[name].dtype)
    path = write_changed_graph(lowered, tmp_path, **{name: wrong})
    failure = parity_failure(lowered, path, lowered.rows(40))
    assert failure.tensor is not None
    assert failure.tensor.is_clear
    assert failure.tensor.submodule == module
    assert set(failure.inputs) == {item.name for item in lowered.signature.inputs}


def test_nan_only_in_the_module_is_reported(mean_graph, monkeypatch):
    lowered = mean_graph("onnxruntime")
    bias = lowered.model.module.hidden.bias
    monkeypatch.setattr(
        bias, "data", bias.detach().clone().index_fill(0, torch.tensor(3), torch.nan)
    )
    failure = parity_failure(lowered, lowered.path, {"items": torch.randint(1, 30, (4, 5))})
    assert failure.code == "parity_nan"
    assert failure.tensor is not None
    assert failure.tensor.submodule == "hidden"
    assert np.isnan(failure.tensor.expected)
    assert np.isfinite(failure.tensor.found)


def test_score_that_depends_on_the_batch_is_reported_with_side_and_row(tmp_path):
    """The side is the one whose scores depend on the batch: ``network`` or ``graph``."""

    class BatchCentredNet(MaskedMeanNet):
        def forward(self, items: Tensor) -> Tensor:
            score = super().forward(items)
            return score - score.mean()

    model = Reference(BatchCentredNet, MEAN_SIGNATURE).model()
    path = tmp_path / "model.onnx"
    lowered = lower(model.module, only_served_graph(MEAN_SIGNATURE), "onnxruntime", path)
    no_plan, largest_batch = None, 64
    session = Session(path, threads=1)
    check = GraphCheck(model.module, lowered, no_plan, "onnxruntime", largest_batch, path, session)
    inputs = {"items": torch.randint(1, 30, (20, 5))}
    parity, expected = check.parity(inputs, "the data")
    with pytest.raises(ParityLost) as raised:
        check.require_same_in_small_batch(expected[:1], take_row(inputs, MEAN_SIGNATURE, 0), parity)
    failure = raised.value.failure
    assert (failure.code, failure.side, failure.row) == ("parity_batch", "network", 0)
    assert failure.inputs["items"].startswith("[")


def test_difference_of_the_exported_program_is_reported_as_such(tmp_path):
    class ExportDependentNet(MaskedMeanNet):
        def forward(self, items: Tensor) -> Tensor:
            return super().forward(items) * (2.0 if torch.compiler.is_exporting() else 1.0)

    model = Reference(ExportDependentNet, MEAN_SIGNATURE).model()
    path = tmp_path / "model.onnx"
    lowered = lower(model.module, only_served_graph(MEAN_SIGNATURE), "onnxruntime", path)
    graph = Graph(model, lowered, MEAN_SIGNATURE, path)
    failure = parity_failure(graph, path, {"items": torch.randint(1, 30, (20, 5))})
    assert failure.is_exported_wrong
    assert failure.tensor is None
    assert "torch.export traced" in str(failure)


def test_row_that_the_runtime_refuses_is_reported(mean_graph, tmp_path):
    lowered = mean_graph("onnxruntime")
    table = stored_tensors(lowered)["model.items.weight"]
    # The graph's table has 20 of the 30 rows, and id 25 is in one row of the batch.
    path = write_changed_graph(lowered, tmp_path, **{"model.items.weight": table[:20]})
    inputs = {"items": torch.randint(1, 20, (9, 5))}
    inputs["items"][6, 2] = 25
    failure = parity_failure(lowered, path, inputs)
    assert (failure.code, failure.row) == ("parity_run", 6)
    assert "25" in failure.inputs["items"]


def test_copied_parity_error_has_its_failure_and_message():
    error = ParityLost(ParityFailure(code="parity_nan", target="tensorrt", row=3))
    copied = copy.deepcopy(error)
    assert copied.failure == error.failure
    assert str(copied) == str(error)


# --- the row's inputs ------------------------------------------------------------------------


def test_take_row_selects_a_row_of_every_kind_of_input():
    signature = Signature(
        inputs=(
            IdInput(name="user", table="user"),
            PaddedBag(name="items", table="items", shape=(12,)),
            JaggedBag(name="a", table="items", shape=(3,)),
            JaggedBag(name="b", table="items", shape=(3,), layout="lengths"),
        ),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    )
    inputs = {
        "user": torch.tensor([4, 5]),
        "items": torch.arange(24).reshape(2, 12),
        "a": torch.tensor([1, 2, 3]),
        "a_offsets": torch.tensor([0, 2]),
        "b": torch.tensor([7, 8]),
        "b_lengths": torch.tensor([2, 0]),
    }
    first, second = (format_row(take_row(inputs, signature, row), signature) for row in (0, 1))
    assert (first["user"], first["a"], first["b"]) == ("4", "[1, 2]", "[7, 8]")
    assert (second["user"], second["a"], second["b"]) == ("5", "[3]", "[]")
    assert first["items"] == "[0, 1, 2, 3, 4, 5, 6, 7, ... 12 values]"
