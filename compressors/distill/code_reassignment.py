"""Select new codes of a packed table that decrease the task's loss.

Around a row's current values, the loss is modelled by its gradient and a diagonal curvature. The
curvature is an upper bound: the columns of a row act together, and the square of a sum of ``dim``
terms is at most ``dim`` times the sum of their squares. For each row the model has its minimum at a
target row. The modelled loss of a row is its squared distance from the target, with each column
weighted by the curvature, and new codes decrease this distance. Without the factor ``dim`` each
column would take the full step by itself; on the demo's tables this increased the loss even if only
three rows changed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compressors.core.modules.formats import PackedTable
from compressors.quantize.kernels.bitpacking import pack, unpack
from compressors.quantize.kernels.levels import (
    FittedRange,
    Grid,
    decode_multiples,
    expand_to_rows,
    nearest,
)
from compressors.quantize.kernels.lloyd import nearest_with_weights
from compressors.quantize.tables import kmeans, product_codes, residual_codes, scales
from compressors.quantize.tables.kmeans import KMeansFormat
from compressors.quantize.tables.product_codes import ProductCodesFormat
from compressors.quantize.tables.residual_codes import ResidualCodesFormat
from compressors.quantize.tables.rowwise import PackedRowsFormat
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8Format

DAMPING = 0.1
"""Added to the curvature, as a share of its mean, so that rows with little data change little."""

SMALLEST = 1e-30

Rowwise = RowwiseInt8Format | PackedRowsFormat
Codebook = KMeansFormat | ProductCodesFormat | ResidualCodesFormat
Codes = Rowwise | Codebook


class Proposal(NamedTuple):
    """Proposed codes of a table and the estimated gain of each row.

    Attributes:
        codes: uint8 or int8 ``(rows, codes)``, not packed.
        gain: decrease of the loss per row, ``(rows,)``; 0 for rows that should keep their codes.
    """

    codes: Tensor
    gain: Tensor


def propose(table: PackedTable, slope: Tensor, curvature: Tensor) -> Proposal:
    """Propose, for every row, the codes that minimize the model of the loss.

    Args:
        table: a packed table whose codes index a codebook or uniform levels.
        slope: gradient of the loss at the table's current weights, ``(rows, dim)``.
        curvature: mean squared gradients, ``(rows, dim)``; rows where all are 0 keep their codes.
    """
    form, stored = _form(table), dict(table.named_buffers())
    with torch.no_grad():
        current = table(torch.arange(table.rows))  # (rows, dim)
    seen = curvature.sum(dim=1) > 0
    damping = DAMPING * curvature[seen].mean() if bool(seen.any()) else curvature.new_zeros(())
    metric = table.dim * (curvature + damping)
    target = current - slope / metric.clamp(min=SMALLEST)
    codes = read_codes(table)
    if isinstance(form, Rowwise):
        new, new_values = nearest_uniform_codes(table, target)
    else:
        new = nearest_codebook_codes(form, codes, stored, target, metric)
        new_values = decode_rows(form, new, stored, table.dim)
    gain = (metric * ((current - target).square() - (new_values - target).square())).sum(dim=1) / 2
    better = seen & (gain > 0) & (new != codes).any(dim=1)
    return Proposal(new, torch.where(better, gain, torch.zeros_like(gain)))


def reassigned_codes(table: PackedTable, proposal: Proposal, share: float) -> tuple[Tensor, int]:
    """Apply the proposed codes to the rows that gain most.

    Args:
        table: not modified.
        proposal: its proposed codes.
        share: share of the rows with a positive gain that get their proposed codes.

    Returns:
        The table's codes as stored (packed), and the number of rows that changed.
    """
    count = round(share * int((proposal.gain > 0).sum()))
    chosen = proposal.gain.topk(count).indices
    codes = read_codes(table)
    codes[chosen] = proposal.codes[chosen]
    width = _width(table)
    return codes if width == 8 else pack(codes, width), count


def read_codes(table: PackedTable) -> Tensor:
    """A copy of a table's codes, unpacked: int8 or uint8 ``(rows, codes)``."""
    form, count, width = _form(table), table.dim, _width(table)
    codes = table.get_buffer("codes")
    if width == 8:
        return codes.clone()
    if isinstance(form, ProductCodesFormat | ResidualCodesFormat):
        count = form.shape(table.rows, table.dim, table.settings).books
    return unpack(codes, count, width)


