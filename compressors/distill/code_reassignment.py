"""Which codes of a packed table would lower the task's loss.

Around what a row reads as now, the loss is modelled by its slope and by a diagonal curvature that
is nowhere below the loss's own: the columns of a row act together, and the square of a sum of
``dim`` terms is at most ``dim`` times the sum of their squares. The model is least at one target
row, and how far a row is from that, each column weighted by the curvature, is what the row loses.
Codes are chosen anew to lose less. (With the bare diagonal each column would take the whole step
alone; on the demo's tables that raised the loss even where three rows moved.)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compressors.core.modules.formats import PackedTable
from compressors.quantize.kernels.bitpacking import pack, unpack
from compressors.quantize.kernels.levels import FittedRange, Grid, by_row, nearest, weights
from compressors.quantize.kernels.lloyd import nearest_under
from compressors.quantize.tables import kmeans, product_codes, residual_codes, scales
from compressors.quantize.tables.kmeans import KMeansFormat
from compressors.quantize.tables.product_codes import ProductCodesFormat
from compressors.quantize.tables.residual_codes import ResidualCodesFormat
from compressors.quantize.tables.rowwise import PackedRowsFormat
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8Format

DAMPING = 0.1
"""Added to the curvature, as a share of its mean: where little is known, little moves."""

SMALLEST = 1e-30

Rowwise = RowwiseInt8Format | PackedRowsFormat
Codebook = KMeansFormat | ProductCodesFormat | ResidualCodesFormat
Codes = Rowwise | Codebook


class Proposal(NamedTuple):
    """New codes of a table, uint8 ``(rows, codes)``, not packed, and what each row gains.

    ``gain`` is ``(rows,)``, in the unit of the loss; 0 where a row had better stay.
    """

    codes: Tensor
    gain: Tensor


def propose(table: PackedTable, slope: Tensor, curvature: Tensor) -> Proposal:
    """The codes of every row where the model of the loss is least.

    Args:
        table: with codes of a codebook, or of even levels.
        slope: of the loss by each weight as it reads now, ``(rows, dim)``.
        curvature: mean squared gradients, ``(rows, dim)``; rows without any stay.
    """
    form, stored = _form(table), dict(table.named_buffers())
    with torch.no_grad():
        now = table(torch.arange(table.rows))  # (rows, dim)
    seen = curvature.sum(dim=1) > 0
    damping = DAMPING * curvature[seen].mean() if bool(seen.any()) else curvature.new_zeros(())
    metric = table.dim * (curvature + damping)
    target = now - slope / metric.clamp(min=SMALLEST)
    codes = unpacked(table)
    if isinstance(form, Rowwise):
        new, again = rounded(table, target)
    else:
        new = proposed(form, codes, stored, target, metric)
        again = decoded(form, new, stored, table.dim)
    gain = (metric * ((now - target).square() - (again - target).square())).sum(dim=1) / 2
    better = seen & (gain > 0) & (new != codes).any(dim=1)
    return Proposal(new, torch.where(better, gain, torch.zeros_like(gain)))


def moved(table: PackedTable, proposal: Proposal, share: float) -> tuple[Tensor, int]:
    """A table's codes, as stored, after the rows moved that gain most, and how many those are.

    ``share`` is of the rows that would gain.
    """
    count = round(share * int((proposal.gain > 0).sum()))
    chosen = proposal.gain.topk(count).indices
    codes = unpacked(table)
    codes[chosen] = proposal.codes[chosen]
    width = _width(table)
    return codes if width == 8 else pack(codes, width), count


def unpacked(table: PackedTable) -> Tensor:
    """A table's codes, ``(rows, codes)``, in a tensor of their own: int8 or uint8."""
    form, count, width = _form(table), table.dim, _width(table)
    codes = table.get_buffer("codes")
    if width == 8:
        return codes.clone()
    if isinstance(form, ProductCodesFormat | ResidualCodesFormat):
        count = form.shape(table.rows, table.dim, table.settings).books
    return unpack(codes, count, width)


def rounded(table: PackedTable, target: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a row-wise table nearest to a target ``(rows, dim)``, and what they read as.

    With even levels the nearest one of each weight is the best under any metric of columns.
    """
    bits, shared = _width(table), scales.SharedScales.of(table.settings)
    odd = shared.symmetric and bits > 2  # a level at zero, and one code unused
    grid = Grid(2**bits - odd, shared.symmetric, rows_per_scale=shared.rows_per_scale)
    stored = dict(table.named_buffers())
    fitted = FittedRange(stored["scale"], stored.get("offset"))
    steps = nearest(target, fitted, grid)
    offset = fitted.offset
    if offset is not None:
        offset = by_row(offset, table.rows, grid.rows_per_scale)
    read = weights(steps, by_row(fitted.scale, table.rows, grid.rows_per_scale), offset)
    zero = 0.0  # of symmetric codes: int8 has a sign of its own
    if shared.symmetric and bits < 8:
        zero = grid.half if bits == 2 else grid.half + 1
    return (steps + zero).to(torch.uint8 if bits < 8 else stored["codes"].dtype), read


def _width(table: PackedTable) -> int:
    """Bits of a stored code."""
    form = _form(table)
    if isinstance(form, Rowwise):
        return form.bits
    return form.width(table.rows, table.dim, table.settings)


def _form(table: PackedTable) -> Codes:
    if not isinstance(table.storage, Codes):
        raise TypeError(f"{table.storage.name!r} has no codes")
    return table.storage


def proposed(
    form: Codebook, codes: Tensor, stored: dict[str, Tensor], target: Tensor, metric: Tensor
) -> Tensor:
    """Codes uint8 ``(rows, codes)`` whose rows are nearest to a target under a metric.

    Exact but for residual codes, which are chosen one after the other while the others stay.
    """
    codebook = stored["codebook"].float()
    if isinstance(form, KMeansFormat):
        scale = stored.get("scale")
        each = target
        if scale is not None:
            each = target / scale.float().where(scale > 0, torch.ones_like(scale.float()))
        ordered, order = codebook.sort()  # training may have moved one level past another
        middle = (ordered[1:] + ordered[:-1]) / 2
        return order[torch.bucketize(each, middle)].to(torch.uint8)
    new = codes.clone()
    books = codebook.reshape(codes.shape[1], -1, codebook.shape[1])
    if isinstance(form, ProductCodesFormat):
        begin = 0
        for place, width in enumerate(product_codes.widths(target.shape[1], codes.shape[1])):
            part = slice(begin, begin + width)
            entries = books[place, :, :width]
            new[:, place] = nearest_under(target[:, part], metric[:, part], entries)
            begin += width
        return new
    for place, entries in enumerate(books):
        others = residual_codes.decode(new, codebook) - entries[new[:, place].long()]
        new[:, place] = nearest_under(target - others, metric, entries)
    return new


def decoded(form: Codebook, codes: Tensor, stored: dict[str, Tensor], dim: int) -> Tensor:
    """What codes ``(rows, codes)`` read as, float32 ``(rows, dim)``."""
    codebook = stored["codebook"]
    if isinstance(form, KMeansFormat):
        return kmeans.decode(codes, codebook, stored.get("scale"))
    if isinstance(form, ProductCodesFormat):
        return product_codes.decode(codes, codebook, dim)
    return residual_codes.decode(codes, codebook)
