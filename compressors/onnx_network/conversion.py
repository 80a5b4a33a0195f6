"""Convert an ONNX graph to the configuration and the weights of an ``OnnxNetwork``.

Tables and dense layers become modules (``layers.py``). Further trained floats are parameters,
constants are buffers, and integers from which shapes are computed are part of the configuration.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveInitializersFromInputsPass
from torch import Tensor

from compressors.errors.onnx_graphs import OnnxRefused
from compressors.onnx_network.ids import may_be_negative
from compressors.onnx_network.layers import ModuleCall, module_calls, tensor_of_value
from compressors.onnx_network.names import common_scopes, unique_name
from compressors.onnx_network.network import MODULE, ROWS, OnnxNetwork, require_supported
from compressors.onnx_network.normalize import normalize
from compressors.onnx_network.operators.elementwise import DTYPES
from compressors.onnx_network.operators.sizes import MOST_SIZES
from compressors.onnx_network.operators.table import OPERATORS, computes_sizes
from compressors.onnx_network.weights import Weights
from compressors.onnx_network.widths import layers_before

SHAPE_READERS = ("Shape", "Size")

Attributes = dict[str, Any]


@dataclass(frozen=True)
class Converted:
    """A network that was read from an ONNX graph.

    Attributes:
        config: the arguments of ``OnnxNetwork``, as JSON.
        weights: its state dict.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]


def convert(model: ir.Model) -> Converted:
    """Convert a graph to the configuration and the weights of an ``OnnxNetwork``.

    Args:
        model: the graph; it is changed.

    Raises:
        OnnxRefused: the graph has an operator, a type or a form that is not supported.
    """
    RemoveInitializersFromInputsPass()(model)  # files of old versions have them there too
    if not model.graph.inputs:
        raise OnnxRefused("inputs_missing")
    for item in model.graph.inputs:
        _require_rows_of_numbers(item)
    weights = normalize(model)
    return _converted(model.graph, weights)


def _require_rows_of_numbers(item: ir.Value) -> None:
    """Raise unless an input is a tensor with a dynamic number of rows."""
    if item.dtype is None or int(item.dtype) not in DTYPES or item.shape is None:
        raise OnnxRefused("input_not_tensor", name=item.name, got=str(item.type))
    if len(item.shape) == 0 or isinstance(item.shape[0], int):
        raise OnnxRefused("batch_fixed", name=item.name, shape=_sizes_of(item.shape))


def _sizes_of(shape: ir.Shape) -> tuple[int | None, ...]:
    """Return a shape with None for dynamic dimensions."""
    return tuple(size if isinstance(size, int) else None for size in shape)


def _converted(graph: ir.Graph, weights: Weights) -> Converted:
    """Convert a simplified graph.

    Args:
        graph: the graph.
        weights: what follows its trained weights.
    """
    calls = {call.nodes[-1]: call for call in module_calls(graph)}
    covered = {node for call in calls.values() for node in call.nodes[:-1]}
    nodes = [node for node in graph if node not in covered]
    attributes = {node: _attributes(node) for node in nodes if node not in calls}
    names = _Names(graph.inputs)
    modules = _modules(calls.values(), names)
    sizes, tensors = _constants(graph, attributes)
    for value in tensors:
        names.of_tensor(value)
    statistics = _statistics(nodes)
    trained = {
        value
        for value, tensor in tensors.items()
        if value not in statistics and weights.include(value) and _may_be_trained(tensor)
    }
    taken: set[str] = set()
    config = {
        "inputs": [{"name": names.of(item), **_type_of(item)} for item in graph.inputs],
        "outputs": {unique_name(item.name or "", taken): names.of(item) for item in graph.outputs},
        "nodes": [
            _call(calls[node], modules, names) if node in calls else _node(node, attributes, names)
            for node in nodes
        ],
        **_units(modules, layers_before(calls.values())),
        "parameters": {names.of(v): _spec(t) for v, t in tensors.items() if v in trained},
        "buffers": {names.of(v): _spec(t) for v, t in tensors.items() if v not in trained},
        "sizes": {names.of(value): integers for value, integers in sizes.items()},
    }
    state = {names.of(value): tensor for value, tensor in tensors.items()}
    for name, call in modules.values():
        state |= {f"{name}.{attribute}": w for attribute, w in call.weights().items()}
    return Converted(config, state)


