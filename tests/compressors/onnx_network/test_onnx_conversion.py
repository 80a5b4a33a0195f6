"""Graphs become networks with tables and layers, whose names are those of the trained model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from error_codes import raises_code
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import Array, build_graph, build_network, require_equal
from torch import nn

from compressors.contracts import ONNX_NETWORK
from compressors.errors.onnx_graphs import OnnxRefused
from compressors.onnx_network.conversion import build, convert
from compressors.onnx_network.network import OnnxNetwork

random = np.random.default_rng(0)
IDS = np.array([0, 2, 1])


def floats(*shape: int) -> Array:
    return random.normal(size=shape).astype(np.float32)


def node(op: str, inputs: str, output: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=name or None, **attributes)


def units(network: nn.Module) -> dict[str, str]:
    """Return the kind of each table and layer by name."""
    return {name: type(module).__name__ for name, module in network.named_children()}


def test_stored_path_of_the_class_is_the_path_of_the_class() -> None:
    assert f"{OnnxNetwork.__module__}:{OnnxNetwork.__name__}" == ONNX_NETWORK


def test_lookup_and_product_with_a_bias_are_a_table_and_a_layer(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "user.weight user", "rows"),
        node("MatMul", "rows mlp.0.weight", "product"),
        node("Add", "mlp.0.bias product", "hidden"),
        node("Gemm", "hidden out.weight out.bias", "y", transB=1),
    ]
    weights = {
        "user.weight": floats(3, 4),
        "mlp.0.weight": floats(4, 2),
        "mlp.0.bias": floats(2),
        "out.weight": floats(1, 2),
        "out.bias": floats(1),
    }
    model = build_graph(nodes, {"user": IDS}, weights=weights)
    network = build_network(model)
    assert units(network) == {"user": "Embedding", "mlp_0": "Linear", "out": "Linear"}
    assert [name for name, _ in network.named_parameters()] == [
        *("user.weight", "mlp_0.weight", "mlp_0.bias", "out.weight", "out.bias")
    ]
    require_equal(model, {"user": IDS}, tmp_path)


def test_layers_that_share_their_weights_are_one_module() -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Add", "a b", "c"),
        node("MatMul", "c w", "d"),
        node("Add", "d b", "y"),
    ]
    network = build_network(
        build_graph(nodes, {"x": floats(3, 2)}, weights={"w": floats(2, 2), "b": floats(2)})
    )
    assert units(network) == {"w": "Linear"}


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Gather", "w x", "a"), node("Transpose", "w", "t"), node("MatMul", "a t", "y")],
        [node("Gather", "w x", "a", axis=1), node("Relu", "a", "y")],
        [node("Gather", "w x", "a"), node("MatMul", "a w", "y")],
    ],
    ids=["scores_of_all_rows", "lookup_of_columns", "table_and_layer"],
)
def test_weight_that_a_compressed_module_does_not_have_stays_a_parameter(
    tmp_path: Path, nodes: list[onnx.NodeProto]
) -> None:
    model = build_graph(nodes, {"x": IDS}, weights={"w": floats(3, 3)})
    network = build_network(model)
    assert "Embedding" not in units(network).values()
    require_equal(model, {"x": IDS}, tmp_path)


def test_trained_floats_are_parameters_and_constants_are_buffers() -> None:
    nodes = [
        helper.make_node("Constant", [], ["half"], value_floats=[0.25, 0.5]),
        node("Mul", "x scale", "a"),
        node("Mul", "a half", "b"),
        node("Add", "b mask", "c"),
        node("Mul", "c temperature", "y"),
    ]
    weights = {
        "scale": floats(2),
        "mask": np.array([0, -np.inf], np.float32),
        "temperature": np.float32(3),
    }
    network = build_network(build_graph(nodes, {"x": floats(3, 2)}, weights=weights))
    assert [name for name, _ in network.named_parameters()] == ["scale"]
    assert {name for name, _ in network.named_buffers()} >= {"mask", "temperature"}


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Unsqueeze", "w axis", "a"), node("Add", "x a", "y")],
        [node("Reshape", "w back", "a"), node("Relu", "a", "b"), node("MatMul", "x b", "y")],
        [node("Gather", "w ids", "a"), node("ReduceSum", "a", "b"), node("Add", "x b", "y")],
        [node("Shape", "x", "s"), node("Reshape", "w s", "a"), node("Add", "x a", "y")],
        [node("Mul", "w w", "a"), node("ReduceSum", "w", "s"), node("Gemm", "x a s", "y")],
    ],
    ids=["unsqueeze", "reshape", "constant_rows", "dynamic_reshape", "two_readers"],
)
def test_trained_weight_of_which_nodes_compute_another_stays_a_parameter_of_its_name(
    tmp_path: Path, nodes: list[onnx.NodeProto]
) -> None:
    weights = {"w": floats(3, 3), "axis": np.array([0]), "back": np.array([3, -1])}
    inputs = {"x": floats(3, 3)}
    model = build_graph(nodes, inputs, weights={**weights, "ids": np.array([2, 2, 0])})
    network = build_network(model)
    assert [name.removesuffix(".weight") for name, _ in network.named_parameters()] == ["w"]
    require_equal(model, inputs, tmp_path)


def test_weights_that_are_equal_when_they_are_read_are_trained_apart() -> None:
    nodes = [node("Mul", "x first", "a"), node("Relu", "a", "b"), node("Mul", "b second", "y")]
    ones = np.ones(2, np.float32)
    model = build_graph(nodes, {"x": floats(3, 2)}, weights={"first": ones, "second": ones})
    assert {name for name, _ in build_network(model).named_parameters()} == {"first", "second"}


def test_statistics_of_a_norm_are_buffers_and_gradients_pass_it() -> None:
    nodes = [node("Relu", "x", "a"), node("BatchNormalization", "a scale bias mean var", "y")]
    weights = {name: np.abs(floats(2)) for name in ("scale", "bias", "mean", "var")}
    converted = convert(ir.from_proto(build_graph(nodes, {"x": floats(3, 2)}, weights=weights)))
    network = build(converted)
    assert {name for name, _ in network.named_parameters()} == {"scale", "bias"}
    network({"x": torch.ones(3, 2)}).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    # Bundles of earlier versions have the statistics as parameters.
    config = converted.config
    parameters = {**config["parameters"], **config["buffers"]}
    earlier = OnnxNetwork(**{**config, "parameters": parameters, "buffers": {}})
    earlier.load_state_dict(converted.weights)
    earlier({"x": torch.ones(3, 2)}).sum().backward()


def test_weights_of_a_convolution_and_the_norm_after_it_are_trained_as_one() -> None:
    nodes = [node("Conv", "x w", "a"), node("BatchNormalization", "a scale bias mean var", "y")]
    weights = {name: np.abs(floats(2)) for name in ("scale", "bias", "mean", "var")}
    model = build_graph(nodes, {"x": floats(3, 4, 5)}, weights={**weights, "w": floats(2, 4, 3)})
    network = build_network(model)
    assert [item.op for item in network.nodes] == ["Conv"]
    assert [parameter.shape for parameter in network.parameters()] == [(2, 4, 3), (2,)]


def test_initializer_that_is_also_an_input_is_a_weight() -> None:
    nodes = [node("Transpose", "w", "t"), node("MatMul", "x t", "y")]
    model = build_graph(nodes, {"x": floats(3, 2)}, weights={"w": floats(4, 2)})
    declared = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2])
    model.graph.input.append(declared)
    assert units(build_network(model)) == {"w": "Linear"}


def test_names_of_a_weight_with_a_suffix_do_not_collide() -> None:
    nodes = [
        node("Transpose", "w", "t"),
        node("MatMul", "x t", "a"),
        node("Add", "a w.original", "y"),
    ]
    weights = {"w": floats(2, 2), "w.original": floats(3, 2)}
    names = {
        name
        for name, _ in build_network(
            build_graph(nodes, {"x": floats(3, 2)}, weights=weights)
        ).named_parameters()
    }
    assert names == {"w.weight", "w_original"}


def test_opset_of_the_domain_ai_onnx_is_the_opset_of_the_graph() -> None:
    model = build_graph([node("Relu", "x", "y")], {"x": floats(3, 2)})
    model.opset_import[0].domain = "ai.onnx"
    assert [item.op for item in build_network(model).nodes] == ["Relu"]


def test_constant_that_would_be_large_is_not_computed_before_it_is_read() -> None:
    nodes = [node("Expand", "one shape", "a"), node("Add", "x a", "y")]
    weights = {"one": np.float32(1), "shape": np.array([10**6, 10**6])}
    network = build_network(build_graph(nodes, {"x": floats(1, 1)}, weights=weights))
    assert [item.op for item in network.nodes] == ["Expand", "Add"]


@pytest.mark.parametrize(
    ("kind", "number", "dtype"),
    [(TensorProto.FLOAT, -np.inf, torch.float32), (TensorProto.DOUBLE, 0.1, torch.float64)],
)
def test_constant_of_a_shape_keeps_its_number_and_dtype_in_json(
    kind: int, number: float, dtype: torch.dtype
) -> None:
    value = helper.make_tensor("", kind, [1], [number])
    nodes = [node("Shape", "x", "shape"), node("ConstantOfShape", "shape", "y", value=value)]
    config = convert(ir.from_proto(build_graph(nodes, {"x": floats(3, 2)}))).config
    network = OnnxNetwork(**json.loads(json.dumps(config, allow_nan=False)))
    output = network({"x": torch.zeros(2, 2)})
    assert torch.equal(output, torch.full((2, 2), number, dtype=dtype))


def test_graph_that_the_libraries_cannot_simplify_is_refused() -> None:
    call = node("Again", "x", "y", domain="own")
    model = build_graph([node("Relu", "x", "y")], {"x": floats(3, 2)}, domains=["own"])
    model.graph.node[0].CopyFrom(call)
    model.functions.append(helper.make_function("own", "Again", ["x"], ["y"], [call], []))
    with raises_code(OnnxRefused, "simplification_failed"):
        build_network(model)


def test_building_a_network_computes_no_random_weights() -> None:
    model = build_graph([node("Gather", "w x", "y")], {"x": IDS}, weights={"w": floats(3, 2)})
    before = torch.get_rng_state()
    build_network(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_input_and_table_of_the_same_name_keep_it() -> None:
    nodes = [node("Gather", "user.weight user", "forward"), node("Relu", "forward", "y")]
    network = build_network(
        build_graph(nodes, {"user": IDS}, weights={"user.weight": floats(3, 2)})
    )
    assert units(network) == {"user": "Embedding"}
    assert [item.name for item in network.inputs] == ["user"]


@pytest.mark.parametrize(
    ("scopes", "expected"),
    [
        (("model/users/Gather", "model/dense/MatMul"), ["users", "dense"]),
        (("/users/Gather", "/mlp/mlp.0/MatMul"), ["users", "mlp_0"]),
        (("", ""), ["w", "v"]),
        (("a/forward/Gather", "a/forward/MatMul"), ["forward_1", "forward_2"]),
    ],
)
def test_names_of_units_come_from_the_scopes_of_nodes(
    scopes: tuple[str, str], expected: list[str]
) -> None:
    nodes = [
        node("Gather", "w x", "a", name=scopes[0]),
        node("MatMul", "a v", "y", name=scopes[1]),
    ]
    weights = {"w": floats(3, 2), "v": floats(2, 2)}
    assert list(units(build_network(build_graph(nodes, {"x": IDS}, weights=weights)))) == expected


def test_lookup_as_tf2onnx_writes_it_is_one_node(tmp_path: Path) -> None:
    nodes = [
        node("Cast", "ids", "numbers", to=1),
        node("Less", "numbers zero", "is_negative"),
        node("Cast", "is_negative", "chosen", to=7),
        node("Add", "ids rows", "from_start"),
        node("Mul", "chosen from_start", "first"),
        node("Not", "is_negative", "is_row"),
        node("Cast", "is_row", "other", to=7),
        node("Mul", "ids other", "second"),
        node("Add", "first second", "found"),
        node("Gather", "w found", "y"),
    ]
    weights = {"w": floats(3, 2), "rows": np.int64(3), "zero": np.float32(0)}
    model = build_graph(nodes, {"ids": IDS}, weights=weights)
    network = build_network(model)
    assert [item.op for item in network.nodes] == ["Module"]
    require_equal(model, {"ids": IDS}, tmp_path)
    weights["rows"] = np.int64(1)  # not the rows of the table: another function
    model = build_graph(nodes, {"ids": IDS}, weights=weights)
    assert len(build_network(model).nodes) > 1
    require_equal(model, {"ids": IDS - 1}, tmp_path)


def test_ids_that_are_computed_and_negative_count_from_the_last_row(tmp_path: Path) -> None:
    nodes = [node("Sub", "ids one", "before"), node("Gather", "w before", "y")]
    weights = {"w": floats(3, 2), "one": np.int64(1)}
    model = build_graph(nodes, {"ids": IDS}, weights=weights)
    assert units(build_network(model)) == {"w": "Embedding"}
    require_equal(model, {"ids": IDS}, tmp_path)


def test_ids_that_are_not_negative_are_looked_up_as_they_are() -> None:
    nodes = [
        node("Mod", "ids count", "bucket"),
        node("Add", "bucket offset", "row"),
        node("Clip", "row zero", "bounded"),
        node("Cast", "bounded", "narrow", to=6),
        node("Gather", "w narrow", "y"),
    ]
    weights = {"w": floats(5, 2), "count": np.int64(3), "offset": np.int64(2), "zero": np.int64(0)}
    network = build_network(build_graph(nodes, {"ids": IDS}, weights=weights))
    assert network.nodes[-1].attributes == {}


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_graph_of_an_older_opset_is_converted(tmp_path: Path, opset: int) -> None:
    # Softmax flattens before opset 13, and the axes of ReduceSum are an attribute.
    axes = {"axes": [1]} if opset < 13 else {}
    inputs = "s axis" if opset >= 13 else "s"
    nodes = [
        node("Softmax", "x", "s", **({"axis": 1} if opset < 13 else {})),
        node("ReduceSum", inputs, "y", keepdims=0, **axes),
    ]
    x = {"x": floats(3, 4, 2)}
    weights = {"axis": np.array([1])} if opset >= 13 else {}
    require_equal(build_graph(nodes, x, weights=weights, opset=opset), x, tmp_path)


def test_input_of_one_value_per_row_may_be_a_column_or_not() -> None:
    model = build_graph(
        [node("Gather", "w x", "y")], {"x": IDS[:, None]}, weights={"w": floats(3, 2)}
    )
    network = build_network(model)
    flat, column = (network({"x": torch.from_numpy(ids)}) for ids in (IDS, IDS[:, None]))
    assert torch.equal(flat, column)
    with pytest.raises(TypeError, match="expected integers as the input x"):
        network({"x": torch.zeros(3)})
    with pytest.raises(ValueError, match="expected the shape"):
        network({"x": torch.zeros(3, 2, dtype=torch.int64)})


def test_gradients_reach_tables_layers_and_parameters() -> None:
    nodes = [
        node("Gather", "table x", "a"),
        node("MatMul", "a layer", "b"),
        node("Mul", "b scale", "y"),
    ]
    weights = {"table": floats(3, 2), "layer": floats(2, 2), "scale": floats(2)}
    network = build_network(build_graph(nodes, {"x": IDS}, weights=weights))
    network({"x": torch.from_numpy(IDS)}).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in network.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("made", "code", "fields"),
    [
        ([node("NonZero", "x", "y")], "operator_unknown", {"op": "NonZero"}),
        (
            [node("FusedGelu", "x", "y", domain="com.microsoft")],
            "operator_unknown",
            {"op": "com.microsoft.FusedGelu"},
        ),
        ([node("Cast", "x", "y", to=10)], "form_unknown", {}),
        (
            [node("Softmax", "x", "y", axis=0, name="attention", hint=1)],
            "attributes_unknown",
            {"op": "Softmax", "node": "attention", "attributes": ("hint",)},
        ),
    ],
    ids=["operator", "domain", "cast_to_float16", "attribute"],
)
def test_node_that_cannot_be_computed_is_refused_by_name(
    made: list[onnx.NodeProto], code: str, fields: dict[str, Any]
) -> None:
    model = build_graph(made, {"x": floats(3, 2)}, domains=["com.microsoft"])
    with raises_code(OnnxRefused, code, **fields):
        build_network(model)


def test_fixed_number_of_rows_is_refused_with_the_input() -> None:
    model = build_graph([node("Relu", "x", "y")], {"x": floats(3, 2)})
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    with raises_code(OnnxRefused, "batch_fixed", name="x", shape=(3, 2)):
        build_network(model)


def test_graph_without_inputs_is_refused() -> None:
    with raises_code(OnnxRefused, "inputs_missing"):
        build_network(build_graph([node("Relu", "w", "y")], {}, weights={"w": floats(2)}))


def test_texts_as_input_and_weights_of_16_bits_are_refused() -> None:
    model = build_graph([node("Relu", "x", "y")], {"x": floats(3, 2)})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    with raises_code(OnnxRefused, "input_not_tensor", name="x"):
        build_network(model)
    half = numpy_helper.from_array(floats(2).astype(np.float16), "w")
    model = build_graph([node("Mul", "x w", "y")], {"x": floats(3, 2)})
    model.graph.initializer.append(half)
    with raises_code(OnnxRefused, "weights_dtype", name="w"):
        build_network(model)


def perceptron(*between: onnx.NodeProto) -> onnx.ModelProto:
    """Return a model of two layers with nodes that compute ``b`` from ``a`` between them."""
    nodes = [node("MatMul", "x first", "a"), *between, node("MatMul", "b second", "y")]
    weights = {"first": floats(2, 6), "second": floats(6, 1), "scale": floats(6)}
    return build_graph(nodes, {"x": floats(3, 2)}, weights=weights)


def test_layer_that_only_layers_read_has_a_width_that_can_be_changed() -> None:
    model = perceptron(node("Relu", "a", "r"), node("Tanh", "r", "b"))
    config = convert(ir.from_proto(model)).config
    assert config["widths"] == {"first": 6}
    narrower = OnnxNetwork(**{**config, "widths": {"first": 4}})
    assert {name: tuple(p.shape) for name, p in narrower.named_parameters()} == {
        "first.weight": (4, 2),
        "second.weight": (1, 4),
    }


@pytest.mark.parametrize(
    "between",
    [
        [node("Mul", "a scale", "b")],
        [node("Softmax", "a", "b")],
        [node("Relu", "a", "r"), node("Add", "a r", "b")],
        [node("Identity", "x", "u"), node("Concat", "u u u", "b", axis=1)],
    ],
    ids=["weights", "softmax", "two_readers", "not_read"],
)
def test_layer_that_other_nodes_read_has_a_fixed_width(between: list[onnx.NodeProto]) -> None:
    assert convert(ir.from_proto(perceptron(*between))).config["widths"] == {}


def test_activations_with_many_branches_are_followed_once() -> None:
    between = [node("Relu", "a", "n0")]
    for index in range(40):
        between += [
            node("Neg", f"n{index}", f"m{index}"),
            node("Clip", f"n{index} m{index}", f"n{index + 1}"),
        ]
    model = perceptron(*between, node("Tanh", "n40", "b"))
    assert convert(ir.from_proto(model)).config["widths"] == {}


def test_layer_whose_output_is_also_an_output_of_the_graph_has_a_fixed_width() -> None:
    nodes = [node("MatMul", "x first", "a"), node("Relu", "a", "b"), node("MatMul", "b last", "y")]
    weights = {"first": floats(2, 6), "last": floats(6, 1)}
    model = build_graph(nodes, {"x": floats(3, 2)}, ["y", "a"], weights)
    assert convert(ir.from_proto(model)).config["widths"] == {}
