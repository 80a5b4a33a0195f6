"""Conversion of ONNX graphs: modules, parameters, names, opsets, widths, unsupported graphs.

A width is the number of outputs of a dense layer. ``widths`` has those that can be changed.
"""

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
from onnx_graphs import Array, build_model, build_network, require_same_outputs
from torch import nn

from compressors.contracts import ONNX_NETWORK
from compressors.errors.onnx_graphs import OnnxRefused
from compressors.onnx_network.conversion import ConvertedModel, convert_model
from compressors.onnx_network.network import OnnxNetwork

random = np.random.default_rng(0)
IDS = np.array([0, 2, 1])


def floats(*shape: int) -> Array:
    return random.normal(size=shape).astype(np.float32)


def node(op: str, inputs: str, output: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    """Return a node; spaces separate the names of its inputs."""
    return helper.make_node(op, inputs.split(), [output], name=name or None, **attributes)


def convert(model: onnx.ModelProto) -> ConvertedModel:
    return convert_model(ir.from_proto(model))


def module_types(network: nn.Module) -> dict[str, str]:
    """Return the class of each table and layer, by name."""
    return {name: type(module).__name__ for name, module in network.named_children()}


def test_stored_class_path_is_the_path_of_onnx_network() -> None:
    assert f"{OnnxNetwork.__module__}:{OnnxNetwork.__name__}" == ONNX_NETWORK


def test_gather_becomes_a_table_and_matmul_with_bias_a_dense_layer(tmp_path: Path) -> None:
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
    model = build_model(nodes, {"user": IDS}, weights=weights)
    network = build_network(model)
    assert module_types(network) == {"user": "Embedding", "mlp_0": "Linear", "out": "Linear"}
    names = [name for name, _ in network.named_parameters()]
    assert names == ["user.weight", "mlp_0.weight", "mlp_0.bias", "out.weight", "out.bias"]
    require_same_outputs(model, {"user": IDS}, tmp_path)


def test_layers_with_the_same_weights_become_one_module() -> None:
    nodes = [
        node("MatMul", "x w", "a"),
        node("Add", "a b", "c"),
        node("MatMul", "c w", "d"),
        node("Add", "d b", "y"),
    ]
    network = build_network(
        build_model(nodes, {"x": floats(3, 2)}, weights={"w": floats(2, 2), "b": floats(2)})
    )
    assert module_types(network) == {"w": "Linear"}


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Gather", "w x", "a"), node("Transpose", "w", "t"), node("MatMul", "a t", "y")],
        [node("Gather", "w x", "a", axis=1), node("Relu", "a", "y")],
        [node("Gather", "w x", "a"), node("MatMul", "a w", "y")],
    ],
    ids=["scores_of_all_rows", "gather_of_columns", "table_and_layer"],
)
def test_weight_that_is_not_only_a_table_or_a_layer_stays_a_parameter(
    tmp_path: Path, nodes: list[onnx.NodeProto]
) -> None:
    model = build_model(nodes, {"x": IDS}, weights={"w": floats(3, 3)})
    network = build_network(model)
    assert "Embedding" not in module_types(network).values()
    require_same_outputs(model, {"x": IDS}, tmp_path)


def test_trained_weights_become_parameters_and_constants_buffers() -> None:
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
    network = build_network(build_model(nodes, {"x": floats(3, 2)}, weights=weights))
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
    ids=["unsqueeze", "reshape", "constant_rows", "dynamic_reshape", "two_consumers"],
)
def test_weight_that_nodes_transform_stays_a_parameter_with_its_name(
    tmp_path: Path, nodes: list[onnx.NodeProto]
) -> None:
    weights = {"w": floats(3, 3), "axis": np.array([0]), "back": np.array([3, -1])}
    inputs = {"x": floats(3, 3)}
    model = build_model(nodes, inputs, weights={**weights, "ids": np.array([2, 2, 0])})
    network = build_network(model)
    assert [name.removesuffix(".weight") for name, _ in network.named_parameters()] == ["w"]
    require_same_outputs(model, inputs, tmp_path)


def test_weights_with_equal_values_stay_separate_parameters() -> None:
    nodes = [node("Mul", "x first", "a"), node("Relu", "a", "b"), node("Mul", "b second", "y")]
    ones = np.ones(2, np.float32)
    model = build_model(nodes, {"x": floats(3, 2)}, weights={"first": ones, "second": ones})
    assert {name for name, _ in build_network(model).named_parameters()} == {"first", "second"}


