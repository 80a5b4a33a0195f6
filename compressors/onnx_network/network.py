"""``OnnxNetwork``: a PyTorch network that computes an ONNX graph.

The arguments of the class describe the graph without its weights as JSON values, so a bundle stores
it like any other network: the class and its arguments in ``model.json``, and the weights in
safetensors files. Embedding tables and dense layers are PyTorch modules, which steps compress.
Functions compute the other nodes (``operators/``).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from compressors.errors.onnx_graphs import OnnxRefused
from compressors.onnx_network.operators.layout import wrap_negative_indices
from compressors.onnx_network.operators.registry import OPERATORS, computes_sizes
from compressors.onnx_network.operators.sizes import (
    OPERATORS_ON_SIZES,
    Sizes,
    as_sizes,
    sizes_to_tensor,
)

Value: TypeAlias = Tensor | Sizes
"""A value of the graph: a tensor, or sizes, from which the graph computes shapes."""


@dataclass(frozen=True)
class GraphInput:
    """An input of the graph.

    Attributes:
        name: its name.
        dtype: dtype of its tensor; all integer types of ONNX become int64.
        shape: the size of each dimension; None for a dynamic one.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def convert(self, tensor: Tensor) -> Tensor:
        """Convert a tensor to the input's dtype and number of dimensions.

        If the input has one value per row, the tensor may be ``(rows,)`` or ``(rows, 1)``.

        Raises:
            TypeError: the input has integers and the tensor has floats.
            ValueError: the tensor has another shape.
        """
        dtype: torch.dtype = getattr(torch, self.dtype)
        if dtype is torch.int64 and tensor.is_floating_point():
            raise TypeError(f"expected integers as the input {self.name}, got floats")
        if tensor.dim() == 1 and len(self.shape) == 2:
            tensor = tensor.unsqueeze(1)
        elif tensor.dim() == 2 and len(self.shape) == 1 and tensor.shape[1] == 1:
            tensor = tensor.squeeze(1)
        has_shape = tensor.dim() == len(self.shape) and all(
            size is None or size == got for size, got in zip(self.shape, tensor.shape, strict=True)
        )
        if not has_shape:
            raise ValueError(
                f"expected the shape {self.shape} of the input {self.name}, got "
                f"{tuple(tensor.shape)}; a list must have this length in the data"
            )
        return tensor.to(dtype)


@dataclass(frozen=True)
class Node:
    """A node of the graph.

    Attributes:
        op: its ONNX operator, or ``Module`` if it calls a module.
        inputs: names of its inputs; empty for an omitted optional input.
        outputs: names of its outputs; empty for an omitted optional output.
        attributes: its attributes.
        module: name of the called module; None for an operator.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    module: str | None


MODULE_OP = "Module"

ROWS_ATTRIBUTE = "rows"
"""Attribute of a node that calls a table: the table's number of rows, if ids may be negative."""


