"""Scales and offsets of row-wise formats: layout, encoding, lookup and gradients.

A group of ``rows_per_scale`` rows (0: all rows of the table) shares one scale and, if the levels
are asymmetric, one offset. A weight is ``multiple * scale + offset``: a *multiple* is a level in
units of the scale, and a *grid* is the set of multiples with the settings of its scales
(``compressors/quantize/kernels/levels.py``).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compressors.core.modules.formats import TensorSpec
from compressors.quantize.kernels.clipping import fit
from compressors.quantize.kernels.levels import (
    FittedRange,
    Grid,
    dequantize,
    nearest_multiples,
)


class SharedScales(NamedTuple):
    """The settings that determine the layout of scales; bundles of older versions lack some.

    Attributes:
        dtype: dtype of the stored scales and offsets.
        symmetric: whether the levels are symmetric around zero, without offsets.
        rows_per_scale: number of neighbouring rows that share a scale; 0: all rows of the table.
    """

    dtype: torch.dtype
    symmetric: bool
    rows_per_scale: int

    @staticmethod
    def from_settings(settings: Mapping[str, Any]) -> "SharedScales":
        """Read them from the ``settings`` of a step or of a stored table."""
        dtype = getattr(torch, settings["scale"])
        return SharedScales(
            dtype, settings.get("symmetric", True), settings.get("rows_per_scale", 1)
        )


def select_settings(grid: Grid) -> dict[str, Any]:
    """Return the settings of a grid that determine a table's layout and lookup."""
    return {
        "scale": grid.scale,
        "symmetric": grid.symmetric,
        "rows_per_scale": grid.rows_per_scale,
    }


