"""Shapes that a graph computes from the shapes of its inputs, for any number of rows.

Each graph has the input ``x``, float32 ``(rows, length, dim)``, and the output ``y``. Its nodes may
read the constants ``SCALARS`` and ``VECTORS``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from error_codes import raises_code
from onnx import TensorProto, helper
from onnx_graphs import Array, build_graph, build_network, require_equal

from compressors.errors.onnx_graphs import OnnxRefused

X = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)


def int64(*values: int) -> Array:
    return np.array(values, np.int64)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    """Return a node; the names of its inputs are separated by spaces."""
    return helper.make_node(op, inputs.split(), [output], **attributes)


SCALARS = {"zero": np.int64(0), "one": np.int64(1), "two": np.int64(2)}
VECTORS = {"v0": int64(0), "v1": int64(1), "v2": int64(2), "all": int64(-1), "six": int64(6)}
VECTORS["all32"] = np.array([-1], np.int32)
SHAPE = node("Shape", "x", "shape")
ONE = helper.make_tensor("", TensorProto.INT64, [1], [1])
GRAPHS: dict[str, list[onnx.NodeProto]] = {
    "reshape_as_torchscript_writes_it": [
        SHAPE,
        node("Gather", "shape zero", "rows", axis=0),
        node("Gather", "shape one", "length"),
        node("Gather", "shape two", "dim"),
        node("Mul", "length dim", "width"),
        node("Unsqueeze", "rows v0", "rows1"),
        node("Unsqueeze", "width v0", "width1"),
        node("Concat", "rows1 width1", "target", axis=0),
        node("Reshape", "x target", "y"),
    ],
    "reshape_as_tf2onnx_writes_it": [
        SHAPE,
        node("Cast", "shape", "shape32", to=TensorProto.INT32),
        node("Slice", "shape32 v0 v1 v0", "rows"),
        node("Concat", "rows all32", "target32", axis=0),
        node("Cast", "target32", "target", to=TensorProto.INT64),
        node("Reshape", "x target", "y"),
    ],
    "expand_to_where_of_a_size": [
        SHAPE,
        node("Slice", "shape v0 v1", "rows"),
        node("Concat", "all v1 all", "wanted", axis=0),
        node("Shape", "wanted", "count"),
        node("ConstantOfShape", "count", "ones", value=ONE),
        node("Equal", "wanted all", "is_any"),
        node("Where", "is_any ones wanted", "target"),
        node("Expand", "x target", "y"),
    ],
    "zeros_of_the_rows": [
        SHAPE,
        node("Slice", "shape v0 v1", "rows"),
        node("Concat", "rows v2", "target", axis=0),
        node("ConstantOfShape", "target", "zeros"),
        node("Flatten", "x", "flat"),
        node("Concat", "zeros flat", "y", axis=1),
    ],
    "positions_of_a_list": [
        SHAPE,
        node("Gather", "shape one", "length"),
        node("Range", "zero length one", "positions"),
        node("Cast", "positions", "numbers", to=TensorProto.FLOAT),
        node("Unsqueeze", "numbers v1", "column"),
        node("Add", "x column", "y"),
    ],
    "size_as_a_number": [
        SHAPE,
        node("Gather", "shape one", "length"),
        node("Cast", "length", "number", to=TensorProto.FLOAT),
        node("Div", "x number", "y"),
    ],
    "arithmetic_of_sizes": [
        node("Size", "x", "count"),
        SHAPE,
        node("ReduceProd", "shape", "product", keepdims=0),
        node("Sub", "product count", "nothing"),
        node("Add", "nothing two", "some"),
        node("Div", "some two", "half"),
        node("Mod", "half two", "rest"),
        node("Neg", "rest", "negative"),
        node("Min", "negative one", "least"),
        node("Max", "least negative", "most"),
        node("Reshape", "most v1", "most1"),
        node("Squeeze", "most1 v0", "most0"),
        node("Identity", "most0", "same"),
        node("Unsqueeze", "same v0", "same1"),
        node("Concat", "v2 same1 six", "target", axis=0),
        node("Reshape", "wide target", "y"),
    ],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_computed_shape_is_that_of_onnx_runtime(tmp_path: Path, name: str) -> None:
    inputs = {"x": X}
    if name == "arithmetic_of_sizes":  # its output is ``wide`` with another shape
        inputs["wide"] = np.concatenate([X[:, :, 0], X[:, :1, 1]], axis=1)  # (4, 6): 24 values
    require_equal(build_model(name, inputs), inputs, tmp_path)


def build_model(name: str, inputs: dict[str, Array]) -> onnx.ModelProto:
    return build_graph(GRAPHS[name], inputs, weights={**SCALARS, **VECTORS})


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "arithmetic_of_sizes"])
def test_graph_that_computes_a_shape_can_be_traced_for_any_number_of_rows(name: str) -> None:
    network = build_network(build_model(name, {"x": X}))
    rows = torch.export.Dim("rows", min=1, max=1024)
    inputs = {"x": torch.from_numpy(X)}
    program = torch.export.export(network, (inputs,), dynamic_shapes=({"x": {0: rows}},))
    other = {"x": torch.randn(7, 5, 3)}
    assert torch.equal(program.module()(other), network(other))


def test_shape_that_depends_on_values_is_refused_with_the_node() -> None:
    nodes = [
        node("ReduceMax", "count", "longest", keepdims=0),
        node("Range", "zero longest one", "y"),
    ]
    inputs = {"count": np.arange(1, 5)}
    network = build_network(build_graph(nodes, inputs, weights=SCALARS))
    with raises_code(OnnxRefused, "shape_from_values", op="Range"):
        network({"count": torch.arange(1, 5)})
