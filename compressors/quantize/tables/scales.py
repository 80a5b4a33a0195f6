"""Scales and offsets shared by rows: layout, encoding, lookup and gradients."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compressors.core.modules.formats import TensorSpec
from compressors.quantize.kernels.clipping import fit
from compressors.quantize.kernels.levels import FittedRange, Grid, nearest, weights


class SharedScales(NamedTuple):
    """Settings of shared scales; records of older bundles may lack some."""

    dtype: torch.dtype
    symmetric: bool
    rows_per_scale: int

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "SharedScales":
        """Read them from the ``settings`` of a step or a record."""
        dtype = getattr(torch, settings["scale"])
        return SharedScales(
            dtype, settings.get("symmetric", True), settings.get("rows_per_scale", 1)
        )


def settings_of(grid: Grid) -> dict[str, Any]:
    """The settings of a grid that determine layout and lookup."""
    return {
        "scale": grid.scale,
        "symmetric": grid.symmetric,
        "rows_per_scale": grid.rows_per_scale,
    }


def layout(rows: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """``scale``, and ``offset`` unless symmetric: ``(ceil(rows / rows_per_scale), 1)`` each."""
    dtype, symmetric, together = SharedScales.of(settings)
    entries = -(-rows // together) if together else 1
    spec = TensorSpec((entries, 1), dtype, every=together)
    return {"scale": spec} if symmetric else {"scale": spec, "offset": spec}


def fit_table(rows: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Fit scale and offset of a table that has one for all rows; otherwise return none."""
    return {} if grid.rows_per_scale else _named(fit(rows, grid))


def fit_block(block: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Fit scales and offsets of a block of rows; none if the table has one for all rows."""
    return _named(fit(block, grid)) if grid.rows_per_scale else {}


def encode_block(
    block: Tensor, params: Mapping[str, Tensor], grid: Grid
) -> tuple[Tensor, dict[str, Tensor]]:
    """Encode a block of rows: nearest levels, counted in scales, and stored scales and offsets.

    Args:
        block: float, ``(rows, dim)``; its first row starts a range.
        params: result of ``fit_table``.
        grid: the levels.

    Raises:
        CompressionError: a weight is too large for the type of the scales.
    """
    stored = fit_block(block, grid)
    known = {**params, **stored}
    return nearest(block, FittedRange(known["scale"], known.get("offset")), grid), stored


def encode_codes(
    block: Tensor, params: Mapping[str, Tensor], grid: Grid, bits: int
) -> dict[str, Tensor]:
    """Encode a block of rows with compiled loops; ``codes`` are those of ``row_encoding.encode``.

    Args:
        block: float, ``(rows, dim)``; its first row starts a range.
        params: result of ``fit_table``.
        grid: an odd number of levels, or an asymmetric one.
        bits: 8 or 4.

    Raises:
        CompressionError: a weight is not finite, or too large for the type of the scales.
    """
    # The import takes half a second, so it is delayed until a table is encoded.
    from compressors.quantize.kernels import row_encoding

    together = grid.rows_per_scale
    if (grid.clipping == "min_max" and together) or (
        grid.clipping == "least_squares" and together == 1
    ):
        codes, fitted = row_encoding.encode(block, grid, bits)
        return {"codes": codes, **_named(fitted)}
    stored = fit_block(block, grid)
    known = {**params, **stored}
    fitted = FittedRange(known["scale"], known.get("offset"))
    return {"codes": row_encoding.encode_as(block, fitted, grid, bits), **stored}


def _named(fitted: FittedRange) -> dict[str, Tensor]:
    offset = {} if fitted.offset is None else {"offset": fitted.offset}
    return {"scale": fitted.scale, **offset}


def entries_of(ids: Tensor, rows_per_scale: int) -> Tensor:
    """Indices of the scales of rows: ids of any shape -> indices in the same shape."""
    if rows_per_scale == 1:
        return ids
    return ids // rows_per_scale if rows_per_scale else torch.zeros_like(ids)


def gradients(
    grad: Tensor,
    steps: Tensor | None,
    stored: Tensor,
    ids: Tensor,
    rows_per_scale: int,
) -> Tensor:
    """The gradient of scales, or of offsets if ``steps`` is None, in their shape and type.

    Args:
        grad: gradient of the looked-up weights, ``(*ids, dim)``.
        steps: levels of these weights, counted in scales, in the same shape.
        stored: the scales or offsets, ``(entries, 1)``.
        ids: the looked-up rows.
        rows_per_scale: number of rows that share an entry.
    """
    each = (grad if steps is None else grad * steps).sum(dim=-1).reshape(-1)  # (lookups,)
    total = torch.zeros(stored.shape[0], device=stored.device)
    total.index_add_(0, entries_of(ids, rows_per_scale).reshape(-1), each)
    return total.unsqueeze(1).to(stored.dtype)


class StepsOf(Protocol):
    """Decoder of a format with planar codes."""

    def __call__(self, packed: Tensor, dim: int, *, symmetric: bool) -> Tensor:
        """Decode planar codes ``(*, bytes)`` to levels counted in scales, float32 ``(*, dim)``."""


def planar_rows(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    ids: Tensor,
    dim: int,
    rows_per_scale: int,
    steps_of: StepsOf,
) -> Tensor:
    """Look up rows of a table of planar codes ``(rows, bytes)``: ids -> float32 ``(*ids, dim)``."""
    entries = entries_of(ids, rows_per_scale)
    steps = steps_of(codes[ids], dim, symmetric=offset is None)
    return weights(steps, scale[entries], None if offset is None else offset[entries])


def make_planar(op: Any, steps_of: StepsOf) -> None:
    """Register the fake kernel and the gradient of a ``custom_op`` on planar codes."""

    def fake(
        codes: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        ids: Tensor,
        dim: int,
        rows_per_scale: int,
    ) -> Tensor:
        return scale.new_empty((*ids.shape, dim), dtype=torch.float32)

    def keep(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, int, int],
        output: Tensor,
    ) -> None:
        *tensors, ctx.dim, ctx.rows_per_scale = inputs
        ctx.save_for_backward(*tensors)

    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor | None, None, None, None]:
        codes, scale, offset, ids = ctx.saved_tensors
        steps = steps_of(codes[ids], ctx.dim, symmetric=offset is None)
        by_scale = gradients(grad, steps, scale, ids, ctx.rows_per_scale)
        by_offset = None
        if offset is not None:
            by_offset = gradients(grad, None, offset, ids, ctx.rows_per_scale)
        return None, by_scale, by_offset, None, None, None

    op.register_fake(fake)
    op.register_autograd(backward, setup_context=keep)
