"""Lowering keeps small constants that change a result, such as an epsilon in a denominator."""

import functools
import itertools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from models import BENCH_ROWS, Reference, only_served_graph, write_split
from numpy.typing import NDArray
from onnx import TensorProto, helper
from pairwise import parametrize_pairwise
from signatures import replace_output
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Bench, IdInput, Output, PaddedBag, Signature, TargetName
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import run
from compressors.lower.export import Lowered, lower
from compressors.lower.passes.simplify import simplify
from compressors.lower.serving_wrapper import input_names
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import Session

TARGETS: tuple[TargetName, ...] = ("onnxruntime", "tensorrt", "tensorrt-rtx")
# onnxscript's no-op rules treat constants up to 1e-8 as 0. These are above, at and far below it.
# Other values are tested on the passes alone, and nightly on the network.
EPS = (1e-7, 1e-8, 1e-16)
OTHER_EPS = (1e-9, 1e-12)
LENGTH = 4
# The float32 sums have another order; TensorRT's graphs round looked-up rows to float16 once.
ROUNDING = {"float32": 1e-6, "packed": 2e-3}


class MaskedMeans(nn.Module):
    """Means of a padded list as libraries compute them, each with another way to avoid 0 / 0."""

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


SIGNATURE = Signature(
    inputs=(
        IdInput(name="user", table="user"),
        PaddedBag(name="items", table="items", shape=(LENGTH,)),
    ),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
STEPS = {"float32": None, "rowwise_int8": RowwiseInt8(), "rowwise_int4": RowwiseInt4()}


@functools.cache
def lower_network(eps: float, table_format: str, target: TargetName) -> tuple[Lowered, Path]:
    """Export the network with this epsilon and table format; return the result and the file."""
    folder = Path(tempfile.mkdtemp())
    reference = Reference(MaskedMeans, SIGNATURE, {"eps": eps})
    model = reference.model()
    step = STEPS[table_format]
    if step is not None:
        rows = write_split(SIGNATURE, reference.rows_of_tables(), folder / "data", rows=BENCH_ROWS)
        model = run(step, model, Bench(signature=SIGNATURE, train=rows), folder / "model")
    path = folder / "model.onnx"
    return lower(model.module, only_served_graph(SIGNATURE), target, path), path


def scores(
    eps: float, table_format: str, target: TargetName, inputs: dict[str, Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the scores of the module and of its graph in ONNX Runtime."""
    graph, path = lower_network(eps, table_format, target)
    with torch.no_grad():
        expected = graph.wrapper(*(inputs[name] for name in input_names(SIGNATURE)))
    scores_of_graph = Session(path, threads=1).scores(
        {name: tensor.numpy() for name, tensor in inputs.items()}
    )
    return expected.numpy(), scores_of_graph


# Cases without the marker ``nightly``: each epsilon in a graph for ONNX Runtime and in one for
# TensorRT-RTX, with the table formats in turn, and one epsilon in a graph for TensorRT.
DEFAULT_CASES = [
    (eps, list(STEPS)[(index + target_index + 1) % len(STEPS)], target)
    for index, eps in enumerate(EPS)
    for target_index, target in enumerate(("onnxruntime", "tensorrt-rtx"))
]
DEFAULT_CASES.append((EPS[1], "rowwise_int8", "tensorrt"))


@pytest.mark.parametrize(
    ("eps", "table_format", "target"),
    [
        *DEFAULT_CASES,
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in itertools.product(EPS, STEPS, TARGETS)
            if case not in DEFAULT_CASES
        ),
    ],
)
def test_masked_means_are_equal_in_graphs_and_torch(eps, table_format, target):
    assert_masked_means_equal(eps, table_format, target)


@pytest.mark.nightly
@parametrize_pairwise(eps=OTHER_EPS, table_format=list(STEPS), target=TARGETS)
def test_masked_means_with_other_epsilons_are_equal_in_graphs_and_torch(eps, table_format, target):
    assert_masked_means_equal(eps, table_format, target)


def assert_masked_means_equal(eps: float, table_format: str, target: TargetName) -> None:
    inputs = generate_inputs(SIGNATURE, {"user": 12, "items": 40}, 16)
    inputs["items"][:5] = 0  # empty lists
    inputs["items"][5:9, 1:] = 0  # lists of one item
    expected, scores_of_graph = scores(eps, table_format, target, inputs)
    assert np.isfinite(expected).all()
    rounding = ROUNDING[
        "float32" if table_format == "float32" or target == "onnxruntime" else "packed"
    ]
    np.testing.assert_allclose(scores_of_graph, expected, rtol=0, atol=rounding)


class LogSigmoid(MaskedMeans):
    """The logarithm of a very small probability, from a large negative logit."""

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        return F.logsigmoid(super().forward(user, items) - 200)


def test_log_sigmoid_of_a_large_negative_logit_is_finite_in_the_graph(tmp_path):
    signature = replace_output(SIGNATURE, form="score")
    model = Reference(LogSigmoid, signature, {"eps": 1e-6}).model()
    path = tmp_path / "model.onnx"
    lowered_graph = lower(model.module, only_served_graph(signature), "onnxruntime", path)
    inputs = generate_inputs(signature, {"user": 12, "items": 40}, 8)
    with torch.no_grad():
        expected = lowered_graph.wrapper(*(inputs[name] for name in input_names(signature))).numpy()
    scores_of_graph = Session(path, threads=1).scores(
        {name: tensor.numpy() for name, tensor in inputs.items()}
    )
    # Scores are about -200, so that the float32 rounding of sums is relative to them.
    np.testing.assert_allclose(scores_of_graph, expected, rtol=1e-6)


# --- the passes alone ------------------------------------------------------------------------

# Constants near 0 and 1. Only exactly 0 (of a sum) and 1 (of a product) may be removed.
SMALL = (1e-7, 1e-8, 9e-9, 1e-12, 1e-16, 1e-30, -1e-12)
NEAR_ONE = (1 + 1e-5, 1 + 9e-6, 1 + 1.2e-7, 1 - 1e-6)


def build_simplified(
    nodes: list[onnx.NodeProto], **constants: NDArray[np.generic]
) -> onnx.ModelProto:
    """Return a graph from ``x`` to ``y`` after the passes of ``simplify``."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    ir_model = ir.from_proto(model)
    simplify(ir_model, lambda _node: None)  # None: the optimizer decides what to fold
    return ir.to_proto(ir_model)


def list_operators(model: onnx.ModelProto) -> list[str]:
    """Return the operators of a graph, without Identity."""
    return [node.op_type for node in model.graph.node if node.op_type != "Identity"]


def run_graph(model: onnx.ModelProto, x: NDArray[np.float32], folder: Path) -> NDArray[np.float32]:
    onnx.save(model, folder / "graph.onnx")
    return Session(folder / "graph.onnx", threads=1).scores({"x": x})


@pytest.mark.parametrize("operands", ["x c", "c x"])
@pytest.mark.parametrize(
    ("kind", "values", "neutral"),
    [("Add", SMALL, 0.0), ("Sub", SMALL, 0.0), ("Mul", NEAR_ONE, 1.0), ("Div", NEAR_ONE, 1.0)],
)
def test_no_op_rules_remove_only_exact_neutral_elements(kind, values, neutral, operands):
    for value in values:
        node = helper.make_node(kind, operands.split(), ["y"])
        assert list_operators(build_simplified([node], c=np.array(value, np.float32))) == [kind], (
            value
        )
    if operands == "x c" or kind in ("Add", "Mul"):
        node = helper.make_node(kind, operands.split(), ["y"])
        assert list_operators(build_simplified([node], c=np.array(neutral, np.float32))) == []


@pytest.mark.parametrize("value", SMALL)
def test_onnxruntime_does_not_remove_small_constants(value, tmp_path):
    nodes = [
        helper.make_node("Add", ["x", "c"], ["sum"]),
        helper.make_node("Div", ["x", "sum"], ["y"]),
    ]
    model = build_simplified(nodes, c=np.array(value, np.float32))
    scores_of_graph = run_graph(model, np.array([[0, 1, 2]], np.float32), tmp_path)
    # 0 / (0 + c) is 0, but 0 / 0 would be NaN; 1e-7 is about the rounding of 1.
    np.testing.assert_allclose(scores_of_graph, [[0, 1, 1]], rtol=0, atol=2e-7)


def test_successive_clips_with_disjoint_bounds_return_the_second_bound(tmp_path):
    nodes = [
        helper.make_node("Clip", ["x", "zero", "one"], ["inside"]),
        helper.make_node("Clip", ["inside", "two", "three"], ["y"]),
    ]
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3}
    model = build_simplified(nodes, **{n: np.array(v, np.float32) for n, v in numbers.items()})
    x = np.array([[-1, 0.5, 9]], np.float32)
    assert run_graph(model, x, tmp_path).tolist() == [[2, 2, 2]]
    # A Relu is a Clip with the lower bound 0.
    clip_and_relu = [
        helper.make_node("Clip", ["x", "", "upper"], ["low"]),
        helper.make_node("Relu", ["low"], ["y"]),
    ]
    model = build_simplified(clip_and_relu, upper=np.array(-1, np.float32))
    assert run_graph(model, x, tmp_path).tolist() == [[0, 0, 0]]