def test_batch_norm_statistics_are_buffers_and_its_parameters_have_gradients() -> None:
    nodes = [node("Relu", "x", "a"), node("BatchNormalization", "a scale bias mean var", "y")]
    weights = {name: np.abs(floats(2)) for name in ("scale", "bias", "mean", "var")}
    converted = convert(build_model(nodes, {"x": floats(3, 2)}, weights=weights))
    network = converted.build_network()
    assert {name for name, _ in network.named_parameters()} == {"scale", "bias"}
    network({"x": torch.ones(3, 2)}).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    # Bundles of earlier versions store the statistics as parameters.
    config = converted.config
    parameters = {**config["parameters"], **config["buffers"]}
    earlier = OnnxNetwork(**{**config, "parameters": parameters, "buffers": {}})
    earlier.load_state_dict(converted.weights)
    earlier({"x": torch.ones(3, 2)}).sum().backward()


def test_batch_norm_is_folded_into_the_convolution_before_it() -> None:
    nodes = [node("Conv", "x w", "a"), node("BatchNormalization", "a scale bias mean var", "y")]
    weights = {name: np.abs(floats(2)) for name in ("scale", "bias", "mean", "var")}
    model = build_model(nodes, {"x": floats(3, 4, 5)}, weights={**weights, "w": floats(2, 4, 3)})
    network = build_network(model)
    assert [item.op for item in network.nodes] == ["Conv"]
    assert [parameter.shape for parameter in network.parameters()] == [(2, 4, 3), (2,)]


def test_initializer_that_is_listed_as_an_input_is_a_weight() -> None:
    nodes = [node("Transpose", "w", "t"), node("MatMul", "x t", "y")]
    model = build_model(nodes, {"x": floats(3, 2)}, weights={"w": floats(4, 2)})
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 2]))
    assert module_types(build_network(model)) == {"w": "Linear"}


def test_name_of_a_transposed_weight_does_not_collide_with_a_similar_name() -> None:
    nodes = [
        node("Transpose", "w", "t"),
        node("MatMul", "x t", "a"),
        node("Add", "a w.original", "y"),
    ]
    weights = {"w": floats(2, 2), "w.original": floats(3, 2)}
    network = build_network(build_model(nodes, {"x": floats(3, 2)}, weights=weights))
    assert {name for name, _ in network.named_parameters()} == {"w.weight", "w_original"}


def test_opset_of_the_domain_ai_onnx_is_the_opset_of_the_graph() -> None:
    model = build_model([node("Relu", "x", "y")], {"x": floats(3, 2)})
    model.opset_import[0].domain = "ai.onnx"
    assert [item.op for item in build_network(model).nodes] == ["Relu"]


def test_constant_with_many_elements_is_not_folded() -> None:
    nodes = [node("Expand", "one shape", "a"), node("Add", "x a", "y")]
    weights = {"one": np.float32(1), "shape": np.array([10**6, 10**6])}
    network = build_network(build_model(nodes, {"x": floats(1, 1)}, weights=weights))
    assert [item.op for item in network.nodes] == ["Expand", "Add"]


@pytest.mark.parametrize(
    ("onnx_type", "number", "dtype"),
    [(TensorProto.FLOAT, -np.inf, torch.float32), (TensorProto.DOUBLE, 0.1, torch.float64)],
)
def test_constant_of_shape_keeps_its_value_and_dtype_in_json(
    onnx_type: int, number: float, dtype: torch.dtype
) -> None:
    value = helper.make_tensor("", onnx_type, [1], [number])
    nodes = [node("Shape", "x", "shape"), node("ConstantOfShape", "shape", "y", value=value)]
    config = convert(build_model(nodes, {"x": floats(3, 2)})).config
    network = OnnxNetwork(**json.loads(json.dumps(config, allow_nan=False)))
    output = network({"x": torch.zeros(2, 2)})
    assert torch.equal(output, torch.full((2, 2), number, dtype=dtype))


def test_graph_that_cannot_be_simplified_is_refused() -> None:
    call = node("Recursive", "x", "y", domain="custom")
    model = build_model([node("Relu", "x", "y")], {"x": floats(3, 2)}, domains=["custom"])
    model.graph.node[0].CopyFrom(call)
    model.functions.append(helper.make_function("custom", "Recursive", ["x"], ["y"], [call], []))
    with raises_code(OnnxRefused, "simplification_failed"):
        build_network(model)


