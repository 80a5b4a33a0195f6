"""Follow trained weights through the simplification of a graph.

Constant folding replaces a node that reads weights by its result, such as a transposed weight.
The result is a weight too, and has the name of the weight that it replaces.
"""

import math
from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript.optimizer import FOLDED_FROM_KEY

RESHAPING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators whose result has the values of a weight in another shape."""

LOOKUPS = frozenset({"Gather", "GatherElements", "GatherND"})
"""Operators whose result may have a row of a weight twice. Training would change both."""

MOST_FOLDED = 512 * 512
"""Most elements of a result that is computed in advance, as in onnxscript."""


@dataclass(frozen=True)
class Weights:
    """The initializers of a graph that training may change.

    Attributes:
        names: their names before the graph is simplified.
        constants: the names of the other initializers and of the results of Constant nodes.
    """

    names: frozenset[str]
    constants: frozenset[str]

    @classmethod
    def of(cls, graph: ir.Graph) -> "Weights":
        """Return the weights of a graph: its floating-point initializers of several elements."""
        names = {
            name
            for name, value in graph.initializers.items()
            if value.dtype is not None and value.dtype.is_floating_point() and _is_larger(value, 1)
        }
        constants = {
            value.name or ""
            for node in graph
            if node.op_type == "Constant"
            for value in node.outputs
        }
        return cls(frozenset(names), frozenset(constants | graph.initializers.keys()) - names)

    def include(self, value: ir.Value) -> bool:
        """Return whether an initializer of the simplified graph is computed from weights.

        Rewrite rules that fuse nodes create initializers without a source; those are weights.
        """
        if value.name in self.constants:
            return False
        sources = value.meta.get(FOLDED_FROM_KEY)
        return not sources or not self.names.isdisjoint({*sources, value.name})

    def may_fold(self, node: ir.Node) -> bool | None:
        """Return whether a node with constant inputs is replaced by its result.

        None stands for the limits of onnxscript's constant folding. Weights are not copied: neither
        if another node reads them, nor into a result of more elements.
        """
        result = node.outputs[0]
        weights = [value for value in node.inputs if value is not None and self._is_weight(value)]
        if not weights:
            return False if _is_larger(result, MOST_FOLDED) else None
        is_copied = any(_has_other_readers(value, node) for value in weights)
        is_repeated = _is_larger(result, sum(_size(value) or 0 for value in weights))
        if is_copied or is_repeated or node.op_type in LOOKUPS:
            return False
        return True if node.op_type in RESHAPING else None

    def _is_weight(self, value: ir.Value) -> bool:
        is_float = value.dtype is not None and value.dtype.is_floating_point()
        return is_float and value.is_initializer() and self.include(value)

    def restore_names(self, graph: ir.Graph) -> None:
        """Give initializers that are computed from one weight, which is not left, its name."""
        weights = {
            value: self.names.intersection(value.meta.get(FOLDED_FROM_KEY, ()))
            for value in graph.initializers.values()
        }
        results = Counter(name for names in weights.values() for name in names)
        for value, names in weights.items():
            name = next(iter(names), "")
            is_only_result = len(names) == 1 and results[name] == 1
            if is_only_result and name not in graph.initializers and not value.is_graph_output():
                value.name = name


def _size(value: ir.Value) -> int | None:
    """Return the number of elements; None if it is not known."""
    if value.shape is None or not value.shape.is_static():
        return None
    size: int = math.prod(value.shape.numpy())
    return size


def _is_larger(value: ir.Value, count: int) -> bool:
    """Return whether a value is known to have more elements than a number."""
    size = _size(value)
    return size is not None and size > count


def _has_other_readers(weight: ir.Value, node: ir.Node) -> bool:
    """Return whether other nodes read a weight, except slices, which read other parts of it."""
    readers = set(weight.consumers())
    is_sliced = all(reader.op_type == "Slice" for reader in readers)
    return weight.is_graph_output() or (readers != {node} and not is_sliced)
