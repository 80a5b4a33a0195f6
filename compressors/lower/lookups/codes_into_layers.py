"""Pass the int8 codes of tables to int8 layers, without converting them to floats in between.

A layer of ``static_int8`` with one scale per input channel divides its inputs by the scales and
rounds them. Where an input is a code of a table times the scale of the channel, the result is the
code again. So the layer reads the code itself, and only its other inputs are rounded. The sums of
products are the same integers.

Operators between table and layer that only rearrange elements then rearrange codes.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from compressors.core.modules.formats import PackedLinear
from compressors.lower.lookups.layout import JOINS, Labels, is_identity, layout_input, positions
from compressors.lower.lookups.program_editor import ProgramEditor, dtype_of, row_shape
from compressors.quantize.dense import static_int8

_aten = torch.ops.aten
_OPS = torch.ops.recpress


def pass_codes_to_layers(editor: ProgramEditor, module: nn.Module) -> None:
    """Change the int8 layers of a program that read tables.

    Args:
        editor: the program.
        module: the module from which it was traced.
    """
    table_scales = {
        node: _expand_scale(editor.tensors[node.args[1]], row_shape(node) or ())
        for node in editor.graph.nodes
        if node.target is _OPS.dequantize_codes.default and row_shape(node) is not None
    }
    if not table_scales:
        return
    codes = _Codes(editor, table_scales)
    input_scales = {
        id(layer.get_buffer("codes")): layer.get_buffer("input_scale")
        for layer in module.modules()
        if isinstance(layer, PackedLinear) and layer.storage == static_int8.FORMAT
    }
    for node in list(editor.graph.nodes):
        if node.target is not _OPS.static_int8_linear.default:
            continue
        x, weights, weight_scale, _, bias = node.args
        scale = input_scales.get(id(editor.tensors.get(weights)))
        source = None if scale is None else _find_scaled_input(editor, x, scale)
        if source is None or scale is None:
            continue
        needed = scale.float().expand(1, *(row_shape(source) or ()))
        if not codes.reads_table(source, needed):
            continue
        rounded = codes.of(source, needed)
        with editor.after(node):
            product = editor.call(
                _OPS.int8_codes_linear.default, rounded, weights, weight_scale, bias
            )
        node.replace_all_uses_with(product)


def _expand_scale(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the scale of each element of ``dequantize_codes``'s output, ``(1, *shape)``."""
    by_lookup = scale.unsqueeze(1) if scale.ndim else scale
    return by_lookup.float().expand(1, *shape)


def _find_scaled_input(editor: ProgramEditor, x: Any, scale: Tensor) -> fx.Node | None:
    """Return a layer's input before the layer divides it by its scales, ``(in,)``; else None."""
    if scale.ndim != 1 or not isinstance(x, fx.Node) or x.target is not _aten.div.Tensor:
        return None
    source, divisor = x.args
    if not isinstance(source, fx.Node) or not isinstance(divisor, fx.Node):
        return None
    return source if editor.tensors.get(divisor) is scale and row_shape(source) else None


class _Codes:
    """Builds the codes of tensors that layers read.

    In the methods, ``scale`` is the scale by which the layer divides each element, ``(1, *row)``;
    NaN if it does not read the element.
    """

    def __init__(self, editor: ProgramEditor, scales: dict[fx.Node, Tensor]) -> None:
        """``scales`` has the outputs of ``dequantize_codes`` and the scale of each element."""
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
        if is_identity(node):
            return self.of(node.args[0], scale)  # type: ignore[arg-type]
        return self._rearrange(node, scale)

    def _rearrange(self, node: fx.Node, scale: Tensor) -> fx.Node:
        """Return the codes of an operator's output whose only input is rearranged."""
        split = node.args[0] if node.target is operator.getitem else None
        source = layout_input(split if isinstance(split, fx.Node) else node)
        if source is None or row_shape(source) is None:
            return self._round(node, scale)
        shape = row_shape(source) or ()
        found: Callable[[fx.Node], Tensor | None] = lambda other: (  # noqa: E731
            positions(shape) if other is source else None
        )
        source_positions = Labels(found).of(node)
        if source_positions is None:
            return self._round(node, scale)
        source_scale = torch.full((1, *shape), torch.nan)
        source_scale.view(-1)[source_positions.flatten()] = scale.flatten()
        codes = self.of(source, source_scale)
        with self.editor.after(node):
            if isinstance(split, fx.Node):
                parts = self.editor.call(split.target, codes, *split.args[1:], **split.kwargs)
                return self.editor.call(operator.getitem, parts, node.args[1])
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
        is_equal = needed.numel() == 0 or bool((needed == needed.reshape(-1)[0]).all())
        stored = (
            torch.tensor(float(needed.max()) if needed.numel() else 1.0) if is_equal else needed
        )
        scale_node = self.editor.add_tensor(f"input_scales.{self._stored}", stored.clone())
        self._stored += 1
        with self.editor.after(node):
            floats = node
            if dtype_of(node) != torch.float32:
                floats = self.editor.call(_aten.to.dtype, node, torch.float32)
            return self.editor.call(_OPS.input_codes.default, floats, scale_node)
