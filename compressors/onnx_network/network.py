"""``OnnxNetwork``: a torch network that computes what an ONNX graph computes.

The graph without its weights is the configuration of the class, plain JSON, so a bundle stores the
network like any other: ``model.json`` has the class and the configuration, and the safetensors
files the weights. Tables and dense layers are modules of torch, which steps compress; the other
nodes are functions (``operators/``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from compressors.errors.onnx_graphs import OnnxRefused
from compressors.onnx_network.operators.layout import from_start
from compressors.onnx_network.operators.sizes import SIZE_OPERATORS, Sizes, as_sizes, tensor_of
from compressors.onnx_network.operators.table import OPERATORS, computes_sizes

Value: TypeAlias = Tensor | Sizes
"""A value of the graph: a tensor, or integers of a shape."""


@dataclass(frozen=True)
class GraphInput:
    """An input of the graph.

    Attributes:
        name: its name.
        dtype: dtype of its tensor; integers of all sizes are int64.
        shape: the size of each dimension; None for a dynamic one.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def convert(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the input's dtype and number of dimensions.

        One value per row may have the shape ``(rows,)`` or ``(rows, 1)``.

        Raises:
            TypeError: the input is for integers and the tensor has floats.
            ValueError: the sizes differ.
        """
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype is torch.int64 and tensor.is_floating_point():
            raise TypeError(f"expected integers as the input {self.name}, got floats")
        if tensor.dim() == 1 and len(self.shape) == 2:
            tensor = tensor.unsqueeze(1)
        elif tensor.dim() == 2 and len(self.shape) == 1 and tensor.shape[1] == 1:
            tensor = tensor.squeeze(1)
        fits = tensor.dim() == len(self.shape) and all(
            size is None or size == got for size, got in zip(self.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"expected the shape {self.shape} of the input {self.name}, got "
                f"{tuple(tensor.shape)}; a list must have this length in the data"
            )
        return tensor.to(dtype)


@dataclass(frozen=True)
class Node:
    """A node of the graph.

    Attributes:
        op: its ONNX operator, or ``Module`` for a call of a module.
        inputs: names of its inputs; empty for an optional input without value.
        outputs: names of its outputs; empty for an output that no node reads.
        attributes: its attributes.
        module: name of the called module.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    module: str | None


MODULE = "Module"

ROWS = "rows"
"""The attribute of a call of a table whose ids may be negative: its number of rows."""


class OnnxNetwork(nn.Module):
    """A network that computes the outputs of an ONNX graph.

    Its tables, dense layers and other weights are attributes that are named after the initializers.

    Args:
        inputs: name, dtype and shape of each input, as in ``GraphInput``.
        outputs: name of each output, and the value that it returns.
        nodes: the nodes in the order in which they are computed, as in ``Node``.
        tables: rows and dimension of each table, by name.
        layers: inputs, outputs and bias of each dense layer, by name. In place of a number of
            inputs or outputs, the name of a width.
        widths: numbers of outputs of layers that are also numbers of inputs of others, by name.
        parameters: dtype and shape of the other trained weights, by name.
        buffers: dtype and shape of the constants, by name.
        sizes: integers from which shapes are computed, by name.

    Raises:
        OnnxRefused: a node has an unknown operator.
    """

    def __init__(
        self,
        inputs: Sequence[Mapping[str, Any]],
        outputs: Mapping[str, str],
        nodes: Sequence[Mapping[str, Any]],
        tables: Mapping[str, Sequence[int]],
        layers: Mapping[str, Mapping[str, Any]],
        widths: Mapping[str, int],
        parameters: Mapping[str, Mapping[str, Any]],
        buffers: Mapping[str, Mapping[str, Any]],
        sizes: Mapping[str, int | list[int]],
    ) -> None:
        super().__init__()
        self.inputs = tuple(
            GraphInput(item["name"], item["dtype"], tuple(item["shape"])) for item in inputs
        )
        self.outputs = dict(outputs)
        self.nodes = tuple(_node(item) for item in nodes)
        self.sizes = {name: as_sizes(values) for name, values in sizes.items()}
        self.tensor_names = (*parameters, *buffers)
        for name, (rows, dim) in tables.items():
            self.add_module(name, nn.Embedding(rows, dim))
        for name, layer in layers.items():
            ends = (layer["inputs"], layer["outputs"])
            inner, outer = (widths[end] if isinstance(end, str) else end for end in ends)
            self.add_module(name, nn.Linear(inner, outer, bias=layer["bias"]))
        for name, spec in parameters.items():
            self.register_parameter(name, nn.Parameter(_empty(spec)))
        for name, spec in buffers.items():
            self.register_buffer(name, _empty(spec))
        self._released = _last_uses(self.nodes, self.outputs.values())

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Compute the outputs.

        Args:
            inputs: the tensor of each input, ``(rows, ...)``.

        Returns:
            The tensor of the only output, or those of several by name.
        """
        tensors = self.graph_inputs(inputs)
        device = next(iter(tensors.values())).device
        values: dict[str, Value] = {**tensors, **self.sizes}
        values |= {name: getattr(self, name) for name in self.tensor_names}
        for node, released in zip(self.nodes, self._released, strict=True):
            results = self._compute(node, [values.get(name) for name in node.inputs], device)
            values.update(
                (name, result) for name, result in zip(node.outputs, results, strict=False) if name
            )
            for name in released:
                values.pop(name, None)
        outputs = {name: _tensor(values[value], device) for name, value in self.outputs.items()}
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def graph_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs with the dtypes and dimensions of the graph.

        Raises:
            TypeError, ValueError: as ``GraphInput.convert``.
        """
        return {item.name: item.convert(inputs[item.name]) for item in self.inputs}

    def _compute(
        self, node: Node, arguments: list[Value | None], device: torch.device
    ) -> tuple[Value, ...]:
        """Return the outputs of a node."""
        result: Any = None
        if node.module is not None:
            source = _tensor(arguments[0], device)
            if ROWS in node.attributes:
                source = from_start(source, node.attributes[ROWS])
            result = self.get_submodule(node.module)(source)
        elif not any(isinstance(item, Tensor) for item in arguments) and computes_sizes(
            node.op, node.attributes
        ):
            result = SIZE_OPERATORS[node.op](*arguments, **node.attributes)
        if result is None:
            operator = OPERATORS[node.op]
            converted: list[Value | None] = []
            for position, argument in enumerate(arguments):
                if position in operator.sizes and isinstance(argument, Tensor):
                    raise OnnxRefused("shape_from_values", op=node.op, node=node.outputs[0])
                keeps = position in operator.sizes | operator.indices or argument is None
                converted.append(argument if keeps else _tensor(argument, device))
            placed = {"device": device} if operator.needs_device else {}
            try:
                result = operator.function(*converted, **node.attributes, **placed)
            except NotImplementedError as fault:
                problem = str(fault)
                raise OnnxRefused("form_unknown", node=node.outputs[0], problem=problem) from fault
        return result if isinstance(result, tuple) else (result,)


def _node(item: Mapping[str, Any]) -> Node:
    """Return a node of the configuration.

    Raises:
        OnnxRefused: its operator, or one of its attributes, is unknown.
    """
    node = Node(
        op=item["op"],
        inputs=tuple(item["inputs"]),
        outputs=tuple(item["outputs"]),
        attributes=dict(item.get("attributes", {})),
        module=item.get("module"),
    )
    if node.op != MODULE:
        require_supported(node.op, node.attributes, node.outputs[0])
    return node


def require_supported(op: str, attributes: Mapping[str, Any], node: str) -> None:
    """Raise unless a node can be computed.

    Args:
        op: its operator.
        attributes: its attributes.
        node: its name, for the message.

    Raises:
        OnnxRefused: its operator, or one of its attributes, is unknown.
    """
    if op not in OPERATORS:
        raise OnnxRefused("operator_unknown", op=op, node=node)
    if unknown := tuple(sorted(attributes.keys() - OPERATORS[op].attributes)):
        raise OnnxRefused("attributes_unknown", op=op, node=node, attributes=unknown)


def _empty(spec: Mapping[str, Any]) -> Tensor:
    """Return a tensor of this dtype and shape, whose values are loaded later."""
    return torch.zeros(spec["shape"], dtype=getattr(torch, spec["dtype"]))


def _tensor(value: Any, device: torch.device) -> Tensor:
    """Return a value as a tensor."""
    return value if isinstance(value, Tensor) else tensor_of(value, device)


def _last_uses(nodes: Sequence[Node], outputs: Any) -> tuple[tuple[str, ...], ...]:
    """Return, for each node, the values that no later node and no output reads."""
    seen = set(outputs)
    released = []
    for node in reversed(nodes):
        names = tuple(dict.fromkeys(name for name in node.inputs if name not in seen))
        seen.update(names)
        released.append(names)
    return tuple(reversed(released))