def _statistics(nodes: Iterable[ir.Node]) -> set[ir.Value | None]:
    """Return the running means and variances of batch norms, which gradients do not change."""
    norms = [node for node in nodes if node.op_type == "BatchNormalization"]
    return {value for node in norms for value in node.inputs[3:5]}


def _may_be_trained(tensor: Tensor) -> bool:
    """Return whether an initializer can be a trained weight: finite floats, more than one."""
    return tensor.is_floating_point() and tensor.numel() > 1 and bool(tensor.isfinite().all())


def _type_of(item: ir.Value) -> dict[str, Any]:
    """Return dtype and shape of an input, as in ``GraphInput``."""
    if item.dtype is None or item.shape is None:  # excluded by _require_rows_of_numbers; for mypy
        raise ValueError(f"the input {item.name} has no type")
    return {"dtype": _dtype_name(DTYPES[int(item.dtype)]), "shape": list(_sizes_of(item.shape))}


def _spec(tensor: Tensor) -> dict[str, Any]:
    """Return dtype and shape of a tensor."""
    return {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape)}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Names:
    """The names of values, weights and modules.

    Args:
        inputs: the inputs of the graph, whose names are kept if possible.
    """

    def __init__(self, inputs: Iterable[ir.Value]) -> None:
        self._values: set[str] = set()
        empty = OnnxNetwork([], {}, [], {}, {}, {}, {}, {}, {})
        self._attributes = set(dir(empty))
        self._names: dict[ir.Value, str] = {}
        for item in inputs:
            self.of(item)

    def of(self, value: ir.Value) -> str:
        """Return the name of a value."""
        if value not in self._names:
            self._names[value] = unique_name(value.name or "", self._values)
        return self._names[value]

    def of_tensor(self, value: ir.Value) -> None:
        """Give an initializer that is an attribute of the network its name."""
        self._names[value] = unique_name(value.name or "", self._values, self._attributes)

    def of_module(self, path: tuple[str, ...]) -> str:
        """Return a name for a module."""
        return unique_name("_".join(path), self._attributes)


def _modules(
    calls: Iterable[ModuleCall], names: _Names
) -> dict[tuple[Any, ...], tuple[str, ModuleCall]]:
    """Return the name and a call of each module, by the key of its calls."""
    by_key = {call.key: call for call in reversed(tuple(calls))}
    first = {call.key: call for call in calls if by_key[call.key] is call}
    scopes = common_scopes(call.path for call in first.values())
    return {key: (names.of_module(call.path[scopes:]), call) for key, call in first.items()}


def _units(
    modules: dict[tuple[Any, ...], tuple[str, ModuleCall]],
    before: dict[tuple[Any, ...], tuple[Any, ...]],
) -> dict[str, Any]:
    """Return the arguments of the class that describe tables and layers.

    Args:
        modules: the name and a call of each module, by key.
        before: by key of a layer, the one whose output is its only input.
    """
    tables, layers = {}, {}
    for key, (name, call) in modules.items():
        if call.kind == "Embedding":
            tables[name] = list(call.arguments)
            continue
        inputs, outputs, has_bias = call.arguments
        layers[name] = {
            "inputs": modules[before[key]][0] if key in before else inputs,
            "outputs": name if key in before.values() else outputs,
            "bias": has_bias,
        }
    widths = {modules[key][0]: modules[key][1].arguments[1] for key in before.values()}
    return {"tables": tables, "layers": layers, "widths": widths}


def _call(
    call: ModuleCall, modules: dict[tuple[Any, ...], tuple[str, ModuleCall]], names: _Names
) -> dict[str, Any]:
    """Return the node of the configuration that calls a module."""
    is_lookup_from_the_end = call.kind == "Embedding" and may_be_negative(call.source)
    return {
        "op": MODULE,
        "module": modules[call.key][0],
        "inputs": [names.of(call.source)],
        "outputs": [names.of(call.result)],
        **({"attributes": {ROWS: call.arguments[0]}} if is_lookup_from_the_end else {}),
    }