class OnnxNetwork(nn.Module):
    """A network that computes an ONNX graph.

    Do not rename the arguments or the public attributes: bundles store the arguments by name, and
    the names of their weights were chosen to differ from all public attributes.

    Args:
        inputs: name, dtype and shape of each input, as in ``GraphInput``.
        outputs: name of the value that is returned, by the name of the output.
        nodes: the nodes in the order of computation, as in ``Node``.
        tables: rows and dimension of each table, by name.
        layers: by name of each dense layer, ``inputs``, ``outputs`` and whether it has a ``bias``.
            The number of inputs or outputs may be given as the name of a width.
        widths: by name, numbers of outputs that are also numbers of inputs of other layers.
        parameters: dtype and shape of the other trained weights, by name.
        buffers: dtype and shape of the constants, by name.
        sizes: constant integers from which the graph computes shapes, by name.

    Raises:
        OnnxRefused: an operator, or one of its attributes, is not supported.
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
        self.nodes = tuple(_parse_node(item) for item in nodes)
        self.sizes = {name: as_sizes(values) for name, values in sizes.items()}
        self.tensor_names = (*parameters, *buffers)
        for name, (rows, dim) in tables.items():
            self.add_module(name, nn.Embedding(rows, dim))
        for name, layer in layers.items():
            in_features, out_features = (
                widths[size] if isinstance(size, str) else size
                for size in (layer["inputs"], layer["outputs"])
            )
            self.add_module(name, nn.Linear(in_features, out_features, bias=layer["bias"]))
        for name, spec in parameters.items():
            self.register_parameter(name, nn.Parameter(_empty(spec)))
        for name, spec in buffers.items():
            self.register_buffer(name, _empty(spec))
        self._last_uses = _find_last_uses(self.nodes, self.outputs.values())

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Compute the outputs.

        Args:
            inputs: a tensor ``(rows, ...)`` for each input, by name.

        Returns:
            The output; if there are several, a dictionary of outputs by name.
        """
        tensors = self.graph_inputs(inputs)
        device = next(iter(tensors.values())).device
        values: dict[str, Value] = {**tensors, **self.sizes}
        values |= {name: getattr(self, name) for name in self.tensor_names}
        for node, last_uses in zip(self.nodes, self._last_uses, strict=True):
            results = self._compute(node, [values.get(name) for name in node.inputs], device)
            values.update(
                (name, result) for name, result in zip(node.outputs, results, strict=False) if name
            )
            for name in last_uses:  # frees their memory
                values.pop(name, None)
        outputs = {name: _as_tensor(values[value], device) for name, value in self.outputs.items()}
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def graph_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the inputs to the dtypes and numbers of dimensions of the graph.

        Raises:
            TypeError, ValueError: see ``GraphInput.convert``.
        """
        return {item.name: item.convert(inputs[item.name]) for item in self.inputs}

    def _compute(
        self, node: Node, arguments: list[Value | None], device: torch.device
    ) -> tuple[Value, ...]:
        """Return the outputs of a node.

        Raises:
            OnnxRefused: the node needs constant sizes and receives a tensor, or has attributes or
                inputs that the operator's function does not support.
        """
        result: Any = None
        if node.module is not None:
            module_input = _as_tensor(arguments[0], device)
            if ROWS_ATTRIBUTE in node.attributes:
                rows = node.attributes[ROWS_ATTRIBUTE]
                module_input = wrap_negative_indices(module_input, rows)
            result = self.get_submodule(node.module)(module_input)
        elif not any(isinstance(item, Tensor) for item in arguments) and computes_sizes(
            node.op, node.attributes
        ):
            result = OPERATORS_ON_SIZES[node.op](*arguments, **node.attributes)
        if result is None:  # an operator on tensors, or a result that is too large for sizes
            operator = OPERATORS[node.op]
            # Inputs at ``size_inputs`` must be sizes, those at ``index_inputs`` may be sizes.
            converted: list[Value | None] = []
            for position, argument in enumerate(arguments):
                if position in operator.size_inputs and isinstance(argument, Tensor):
                    raise OnnxRefused("shape_from_values", op=node.op, node=node.outputs[0])
                accepts_sizes = position in operator.size_inputs | operator.index_inputs
                is_unchanged = accepts_sizes or argument is None
                converted.append(argument if is_unchanged else _as_tensor(argument, device))
            keywords = {"device": device} if operator.needs_device else {}
            try:
                result = operator.function(*converted, **node.attributes, **keywords)
            except NotImplementedError as fault:
                problem = str(fault)
                raise OnnxRefused("form_unknown", node=node.outputs[0], problem=problem) from fault
        return result if isinstance(result, tuple) else (result,)


def _parse_node(item: Mapping[str, Any]) -> Node:
    """Return a node of the configuration.

    Raises:
        OnnxRefused: its operator, or one of its attributes, is not supported.
    """
    node = Node(
        op=item["op"],
        inputs=tuple(item["inputs"]),
        outputs=tuple(item["outputs"]),
        attributes=dict(item.get("attributes", {})),
        module=item.get("module"),
    )
    if node.op != MODULE_OP:
        require_supported(node.op, node.attributes, node.outputs[0])
    return node


def require_supported(op: str, attributes: Mapping[str, Any], node: str) -> None:
    """Raise unless an operator and its attributes are supported.

    Args:
        op: the operator.
        attributes: the attributes of the node.
        node: name of the node, for the message.

    Raises:
        OnnxRefused: the operator, or one of the attributes, is not supported.
    """
    if op not in OPERATORS:
        raise OnnxRefused("operator_unknown", op=op, node=node)
    if unknown := tuple(sorted(attributes.keys() - OPERATORS[op].attributes)):
        raise OnnxRefused("attributes_unknown", op=op, node=node, attributes=unknown)


def _empty(spec: Mapping[str, Any]) -> Tensor:
    """Return a tensor of this dtype and shape, whose values are loaded later."""
    return torch.zeros(spec["shape"], dtype=getattr(torch, spec["dtype"]))


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    """Return a value as a tensor."""
    return value if isinstance(value, Tensor) else sizes_to_tensor(value, device)


def _find_last_uses(nodes: Sequence[Node], outputs: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Return, for each node, its inputs that no later node consumes and that are no outputs."""
    used_later = set(outputs)
    last_uses = []
    for node in reversed(nodes):
        names = tuple(dict.fromkeys(name for name in node.inputs if name not in used_later))
        used_later.update(names)
        last_uses.append(names)
    return tuple(reversed(last_uses))
