"""Use the rows of a merged lookup directly where a network joins them again.

A network that concatenates, stacks or reshapes looked-up rows often restores the matrix that the
merged lookup returned, or a part of it. Its operators are then replaced by a slice of that matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from compressors.lower.lookups.layout import JOINS, RESHAPES, Labels, positions
from compressors.lower.lookups.program_editor import ProgramEditor, row_shape, shape_of

_aten = torch.ops.aten


def join_rows(editor: ProgramEditor, looked_up: Sequence[fx.Node]) -> None:
    """Replace operators that rearrange the outputs of merged lookups.

    Args:
        editor: the program.
        looked_up: the outputs of merged lookups, ``(rows, lookups, dim)``.
    """
    for rows in looked_up:
        _join_rows_of(editor, rows)


def _join_rows_of(editor: ProgramEditor, rows: fx.Node) -> None:
    shape = row_shape(rows)
    if shape is None:
        return
    labels = Labels(lambda node: positions(shape) if node is rows else None)
    for node in list(editor.graph.nodes):
        if node.target not in JOINS and node.target not in RESHAPES:
            continue
        if node.target in JOINS:
            _join_neighbours(editor, rows, labels, node)
        span = _find_span(labels.of(node), shape[-1])
        if span is not None and len(span) > 1:
            with editor.after(node):
                joined = _slice(editor, rows, span, row_shape(node) or ())
            node.replace_all_uses_with(joined)


def _join_neighbours(editor: ProgramEditor, rows: fx.Node, labels: Labels, join: fx.Node) -> None:
    """Replace each sequence of neighbouring rows among the inputs of a join by one input."""
    sources: list[Any] = list(join.args[0])  # type: ignore[arg-type]
    if join.target is _aten.stack.default or len(sources) < 3:
        return  # an input of a stack has one dimension less than its result
    dim: Any = join.args[1] if len(join.args) > 1 else 0
    if dim % len(shape_of(join)) == 0:
        return  # it appends the rows of another batch
    width = (row_shape(rows) or (0,))[-1]
    joined: list[fx.Node] = []
    begin = 0
    while begin < len(sources):
        end, best = begin + 1, None
        parts: list[Tensor] = []
        for index in range(begin, len(sources)):
            part = labels.of(sources[index])
            if part is None:
                break
            parts.append(part)
            block = torch.cat(parts, dim=dim)
            span = _find_span(block, width)
            if span is None:
                break
            if len(span) > 1 and index > begin:
                end, best = index + 1, (span, tuple(block.shape[1:]))
        if best is None:
            joined.append(sources[begin])
        else:
            with editor.after(rows):
                joined.append(_slice(editor, rows, *best))
        begin = end
    if 1 < len(joined) < len(sources):
        join.args = (joined, *join.args[1:])


def _find_span(labels: Tensor | None, width: int) -> range | None:
    """Return the lookups whose rows a tensor contains completely and in their order, else None.

    Args:
        labels: positions of its elements in the merged rows, ``(1, *row)``.
        width: width of a looked-up row.
    """
    if labels is None or labels.numel() == 0:
        return None
    flat = labels.flatten()
    first, count = int(flat[0]), flat.numel()
    if first % width or count % width or not torch.equal(flat, torch.arange(first, first + count)):
        return None
    return range(first // width, (first + count) // width)


def _slice(editor: ProgramEditor, rows: fx.Node, span: range, shape: tuple[int, ...]) -> fx.Node:
    """Add the rows of some lookups as ``(rows, *shape)``."""
    lookups, _ = row_shape(rows) or (0, 0)
    part = rows
    if span != range(lookups):
        part = editor.call(_aten.slice.Tensor, rows, 1, span.start, span.stop)
    return (
        part if row_shape(part) == shape else editor.call(_aten.reshape.default, part, [-1, *shape])
    )
