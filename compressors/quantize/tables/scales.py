"""Scales and offsets that rows share: how they are laid out, written, read and trained."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compressors.core.modules.formats import TensorSpec
from compressors.quantize.kernels.clipping import fit
from compressors.quantize.kernels.levels import FittedRange, Grid, nearest, weights


class SharedScales(NamedTuple):
    """What a format needs to know of its scales; records of older bundles say less."""

    dtype: torch.dtype
    symmetric: bool
    rows_per_scale: int

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "SharedScales":
        """As ``settings`` of a step or a record say."""
        dtype = getattr(torch, settings["scale"])
        return SharedScales(
            dtype, settings.get("symmetric", True), settings.get("rows_per_scale", 1)
        )


def settings_of(grid: Grid) -> dict[str, Any]:
    """What a layout and a lookup must know of a grid."""
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
    """Scale and offset of a table that has one for all its rows; else nothing."""
    return {} if grid.rows_per_scale else _named(fit(rows, grid))


def fit_block(block: Tensor, grid: Grid) -> dict[str, Tensor]:
    """Scales and offsets of a block of rows; nothing where the table has one for all its rows."""
    return _named(fit(block, grid)) if grid.rows_per_scale else {}


def encode_block(
    block: Tensor, params: Mapping[str, Tensor], grid: Grid
) -> tuple[Tensor, dict[str, Tensor]]:
    """The nearest levels of a block of rows, counted in scales, and what is stored beside them.

    Args:
        block: float, ``(rows, dim)``; its first row begins a range.
        params: what ``fit_table`` gave.
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
    """What is stored of a block of rows, by compiled loops: ``codes`` as ``kernels.encode`` gives.

    Args:
        block: float, ``(rows, dim)``; its first row begins a range.
        params: what ``fit_table`` gave.
        grid: an odd number of levels, or an asymmetric one.
        bits: 8 or 4.

    Raises:
        CompressionError: a weight is not finite, or too large for the type of the scales.
    """
    # Half a second, which who encodes nothing should not wait for.
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
    """Where the scales of these rows lie: ids of any shape, as many entries."""
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
    """The gradient of scales, or of offsets where ``steps`` is None, in their shape and type.

    Args:
        grad: of the looked-up weights, ``(*ids, dim)``.
        steps: their levels, counted in scales, in the same shape.
        stored: the scales or offsets, ``(entries, 1)``.
        ids: the rows looked up.
        rows_per_scale: how many share an entry.
    """
    each = (grad if steps is None else grad * steps).sum(dim=-1).reshape(-1)  # a number a lookup
    total = torch.zeros(stored.shape[0], device=stored.device)
    total.index_add_(0, entries_of(ids, rows_per_scale).reshape(-1), each)
    return total.unsqueeze(1).to(stored.dtype)


class StepsOf(Protocol):
    """How a format of planar codes reads them."""

    def __call__(self, packed: Tensor, dim: int, *, symmetric: bool) -> Tensor:
        """Planar codes ``(*, bytes)`` as levels counted in scales, float32 ``(*, dim)``."""


def planar_rows(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    ids: Tensor,
    dim: int,
    rows_per_scale: int,
    steps_of: StepsOf,
) -> Tensor:
    """Rows of a table of planar codes ``(rows, bytes)``: ids -> float32 ``(*ids, dim)``."""
    entries = entries_of(ids, rows_per_scale)
    steps = steps_of(codes[ids], dim, symmetric=offset is None)
    return weights(steps, scale[entries], None if offset is None else offset[entries])


def make_planar(op: Any, steps_of: StepsOf) -> None:
    """Give an op of planar codes, made by ``custom_op``, its fake kernel and its gradient."""

    def fake(
        codes: Tensor,  # noqa: ARG001
        scale: Tensor,
        offset: Tensor | None,  # noqa: ARG001
        ids: Tensor,
        dim: int,
        rows_per_scale: int,  # noqa: ARG001
    ) -> Tensor:
        return scale.new_empty((*ids.shape, dim), dtype=torch.float32)

    def keep(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor, int, int],
        output: Tensor,  # noqa: ARG001
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
