"""Convert an ONNX graph to the configuration and the weights of an ``OnnxNetwork``.

Embedding tables and dense layers become modules (``module_calls.py``). Other trained weights become
parameters, constants become buffers, and constant sizes (``operators/sizes.py``), from which the
graph computes shapes, become part of the configuration.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveInitializersFromInputsPass
from torch import Tensor

from compressors.errors.onnx_graphs import OnnxRefused
from compressors.onnx_network.module_calls import (
    ModuleCall,
    ModuleKey,
    find_module_calls,
    initializer_tensor,
)
from compressors.onnx_network.names import count_common_scopes, unique_name
from compressors.onnx_network.negative_ids import may_be_negative
from compressors.onnx_network.network import (
    MODULE_OP,
    ROWS_ATTRIBUTE,
    OnnxNetwork,
    require_supported,
)
from compressors.onnx_network.normalize import normalize
from compressors.onnx_network.operators.elementwise import DTYPES
from compressors.onnx_network.operators.registry import OPERATORS, computes_sizes
from compressors.onnx_network.operators.sizes import MAX_SIZES
from compressors.onnx_network.shared_widths import find_producers
from compressors.onnx_network.trained_weights import TrainedWeights

SHAPE_OPERATORS = ("Shape", "Size")
"""Operators that return sizes of a tensor."""

Attributes: TypeAlias = dict[str, Any]
"""The attributes of a node as JSON values, by name."""

NamedModules: TypeAlias = dict[ModuleKey, tuple[str, ModuleCall]]
"""The name and the first call of each module, by the key of its calls."""


@dataclass(frozen=True)
class ConvertedModel:
    """The configuration and the weights of an ``OnnxNetwork``.

    Attributes:
        config: the arguments of the class, as JSON values.
        weights: the state dict.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]

    def build_network(self) -> OnnxNetwork:
        """Return the network with its weights, in evaluation mode."""
        with torch.device("meta"):  # the state dict replaces all tensors
            network = OnnxNetwork(**self.config)
        network.load_state_dict(self.weights, strict=True, assign=True)
        return network.eval()


def convert_model(model: ir.Model) -> ConvertedModel:
    """Convert an ONNX model to the configuration and the weights of an ``OnnxNetwork``.

    Args:
        model: the model; it is changed.

    Raises:
        OnnxRefused: the graph has an operator, a type or an attribute that is not supported.
    """
    # Models of IR version 3 or older list their initializers as inputs too.
    RemoveInitializersFromInputsPass()(model)
    if not model.graph.inputs:
        raise OnnxRefused("inputs_missing")
    for item in model.graph.inputs:
        _require_numeric_batch(item)
    weights = normalize(model)
    return _convert_graph(model.graph, weights)


def _require_numeric_batch(item: ir.Value) -> None:
    """Raise unless an input is a numeric tensor with a dynamic number of rows."""
    if item.dtype is None or int(item.dtype) not in DTYPES or item.shape is None:
        raise OnnxRefused("input_not_tensor", name=item.name, got=str(item.type))
    if len(item.shape) == 0 or isinstance(item.shape[0], int):
        raise OnnxRefused("batch_fixed", name=item.name, shape=_static_sizes(item.shape))


def _static_sizes(shape: ir.Shape) -> tuple[int | None, ...]:
    """Return the size of each dimension, None for a dynamic one."""
    return tuple(size if isinstance(size, int) else None for size in shape)


def _convert_graph(graph: ir.Graph, weights: TrainedWeights) -> ConvertedModel:
    """Convert a simplified graph.

    Args:
        graph: the graph.
        weights: the initializers that training may change.
    """
    calls = {call.nodes[-1]: call for call in find_module_calls(graph)}
    replaced = {node for call in calls.values() for node in call.nodes[:-1]}
    nodes = [node for node in graph if node not in replaced]
    attributes = {node: _read_attributes(node) for node in nodes if node not in calls}
    names = _NameAssigner(graph.inputs)
    modules = _name_modules(calls.values(), names)
    sizes, tensors = _collect_constants(graph, attributes)
    for value in tensors:
        names.assign_attribute_name(value)
    statistics = _batch_norm_statistics(nodes)
    trained = {
        value
        for value, tensor in tensors.items()
        if value not in statistics and weights.include(value) and _is_trainable(tensor)
    }
    output_names: set[str] = set()
    config = {
        "inputs": [{"name": names.of(item), **_input_type(item)} for item in graph.inputs],
        "outputs": {
            unique_name(item.name or "", output_names): names.of(item) for item in graph.outputs
        },
        "nodes": [
            _module_node(calls[node], modules, names)
            if node in calls
            else _operator_node(node, attributes[node], names)
            for node in nodes
        ],
        **_module_arguments(modules, find_producers(calls.values())),
        "parameters": {names.of(v): _tensor_type(t) for v, t in tensors.items() if v in trained},
        "buffers": {names.of(v): _tensor_type(t) for v, t in tensors.items() if v not in trained},
        "sizes": {names.of(value): constant for value, constant in sizes.items()},
    }
    state = {names.of(value): tensor for value, tensor in tensors.items()}
    for name, call in modules.values():
        state |= {f"{name}.{attribute}": w for attribute, w in call.weights().items()}
    return ConvertedModel(config, state)


