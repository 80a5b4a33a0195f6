"""Find the embedding tables and dense layers of an ONNX graph.

A table is a ``Gather`` from an initializer. A dense layer is a ``Gemm``, or a ``MatMul`` and the
``Add`` of its bias. Nodes with the same weights become calls of the same module.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compressors.onnx_network.names import layer_path

ModuleKey: TypeAlias = tuple[Any, ...]
"""Identifies a module: its weight, then what else it depends on, such as the bias."""


@dataclass(frozen=True)
class ModuleCall:
    """Nodes of a graph that become a call of one PyTorch module.

    Attributes:
        key: equal for calls of the same module.
        kind: ``Embedding`` or ``Linear``, the name of the module's class in ``torch.nn``.
        path: the module's name as a path, such as ``("tower", "hidden")``.
        arguments: rows and dimension of a table; inputs, outputs and has-bias flag of a layer.
        weights: returns the state dict of the module.
        input: the value that the module receives.
        output: the value that it returns.
        nodes: the nodes that the call replaces.
    """

    key: ModuleKey
    kind: str
    path: tuple[str, ...]
    arguments: tuple[int, ...]
    weights: Callable[[], dict[str, Tensor]]
    input: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def initializer_tensor(value: ir.Value) -> Tensor:
    """Return an initializer as a tensor; all integer types become int64."""
    if value.const_value is None:
        raise ValueError(f"the initializer {value.name} has no value")
    array = np.array(value.const_value.numpy())
    return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)


def find_module_calls(graph: ir.Graph) -> tuple[ModuleCall, ...]:
    """Return the calls of tables and dense layers, in the order of the graph.

    A weight that other nodes also read does not become a module, because compression would remove
    the tensor that they need. An example is a table whose transpose scores all items.
    """
    calls = tuple(call for node in graph for call in _find_call(node))
    key_of = {node: call.key for call in calls for node in call.nodes}
    return tuple(
        call
        for call in calls
        if {key_of.get(node) for node in call.key[0].consumers()} == {call.key}
    )


def _find_call(node: ir.Node) -> Iterator[ModuleCall]:
    """Yield the module call of a node, if there is one."""
    if node.domain != "" or len(node.inputs) < 2:
        return
    first, second = node.inputs[:2]
    if first is None or second is None:
        return
    match node.op_type:
        case "Gather" if _is_weight_matrix(first) and not second.is_initializer():
            if node.attributes.get_int("axis", 0) in (0, -2):
                yield _table_call(node, weight=first, ids=second)
        case "MatMul" if _is_weight_matrix(second) and not first.is_initializer():
            yield _dense_call(node, first, weight=second, is_transposed=False)
        case "Gemm" if _is_weight_matrix(second) and not first.is_initializer():
            if not node.attributes.get_int("transA", 0) and _has_valid_bias(node, second):
                is_transposed = bool(node.attributes.get_int("transB", 0))
                yield _dense_call(node, first, weight=second, is_transposed=is_transposed)


def _is_weight_matrix(value: ir.Value) -> bool:
    """Return whether a value is a float32 initializer with two dimensions."""
    stored = value.const_value if value.is_initializer() else None
    return stored is not None and stored.dtype == ir.DataType.FLOAT and len(stored.shape) == 2


def _table_call(node: ir.Node, weight: ir.Value, ids: ir.Value) -> ModuleCall:
    rows, dim = _matrix_shape(weight)
    return ModuleCall(
        key=(weight, "Embedding"),
        kind="Embedding",
        path=layer_path(node, weight),
        arguments=(rows, dim),
        weights=lambda: {"weight": initializer_tensor(weight)},
        input=ids,
        output=node.outputs[0],
        nodes=(node,),
    )


def _dense_call(node: ir.Node, x: ir.Value, weight: ir.Value, *, is_transposed: bool) -> ModuleCall:
    """Return the call of the layer ``x @ weight + bias``."""
    outputs, inputs = _matrix_shape(weight) if is_transposed else _matrix_shape(weight)[::-1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    bias_add = None if node.op_type == "Gemm" else _find_bias_add(node.outputs[0], outputs)
    if bias_add is not None:
        bias = next(item for item in bias_add.inputs if item is not node.outputs[0])
    alpha = node.attributes.get_float("alpha", 1.0)
    beta = node.attributes.get_float("beta", 1.0)

    def weights() -> dict[str, Tensor]:
        matrix = initializer_tensor(weight)
        tensors = {"weight": alpha * (matrix if is_transposed else matrix.T).contiguous()}
        if bias is not None:
            tensors["bias"] = beta * initializer_tensor(bias).reshape(-1).expand(outputs)
        return tensors

    return ModuleCall(
        key=(weight, is_transposed, bias, alpha, beta),
        kind="Linear",
        path=layer_path(node, weight),
        arguments=(inputs, outputs, bias is not None),
        weights=weights,
        input=x,
        output=node.outputs[0] if bias_add is None else bias_add.outputs[0],
        nodes=(node,) if bias_add is None else (node, bias_add),
    )


def _matrix_shape(weight: ir.Value) -> tuple[int, int]:
    assert weight.const_value is not None  # noqa: S101 - checked by _is_weight_matrix; for mypy
    rows, columns = (int(size) for size in weight.const_value.shape)
    return rows, columns


def _has_valid_bias(gemm: ir.Node, weight: ir.Value) -> bool:
    """Return whether a Gemm adds nothing, one number, or one number per output."""
    if len(gemm.inputs) < 3 or gemm.inputs[2] is None:
        return True
    outputs = _matrix_shape(weight)[0 if gemm.attributes.get_int("transB", 0) else 1]
    return _is_bias(gemm.inputs[2], (1, outputs))


def _is_bias(value: ir.Value | None, sizes: tuple[int, ...]) -> bool:
    """Return whether a value is a float32 initializer of one row with one of these sizes."""
    stored = value.const_value if value is not None and value.is_initializer() else None
    return (
        stored is not None
        and stored.dtype == ir.DataType.FLOAT
        and stored.size in sizes
        and all(size == 1 for size in tuple(stored.shape)[:-1])
    )


def _find_bias_add(product: ir.Value, outputs: int) -> ir.Node | None:
    """Return the Add of a bias that is the only consumer of a product, if there is one."""
    consumers = tuple(product.consumers())
    if len(consumers) != 1 or product.is_graph_output() or consumers[0].op_type != "Add":
        return None
    bias = next((item for item in consumers[0].inputs if item is not product), None)
    # A bias of more than two dimensions could add a dimension to the product.
    keeps_rank = bias is not None and bias.shape is not None and len(bias.shape) <= 2
    return consumers[0] if keeps_rank and _is_bias(bias, (outputs,)) else None
