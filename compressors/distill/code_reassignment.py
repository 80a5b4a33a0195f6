"""Select new codes of a packed table (one stored as codes) that decrease the task's loss.

Near a row's current values, the loss is approximated by a quadratic function of the row, with the
gradient of the loss and a diagonal second-order term. This term has one weight per column, the
*column weight*: ``dim`` times the column's mean squared gradient (its *curvature*). The factor
``dim`` makes it an upper bound although the columns of a row change together: the square of a sum
of ``dim`` terms is at most ``dim`` times the sum of their squares. Without the factor, the loss of
the tables of ``recpress demo`` increased even if only three rows changed.

The row where the quadratic function has its minimum is the *optimal row*. Up to constants, the
function is the squared distance of the row from the optimal row, with a column weight per column.
New codes are those that decrease this distance most.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from compressors.core.modules.formats import PackedTable
from compressors.quantize.kernels.bitpacking import pack, unpack
from compressors.quantize.kernels.levels import (
    FittedRange,
    Grid,
    dequantize,
    expand_to_rows,
    nearest_multiples,
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
"""Smallest divisor of a gradient, for columns without curvature."""

RowwiseFormat = RowwiseInt8Format | PackedRowsFormat
CodebookFormat = KMeansFormat | ProductCodesFormat | ResidualCodesFormat
FormatWithCodes = RowwiseFormat | CodebookFormat
"""Formats whose codes can be selected again."""


class ProposedCodes(NamedTuple):
    """New codes of a table and the estimated gain of each row.

    Attributes:
        codes: uint8 or int8 ``(rows, codes)``, not packed.
        gain: estimated decrease of the loss by each row, ``(rows,)``; 0 if the row keeps its codes.
    """

    codes: Tensor
    gain: Tensor


def propose(table: PackedTable, gradient: Tensor, curvature: Tensor) -> ProposedCodes:
    """Propose, for every row, the codes that minimize the approximated loss.

    Args:
        table: a packed table whose codes index a codebook or uniform levels.
        gradient: gradient of the loss at the table's current weights, ``(rows, dim)``.
        curvature: mean squared gradients, ``(rows, dim)``; rows of zeros keep their codes.
    """
    storage, stored = _require_codes_format(table), dict(table.named_buffers())
    with torch.no_grad():
        current_rows = table(torch.arange(table.rows))  # (rows, dim)
    has_lookups = curvature.sum(dim=1) > 0
    damping = curvature.new_zeros(())
    if bool(has_lookups.any()):
        damping = DAMPING * curvature[has_lookups].mean()
    column_weights = table.dim * (curvature + damping)
    optimal_rows = current_rows - gradient / column_weights.clamp(min=SMALLEST)
    codes = read_codes(table)
    if isinstance(storage, RowwiseFormat):
        new_codes, new_values = nearest_uniform_codes(table, optimal_rows)
    else:
        new_codes = nearest_codebook_codes(storage, codes, stored, optimal_rows, column_weights)
        new_values = decode_rows(storage, new_codes, stored, table.dim)
    decrease = (current_rows - optimal_rows).square() - (new_values - optimal_rows).square()
    gain = (column_weights * decrease).sum(dim=1) / 2
    better = has_lookups & (gain > 0) & (new_codes != codes).any(dim=1)
    return ProposedCodes(new_codes, torch.where(better, gain, torch.zeros_like(gain)))


def reassign_codes(table: PackedTable, proposal: ProposedCodes, share: float) -> tuple[Tensor, int]:
    """Return a table's codes, with proposed codes for the rows with the largest gains.

    Args:
        table: not modified.
        proposal: the result of ``propose`` for this table.
        share: the share of the rows with a positive gain that get their proposed codes.

    Returns:
        The table's codes as stored (packed), and the number of rows that changed.
    """
    count = round(share * int((proposal.gain > 0).sum()))
    selected_rows = proposal.gain.topk(count).indices
    codes = read_codes(table)
    codes[selected_rows] = proposal.codes[selected_rows]
    bits = _get_code_bits(table)
    return codes if bits == 8 else pack(codes, bits), count


def read_codes(table: PackedTable) -> Tensor:
    """Return a copy of a table's codes, unpacked: int8 or uint8 ``(rows, codes)``."""
    storage, count, bits = _require_codes_format(table), table.dim, _get_code_bits(table)
    codes = table.get_buffer("codes")
    if bits == 8:
        return codes.clone()
    if isinstance(storage, ProductCodesFormat | ResidualCodesFormat):
        count = storage.shape(table.rows, table.dim, table.settings).num_codebooks
    return unpack(codes, count, bits)


