"""Follow elements through operators that only rearrange them.

Such an operator concatenates, reshapes, selects or moves elements; it computes nothing. Each
element of a row gets a label, such as its position in another tensor. The labels of the operator's
output then say where each of its elements comes from. Labels are computed by the operator itself:
it is called with a batch of one row, the labels.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from compressors.lower.lookups.program_editor import row_shape, shape_of

_aten = torch.ops.aten
IDENTITIES = {
    _aten.contiguous.default,
    _aten.clone.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten.dropout.default,  # in evaluation mode
}
"""Operators whose output equals their input."""
RESHAPES = {
    _aten.view.default,
    _aten.reshape.default,
    _aten._unsafe_view.default,
    _aten.flatten.using_ints,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
}
"""Operators that keep all elements of a row in their order."""
SELECTIONS = {_aten.select.int, _aten.slice.Tensor, _aten.narrow.default}
"""Operators that select some elements of a row."""
_MOVES = {_aten.permute.default, _aten.transpose.int}
_SPLITS = {
    _aten.unbind.int,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.chunk.default,
}
JOINS = {_aten.cat.default, _aten.concat.default, _aten.stack.default}
"""Operators that join several tensors, the first argument."""
_WITH_ONE_INPUT = RESHAPES | SELECTIONS | _MOVES | _SPLITS | {operator.getitem}


def is_identity(node: fx.Node) -> bool:
    """Return whether a node's output equals its input."""
    if node.target in {_aten.to.dtype, _aten._to_copy.default}:
        source = node.args[0]
        return isinstance(source, fx.Node) and source.meta["val"].dtype == node.meta["val"].dtype
    return node.target in IDENTITIES


def layout_input(node: fx.Node) -> fx.Node | None:
    """Return the only tensor that an operator rearranges; None for other operators."""
    if node.target in _WITH_ONE_INPUT or is_identity(node):
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    return None


class Labels:
    """Labels of the elements of a row.

    Attributes:
        find: returns the labels of a node, ``(1, *row)``; None if they follow from its inputs.
        default: the labels of a node that computes something, given its shape ``(1, *row)``; None
            if its elements have no labels.
    """

    def __init__(
        self,
        find: Callable[[fx.Node], Tensor | None],
        default: Callable[[tuple[int, ...]], Tensor] | None = None,
    ) -> None:
        self.find = find
        self.default = default
        self._known: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Tensor | None:
        """Return the labels of a node's output, ``(1, *row)``; None if some element has none."""
        labels = self._compute(node)
        return labels if isinstance(labels, Tensor) else None

    def _compute(self, node: fx.Node) -> Any:
        if node not in self._known:
            self._known[node] = self._find_or_follow(node)
        return self._known[node]

    def _find_or_follow(self, node: fx.Node) -> Any:
        found = self.find(node)
        if found is not None:
            return found
        if is_identity(node):
            return self._compute(node.args[0])  # type: ignore[arg-type]
        if node.target in _WITH_ONE_INPUT or node.target in JOINS:
            followed = self._follow(node)
            if followed is not None:
                return followed
        shape = row_shape(node)
        return None if self.default is None or shape is None else self.default((1, *shape))

    def _follow(self, node: fx.Node) -> Any:
        """Call an operator with the labels of its inputs; None if it does not keep rows apart."""
        rows = self._rows(node)
        if rows is None:
            return None
        labels: dict[fx.Node, Any] = {}
        for source in node.all_input_nodes:
            value = source.meta.get("val")
            if isinstance(value, torch.SymInt):
                if str(value) != rows:
                    return None
                labels[source] = 1
                continue
            labels[source] = self._compute(source)
            if labels[source] is None:
                return None
        try:
            result = node.target(*fx.node.map_arg(node.args, labels.__getitem__), **node.kwargs)  # type: ignore[operator]
        except (RuntimeError, IndexError):  # it mixes the elements of several rows
            return None
        if node.target in _SPLITS:
            return result
        return result if tuple(result.shape) == (1, *shape_of(node)[1:]) else None

    def _rows(self, node: fx.Node) -> str | None:
        """Return the number of rows of an operator's output, if its inputs have as many."""
        sources = [other for other in node.all_input_nodes if shape_of(other)]
        values = [other for other in (node, *sources) if shape_of(other)]
        counts = {str(shape_of(other)[0]) for other in values}
        split = node.args[0] if node.target is operator.getitem else None
        if isinstance(split, fx.Node):  # one of a Split's outputs
            counts.add(str(self._rows(split)))
        return counts.pop() if len(counts) == 1 else None


def positions(shape: tuple[int, ...]) -> Tensor:
    """Return the position of each element of a row, int64 ``(1, *shape)``."""
    return torch.arange(math.prod(shape)).reshape(1, *shape)
