"""Find dense layers whose output is the input of other dense layers only.

The number of outputs of such a layer equals the number of inputs of its consumers. The network's
configuration has this width once, so pruning can reduce it for all these layers
(``compressors/prune/structure/config_widths.py``).
"""

from collections.abc import Collection, Mapping

import onnx_ir as ir

from compressors.onnx_network.module_calls import ModuleCall, ModuleKey

ELEMENTWISE_OPERATORS = frozenset(
    {
        *("Abs", "Cast", "Celu", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Sign"),
        *("Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
    }
)
"""Operators that compute each element of the output from the same element of their first input."""


def find_producers(calls: Collection[ModuleCall]) -> dict[ModuleKey, ModuleKey]:
    """Return the dense layer that produces the input of each dense layer, if they share a width.

    A layer and its producer share a width if only elementwise operators are between them and all
    consumers of the producer's output are such layers.

    Args:
        calls: the calls of modules in a graph.

    Returns:
        The key of the producer by the key of the layer.
    """
    dense = [call for call in calls if call.kind == "Linear"]
    by_node = {call.nodes[0]: call.key for call in dense}
    by_output = {call.output: call.key for call in dense}
    consumers: dict[ModuleKey, set[ModuleKey | None]] = {}
    producers: dict[ModuleKey, set[ModuleKey | None]] = {}
    for call in dense:
        consumers.setdefault(call.key, set()).update(_find_consumers(call.output, by_node))
        producers.setdefault(call.key, set()).add(_find_producer(call.input, by_output))
    return {
        key: producer
        for producer, keys in consumers.items()
        if all(key is not None and producers[key] == {producer} for key in keys)
        for key in keys
        if key is not None
    }


def _find_consumers(value: ir.Value, by_node: Mapping[ir.Node, ModuleKey]) -> set[ModuleKey | None]:
    """Return the layers that consume a value after elementwise operators; None for other nodes."""
    consumers: set[ModuleKey | None] = set()
    visited = {value}
    pending = [value]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            consumers.add(None)
        for node in value.consumers():
            if node in by_node:
                consumers.add(by_node[node])
            elif not _is_elementwise(node) or node.inputs[0] is not value:
                consumers.add(None)
            elif node.outputs[0] not in visited:
                visited.add(node.outputs[0])
                pending.append(node.outputs[0])
    return consumers


def _find_producer(value: ir.Value, by_output: Mapping[ir.Value, ModuleKey]) -> ModuleKey | None:
    """Return the layer that a value comes from through elementwise operators; None if none."""
    while value not in by_output:
        node = value.producer()
        if node is None or not _is_elementwise(node) or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return by_output[value]


def _is_elementwise(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in ELEMENTWISE_OPERATORS
