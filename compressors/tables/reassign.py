"""Which codes of a packed table would lower the task's loss.

Around what a row reads as now, the loss is modelled by its slope and a diagonal curvature. It is
least at one target row, and how far a row is from that, each column weighted by the curvature, is
what the row loses. Codes are chosen anew to lose less.
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

Codes = KMeansFormat | ProductCodesFormat | ResidualCodesFormat


class Proposal(NamedTuple):
    """New codes uint8 ``(rows, codes)``, not packed, and what each row gains, ``(rows,)``."""

    codes: Tensor
    gain: Tensor


def moved(
    table: PackedTable, slope: Tensor, curvature: Tensor, penalty: float, share: float
) -> tuple[Tensor, int]:
    """A table's codes after those rows moved that gain most.

    Args:
        table: with codes of a codebook.
        slope: of the loss by each weight as it reads now, ``(rows, dim)``.
        curvature: the same, none negative; rows without any stay.
        penalty: on the squared norm of the table, as ``table_l2``.
        share: of the rows that would gain, how many move.

    Returns:
        Codes as stored, and how many rows moved.
    """
    form, stored = table.storage, dict(table.named_buffers())
    if not isinstance(form, Codes):
        raise TypeError(f"{form.name!r} has no codes of a codebook")
    with torch.no_grad():
        now = table(torch.arange(table.rows))  # (rows, dim)
    seen = curvature.sum(dim=1) > 0
    damping = DAMPING * curvature[seen].mean() if bool(seen.any()) else curvature.new_zeros(())
    metric = (curvature + penalty + damping).float()
    target = now - ((slope + penalty * now) / metric.clamp(min=1e-30)).float()
    width = form.width(table.rows, table.dim, table.settings)
    count = table.dim
    if not isinstance(form, KMeansFormat):
        count = form.shape(table.rows, table.dim, table.settings).books
    codes = unpack(stored["codes"], count, width)
    new = proposed(form, codes, stored, target, metric)
    again = decoded(form, new, stored, table.dim)
    gain = (metric * ((now - target).square() - (again - target).square())).sum(dim=1)
    gain = torch.where(seen & (new != codes).any(dim=1), gain, torch.zeros_like(gain))
    gaining = int((gain > 0).sum())
    chosen = gain.topk(round(share * gaining)).indices
    codes = codes.clone()  # eight bits are not unpacked: these are the stored ones
    codes[chosen] = new[chosen]
    return pack(codes, width), len(chosen)


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
