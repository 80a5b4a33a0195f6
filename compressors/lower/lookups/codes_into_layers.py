"""Pass the int8 codes of tables to int8 layers, without converting them to floats in between.

A layer of ``static_int8`` with one scale per input channel divides its inputs by the scales and
rounds them. Where an input is a code of a table times the scale of the channel, the result is the
code again. So the layer reads the code itself, and only its other inputs are rounded. The sums of
products are the same integers.

Operators between table and layer that only rearrange elements then rearrange codes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from compressors.lower.lookups.layout import JOINS, Labels, layout_input, positions
from compressors.lower.lookups.program_editor import ProgramEditor, row_shape

_aten = torch.ops.aten
_OPS = torch.ops.recpress


def pass_codes_to_layers(editor: ProgramEditor) -> int:
    """Change the int8 layers of a program that read tables; return their number."""
    scales = {
        node: _expand_scale(editor.tensors[node.args[1]], row_shape(node) or ())
        for node in editor.graph.nodes
        if node.target is _OPS.widen_codes.default and row_shape(node) is not None
    }
    if not scales:
        return 0
    codes = _Codes(editor, scales)
    changed = 0
    for node in list(editor.graph.nodes):
        if node.target is not _OPS.static_int8_linear.default:
            continue
        x, weights, weight_scale, _, bias = node.args
        divided = _find_scaled_input(editor, x)
        if divided is None:
            continue
        source, scale = divided
        needed = scale.expand(1, *(row_shape(source) or ()))
        if not codes.reads_table(source, needed):
            continue
        rounded = codes.of(source, needed)
        with editor.after(node):
            product = editor.call(
                _OPS.int8_codes_linear.default, rounded, weights, weight_scale, bias
            )
        node.replace_all_uses_with(product)
        changed += 1
    return changed


def _expand_scale(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the scale of each element of ``widen_codes``'s output, ``(1, *shape)``."""
    by_lookup = scale.unsqueeze(1) if scale.ndim else scale
    return by_lookup.float().expand(1, *shape)


def _find_scaled_input(editor: ProgramEditor, x: Any) -> tuple[fx.Node, Tensor] | None:
    """Return a layer's input before it is divided by one scale per channel, and the scales."""
    if not isinstance(x, fx.Node) or x.target is not _aten.div.Tensor:
        return None
    source, scale = x.args
    if not isinstance(source, fx.Node) or not isinstance(scale, fx.Node):
        return None
    stored = editor.tensors.get(scale)
    if stored is None or stored.ndim != 1 or row_shape(source) is None:
        return None
    return source, stored.float()


class _Codes:
    """Builds the codes of tensors that layers read.

    ``scale`` is the scale by which each element is divided, ``(1, *row)``; NaN if the layer does
    not read the element.
    """

    def __init__(self, editor: ProgramEditor, scales: dict[fx.Node, Tensor]) -> None:
        """``scales`` has the outputs of ``widen_codes`` and the scale of each element."""
        self.editor = editor
        self.scales = scales
        self.labels = Labels(scales.get, lambda shape: torch.full(shape, torch.nan))
        self._built: dict[tuple[fx.Node, bytes], fx.Node] = {}
        self._stored = 0

    def reads_table(self, node: fx.Node, scale: Tensor) -> bool:
        """Return whether some elements are codes of a table times the scale."""
        labels = self.labels.of(node)
        return labels is not None and bool((labels == scale).any())

    def of(self, node: fx.Node, scale: Tensor) -> fx.Node:
        """Return the codes of a tensor, uint8 of its shape."""
        key = (node, scale.contiguous().numpy().tobytes())
        if key not in self._built:
            self._built[key] = self._build(node, scale)
        return self._built[key]

    def _build(self, node: fx.Node, scale: Tensor) -> fx.Node:
        if not self.reads_table(node, scale):
            return self._round(node, scale)
        if node in self.scales:
            is_exact = bool(((self.scales[node] == scale) | scale.isnan()).all())
            codes = node.args[0]
            return codes if is_exact and isinstance(codes, fx.Node) else self._round(node, scale)
        if node.target in JOINS:
            return self._join(node, scale)
        source = layout_input(node)
        if source is None or row_shape(source) is None:
            return self._round(node, scale)
        found: Callable[[fx.Node], Tensor | None] = lambda other: (  # noqa: E731
            positions(row_shape(source) or ()) if other is source else None
        )
        moved = Labels(found).of(node)
        if moved is None:
            return self._round(node, scale)
        lifted = torch.full((1, *(row_shape(source) or ())), torch.nan)
        lifted.view(-1)[moved.flatten()] = scale.flatten()
        codes = self.of(source, lifted)
        with self.editor.after(node):
            return self.editor.call(node.target, codes, *node.args[1:], **node.kwargs)

    def _join(self, node: fx.Node, scale: Tensor) -> fx.Node:
        sources: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        dim: Any = node.args[1] if len(node.args) > 1 else 0
        if node.target is _aten.stack.default:
            parts = scale.unbind(dim)
        else:
            sizes = [(1, *(row_shape(part) or ()))[dim] for part in sources]
            parts = torch.split(scale, sizes, dim)
        codes = [self.of(source, part) for source, part in zip(sources, parts, strict=True)]
        with self.editor.after(node):
            return self.editor.call(node.target, codes, *node.args[1:])

    def _round(self, node: fx.Node, scale: Tensor) -> fx.Node:
        """Add the rounding of a tensor that is not made of codes."""
        needed = torch.where(scale.isnan(), 1.0, scale)[0]
        stored = needed.reshape(-1)[0] if bool((needed == needed.reshape(-1)[0]).all()) else needed
        name = f"input_scales.{self._stored}"
        self._stored += 1
        scale_node = self.editor.add_tensor(name, stored.clone())
        with self.editor.after(node):
            return self.editor.call(_OPS.input_codes.default, node, scale_node)
