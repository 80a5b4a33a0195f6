"""Lowering keeps every constant that changes a result, however small."""

import functools
import itertools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from models import BENCH_ROWS, Reference, prepared, whole
from numpy.typing import NDArray
from onnx import TensorProto, helper
from pairwise import parametrize_pairwise
from signatures import with_output
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Bench, IdInput, Output, PaddedBag, Signature, TargetName
from compressors.core.batches import example
from compressors.core.runner import run
from compressors.lower.export import Lowered, lower
from compressors.lower.passes.simplify import simplify
from compressors.lower.serving_wrapper import input_names
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import Session

TARGETS: tuple[TargetName, ...] = ("onnxruntime", "tensorrt", "tensorrt-rtx")
# Both sides of the 1e-8 below which ``isclose`` takes a number for 0, and one far below. Others are
# tried on the passes alone, and nightly on the network.
EPS = (1e-7, 1e-8, 1e-16)
OTHER_EPS = (1e-9, 1e-12)
LENGTH = 4
# A float32 graph sums in another order; TensorRT's forms round looked-up rows to float16 once.
ROUNDING = {"float32": 1e-6, "packed": 2e-3}


class MaskedMeans(nn.Module):
    """Means of a padded list as libraries write them, each with its own guard against 0 / 0."""

    def __init__(self, eps: float, dim: int = 6) -> None:
        super().__init__()
        self.eps = eps
        self.user = nn.Embedding(12, dim)
        self.items = nn.Embedding(40, dim)
        self.out = nn.Linear(6 * dim, 1)

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        rows = self.items(items)  # (rows, LENGTH, dim)
        mask = (items != 0).to(rows.dtype).unsqueeze(-1)  # (rows, LENGTH, 1)
        total, count = (rows * mask).sum(1), mask.sum(1)  # (rows, dim), (rows, 1)
        integers = (items != 0).sum(1, keepdim=True)
        parts = (
            total / (count + self.eps),
            total / (self.eps + integers),
            total / count.clamp(min=self.eps),
            total / torch.maximum(count, torch.tensor(self.eps)),
            total / (count - -self.eps),
            F.normalize(total, dim=1, eps=self.eps) + self.user(user),
        )
        score: Tensor = self.out(torch.cat(parts, dim=1)).squeeze(1)
        return score


