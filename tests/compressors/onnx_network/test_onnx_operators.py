"""Each supported ONNX operator has the outputs of ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from error_codes import raises_code
from onnx import TensorProto, helper
from onnx_graphs import Array, build_model, build_network, network_outputs, require_same_outputs

from compressors.errors.onnx_graphs import OnnxRefused
from compressors.onnx_network.operators.registry import OPERATORS

random = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return random.normal(size=shape).astype(np.float32)


def ids(*shape: int, low: int = 0, high: int = 3) -> Array:
    return random.integers(low, high, shape)


def sizes(*values: int) -> Array:
    return np.array(values, np.int64)


def booleans(*shape: int) -> Array:
    return random.integers(0, 2, shape).astype(bool)


X, POSITIVE, SEQUENCES = floats(4, 3), np.abs(floats(4, 3)) + 0.1, floats(4, 5, 3)
Case = tuple[str, list[Array], list[Array], dict[str, Any]]
"""An operator, its inputs from the network's inputs, its further inputs from initializers, and its
attributes."""

UNARY = (
    *("Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Exp", "Erf", "Sin", "Cos", "Tanh"),
    *("Sigmoid", "HardSigmoid", "HardSwish", "Relu", "LeakyRelu", "ThresholdedRelu", "Elu"),
    *("Celu", "Selu", "Mish", "Softplus", "Softsign", "IsNaN", "Identity", "Dropout", "Softmax"),
    *("LogSoftmax", "LpNormalization", "Flatten", "Transpose", "ReduceSum", "ReduceMean"),
    *("ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
    *("ReduceLogSumExp", "Shape", "Size", "ArgMax", "ArgMin"),
)
NOT_IDENTITY = ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")
"""Reductions of which the result for one element is not the element."""

CASES: list[Case] = [
    *((op, [X], [], {}) for op in UNARY),
    *((op, [POSITIVE], [], {}) for op in ("Reciprocal", "Sqrt", "Log", "ReduceLogSum")),
    *((op, [X, floats(4, 1)], [], {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum")),
    *((op, [X, X[::-1].copy(), X], [], {}) for op in ("Sum", "Mean", "Max", "Min")),
    *(
        (op, [X, np.where(booleans(4, 3), X, 0).astype(np.float32)], [], {})
        for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    ),
    *((op, [booleans(4, 3), booleans(4, 3)], [], {}) for op in ("And", "Or", "Xor")),
    ("Not", [booleans(4, 3)], [], {}),
    ("Where", [booleans(4, 1), X, floats(4, 3)], [], {}),
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
    ("Cast", [X], [], {"to": TensorProto.INT64}),
    ("Cast", [ids(4, 3)], [], {"to": TensorProto.BOOL}),
    ("Cast", [np.array([5 * 10**9, -(3 * 10**9), 7])], [], {"to": TensorProto.INT32}),
    ("Cast", [np.array([300, -200, 7])], [], {"to": TensorProto.INT8}),
    ("CastLike", [X, ids(4, 3)], [], {}),
    ("Softmax", [SEQUENCES], [], {"axis": 1}),
    ("LpNormalization", [SEQUENCES], [], {"axis": 1, "p": 1}),
    ("Flatten", [SEQUENCES], [], {"axis": 2}),
    ("Flatten", [SEQUENCES], [], {"axis": 0}),
    ("Flatten", [SEQUENCES], [], {"axis": -1}),
    ("Transpose", [SEQUENCES], [], {"perm": [0, 2, 1]}),
    ("Reshape", [SEQUENCES], [sizes(0, -1)], {}),
    ("Squeeze", [floats(4, 1, 3)], [sizes(1)], {}),
    ("Unsqueeze", [X], [sizes(-1, 1)], {}),
    ("Expand", [floats(4, 1)], [sizes(2, 1, 3)], {}),
    ("Expand", [X], [sizes(3)], {}),
    ("Tile", [X], [sizes(1, 2)], {}),
    ("Concat", [X, floats(4, 2)], [], {"axis": -1}),
    ("Split", [X], [sizes(1, 2)], {"axis": 1}),
    ("Slice", [SEQUENCES], [sizes(1, -2), sizes(2**62, 3), sizes(1, 2)], {}),
    ("Slice", [SEQUENCES], [sizes(-1), sizes(-(2**62)), sizes(1), sizes(-2)], {}),
    ("Slice", [SEQUENCES], [sizes(0), sizes(5), sizes(1), sizes(2)], {}),
    ("Slice", [SEQUENCES], [sizes(3), sizes(0), sizes(1), sizes(-1)], {}),
    ("Slice", [SEQUENCES], [sizes(0), sizes(3), sizes(1), sizes(-1)], {}),
    ("Gather", [SEQUENCES], [sizes(2, -1)], {"axis": 1}),
    ("Gather", [SEQUENCES], [np.int64(-1)], {"axis": 2}),
    ("Gather", [X, ids(4, 2, low=-4)], [], {}),
    ("GatherElements", [X, ids(4, 2, low=-3)], [], {"axis": 1}),
    ("GatherND", [SEQUENCES, ids(4, 2)], [], {}),
    ("GatherND", [SEQUENCES, ids(4, 2, 1, low=-5)], [], {"batch_dims": 1}),
    ("OneHot", [ids(4, 2, low=-3)], [np.int64(3), np.array([0.5, 2.0], np.float32)], {}),
    ("OneHot", [ids(4, 2)], [np.int64(3), np.array([0, 1])], {"axis": 1}),
    ("Pad", [X], [sizes(0, 1, 0, 2)], {}),
    ("Pad", [X], [sizes(2, 1), np.float32(7), sizes(1)], {}),
    ("Trilu", [SEQUENCES], [], {"upper": 0}),
    ("Trilu", [SEQUENCES], [np.int64(1)], {}),
    ("MatMul", [SEQUENCES, floats(4, 3, 2)], [], {}),
    ("MatMul", [SEQUENCES], [floats(3, 2)], {}),
    ("Gemm", [X], [floats(2, 3), floats(2)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [X], [floats(3, 2), floats(1)], {}),
    ("Gemm", [X], [floats(3, 2)], {}),
    ("Gemm", [X, floats(4, 2)], [], {"transA": 1, "alpha": 0.5}),
    ("Einsum", [SEQUENCES, floats(4, 3, 2)], [], {"equation": "blf,bfd->bld"}),
    ("ReduceSum", [SEQUENCES], [sizes(1, -1)], {"keepdims": 0}),
    ("ReduceMean", [SEQUENCES], [sizes(1)], {}),
    ("ReduceProd", [SEQUENCES], [sizes(1, 2)], {"keepdims": 0}),
    *((op, [X], [], {"noop_with_empty_axes": 1}) for op in ("ReduceSum", *NOT_IDENTITY)),
    *((op, [ids(4, 3).astype(np.int32)], [sizes(1)], {}) for op in ("ReduceMean", "ReduceL2")),
    ("ReduceSum", [ids(4, 3)], [sizes(1)], {}),
    ("ArgMax", [ids(4, 5)], [], {"axis": 1, "keepdims": 0, "select_last_index": 1}),
    ("ArgMin", [SEQUENCES], [], {"axis": 1}),
    ("TopK", [SEQUENCES], [sizes(2)], {"axis": 1}),
    ("TopK", [SEQUENCES], [sizes(2)], {"largest": 0}),
    ("TopK", [np.ones((4, 99), np.float32)], [sizes(9)], {}),
    ("CumSum", [SEQUENCES], [np.int64(1)], {"exclusive": 1, "reverse": 1}),
    ("CumSum", [np.array([[1, 2, 1e8]], np.float32)], [np.int64(-1)], {"exclusive": 1}),
    (
        "CumSum",
        [np.array([[1e8, 1, 2]], np.float32)],
        [np.int64(1)],
        {"exclusive": 1, "reverse": 1},
    ),
    ("CumSum", [ids(4, 3)], [np.int64(-1)], {}),
    ("LayerNormalization", [SEQUENCES], [floats(3), floats(3)], {"epsilon": 0.01}),
    ("LayerNormalization", [SEQUENCES], [floats(5, 3)], {"axis": 1}),
    ("LayerNormalization", [SEQUENCES], [floats(1, 3), floats(1, 1, 3)], {}),
    ("LpNormalization", [np.zeros((2, 3), np.float32)], [], {}),
    (
        "BatchNormalization",
        [X],
        [floats(3), floats(3), floats(3), np.abs(floats(3))],
        {"epsilon": 0.01},
    ),
    ("Conv", [SEQUENCES], [floats(2, 5, 2), floats(2)], {"pads": [1, 0], "strides": [2]}),
    ("Conv", [floats(4, 2, 5, 3)], [floats(4, 1, 2, 2)], {"group": 2, "dilations": [2, 1]}),
    ("GRU", [SEQUENCES], [floats(1, 6, 3), floats(1, 6, 2), floats(1, 12)], {"hidden_size": 2}),
    ("LSTM", [SEQUENCES], [floats(1, 8, 3), floats(1, 8, 2), floats(1, 16)], {"hidden_size": 2}),
    (
        "LSTM",
        [SEQUENCES],
        [floats(2, 8, 3), floats(2, 8, 2)],
        {"hidden_size": 2, "direction": "bidirectional"},
    ),
]
OPSETS = {"Gelu": 20, "Swish": 24, "RMSNormalization": 23}
"""The first opset of operators that opset 18 does not have."""
NEWER_CASES = [
    ("Swish", [X], [], {"alpha": 0.5}),
    ("RMSNormalization", [SEQUENCES], [floats(3)], {}),
]
OUTPUT_COUNTS = {"Split": 2, "TopK": 2, "GRU": 2, "LSTM": 3}


def case_id(case: Case) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[3].items())])


@pytest.mark.parametrize("case", [*CASES, *NEWER_CASES], ids=case_id)
def test_operator_has_the_outputs_of_onnx_runtime(tmp_path: Path, case: Case) -> None:
    op, arrays, constants, attributes = case
    if op == "GRU":  # the only form that torch has
        attributes = {**attributes, "linear_before_reset": 1}
    inputs = {f"x{index}": array for index, array in enumerate(arrays)}
    weights = {f"w{index}": array for index, array in enumerate(constants)}
    outputs = [f"y{index}" for index in range(OUTPUT_COUNTS.get(op, 1))]
    node = helper.make_node(op, [*inputs, *weights], outputs, **attributes)
    model = build_model([node], inputs, outputs, weights, opset=OPSETS.get(op, 18))
    require_same_outputs(model, inputs, tmp_path)


@pytest.mark.parametrize(
    ("op", "array"),
    [
        ("ReduceL2", np.zeros((2, 3), np.float32)),
        ("LpNormalization", np.zeros((2, 3), np.float32)),
        ("Selu", np.full((2, 3), 100, np.float32)),
    ],
)
def test_gradients_are_finite_where_the_formula_divides_by_zero_or_overflows(
    op: str, array: Array
) -> None:
    network = build_network(build_model([helper.make_node(op, ["x"], ["y"])], {"x": array}))
    x = torch.from_numpy(array).requires_grad_()
    network({"x": x}).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    # Inputs are separated by spaces; an empty name omits an optional input, such as the bias.
    [
        ("GRU", "x w r", {}),
        ("GRU", "x w r  lengths", {"linear_before_reset": 1}),
        ("LSTM", "x w4 r4     p", {}),
    ],
    ids=["reset_before_linear", "lengths", "peepholes"],
)
def test_recurrent_operator_that_torch_does_not_support_is_refused(
    op: str, inputs: str, attributes: dict[str, Any]
) -> None:
    weights = {"w": floats(1, 6, 3), "r": floats(1, 6, 2), "p": floats(1, 6)}
    weights |= {"w4": floats(1, 8, 3), "r4": floats(1, 8, 2), "lengths": np.full(5, 4, np.int32)}
    node = helper.make_node(op, inputs.split(" "), ["", "state"], hidden_size=2, **attributes)
    network = build_network(build_model([node], {"x": SEQUENCES}, ["state"], weights))
    # A node without a name gets the name ``value``.
    with raises_code(OnnxRefused, "form_unknown", node="value"):
        network_outputs(network, {"x": SEQUENCES})


@pytest.mark.parametrize(
    ("op", "inputs", "output"),  # index of the node's output that is the output of the graph
    [("LayerNormalization", "x scale", 1), ("Dropout", "x ratio is_training", 0)],
)
def test_training_output_or_training_mode_is_refused(op: str, inputs: str, output: int) -> None:
    weights = {"scale": floats(3), "ratio": np.float32(0.5), "is_training": np.array(True)}
    node = helper.make_node(op, inputs.split(), ["a", "b"], name="training")
    model = build_model([node], {"x": X}, [node.output[output]], weights)
    with raises_code(OnnxRefused, "form_unknown", node="training"):
        build_network(model)


def test_every_supported_operator_has_a_case() -> None:
    tested = {case[0] for case in (*CASES, *NEWER_CASES)}
    # test_onnx_shapes.py tests these operators, which have no tensor as input.
    assert OPERATORS.keys() - tested == {"ConstantOfShape", "Range"}
