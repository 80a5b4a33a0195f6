"""Find dense layers whose output is the input of other dense layers only.

The number of outputs of such a layer is one number of the network's configuration, which is the
number of inputs of the other layers too. So pruning can make the layer narrower
(``compressors/prune/structure/config_widths.py``).
"""

from collections.abc import Collection, Mapping
from typing import Any

import onnx_ir as ir

from compressors.onnx_network.layers import ModuleCall

ELEMENT_BY_ELEMENT = frozenset(
    {
        *("Abs", "Cast", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Sign"),
        *("Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
    }
)
"""Operators that compute each element from the element of their first input."""

Key = tuple[Any, ...]


def layers_before(calls: Collection[ModuleCall]) -> dict[Key, Key]:
    """Return, for dense layers, the layer whose output is their only input.

    A layer whose output is read in another way too is in no entry.

    Args:
        calls: the calls of modules in a graph.

    Returns:
        The key of the layer before, by the key of the layer.
    """
    dense = [call for call in calls if call.kind == "Linear"]
    by_node = {call.nodes[0]: call.key for call in dense}
    by_result = {call.result: call.key for call in dense}
    readers: dict[Key, set[Key | None]] = {}
    sources: dict[Key, set[Key | None]] = {}
    for call in dense:
        readers.setdefault(call.key, set()).update(_readers(call.result, by_node))
        sources.setdefault(call.key, set()).add(_source(call.source, by_result))
    return {
        key: layer
        for layer, keys in readers.items()
        if all(key is not None and sources[key] == {layer} for key in keys)
        for key in keys
        if key is not None
    }


def _readers(value: ir.Value, by_node: Mapping[ir.Node, Key]) -> set[Key | None]:
    """Return the layers that read a value, element by element; None for another reader."""
    readers: set[Key | None] = set()
    visited = {value}
    pending = [value]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            readers.add(None)
        for node in value.consumers():
            if node in by_node:
                readers.add(by_node[node])
            elif not _is_element_by_element(node) or node.inputs[0] is not value:
                readers.add(None)
            elif node.outputs[0] not in visited:
                visited.add(node.outputs[0])
                pending.append(node.outputs[0])
    return readers


def _source(value: ir.Value, by_result: Mapping[ir.Value, Key]) -> Key | None:
    """Return the layer from whose output a value is computed element by element, or None."""
    while value not in by_result:
        node = value.producer()
        if node is None or not _is_element_by_element(node) or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return by_result[value]


def _is_element_by_element(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in ELEMENT_BY_ELEMENT