SCHEMA = Signature(
    inputs=(
        IdInput(name="user", table="user"),
        PaddedBag(name="items", table="items", shape=(LENGTH,)),
    ),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
STEPS = {"float32": None, "rowwise_int8": RowwiseInt8(), "rowwise_int4": RowwiseInt4()}


@functools.cache
def lowered(eps: float, form: str, target: TargetName) -> tuple[Lowered, Path]:
    folder = Path(tempfile.mkdtemp())
    reference = Reference(MaskedMeans, SCHEMA, {"eps": eps})
    model = reference.model()
    step = STEPS[form]
    if step is not None:
        rows = prepared(SCHEMA, reference.rows_of_tables(), folder / "data", rows=BENCH_ROWS)
        model = run(step, model, Bench(signature=SCHEMA, train=rows), folder / "model")
    path = folder / "model.onnx"
    return lower(model.module, whole(SCHEMA), target, path), path


def scores(
    eps: float, form: str, target: TargetName, inputs: dict[str, Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the module and of its graph in ONNX Runtime, which runs TensorRT's forms too."""
    graph, path = lowered(eps, form, target)
    with torch.no_grad():
        expected = graph.served(*(inputs[name] for name in input_names(SCHEMA)))
    found = Session(path, 1).scores({name: tensor.numpy() for name, tensor in inputs.items()})
    return expected.numpy(), found


# In the default tier each guard is in a graph for ONNX Runtime and in one for TensorRT-RTX, with
# the forms of tables in turn, and one is in a graph for TensorRT.
GUARDS = [
    (eps, list(STEPS)[(place + turn + 1) % len(STEPS)], target)
    for place, eps in enumerate(EPS)
    for turn, target in enumerate(("onnxruntime", "tensorrt-rtx"))
]
GUARDS.append((EPS[1], "rowwise_int8", "tensorrt"))


@pytest.mark.parametrize(
    ("eps", "form", "target"),
    [
        *GUARDS,
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in itertools.product(EPS, STEPS, TARGETS)
            if case not in GUARDS
        ),
    ],
)
def test_masked_means_of_empty_lists_are_the_modules_on_every_target(eps, form, target):
    check_masked_means(eps, form, target)


@pytest.mark.nightly
@parametrize_pairwise(eps=OTHER_EPS, form=list(STEPS), target=TARGETS)
def test_masked_means_with_other_guards_are_the_modules_on_every_target(eps, form, target):
    check_masked_means(eps, form, target)


def check_masked_means(eps: float, form: str, target: TargetName) -> None:
    inputs = example(SCHEMA, {"user": 12, "items": 40}, 16)
    inputs["items"][:5] = 0  # empty lists
    inputs["items"][5:9, 1:] = 0  # lists of one
    expected, found = scores(eps, form, target, inputs)
    assert np.isfinite(expected).all()
    rounding = ROUNDING["float32" if form == "float32" or target == "onnxruntime" else "packed"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding)


class LogSigmoid(MaskedMeans):
    """The logarithm of a very small probability."""

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        return F.logsigmoid(super().forward(user, items) - 200)


def test_the_log_of_a_vanishing_sigmoid_is_finite_in_the_graph(tmp_path):
    signature = with_output(SCHEMA, form="score")
    model = Reference(LogSigmoid, signature, {"eps": 1e-6}).model()
    path = tmp_path / "model.onnx"
    done = lower(model.module, whole(signature), "onnxruntime", path)
    inputs = example(signature, {"user": 12, "items": 40}, 8)
    with torch.no_grad():
        expected = done.served(*(inputs[name] for name in input_names(signature))).numpy()
    found = Session(path, 1).scores({name: tensor.numpy() for name, tensor in inputs.items()})
    np.testing.assert_allclose(found, expected, rtol=1e-6)  # about -200, by float32 sums


# --- the passes alone ------------------------------------------------------------------------

SMALL = (1e-7, 1e-8, 9e-9, 1e-12, 1e-16, 1e-30, -1e-12)
NEAR_ONE = (1 + 1e-5, 1 + 9e-6, 1 + 1.2e-7, 1 - 1e-6)


def simplified(nodes: list[onnx.NodeProto], **constants: NDArray[np.generic]) -> onnx.ModelProto:
    """A graph from ``x`` to ``y`` after the passes."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])
    held = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    inside = ir.from_proto(model)
    simplify(inside, lambda _node: None)
    return ir.to_proto(inside)


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type != "Identity"]


def run_graph(model: onnx.ModelProto, x: NDArray[np.float32], folder: Path) -> NDArray[np.float32]:
    onnx.save(model, folder / "graph.onnx")
    return Session(folder / "graph.onnx", 1).scores({"x": x})


@pytest.mark.parametrize("order", ["x c", "c x"])
@pytest.mark.parametrize(
    ("kind", "values", "neutral"),
    [("Add", SMALL, 0.0), ("Sub", SMALL, 0.0), ("Mul", NEAR_ONE, 1.0), ("Div", NEAR_ONE, 1.0)],
)
def test_only_an_exact_neutral_element_is_removed(kind, values, neutral, order):
    for value in values:
        node = helper.make_node(kind, order.split(), ["y"])
        assert operators(simplified([node], c=np.array(value, np.float32))) == [kind], value
    if order == "x c" or kind in ("Add", "Mul"):
        node = helper.make_node(kind, order.split(), ["y"])
        assert operators(simplified([node], c=np.array(neutral, np.float32))) == []


@pytest.mark.parametrize("value", SMALL)
def test_onnxruntime_keeps_small_constants_when_it_opens_a_graph(value, tmp_path):
    nodes = [
        helper.make_node("Add", ["x", "c"], ["sum"]),
        helper.make_node("Div", ["x", "sum"], ["y"]),
    ]
    model = simplified(nodes, c=np.array(value, np.float32))
    found = run_graph(model, np.array([[0, 1, 2]], np.float32), tmp_path)
    # 0 / (0 + c) is 0, where 0 / 0 would be NaN; 1e-7 is one rounding of 1
    np.testing.assert_allclose(found, [[0, 1, 1]], rtol=0, atol=2e-7)


def test_successive_clips_with_bounds_apart_give_the_second_clips_bound(tmp_path):
    nodes = [
        helper.make_node("Clip", ["x", "zero", "one"], ["inside"]),
        helper.make_node("Clip", ["inside", "two", "three"], ["y"]),
    ]
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3}
    model = simplified(nodes, **{n: np.array(v, np.float32) for n, v in numbers.items()})
    x = np.array([[-1, 0.5, 9]], np.float32)
    assert run_graph(model, x, tmp_path).tolist() == [[2, 2, 2]]
    below = [
        helper.make_node("Clip", ["x", "", "least"], ["low"]),
        helper.make_node("Relu", ["low"], ["y"]),
    ]
    model = simplified(below, least=np.array(-1, np.float32))
    assert run_graph(model, x, tmp_path).tolist() == [[0, 0, 0]]
