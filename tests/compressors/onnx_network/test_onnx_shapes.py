"""Shapes that a graph computes from the shapes of its inputs, with a dynamic number of rows."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from error_codes import raises_code
from onnx import TensorProto, helper
from onnx_graphs import Array, build_model, build_network, require_same_outputs

from compressors.errors.onnx_graphs import OnnxRefused

X = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32)


def int64(*values: int) -> Array:
    return np.array(values, np.int64)


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    """Return a node; spaces separate the names of its inputs."""
    return helper.make_node(op, inputs.split(), [output], **attributes)


def integer(value: int) -> onnx.TensorProto:
    """Return the value of a ``ConstantOfShape`` node."""
    return helper.make_tensor("", TensorProto.INT64, [1], [value])


# Initializers of all graphs, by name.
SCALARS = {"zero": np.int64(0), "one": np.int64(1), "two": np.int64(2)}
VECTORS = {"v0": int64(0), "v1": int64(1), "v2": int64(2), "all": int64(-1), "six": int64(6)}
VECTORS |= {
    "all32": np.array([-1], np.int32),
    "last_two": int64(-2, -1),
    "end": int64(2**62),
    "reversed_end": int64(-(2**62)),
    "pairs": int64(-1, 2),
    "square": int64(2, 2),
    "zero_all": int64(0, -1),
    "split": int64(1, 2),
    "off_on": int64(0, 1),
    "six0": np.array(6),
}
SHAPE = node("Shape", "x", "shape")
DYNAMIC_GRAPHS: dict[str, list[onnx.NodeProto]] = {
    "reshape_exported_by_torchscript": [
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
    "reshape_exported_by_tf2onnx": [
        SHAPE,
        node("Cast", "shape", "shape32", to=TensorProto.INT32),
        node("Slice", "shape32 v0 v1 v0", "rows"),
        node("Concat", "rows all32", "target32", axis=0),
        node("Cast", "target32", "target", to=TensorProto.INT64),
        node("Reshape", "x target", "y"),
    ],
    "expand_to_size_selected_by_where": [
        SHAPE,
        node("Slice", "shape v0 v1", "rows"),
        node("Concat", "all v1 all", "requested", axis=0),
        node("Shape", "requested", "count"),
        node("ConstantOfShape", "count", "ones", value=integer(1)),
        node("Equal", "requested all", "is_any"),
        node("Where", "is_any ones requested", "target"),
        node("Expand", "x target", "y"),
    ],
    "zeros_per_row": [
        SHAPE,
        node("Slice", "shape v0 v1", "rows"),
        node("Concat", "rows v2", "target", axis=0),
        node("ConstantOfShape", "target", "zeros"),
        node("Flatten", "x", "flat"),
        node("Concat", "zeros flat", "y", axis=1),
    ],
    "positions_in_a_sequence": [
        SHAPE,
        node("Gather", "shape one", "length"),
        node("Range", "zero length one", "positions"),
        node("Cast", "positions", "numbers", to=TensorProto.FLOAT),
        node("Unsqueeze", "numbers v1", "column"),
        node("Add", "x column", "y"),
    ],
    "size_cast_to_float": [
        SHAPE,
        node("Gather", "shape one", "length"),
        node("Cast", "length", "number", to=TensorProto.FLOAT),
        node("Div", "x number", "y"),
    ],
    "integers_per_row": [
        SHAPE,
        node("Slice", "shape v0 v1", "rows"),
        node("ConstantOfShape", "rows", "ones", value=integer(2)),
        node("Unsqueeze", "ones last_two", "column"),
        node("Cast", "column", "numbers", to=TensorProto.FLOAT),
        node("Mul", "x numbers", "y"),
    ],
    "pads_exported_by_torchscript": [
        SHAPE,
        node("Slice", "shape v2 end", "dim"),
        node("Concat", "dim v1 v0 v2 v0 v0", "from_last", axis=0),
        node("Reshape", "from_last pairs", "by_axis"),
        node("Slice", "by_axis all reversed_end v0 all", "reversed"),
        node("Transpose", "reversed", "by_side", perm=[1, 0]),
        node("Reshape", "by_side all", "pads"),
        node("Pad", "x pads", "y"),
    ],
}
"""Graphs with a dynamic number of rows whose outputs are floats."""

STATIC_GRAPHS: dict[str, list[onnx.NodeProto]] = {
    "arithmetic_on_sizes": [
        node("Size", "x", "count"),
        SHAPE,
        node("ReduceProd", "shape", "product", keepdims=0),
        node("Sub", "product count", "nothing"),
        node("Add", "nothing two", "some"),
        node("Div", "some two", "half"),
        node("Mod", "half two", "remainder"),
        node("Neg", "remainder", "negative"),
        node("Min", "negative one", "least"),
        node("Max", "least negative", "most"),
        node("Reshape", "most v1", "most1"),
        node("Squeeze", "most1 v0", "most0"),
        node("Identity", "most0", "same"),
        node("Unsqueeze", "same v0", "same1"),
        node("Concat", "v2 same1 six", "target", axis=0),
        node("Reshape", "wide target", "y"),
    ],
    "flatten_up_to_the_last_dimension": [
        SHAPE,
        node("Max", "shape v1", "same"),  # a size that simplification cannot compute
        node("Reshape", "x same", "again"),
        node("Flatten", "again", "y", axis=-1),
    ],
    "empty_range": [
        SHAPE,
        node("Gather", "shape one", "length"),
        node("Range", "length two one", "nothing"),
        node("Concat", "nothing v1", "y", axis=0),
    ],
    "matrix_of_sizes": [
        SHAPE,
        node("Concat", "shape six", "four", axis=0),
        node("Reshape", "four square", "matrix"),
        node("Slice", "matrix v1 v2 v1", "second"),
        node("Squeeze", "second v1", "values"),
        node("ReduceProd", "matrix v1", "products", keepdims=0),
        node("Unsqueeze", "products v1", "column"),
        node("Reshape", "column zero_all", "again"),
        node("Concat", "matrix again", "wide", axis=1),
        node("OneHot", "values six0 off_on", "classes", axis=0),
        node("Transpose", "wide", "tall", perm=[1, 0]),
        node("Concat", "classes tall", "y", axis=0),
    ],
    "other_operators_on_sizes": [
        SHAPE,
        node("Slice", "shape v2 end", "dim"),
        node("Sub", "dim six", "negative"),
        node("Div", "negative v2", "quotient"),
        node("Mod", "negative v2", "modulo", fmod=0),
        node("Mod", "negative v2", "remainder", fmod=1),
        node("Abs", "negative", "distance"),
        node("ReduceSum", "shape", "sum"),
        node("ReduceMax", "shape", "largest"),
        node("ReduceMin", "shape", "smallest"),
        helper.make_node("Split", ["shape", "split"], ["first", "others"]),
        node("Tile", "others v2", "twice"),
        node("Expand", "dim v2", "expanded"),
        node("Less", "shape six", "is_less"),
        node("Where", "is_less shape all", "chosen"),
        node(
            "Concat",
            "quotient modulo remainder distance sum largest smallest first twice expanded chosen",
            "y",
            axis=0,
        ),
    ],
}
"""Graphs of operators on sizes. They are valid for the four rows of ``X`` only."""


@pytest.mark.parametrize("name", [*DYNAMIC_GRAPHS, *STATIC_GRAPHS])
def test_graph_that_computes_a_shape_has_the_outputs_of_onnx_runtime(
    tmp_path: Path, name: str
) -> None:
    inputs = {"x": X}
    if name == "arithmetic_on_sizes":
        inputs["wide"] = np.concatenate([X[:, :, 0], X[:, :1, 1]], axis=1)  # (4, 6): 24 values
    require_same_outputs(build_case(name, inputs), inputs, tmp_path)


def build_case(name: str, inputs: dict[str, Array]) -> onnx.ModelProto:
    nodes = {**DYNAMIC_GRAPHS, **STATIC_GRAPHS}[name]
    return build_model(nodes, inputs, weights={**SCALARS, **VECTORS})


@pytest.mark.parametrize("name", DYNAMIC_GRAPHS)
def test_graph_that_computes_a_shape_is_traced_with_dynamic_rows(name: str) -> None:
    network = build_network(build_case(name, {"x": X}))
    rows = torch.export.Dim("rows", min=1, max=1024)
    inputs = {"x": torch.from_numpy(X)}
    program = torch.export.export(network, (inputs,), dynamic_shapes=({"x": {0: rows}},))
    other = {"x": torch.randn(7, 5, 3)}
    assert torch.equal(program.module()(other), network(other))


def test_shape_that_depends_on_values_is_refused_with_the_operator() -> None:
    nodes = [
        node("ReduceMax", "count", "longest", keepdims=0),
        node("Range", "zero longest one", "y"),
    ]
    inputs = {"count": np.arange(1, 5)}
    network = build_network(build_model(nodes, inputs, weights=SCALARS))
    with raises_code(OnnxRefused, "shape_from_values", op="Range"):
        network({"count": torch.arange(1, 5)})