def nearest_uniform_codes(table: PackedTable, target: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a row-wise table nearest to a target, and their values, both ``(rows, dim)``.

    With uniform levels, the level nearest to each weight is the best for any weighting of columns.
    """
    bits, shared = _width(table), scales.SharedScales.of(table.settings)
    odd = shared.symmetric and bits > 2  # a level at zero, and one code unused
    grid = Grid(2**bits - odd, shared.symmetric, rows_per_scale=shared.rows_per_scale)
    stored = dict(table.named_buffers())
    fitted = FittedRange(stored["scale"], stored.get("offset"))
    multiples = nearest(target, fitted, grid)
    offset = fitted.offset
    if offset is not None:
        offset = expand_to_rows(offset, table.rows, grid.rows_per_scale)
    values = decode_multiples(
        multiples, expand_to_rows(fitted.scale, table.rows, grid.rows_per_scale), offset
    )
    zero = 0.0  # the code of level 0 in symmetric formats; int8 codes are signed
    if shared.symmetric and bits < 8:
        zero = grid.half if bits == 2 else grid.half + 1
    return (multiples + zero).to(torch.uint8 if bits < 8 else stored["codes"].dtype), values


def _width(table: PackedTable) -> int:
    """Bits of a stored code."""
    form = _form(table)
    if isinstance(form, Rowwise):
        return form.bits
    return form.width(table.rows, table.dim, table.settings)


def _form(table: PackedTable) -> Codes:
    if not isinstance(table.storage, Codes):
        raise TypeError(f"Expected a format with codes, got {table.storage.name!r}.")
    return table.storage


def nearest_codebook_codes(
    form: Codebook, codes: Tensor, stored: dict[str, Tensor], target: Tensor, metric: Tensor
) -> Tensor:
    """Codes uint8 ``(rows, codes)`` whose values are nearest to a target under a metric.

    The result is exact except for residual codes, which are selected one after the other while the
    others are fixed.

    Args:
        form: the format of the table.
        codes: the present codes, uint8 ``(rows, codes)``.
        stored: the tensors of the table.
        target: ``(rows, dim)``.
        metric: weight of each squared difference, ``(rows, dim)``.
    """
    codebook = stored["codebook"].float()
    if isinstance(form, KMeansFormat):
        scale = stored.get("scale")
        scaled = target
        if scale is not None:
            scaled = target / scale.float().where(scale > 0, torch.ones_like(scale.float()))
        ordered, order = codebook.sort()  # training may have changed the order of levels
        middle = (ordered[1:] + ordered[:-1]) / 2
        return order[torch.bucketize(scaled, middle)].to(torch.uint8)
    new = codes.clone()
    books = codebook.reshape(codes.shape[1], -1, codebook.shape[1])
    if isinstance(form, ProductCodesFormat):
        begin = 0
        for index, width in enumerate(product_codes.part_widths(target.shape[1], codes.shape[1])):
            part = slice(begin, begin + width)
            entries = books[index, :, :width]
            new[:, index] = nearest_with_weights(target[:, part], metric[:, part], entries)
            begin += width
        return new
    for index, entries in enumerate(books):
        others = residual_codes.decode(new, codebook) - entries[new[:, index].long()]
        new[:, index] = nearest_with_weights(target - others, metric, entries)
    return new


def decode_rows(form: Codebook, codes: Tensor, stored: dict[str, Tensor], dim: int) -> Tensor:
    """The values of codes ``(rows, codes)``: float32 ``(rows, dim)``."""
    codebook = stored["codebook"]
    if isinstance(form, KMeansFormat):
        return kmeans.decode(codes, codebook, stored.get("scale"))
    if isinstance(form, ProductCodesFormat):
        return product_codes.decode(codes, codebook, dim)
    return residual_codes.decode(codes, codebook)