def layout(rows: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Return shape and dtype of ``scale`` and, unless symmetric, ``offset``: ``(scales, 1)``."""
    dtype, symmetric, rows_per_scale = SharedScales.from_settings(settings)
    count = -(-rows // rows_per_scale) if rows_per_scale else 1
    spec = TensorSpec((count, 1), dtype, rows_per_entry=rows_per_scale)
    return {"scale": spec} if symmetric else {"scale": spec, "offset": spec}


def fit_table(rows: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Fit scale and offset of a table with one scale for all rows; otherwise return no tensors."""
    return {} if grid.rows_per_scale else _name_tensors(fit(rows, grid))


def fit_block(block: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Fit scales and offsets of a block of rows; no tensors if the table has only one scale."""
    return _name_tensors(fit(block, grid)) if grid.rows_per_scale else {}


def encode_block(
    block: Tensor, params: Mapping[str, Tensor], grid: Grid
) -> tuple[Tensor, dict[str, Tensor]]:
    """Round a block of rows to the nearest levels.

    Args:
        block: float, ``(rows, dim)``; its first row begins a group of rows with one scale.
        params: result of ``fit_table``.
        grid: the levels.

    Returns:
        The multiples, float32 ``(rows, dim)``, and the stored scales and offsets of the block, by
        name.

    Raises:
        ValueNotStorable: a scale or offset is too large for the type in which it is stored.
    """
    stored = fit_block(block, grid)
    fitted = {**params, **stored}
    multiples = nearest_multiples(block, FittedRange(fitted["scale"], fitted.get("offset")), grid)
    return multiples, stored


def encode_codes(
    block: Tensor, params: Mapping[str, Tensor], grid: Grid, bits: int
) -> dict[str, Tensor]:
    """Encode a block of rows with compiled loops.

    Args:
        block: float, ``(rows, dim)``; its first row begins a group of rows with one scale.
        params: result of ``fit_table``.
        grid: an asymmetric grid, or a symmetric one with an odd number of levels.
        bits: bits of a code, 8 or 4.

    Returns:
        By name, ``codes`` as in ``row_encoding.encode``, and the stored scales and offsets of the
        block.

    Raises:
        ValueNotStorable: a weight is not finite, or a scale or offset is too large for its type.
    """
    # The import takes half a second, so it is delayed until a table is encoded.
    from compressors.quantize.kernels import row_encoding

    # The loops also fit the scales by these rules; by other rules, they are fitted first.
    has_loop_for_fit = (grid.clipping == "min_max" and grid.rows_per_scale > 0) or (
        grid.clipping == "least_squares" and grid.rows_per_scale == 1
    )
    if has_loop_for_fit:
        codes, fitted = row_encoding.encode(block, grid, bits)
        return {"codes": codes, **_name_tensors(fitted)}
    stored = fit_block(block, grid)
    by_name = {**params, **stored}
    fitted = FittedRange(by_name["scale"], by_name.get("offset"))
    return {"codes": row_encoding.encode_with_scales(block, fitted, grid, bits), **stored}


def _name_tensors(fitted: FittedRange) -> dict[str, Tensor]:
    """Return scale and, if there is one, offset by the names under which they are stored."""
    offset = {} if fitted.offset is None else {"offset": fitted.offset}
    return {"scale": fitted.scale, **offset}


def scale_indices(ids: Tensor, rows_per_scale: int) -> Tensor:
    """Return the index of the scale of each row, for ids of any shape: int, the same shape."""
    if rows_per_scale == 1:
        return ids
    return ids // rows_per_scale if rows_per_scale else torch.zeros_like(ids)


def compute_gradient(
    grad: Tensor,
    multiples: Tensor | None,
    stored: Tensor,
    ids: Tensor,
    rows_per_scale: int,
) -> Tensor:
    """Compute the gradient of scales, or of offsets if ``multiples`` is None.

    Args:
        grad: gradient of the looked-up weights, ``(*ids, dim)``.
        multiples: the weights' levels in units of the scale, ``(*ids, dim)``.
        stored: the scales or offsets, ``(scales, 1)``.
        ids: the looked-up rows.
        rows_per_scale: number of rows that share a scale; 0: all.

    Returns:
        ``(scales, 1)`` in the dtype of ``stored``.
    """
    by_lookup = (
        (grad if multiples is None else grad * multiples).sum(dim=-1).reshape(-1)
    )  # (lookups,)
    total = torch.zeros(stored.shape[0], device=stored.device)
    total.index_add_(0, scale_indices(ids, rows_per_scale).reshape(-1), by_lookup)
    return total.unsqueeze(1).to(stored.dtype)


class DecodeCodes(Protocol):
    """A function that decodes the packed codes of a format.

    ``compressors/quantize/kernels/bitpacking.py`` explains how several codes share a byte.
    """

    def __call__(self, packed: Tensor, dim: int, *, symmetric: bool) -> Tensor:
        """Decode packed codes ``(*, bytes)`` to multiples of the scale, float32 ``(*, dim)``."""


def look_up_packed_rows(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    ids: Tensor,
    dim: int,
    rows_per_scale: int,
    decode_codes: DecodeCodes,
) -> Tensor:
    """Look up rows of a table of packed codes ``(rows, bytes)``: ids -> float32 ``(*ids, dim)``."""
    indices = scale_indices(ids, rows_per_scale)
    multiples = decode_codes(codes[ids], dim, symmetric=offset is None)
    return dequantize(multiples, scale[indices], None if offset is None else offset[indices])


def register_packed_op(op: Any, decode_codes: DecodeCodes) -> None:
    """Register the fake kernel and the gradient of a ``custom_op`` that looks up packed codes."""

    def fake(
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        ids: Tensor,
        dim: int,
        rows_per_scale: int,
    ) -> Tensor:
        return scale.new_empty((*ids.shape, dim), dtype=torch.float32)

    def save_inputs(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, int, int],
        output: Tensor,
    ) -> None:
        *tensors, ctx.dim, ctx.rows_per_scale = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None, None, None, None]:
        codes, scale, offset, ids = ctx.saved_tensors
        multiples = decode_codes(codes[ids], ctx.dim, symmetric=offset is None)
        grad_scale = compute_gradient(grad, multiples, scale, ids, ctx.rows_per_scale)
        grad_offset = None
        if offset is not None:
            grad_offset = compute_gradient(grad, None, offset, ids, ctx.rows_per_scale)
        return None, grad_scale, grad_offset, None, None, None

    op.register_fake(fake)
    op.register_autograd(backward, setup_context=save_inputs)
