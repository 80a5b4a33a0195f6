"""Find the tables and dense layers of an ONNX graph.

A table is a ``Gather`` from an initializer, a dense layer a ``Gemm``, or a ``MatMul`` with the
``Add`` of its bias. Nodes with the same weights share a module.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compressors.onnx_network.names import layer_path


@dataclass(frozen=True)
class ModuleCall:
    """Nodes of a graph that become the call of one module of torch.

    Attributes:
        key: equal for calls of the same module.
        kind: name of the module's class in ``torch.nn``.
        path: parts of the module's name.
        arguments: rows and dimension of a table; inputs, outputs and bias of a layer.
        weights: returns its state dict.
        source: the value that it receives.
        result: the value that it returns.
        nodes: the nodes that the call replaces.
    """

    key: tuple[Any, ...]
    kind: str
    path: tuple[str, ...]
    arguments: tuple[int, ...]
    weights: Callable[[], dict[str, Tensor]]
    source: ir.Value
    result: ir.Value
    nodes: tuple[ir.Node, ...]


def tensor_of_value(value: ir.Value) -> Tensor:
    """Return an initializer as a tensor; integers of all sizes are int64."""
    if value.const_value is None:
        raise ValueError(f"the initializer {value.name} has no value")
    array = np.array(value.const_value.numpy())
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)


def module_calls(graph: ir.Graph) -> tuple[ModuleCall, ...]:
    """Return the calls of tables and dense layers, in the order of the graph.

    A weight that other nodes read too, such as a table whose transpose scores all items, is none
    of a module, because a compressed module has no such weight.
    """
    calls = tuple(call for node in graph for call in _call(node))
    key_of = {node: call.key for call in calls for node in call.nodes}
    return tuple(
        call
        for call in calls
        if {key_of.get(node) for node in call.key[0].consumers()} == {call.key}
    )


def _call(node: ir.Node) -> Iterator[ModuleCall]:
    """Yield the module call of a node, if there is one."""
    if node.domain != "" or len(node.inputs) < 2:
        return
    first, second = node.inputs[:2]
    if first is None or second is None:
        return
    match node.op_type:
        case "Gather" if _is_matrix(first) and not second.is_initializer():
            if node.attributes.get_int("axis", 0) in (0, -2):
                yield _table(node, weight=first, ids=second)
        case "MatMul" if _is_matrix(second) and not first.is_initializer():
            yield _dense(node, source=first, weight=second, is_transposed=False)
        case "Gemm" if _is_matrix(second) and not first.is_initializer():
            if not node.attributes.get_int("transA", 0) and _has_vector(node, second):
                is_transposed = bool(node.attributes.get_int("transB", 0))
                yield _dense(node, source=first, weight=second, is_transposed=is_transposed)


def _is_matrix(value: ir.Value) -> bool:
    """Return whether a value is an initializer with rows and columns of float32."""
    stored = value.const_value if value.is_initializer() else None
    return stored is not None and stored.dtype == ir.DataType.FLOAT and len(stored.shape) == 2


def _table(node: ir.Node, weight: ir.Value, ids: ir.Value) -> ModuleCall:
    rows, dim = _shape(weight)
    return ModuleCall(
        key=(weight, "Embedding"),
        kind="Embedding",
        path=layer_path(node, weight),
        arguments=(rows, dim),
        weights=lambda: {"weight": tensor_of_value(weight)},
        source=ids,
        result=node.outputs[0],
        nodes=(node,),
    )


def _dense(node: ir.Node, source: ir.Value, weight: ir.Value, *, is_transposed: bool) -> ModuleCall:
    """Return the call of the layer ``source @ weight + bias``."""
    outputs, inputs = _shape(weight) if is_transposed else _shape(weight)[::-1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    addition = None if node.op_type == "Gemm" else _addition(node.outputs[0], outputs)
    if addition is not None:
        bias = next(item for item in addition.inputs if item is not node.outputs[0])
    alpha = node.attributes.get_float("alpha", 1.0)
    beta = node.attributes.get_float("beta", 1.0)

    def weights() -> dict[str, Tensor]:
        matrix = tensor_of_value(weight)
        tensors = {"weight": alpha * (matrix if is_transposed else matrix.T).contiguous()}
        if bias is not None:
            tensors["bias"] = beta * tensor_of_value(bias).reshape(-1).expand(outputs)
        return tensors

    return ModuleCall(
        key=(weight, is_transposed, bias, alpha, beta),
        kind="Linear",
        path=layer_path(node, weight),
        arguments=(inputs, outputs, bias is not None),
        weights=weights,
        source=source,
        result=node.outputs[0] if addition is None else addition.outputs[0],
        nodes=(node,) if addition is None else (node, addition),
    )


def _shape(weight: ir.Value) -> tuple[int, int]:
    assert weight.const_value is not None  # noqa: S101 - _is_matrix has checked it; for mypy
    rows, columns = (int(size) for size in weight.const_value.shape)
    return rows, columns


def _has_vector(gemm: ir.Node, weight: ir.Value) -> bool:
    """Return whether what a Gemm adds is one number per column, or nothing."""
    if len(gemm.inputs) < 3 or gemm.inputs[2] is None:
        return True
    columns = _shape(weight)[0 if gemm.attributes.get_int("transB", 0) else 1]
    return _is_vector(gemm.inputs[2], (1, columns))


def _is_vector(value: ir.Value | None, counts: tuple[int, ...]) -> bool:
    """Return whether a value is an initializer of one row of float32 with such a size."""
    stored = value.const_value if value is not None and value.is_initializer() else None
    return (
        stored is not None
        and stored.dtype == ir.DataType.FLOAT
        and stored.size in counts
        and all(size == 1 for size in tuple(stored.shape)[:-1])
    )


def _addition(product: ir.Value, outputs: int) -> ir.Node | None:
    """Return the Add of a bias that alone reads a product; None if there is none."""
    consumers = tuple(product.consumers())
    if len(consumers) != 1 or product.is_graph_output() or consumers[0].op_type != "Add":
        return None
    bias = next((item for item in consumers[0].inputs if item is not product), None)
    # With more dimensions, the bias could add one to the product.
    has_two = bias is not None and bias.shape is not None and len(bias.shape) <= 2
    return consumers[0] if has_two and _is_vector(bias, (outputs,)) else None
