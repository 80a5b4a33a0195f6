"""Each ONNX operator of a network computes what ONNX Runtime computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from error_codes import raises_code
from onnx import helper
from onnx_graphs import Array, build_graph, build_network, network_outputs, require_equal

from compressors.errors.onnx_graphs import OnnxRefused
from compressors.onnx_network.operators.table import OPERATORS

random = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return random.normal(size=shape).astype(np.float32)


def ids(*shape: int, low: int = 0, high: int = 3) -> Array:
    return random.integers(low, high, shape)


def sizes(*values: int) -> Array:
    return np.array(values, np.int64)


def flags(*shape: int) -> Array:
    return random.integers(0, 2, shape).astype(bool)


X, POSITIVE, LONG = floats(4, 3), np.abs(floats(4, 3)) + 0.1, floats(4, 5, 3)
Case = tuple[str, list[Array], list[Array], dict[str, Any]]
"""An operator, its inputs, its weights, which follow the inputs, and its attributes."""

UNARY = (
    *("Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Exp", "Erf", "Sin", "Cos", "Tanh"),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Relu", "LeakyRelu", "ThresholdedRelu", "Elu"),
    *("Celu", "Selu", "Mish", "Softplus", "Softsign", "IsNaN", "Identity", "Dropout", "Softmax"),
    *("LogSoftmax", "LpNormalization", "Flatten", "Transpose", "ReduceSum", "ReduceMean"),
    *("ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    *("ReduceLogSumExp", "Shape", "Size", "ArgMax", "ArgMin"),
)
NOT_ALONE = ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")
"""Reductions that change a single element."""

CASES: list[Case] = [
    *((op, [X], [], {}) for op in UNARY),
    *((op, [POSITIVE], [], {}) for op in ("Reciprocal", "Sqrt", "Log", "ReduceLogSum")),
    *((op, [X, floats(4, 1)], [], {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")),
    *((op, [X, X[::-1].copy(), X], [], {}) for op in ("Sum", "Mean", "Max", "Min")),
    *(
        (op, [X, np.where(flags(4, 3), X, 0).astype(np.float32)], [], {})
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    ),
    *((op, [flags(4, 3), flags(4, 3)], [], {}) for op in ("And", "Or", "Xor")),
    ("Not", [flags(4, 3)], [], {}),
    ("Where", [flags(4, 1), X, floats(4, 3)], [], {}),
    ("Pow", [POSITIVE, X], [], {}),
    ("Pow", [X], [sizes(2)], {}),
    ("Div", [ids(4, 3, low=-9, high=9), ids(4, 3, low=1)], [], {}),
    ("Mod", [ids(4, 3, low=-9, high=9), ids(4, 3, low=1, high=5)], [], {}),
    ("Mod", [X, POSITIVE], [], {"fmod": 1}),
    ("Clip", [X], [np.float32(-0.5), np.float32(0.5)], {}),
    ("PRelu", [X], [floats(3)], {}),
    ("LeakyRelu", [X], [], {"alpha": 0.3}),
    ("Elu", [X], [], {"alpha": 0.3}),
    ("Selu", [X], [], {"alpha": 0.3, "gamma": 2.0}),
    ("HardSigmoid", [X], [], {"alpha": 0.3, "beta": 0.4}),
    ("Gelu", [X], [], {"approximate": "tanh"}),
    ("Gelu", [X], [], {}),
    ("Cast", [X], [], {"to": 7}),
    ("Cast", [ids(4, 3)], [], {"to": 9}),
    ("Cast", [np.array([5 * 10**9, -(3 * 10**9), 7])], [], {"to": 6}),
    ("Cast", [np.array([300, -200, 7])], [], {"to": 3}),
    ("CastLike", [X, ids(4, 3)], [], {}),
    ("Softmax", [LONG], [], {"axis": 1}),
    ("LpNormalization", [LONG], [], {"axis": 1, "p": 1}),
    ("Flatten", [LONG], [], {"axis": 2}),
    ("Flatten", [LONG], [], {"axis": 0}),
    ("Flatten", [LONG], [], {"axis": -1}),
    ("Transpose", [LONG], [], {"perm": [0, 2, 1]}),
    ("Reshape", [LONG], [sizes(0, -1)], {}),
    ("Squeeze", [floats(4, 1, 3)], [sizes(1)], {}),
    ("Unsqueeze", [X], [sizes(-1, 1)], {}),
    ("Expand", [floats(4, 1)], [sizes(2, 1, 3)], {}),
    ("Expand", [X], [sizes(3)], {}),
    ("Tile", [X], [sizes(1, 2)], {}),
    ("Concat", [X, floats(4, 2)], [], {"axis": -1}),
    ("Split", [X], [sizes(1, 2)], {"axis": 1}),
    ("Slice", [LONG], [sizes(1, -2), sizes(2**62, 3), sizes(1, 2)], {}),
    ("Slice", [LONG], [sizes(-1), sizes(-(2**62)), sizes(1), sizes(-2)], {}),
    ("Slice", [LONG], [sizes(0), sizes(5), sizes(1), sizes(2)], {}),
    ("Slice", [LONG], [sizes(3), sizes(0), sizes(1), sizes(-1)], {}),
    ("Slice", [LONG], [sizes(0), sizes(3), sizes(1), sizes(-1)], {}),
    ("Gather", [LONG], [sizes(2, -1)], {"axis": 1}),
    ("Gather", [LONG], [np.int64(-1)], {"axis": 2}),
    ("Gather", [X, ids(4, 2, low=-4)], [], {}),
    ("GatherElements", [X, ids(4, 2, low=-3)], [], {"axis": 1}),
    ("GatherND", [LONG, ids(4, 2)], [], {}),
    ("GatherND", [LONG, ids(4, 2, 1, low=-5)], [], {"batch_dims": 1}),
    ("OneHot", [ids(4, 2, low=-3)], [np.int64(3), np.array([0.5, 2.0], np.float32)], {}),
    ("OneHot", [ids(4, 2)], [np.int64(3), np.array([0, 1])], {"axis": 1}),
    ("Pad", [X], [sizes(0, 1, 0, 2)], {}),
    ("Pad", [X], [sizes(2, 1), np.float32(7), sizes(1)], {}),
    ("Trilu", [LONG], [], {"upper": 0}),
    ("Trilu", [LONG], [np.int64(1)], {}),
    ("MatMul", [LONG, floats(4, 3, 2)], [], {}),
    ("MatMul", [LONG], [floats(3, 2)], {}),
    ("Gemm", [X], [floats(2, 3), floats(2)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [X], [floats(3, 2), floats(1)], {}),
    ("Gemm", [X], [floats(3, 2)], {}),
    ("Gemm", [X, floats(4, 2)], [], {"transA": 1, "alpha": 0.5}),
    ("Einsum", [LONG, floats(4, 3, 2)], [], {"equation": "blf,bfd->bld"}),
    ("ReduceSum", [LONG], [sizes(1, -1)], {"keepdims": 0}),
    ("ReduceMean", [LONG], [sizes(1)], {}),
    ("ReduceProd", [LONG], [sizes(1, 2)], {"keepdims": 0}),
    *((op, [X], [], {"noop_with_empty_axes": 1}) for op in ("ReduceSum", *NOT_ALONE)),
    *((op, [ids(4, 3).astype(np.int32)], [sizes(1)], {}) for op in ("ReduceMean", "ReduceL2")),
    ("ReduceSum", [ids(4, 3)], [sizes(1)], {}),
    ("ArgMax", [ids(4, 5)], [], {"axis": 1, "keepdims": 0, "select_last_index": 1}),
    ("ArgMin", [LONG], [], {"axis": 1}),
    ("TopK", [LONG], [sizes(2)], {"axis": 1}),
    ("TopK", [LONG], [sizes(2)], {"largest": 0}),
    ("TopK", [np.ones((4, 99), np.float32)], [sizes(9)], {}),
    ("CumSum", [LONG], [np.int64(1)], {"exclusive": 1, "reverse": 1}),
    ("CumSum", [np.array([[1, 2, 1e8]], np.float32)], [np.int64(-1)], {"exclusive": 1}),
    (
        "CumSum",
        [np.array([[1e8, 1, 2]], np.float32)],
        [np.int64(1)],
        {"exclusive": 1, "reverse": 1},
    ),
    ("CumSum", [ids(4, 3)], [np.int64(-1)], {}),
    ("LayerNormalization", [LONG], [floats(3), floats(3)], {"epsilon": 0.01}),
    ("LayerNormalization", [LONG], [floats(5, 3)], {"axis": 1}),
    ("LayerNormalization", [LONG], [floats(1, 3), floats(1, 1, 3)], {}),
    ("LpNormalization", [np.zeros((2, 3), np.float32)], [], {}),
    (
        "BatchNormalization",
        [X],
        [floats(3), floats(3), floats(3), np.abs(floats(3))],
        {"epsilon": 0.01},
    ),
    ("Conv", [LONG], [floats(2, 5, 2), floats(2)], {"pads": [1, 0], "strides": [2]}),
    ("Conv", [floats(4, 2, 5, 3)], [floats(4, 1, 2, 2)], {"group": 2, "dilations": [2, 1]}),
    ("GRU", [LONG], [floats(1, 6, 3), floats(1, 6, 2), floats(1, 12)], {"hidden_size": 2}),
    ("LSTM", [LONG], [floats(1, 8, 3), floats(1, 8, 2), floats(1, 16)], {"hidden_size": 2}),
    (
        "LSTM",
        [LONG],
        [floats(2, 8, 3), floats(2, 8, 2)],
        {"hidden_size": 2, "direction": "bidirectional"},
    ),
]
LATER = {"Gelu": 20, "Swish": 24, "RMSNormalization": 23}
"""The opset of the operators that opset 18 does not have."""
NEWER = [("Swish", [X], [], {"alpha": 0.5}), ("RMSNormalization", [LONG], [floats(3)], {})]
OUTPUTS = {"Split": 2, "TopK": 2, "GRU": 2, "LSTM": 3}


def name_of(case: Case) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[3].items())])


@pytest.mark.parametrize("case", [*CASES, *NEWER], ids=name_of)
def test_operator_computes_what_onnx_runtime_computes(tmp_path: Path, case: Case) -> None:
    op, arrays, constants, attributes = case
    if op == "GRU":
        attributes = {**attributes, "linear_before_reset": 1}
    inputs = {f"x{index}": array for index, array in enumerate(arrays)}
    weights = {f"w{index}": array for index, array in enumerate(constants)}
    outputs = [f"y{index}" for index in range(OUTPUTS.get(op, 1))]
    node = helper.make_node(op, [*inputs, *weights], outputs, **attributes)
    model = build_graph([node], inputs, outputs, weights, opset=LATER.get(op, 18))
    require_equal(model, inputs, tmp_path)


@pytest.mark.parametrize(
    ("op", "array"),
    [
        ("ReduceL2", np.zeros((2, 3), np.float32)),
        ("LpNormalization", np.zeros((2, 3), np.float32)),
        ("Selu", np.full((2, 3), 100, np.float32)),
    ],
)
def test_gradients_are_finite_where_a_formula_divides_by_zero_or_overflows(
    op: str, array: Array
) -> None:
    network = build_network(build_graph([helper.make_node(op, ["x"], ["y"])], {"x": array}))
    x = torch.from_numpy(array).requires_grad_()
    network({"x": x}).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("GRU", "x w r", {}),
        ("GRU", "x w r  lengths", {"linear_before_reset": 1}),
        ("LSTM", "x w4 r4     p", {}),
    ],
    ids=["gates", "lengths", "peepholes"],
)
def test_form_that_torch_does_not_have_is_refused_with_the_node(
    op: str, inputs: str, attributes: dict[str, Any]
) -> None:
    weights = {"w": floats(1, 6, 3), "r": floats(1, 6, 2), "p": floats(1, 6)}
    weights |= {"w4": floats(1, 8, 3), "r4": floats(1, 8, 2), "lengths": np.full(5, 4, np.int32)}
    node = helper.make_node(op, inputs.split(" "), ["", "state"], hidden_size=2, **attributes)
    network = build_network(build_graph([node], {"x": LONG}, ["state"], weights))
    with raises_code(OnnxRefused, "form_unknown", node="value"):
        network_outputs(network, {"x": LONG})


@pytest.mark.parametrize(
    ("op", "inputs", "output"),
    [("LayerNormalization", "x scale", 1), ("Dropout", "x ratio is_training", 0)],
)
def test_output_that_only_training_has_is_refused_with_the_node(
    op: str, inputs: str, output: int
) -> None:
    weights = {"scale": floats(3), "ratio": np.float32(0.5), "is_training": np.array(True)}
    node = helper.make_node(op, inputs.split(), ["a", "b"], name="training")
    model = build_graph([node], {"x": X}, [node.output[output]], weights)
    with raises_code(OnnxRefused, "form_unknown", node="training"):
        build_network(model)


def test_every_operator_of_the_list_has_a_case() -> None:
    tested = {case[0] for case in (*CASES, *NEWER)}
    # Graphs with these are in test_onnx_shapes.py, since they compute nothing from an input alone.
    assert OPERATORS.keys() - tested == {"ConstantOfShape", "Range"}