def test_building_a_network_draws_no_random_numbers() -> None:
    model = build_model([node("Gather", "w x", "y")], {"x": IDS}, weights={"w": floats(3, 2)})
    before = torch.get_rng_state()
    build_network(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_input_and_table_with_the_same_name_both_keep_it() -> None:
    nodes = [node("Gather", "user.weight user", "forward"), node("Relu", "forward", "y")]
    network = build_network(
        build_model(nodes, {"user": IDS}, weights={"user.weight": floats(3, 2)})
    )
    assert module_types(network) == {"user": "Embedding"}
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
def test_module_names_are_derived_from_node_names(
    scopes: tuple[str, str], expected: list[str]
) -> None:
    nodes = [
        node("Gather", "w x", "a", name=scopes[0]),
        node("MatMul", "a v", "y", name=scopes[1]),
    ]
    weights = {"w": floats(3, 2), "v": floats(2, 2)}
    network = build_network(build_model(nodes, {"x": IDS}, weights=weights))
    assert list(module_types(network)) == expected


def test_lookup_that_tf2onnx_exports_becomes_one_node(tmp_path: Path) -> None:
    nodes = [
        node("Cast", "ids", "float_ids", to=TensorProto.FLOAT),
        node("Less", "float_ids zero", "is_negative"),
        node("Cast", "is_negative", "is_negative_as_int", to=TensorProto.INT64),
        node("Add", "ids rows", "wrapped"),
        node("Mul", "is_negative_as_int wrapped", "wrapped_or_zero"),
        node("Not", "is_negative", "is_valid"),
        node("Cast", "is_valid", "is_valid_as_int", to=TensorProto.INT64),
        node("Mul", "ids is_valid_as_int", "ids_or_zero"),
        node("Add", "wrapped_or_zero ids_or_zero", "row"),
        node("Gather", "w row", "y"),
    ]
    weights = {"w": floats(3, 2), "rows": np.int64(3), "zero": np.float32(0)}
    model = build_model(nodes, {"ids": IDS}, weights=weights)
    network = build_network(model)
    assert [item.op for item in network.nodes] == ["Module"]
    require_same_outputs(model, {"ids": IDS}, tmp_path)
    weights["rows"] = np.int64(1)  # not the number of rows, so the nodes are needed
    model = build_model(nodes, {"ids": IDS}, weights=weights)
    assert len(build_network(model).nodes) > 1
    require_same_outputs(model, {"ids": IDS - 1}, tmp_path)


def test_computed_negative_ids_count_from_the_last_row(tmp_path: Path) -> None:
    nodes = [node("Sub", "ids one", "before"), node("Gather", "w before", "y")]
    weights = {"w": floats(3, 2), "one": np.int64(1)}
    model = build_model(nodes, {"ids": IDS}, weights=weights)
    assert module_types(build_network(model)) == {"w": "Embedding"}
    require_same_outputs(model, {"ids": IDS}, tmp_path)


def test_computed_non_negative_ids_are_not_wrapped() -> None:
    nodes = [
        node("Mod", "ids count", "bucket"),
        node("Add", "bucket offset", "row"),
        node("Clip", "row zero", "bounded"),
        node("Cast", "bounded", "narrow", to=TensorProto.INT32),
        node("Gather", "w narrow", "y"),
    ]
    weights = {"w": floats(5, 2), "count": np.int64(3), "offset": np.int64(2), "zero": np.int64(0)}
    network = build_network(build_model(nodes, {"ids": IDS}, weights=weights))
    assert network.nodes[-1].attributes == {}  # the attribute ``ROWS_ATTRIBUTE`` would wrap ids


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_graph_of_an_older_opset_is_converted(tmp_path: Path, opset: int) -> None:
    # Before opset 13, Softmax flattens its input, and the axes of ReduceSum are an attribute.
    axes = {"axes": [1]} if opset < 13 else {}
    inputs = "s axis" if opset >= 13 else "s"
    nodes = [
        node("Softmax", "x", "s", **({"axis": 1} if opset < 13 else {})),
        node("ReduceSum", inputs, "y", keepdims=0, **axes),
    ]
    x = {"x": floats(3, 4, 2)}
    weights = {"axis": np.array([1])} if opset >= 13 else {}
    require_same_outputs(build_model(nodes, x, weights=weights, opset=opset), x, tmp_path)


def test_input_with_one_value_per_row_may_have_one_or_two_dimensions() -> None:
    model = build_model(
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
    network = build_network(build_model(nodes, {"x": IDS}, weights=weights))
    network({"x": torch.from_numpy(IDS)}).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in network.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("nodes", "code", "fields"),
    [
        ([node("NonZero", "x", "y")], "operator_unknown", {"op": "NonZero"}),
        (
            [node("FusedGelu", "x", "y", domain="com.microsoft")],
            "operator_unknown",
            {"op": "com.microsoft.FusedGelu"},
        ),
        ([node("Cast", "x", "y", to=TensorProto.FLOAT16)], "form_unknown", {}),
        (
            [node("Softmax", "x", "y", axis=0, name="attention", hint=1)],
            "attributes_unknown",
            {"op": "Softmax", "node": "attention", "attributes": ("hint",)},
        ),
    ],
    ids=["operator", "domain", "cast_to_float16", "attribute"],
)
def test_unsupported_node_is_refused_with_its_operator_and_attributes(
    nodes: list[onnx.NodeProto], code: str, fields: dict[str, Any]
) -> None:
    model = build_model(nodes, {"x": floats(3, 2)}, domains=["com.microsoft"])
    with raises_code(OnnxRefused, code, **fields):
        build_network(model)


def test_fixed_number_of_rows_is_refused_with_the_name_of_the_input() -> None:
    model = build_model([node("Relu", "x", "y")], {"x": floats(3, 2)})
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    with raises_code(OnnxRefused, "batch_fixed", name="x", shape=(3, 2)):
        build_network(model)


def test_graph_without_inputs_is_refused() -> None:
    with raises_code(OnnxRefused, "inputs_missing"):
        build_network(build_model([node("Relu", "w", "y")], {}, weights={"w": floats(2)}))


def test_string_input_and_float16_weights_are_refused() -> None:
    model = build_model([node("Relu", "x", "y")], {"x": floats(3, 2)})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    with raises_code(OnnxRefused, "input_not_tensor", name="x"):
        build_network(model)
    float16 = numpy_helper.from_array(floats(2).astype(np.float16), "w")
    model = build_model([node("Mul", "x w", "y")], {"x": floats(3, 2)})
    model.graph.initializer.append(float16)
    with raises_code(OnnxRefused, "weights_dtype", name="w"):
        build_network(model)


def build_two_layers(*between: onnx.NodeProto) -> onnx.ModelProto:
    """Build two dense layers; the nodes ``between`` compute ``b``, the second input, from ``a``."""
    nodes = [node("MatMul", "x first", "a"), *between, node("MatMul", "b second", "y")]
    weights = {"first": floats(2, 6), "second": floats(6, 1), "scale": floats(6)}
    return build_model(nodes, {"x": floats(3, 2)}, weights=weights)


def test_width_of_a_layer_that_only_layers_consume_can_be_changed() -> None:
    model = build_two_layers(node("Relu", "a", "r"), node("Tanh", "r", "b"))
    config = convert(model).config
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
    ids=["scale", "softmax", "two_branches", "not_consumed"],
)
def test_width_of_a_layer_with_other_consumers_is_fixed(between: list[onnx.NodeProto]) -> None:
    assert convert(build_two_layers(*between)).config["widths"] == {}


def test_each_node_of_branching_activations_is_visited_once() -> None:
    between = [node("Relu", "a", "n0")]
    for index in range(40):
        between += [
            node("Neg", f"n{index}", f"m{index}"),
            node("Clip", f"n{index} m{index}", f"n{index + 1}"),
        ]
    model = build_two_layers(*between, node("Tanh", "n40", "b"))
    assert convert(model).config["widths"] == {}  # there are 2**40 paths, too many to visit


def test_width_of_a_layer_that_computes_a_graph_output_is_fixed() -> None:
    nodes = [node("MatMul", "x first", "a"), node("Relu", "a", "b"), node("MatMul", "b last", "y")]
    weights = {"first": floats(2, 6), "last": floats(6, 1)}
    model = build_model(nodes, {"x": floats(3, 2)}, ["y", "a"], weights)
    assert convert(model).config["widths"] == {}