def _node(node: ir.Node, attributes: dict[ir.Node, Attributes], names: _Names) -> dict[str, Any]:
    """Return the node of the configuration that computes an operator."""
    return {
        "op": node.op_type,
        "inputs": ["" if item is None else names.of(item) for item in node.inputs],
        "outputs": [names.of(item) for item in node.outputs],
        **({"attributes": attributes[node]} if attributes[node] else {}),
    }


def _attributes(node: ir.Node) -> Attributes:
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
    _require_results(node, op, name)
    return attributes


def _torch_dtype(number: int, node: str) -> torch.dtype:
    """Return the torch dtype of a number of ``TensorProto.DataType`` in a node's attribute.

    Raises:
        OnnxRefused: there is none.
    """
    if number not in DTYPES:
        problem = f"numbers of the type {ir.DataType(number).name}"
        raise OnnxRefused("form_unknown", node=node, problem=problem)
    return DTYPES[number]


def _require_results(node: ir.Node, op: str, name: str) -> None:
    """Raise if outputs are read that the function of an operator does not compute."""
    results = OPERATORS[op].results
    missing = () if results is None else node.outputs[results:]
    if any(output.uses() or output.is_graph_output() for output in missing):
        problem = f"{op} of which more than {results} outputs are read"
        raise OnnxRefused("form_unknown", node=name, problem=problem)
    if op == "Dropout" and len(node.inputs) > 2:  # simplification has removed it for inference
        raise OnnxRefused("form_unknown", node=name, problem="Dropout for training")


def _json_value(attribute: ir.Attr, node: str) -> Any:
    """Return the value of an attribute; a tensor of one number is this number."""
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


def _constants(
    graph: ir.Graph, attributes: dict[ir.Node, Attributes]
) -> tuple[dict[ir.Value, Any], dict[ir.Value, Tensor]]:
    """Return the constants that nodes of the configuration read.

    Args:
        graph: the graph.
        attributes: the nodes that are not part of a module, with their attributes.

    Returns:
        The integers of shapes by value, and the other constants as tensors.

    Raises:
        OnnxRefused: a constant has a type that is not supported.
    """
    sizes: dict[ir.Value, Any] = {}
    computed: set[ir.Value] = set()  # integers of shapes that nodes compute
    read = [item for item in graph.outputs if item.is_initializer()]
    for node, values in attributes.items():
        inputs = [item for item in node.inputs if item is not None]
        read += [item for item in inputs if item.is_initializer()]
        operator = OPERATORS[node.op_type]
        is_size = node.op_type in SHAPE_READERS or (
            computes_sizes(node.op_type, values)
            and all(item in computed or _may_be_sizes(item) for item in inputs)
        )
        computed |= set(node.outputs) if is_size else set()
        for position, item in enumerate(node.inputs):
            computes = is_size and node.op_type not in SHAPE_READERS
            is_read_as_size = computes or position in operator.sizes | operator.indices
            if item is not None and is_read_as_size and _may_be_sizes(item):
                sizes[item] = tensor_of_value(item).tolist()
    tensors = {value: _checked(value) for value in dict.fromkeys(read) if value not in sizes}
    return sizes, tensors


def _may_be_sizes(value: ir.Value) -> bool:
    """Return whether a value is a constant of few integers, or of few conditions on them."""
    stored = value.const_value if value.is_initializer() else None
    return (
        stored is not None
        and stored.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
        and len(stored.shape) <= 1
        and stored.size <= MOST_SIZES
    )


def _checked(value: ir.Value) -> Tensor:
    """Return an initializer as a tensor.

    Raises:
        OnnxRefused: it has a type that is not supported.
    """
    if value.dtype is None or int(value.dtype) not in DTYPES:
        raise OnnxRefused("weights_dtype", name=value.name, dtype=str(value.dtype))
    return tensor_of_value(value)


def build(converted: Converted) -> OnnxNetwork:
    """Return the network with its weights, in evaluation mode."""
    with torch.device("meta"):  # the state dict replaces all tensors
        network = OnnxNetwork(**converted.config)
    network.load_state_dict(converted.weights, strict=True, assign=True)
    return network.eval()