def nearest_uniform_codes(table: PackedTable, optimal_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a row-wise table's codes nearest to optimal rows, and values: ``(rows, dim)`` each.

    A value is ``multiple * scale + offset``; a symmetric table has no offset. Each column has its
    own code, so weights of columns do not matter.
    """
    bits, shared = _get_code_bits(table), scales.SharedScales.from_settings(table.settings)
    # A grid is the set of levels. A symmetric grid with a level at zero has an odd number of
    # levels, so code 0 is not used. Symmetric int2 has no level at zero and uses all four codes
    # (see ``quantize/kernels/levels.py``).
    has_zero_level = shared.symmetric and bits > 2
    grid = Grid(2**bits - has_zero_level, shared.symmetric, rows_per_scale=shared.rows_per_scale)
    stored = dict(table.named_buffers())
    fitted = FittedRange(stored["scale"], stored.get("offset"))
    multiples = nearest_multiples(optimal_rows, fitted, grid)
    offset = fitted.offset
    if offset is not None:
        offset = expand_to_rows(offset, table.rows, grid.rows_per_scale)
    values = dequantize(
        multiples, expand_to_rows(fitted.scale, table.rows, grid.rows_per_scale), offset
    )
    # A code is the multiple plus a constant. The constant is zero for asymmetric levels and for
    # symmetric int8, whose codes are signed. Otherwise it avoids negative codes.
    constant = 0.0
    if shared.symmetric and bits < 8:
        # ``grid.max_multiple`` is the highest multiple: 1.5 for int2, 7 for int4.
        constant = grid.max_multiple if bits == 2 else grid.max_multiple + 1
    return (multiples + constant).to(torch.uint8 if bits < 8 else stored["codes"].dtype), values


def _get_code_bits(table: PackedTable) -> int:
    """Return the bits of a stored code."""
    storage = _require_codes_format(table)
    if isinstance(storage, RowwiseFormat):
        return storage.bits
    # ``width`` of a codebook format is the number of bits of a code.
    return storage.width(table.rows, table.dim, table.settings)


def _require_codes_format(table: PackedTable) -> FormatWithCodes:
    if not isinstance(table.storage, FormatWithCodes):
        raise TypeError(f"Expected a format with codes, got {table.storage.name!r}.")
    return table.storage


def nearest_codebook_codes(
    storage: CodebookFormat,
    codes: Tensor,
    stored: dict[str, Tensor],
    optimal_rows: Tensor,
    column_weights: Tensor,
) -> Tensor:
    """Select codes, uint8 ``(rows, codes)``, whose values are nearest to the optimal rows.

    Each squared difference has a weight. Residual codes are selected one after the other while the
    others are fixed, so their distance may not be the smallest. For the other formats it is.

    Args:
        storage: the format of the table.
        codes: the current codes, uint8 ``(rows, codes)``.
        stored: the tensors of the table.
        optimal_rows: ``(rows, dim)``.
        column_weights: weight of each squared difference, ``(rows, dim)``.
    """
    codebook = stored["codebook"].float()
    if isinstance(storage, KMeansFormat):
        scale = stored.get("scale")
        scaled = optimal_rows
        if scale is not None:
            scaled = optimal_rows / scale.float().where(scale > 0, torch.ones_like(scale.float()))
        # Training may have changed the order of the levels.
        sorted_levels, code_of_rank = codebook.sort()
        middle = (sorted_levels[1:] + sorted_levels[:-1]) / 2
        return code_of_rank[torch.bucketize(scaled, middle)].to(torch.uint8)
    new_codes = codes.clone()
    # The tensor ``codebook`` is the concatenation of several codebooks, one for each code of a row.
    codebooks = codebook.reshape(codes.shape[1], -1, codebook.shape[1])  # (codes, levels, width)
    if isinstance(storage, ProductCodesFormat):
        begin = 0
        for index, width in enumerate(
            product_codes.part_widths(optimal_rows.shape[1], codes.shape[1])
        ):
            part = slice(begin, begin + width)
            entries = codebooks[index, :, :width]
            new_codes[:, index] = nearest_with_weights(
                optimal_rows[:, part], column_weights[:, part], entries
            )
            begin += width
        return new_codes
    for index, entries in enumerate(codebooks):
        others = residual_codes.decode(new_codes, codebook) - entries[new_codes[:, index].long()]
        new_codes[:, index] = nearest_with_weights(optimal_rows - others, column_weights, entries)
    return new_codes


def decode_rows(
    storage: CodebookFormat, codes: Tensor, stored: dict[str, Tensor], dim: int
) -> Tensor:
    """Return the values of codes ``(rows, codes)``: float32 ``(rows, dim)``."""
    codebook = stored["codebook"]
    if isinstance(storage, KMeansFormat):
        return kmeans.decode(codes, codebook, stored.get("scale"))
    if isinstance(storage, ProductCodesFormat):
        return product_codes.decode(codes, codebook, dim)
    return residual_codes.decode(codes, codebook)