def _batch_norm_statistics(nodes: Iterable[ir.Node]) -> set[ir.Value | None]:
    """Return the running means and variances of batch norms, which have no gradients."""
    norms = [node for node in nodes if node.op_type == "BatchNormalization"]
    return {value for node in norms for value in node.inputs[3:5]}


def _is_trainable(tensor: Tensor) -> bool:
    """Return whether a tensor may be a trained weight: two or more finite floats."""
    return tensor.is_floating_point() and tensor.numel() > 1 and bool(tensor.isfinite().all())


def _input_type(item: ir.Value) -> dict[str, Any]:
    """Return dtype and shape of an input, as in ``GraphInput``."""
    if item.dtype is None or item.shape is None:  # excluded by _require_numeric_batch; for mypy
        raise ValueError(f"the input {item.name} has no type")
    dtype = DTYPES[int(item.dtype)]
    return {"dtype": _dtype_name(dtype), "shape": list(_static_sizes(item.shape))}


def _tensor_type(tensor: Tensor) -> dict[str, Any]:
    """Return dtype and shape of a tensor."""
    return {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape)}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _NameAssigner:
    """Assigns names to values, weights and modules.

    Args:
        inputs: the inputs of the graph. They keep their names where these are identifiers.
    """

    def __init__(self, inputs: Iterable[ir.Value]) -> None:
        self._used_values: set[str] = set()
        empty = OnnxNetwork([], {}, [], {}, {}, {}, {}, {}, {})
        self._used_attributes = set(dir(empty))
        self._names: dict[ir.Value, str] = {}
        for item in inputs:
            self.of(item)

    def of(self, value: ir.Value) -> str:
        """Return the name of a value; assign one at the first call."""
        if value not in self._names:
            self._names[value] = unique_name(value.name or "", self._used_values)
        return self._names[value]

    def assign_attribute_name(self, value: ir.Value) -> None:
        """Assign an initializer a name that is also free as an attribute of the network."""
        self._names[value] = unique_name(value.name or "", self._used_values, self._used_attributes)

    def assign_module_name(self, path: tuple[str, ...]) -> str:
        """Return a name for a module that is free as an attribute of the network."""
        return unique_name("_".join(path), self._used_attributes)


def _name_modules(calls: Iterable[ModuleCall], names: _NameAssigner) -> NamedModules:
    """Return the name and the first call of each module, without the scopes that all share."""
    first_calls: dict[ModuleKey, ModuleCall] = {}
    for call in calls:
        first_calls.setdefault(call.key, call)
    start = count_common_scopes(call.path for call in first_calls.values())
    return {
        key: (names.assign_module_name(call.path[start:]), call)
        for key, call in first_calls.items()
    }


def _module_arguments(
    modules: NamedModules, producers: Mapping[ModuleKey, ModuleKey]
) -> dict[str, Any]:
    """Return the arguments ``tables``, ``layers`` and ``widths`` of the class.

    Args:
        modules: the name and the first call of each module, by key.
        producers: the key of the layer that produces a layer's input, where they share a width.
    """
    tables, layers = {}, {}
    for key, (name, call) in modules.items():
        if call.kind == "Embedding":
            tables[name] = list(call.arguments)
            continue
        inputs, outputs, has_bias = call.arguments
        layers[name] = {
            "inputs": modules[producers[key]][0] if key in producers else inputs,
            "outputs": name if key in producers.values() else outputs,
            "bias": has_bias,
        }
    widths = {modules[key][0]: modules[key][1].arguments[1] for key in producers.values()}
    return {"tables": tables, "layers": layers, "widths": widths}


def _module_node(call: ModuleCall, modules: NamedModules, names: _NameAssigner) -> dict[str, Any]:
    """Return the node of the configuration that calls a module."""
    may_have_negative_ids = call.kind == "Embedding" and may_be_negative(call.input)
    return {
        "op": MODULE_OP,
        "module": modules[call.key][0],
        "inputs": [names.of(call.input)],
        "outputs": [names.of(call.output)],
        **({"attributes": {ROWS_ATTRIBUTE: call.arguments[0]}} if may_have_negative_ids else {}),
    }


def _operator_node(node: ir.Node, attributes: Attributes, names: _NameAssigner) -> dict[str, Any]:
    """Return the node of the configuration that computes an operator."""
    return {
        "op": node.op_type,
        "inputs": ["" if item is None else names.of(item) for item in node.inputs],
        "outputs": [names.of(item) for item in node.outputs],
        **({"attributes": attributes} if attributes else {}),
    }


