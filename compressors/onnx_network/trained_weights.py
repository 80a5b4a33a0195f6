"""Find the trained weights of a graph, and track them while the graph is simplified.

Constant folding replaces a node whose inputs are constants by its result. If an input is a weight,
such as one that the graph transposes, the result is a weight too and gets the name of the weight
that it replaces.
"""

import math
from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript.optimizer import FOLDED_FROM_KEY

RESHAPE_OPERATORS = frozenset(
    {"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators whose output has the elements of the input in another shape."""

GATHER_OPERATORS = frozenset({"Gather", "GatherElements", "GatherND"})
"""Operators whose output may contain a row of a weight twice. They are not folded, because training
would change the two copies separately."""

MAX_FOLDED_ELEMENTS = 512 * 512
"""Largest number of elements of a folded result that is not a weight: onnxscript's default."""


@dataclass(frozen=True)
class TrainedWeights:
    """The initializers of a graph that training may change.

    Attributes:
        names: their names before the graph is simplified.
        constants: the names of the other initializers and of the outputs of Constant nodes.
    """

    names: frozenset[str]
    constants: frozenset[str]

    @classmethod
    def of(cls, graph: ir.Graph) -> "TrainedWeights":
        """Return the weights of a graph: floating-point initializers of two or more elements."""
        names = {
            name
            for name, value in graph.initializers.items()
            if value.dtype is not None
            and value.dtype.is_floating_point()
            and _has_more_elements(value, 1)
        }
        constants = {
            value.name or ""
            for node in graph
            if node.op_type == "Constant"
            for value in node.outputs
        }
        return cls(frozenset(names), frozenset(constants | graph.initializers.keys()) - names)

    def include(self, value: ir.Value) -> bool:
        """Return whether an initializer of the simplified graph is a weight or computed from one.

        Rewrite rules that fuse nodes create initializers that do not record what they were computed
        from; these count as weights.
        """
        if value.name in self.constants:
            return False
        sources = value.meta.get(FOLDED_FROM_KEY)
        return not sources or not self.names.isdisjoint({*sources, value.name})

    def should_fold(self, node: ir.Node) -> bool | None:
        """Return whether constant folding replaces a node by its result.

        None leaves the decision to onnxscript's default limits. Folding never duplicates a weight:
        a node stays if other nodes consume the weight, or if its result has more elements.
        """
        result = node.outputs[0]
        weights = [value for value in node.inputs if value is not None and self._is_weight(value)]
        if not weights:
            return False if _has_more_elements(result, MAX_FOLDED_ELEMENTS) else None
        needs_copy = any(_has_other_consumers(value, node) for value in weights)
        grows = _has_more_elements(result, sum(_element_count(value) or 0 for value in weights))
        if needs_copy or grows or node.op_type in GATHER_OPERATORS:
            return False
        return True if node.op_type in RESHAPE_OPERATORS else None

    def _is_weight(self, value: ir.Value) -> bool:
        is_float = value.dtype is not None and value.dtype.is_floating_point()
        return is_float and value.is_initializer() and self.include(value)

    def restore_names(self, graph: ir.Graph) -> None:
        """Rename each initializer that replaces exactly one weight to the name of that weight."""
        sources = {
            value: self.names.intersection(value.meta.get(FOLDED_FROM_KEY, ()))
            for value in graph.initializers.values()
        }
        result_counts = Counter(name for names in sources.values() for name in names)
        for value, names in sources.items():
            name = next(iter(names), "")
            is_only_result = len(names) == 1 and result_counts[name] == 1
            if is_only_result and name not in graph.initializers and not value.is_graph_output():
                value.name = name


def _element_count(value: ir.Value) -> int | None:
    """Return the number of elements; None if it is not known."""
    if value.shape is None or not value.shape.is_static():
        return None
    count: int = math.prod(value.shape.numpy())
    return count


def _has_more_elements(value: ir.Value, limit: int) -> bool:
    """Return whether a value is known to have more elements than the limit."""
    count = _element_count(value)
    return count is not None and count > limit


def _has_other_consumers(weight: ir.Value, node: ir.Node) -> bool:
    """Return whether a weight has other consumers than a node.

    Slices do not count if all consumers are slices, because they read different parts.
    """
    consumers = set(weight.consumers())
    is_sliced = all(consumer.op_type == "Slice" for consumer in consumers)
    return weight.is_graph_output() or (consumers != {node} and not is_sliced)
