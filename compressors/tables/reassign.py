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

from compressors.formats import PackedTable
from compressors.tables import kmeans, product_codes, residual_codes
from compressors.tables.kmeans import KMeansFormat
from compressors.tables.lloyd import nearest_under
from compressors.tables.planar import pack, unpack
from compressors.tables.product_codes import ProductCodesFormat
from compressors.tables.residual_codes import ResidualCodesFormat

DAMPING = 0.1
"""Added to the curvature, as a share of its mean: where little is known, little moves."""

SMALLEST = 1e-30

Codes = KMeansFormat | ProductCodesFormat | ResidualCodesFormat


class Proposal(NamedTuple):
    """New codes of a table, uint8 ``(rows, codes)``, not packed, and what each row gains.

    ``gain`` is ``(rows,)``, in the unit of the loss; 0 where a row had better stay.
    """

    codes: Tensor
    gain: Tensor


def propose(table: PackedTable, slope: Tensor, curvature: Tensor) -> Proposal:
    """The codes of every row where the model of the loss is least.

    Args:
        table: with codes of a codebook.
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
    width = _form(table).width(table.rows, table.dim, table.settings)
    return pack(codes, width), count


def unpacked(table: PackedTable) -> Tensor:
    """A table's codes, uint8 ``(rows, codes)``, in a tensor of their own."""
    form, count = _form(table), table.dim
    if not isinstance(form, KMeansFormat):
        count = form.shape(table.rows, table.dim, table.settings).books
    width = form.width(table.rows, table.dim, table.settings)
    return unpack(table.get_buffer("codes"), count, width)


def _form(table: PackedTable) -> Codes:
    if not isinstance(table.storage, Codes):
        raise TypeError(f"{table.storage.name!r} has no codes of a codebook")
    return table.storage


def proposed(
    form: Codes, codes: Tensor, stored: dict[str, Tensor], target: Tensor, metric: Tensor
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


def decoded(form: Codes, codes: Tensor, stored: dict[str, Tensor], dim: int) -> Tensor:
    """What codes ``(rows, codes)`` read as, float32 ``(rows, dim)``."""
    codebook = stored["codebook"]
    if isinstance(form, KMeansFormat):
        return kmeans.decode(codes, codebook, stored.get("scale"))
    if isinstance(form, ProductCodesFormat):
        return product_codes.decode(codes, codebook, dim)
    return residual_codes.decode(codes, codebook)