def _read_attributes(node: ir.Node) -> Attributes:
    """Return the attributes of a node as JSON values.

    Raises:
        OnnxRefused: the operator or an attribute is not supported.
    """
    name = node.name or node.outputs[0].name or ""
    op = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
    require_supported(op, {}, name)
    attributes = {key: _json_value(item, name) for key, item in node.attributes.items()}
    require_supported(op, attributes, name)
    if op == "Cast":
        _torch_dtype(attributes["to"], name)
    if op == "ConstantOfShape" and "value" in node.attributes:
        dtype = _torch_dtype(node.attributes["value"].as_tensor().dtype, name)
        attributes |= {"dtype": _dtype_name(dtype)} if dtype is torch.float64 else {}
    _require_supported_outputs(node, op, name)
    return attributes


def _torch_dtype(number: int, node: str) -> torch.dtype:
    """Return the torch dtype of a ``TensorProto.DataType`` number in an attribute of a node.

    Raises:
        OnnxRefused: the type is not supported.
    """
    if number not in DTYPES:
        problem = f"the type {ir.DataType(number).name}"
        raise OnnxRefused("form_unknown", node=node, problem=problem)
    return DTYPES[number]


def _require_supported_outputs(node: ir.Node, op: str, name: str) -> None:
    """Raise if a node has a consumed output that the operator's function does not compute."""
    supported = OPERATORS[op].num_outputs
    missing = () if supported is None else node.outputs[supported:]
    if any(output.uses() or output.is_graph_output() for output in missing):
        problem = f"{op} with more than {supported} outputs in use"
        raise OnnxRefused("form_unknown", node=name, problem=problem)
    # Simplification has removed each Dropout whose training mode is known to be off.
    if op == "Dropout" and len(node.inputs) > 2:
        raise OnnxRefused("form_unknown", node=name, problem="Dropout in training mode")


def _json_value(attribute: ir.Attr, node: str) -> Any:
    """Return the value of an attribute; a tensor of one element becomes a number.

    Raises:
        OnnxRefused: the attribute has another type.
    """
    match attribute.type:
        case ir.AttributeType.INT | ir.AttributeType.STRING:
            return attribute.value
        case ir.AttributeType.INTS | ir.AttributeType.STRINGS:
            return list(attribute.value)
        case ir.AttributeType.FLOAT if math.isfinite(attribute.value):
            return attribute.value
        case ir.AttributeType.TENSOR if attribute.value.size == 1:
            number = attribute.value.numpy().reshape(-1)[0].item()
            return number if math.isfinite(number) else str(number)
    problem = f"the attribute {attribute.name} of the type {attribute.type.name}"
    raise OnnxRefused("form_unknown", node=node, problem=problem)


def _collect_constants(
    graph: ir.Graph, attributes: Mapping[ir.Node, Attributes]
) -> tuple[dict[ir.Value, Any], dict[ir.Value, Tensor]]:
    """Return the initializers that nodes of the configuration consume.

    Args:
        graph: the graph.
        attributes: the attributes of the nodes that are not part of a module.

    Returns:
        The constant sizes, as integers or lists, and the other constants as tensors.

    Raises:
        OnnxRefused: a constant has a type that is not supported.
    """
    sizes: dict[ir.Value, Any] = {}
    computed_sizes: set[ir.Value] = set()
    consumed = [item for item in graph.outputs if item.is_initializer()]
    for node, values in attributes.items():
        inputs = [item for item in node.inputs if item is not None]
        consumed += [item for item in inputs if item.is_initializer()]
        operator = OPERATORS[node.op_type]
        is_shape_operator = node.op_type in SHAPE_OPERATORS
        has_only_sizes = (
            not is_shape_operator
            and computes_sizes(node.op_type, values)
            and all(item in computed_sizes or _can_be_sizes(item) for item in inputs)
        )
        if is_shape_operator or has_only_sizes:
            computed_sizes.update(node.outputs)
        for position, item in enumerate(node.inputs):
            accepts_sizes = (
                has_only_sizes or position in operator.size_inputs | operator.index_inputs
            )
            if item is not None and accepts_sizes and _can_be_sizes(item):
                sizes[item] = initializer_tensor(item).tolist()
    tensors = {item: _read_tensor(item) for item in dict.fromkeys(consumed) if item not in sizes}
    return sizes, tensors


def _can_be_sizes(value: ir.Value) -> bool:
    """Return whether a value is a small constant of integers, or of booleans (for ``Where``)."""
    stored = value.const_value if value.is_initializer() else None
    return (
        stored is not None
        and stored.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
        and len(stored.shape) <= 1
        and stored.size <= MAX_SIZES
    )


def _read_tensor(value: ir.Value) -> Tensor:
    """Return an initializer as a tensor.

    Raises:
        OnnxRefused: its type is not supported.
    """
    if value.dtype is None or int(value.dtype) not in DTYPES:
        raise OnnxRefused("weights_dtype", name=value.name, dtype=str(value.dtype))
    return initializer_tensor(value)
