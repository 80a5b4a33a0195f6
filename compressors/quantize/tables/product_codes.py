"""Product quantization of embedding tables: one code for each part of a row's columns.

The columns are split into ``parts``, and each part of a row is stored as the nearest of
``2 ** bits`` short vectors. A table of ``rows x dim`` float32 shrinks from ``4 * rows * dim`` to
``rows * ceil(parts * bits / 8)`` bytes and a codebook of about ``4 * dim * 2 ** bits``.

Source: Jegou et al. 2011, https://doi.org/10.1109/TPAMI.2010.57 (product quantization).
Differs: if the number of columns is not a multiple of ``parts``, some parts have one column more
than others; codebooks are smaller for small tables; codes of 2 and 4 bits are packed.

The *widths* of parts are numbers of columns; the *width* of a code is its number of bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.core.modules.formats import TableFormat, TensorSpec
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from compressors.quantize.kernels.bitpacking import pack, unpack
from compressors.quantize.kernels.lloyd import kmeans, nearest_entries, sample_rows
from compressors.quantize.tables.codebooks import (
    CodeBits,
    CodebookShare,
    CodebookType,
    Shape,
    compute_code_width,
    compute_shape,
    convert_codebook,
    entry_indices,
    layout,
)


def part_widths(dim: int, parts: int) -> tuple[int, ...]:
    """Return the number of columns of each part, wider parts first; no part is empty."""
    parts = min(parts, dim)
    return tuple(dim // parts + (index < dim % parts) for index in range(parts))


def padded_columns(dim: int, parts: int) -> list[int] | None:
    """Return the index of each column of a row after all parts are padded to the widest width.

    The result is None if all parts have the same width, so that nothing is padded.
    """
    widths = part_widths(dim, parts)
    if len(set(widths)) == 1:
        return None
    return [part * widths[0] + index for part, width in enumerate(widths) for index in range(width)]


def fit(table: Tensor, parts: int, levels: int, weight: Tensor | None = None) -> Tensor:
    """Fit a codebook for each part of the columns.

    Args:
        table: float ``(rows, dim)``; large tables are sampled.
        parts: number of parts of the columns.
        levels: number of entries of a codebook.
        weight: weight of each row, ``(rows,)``, only for tables that are not sampled.

    Returns:
        The concatenated codebooks, float32 ``(parts * levels, widest part)``. The entries of
        narrower parts are padded with zeros.

    Raises:
        ValueError: rows are weighted, and the table is so large that it is sampled.
    """
    rows = sample_rows(table)
    if weight is not None and len(weight) != len(rows):
        raise ValueError(f"Expected row weights for at most {len(rows)} rows, got {len(table)}.")
    widths = part_widths(table.shape[1], parts)
    codebook = torch.zeros(len(widths), levels, widths[0])
    for index, part in enumerate(torch.split(rows, list(widths), dim=1)):
        codebook[index, :, : widths[index]] = kmeans(part.contiguous(), levels, weight).codebook
    return codebook.reshape(-1, widths[0])


def encode(table: Tensor, codebook: Tensor, parts: int) -> Tensor:
    """Find the nearest entry for each part of each row: uint8 ``(rows, parts)``, not packed."""
    widths = part_widths(table.shape[1], parts)
    codebooks = codebook.reshape(len(widths), -1, widths[0])
    codes = [
        nearest_entries(part.float().contiguous(), codebooks[index, :, : widths[index]])
        for index, part in enumerate(torch.split(table, list(widths), dim=1))
    ]
    return torch.stack(codes, dim=1).to(torch.uint8)


def decode(codes: Tensor, codebook: Tensor, dim: int) -> Tensor:
    """Decode codes ``(*, parts)`` to float32 weights ``(*, dim)``."""
    return _concatenate_parts(codebook[entry_indices(codes, len(codebook))].float(), dim)


def _concatenate_parts(entries: Tensor, dim: int) -> Tensor:
    """Concatenate entries ``(*, parts, widest)`` and remove padding columns."""
    column_indices = padded_columns(dim, entries.shape[-2])
    padded = entries.flatten(-2)
    return padded if column_indices is None else padded[..., column_indices]


@torch.library.custom_op("recpress::product_codes", mutates_args=())
def product_codes(
    codes: Tensor, codebook: Tensor, ids: Tensor, dim: int, parts: int, width: int
) -> Tensor:
    """Look up rows of a stored table as float32 ``(*ids, dim)``.

    ``codes`` are packed with ``width`` bits each; ``codebook`` is
    ``(parts * levels, widest part)``.
    """
    return decode(unpack(codes[ids], parts, width), codebook, dim).contiguous()


@product_codes.register_fake
def _(
    codes: Tensor,
    codebook: Tensor,
    ids: Tensor,
    dim: int,
    parts: int,
    width: int,
) -> Tensor:
    return codebook.new_empty((*ids.shape, dim), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dim, ctx.parts, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, codebook, ids = ctx.saved_tensors
    indices = entry_indices(
        unpack(codes[ids], ctx.parts, ctx.width), len(codebook)
    )  # (*ids, parts)
    column_indices = padded_columns(ctx.dim, ctx.parts)
    if column_indices is not None:
        padded_grad = grad.new_zeros((*grad.shape[:-1], ctx.parts * codebook.shape[1]))
        padded_grad[..., column_indices] = grad
        grad = padded_grad
    total = torch.zeros(codebook.shape, device=grad.device)
    total.index_add_(0, indices.reshape(-1), grad.reshape(-1, codebook.shape[1]))
    return None, total.to(codebook.dtype), None, None, None, None


product_codes.register_autograd(_compute_gradients, setup_context=_setup_context)


@dataclass(frozen=True)
class ProductCodesFormat:
    """Stores packed ``codes`` uint8, and ``codebook`` ``(parts * levels, widest part)``.

    ``learned``: names of the tensors that training may change. The protocol ``TableFormat``
    (``core/modules/formats.py``) explains the methods.
    """

    name: str = "product_codes"
    learned: tuple[str, ...] = ("codebook",)

    def shape(self, rows: int, dim: int, settings: Mapping[str, Any]) -> Shape:
        """Return the sizes of the codes and codebooks of a ``rows x dim`` table."""
        widths = part_widths(dim, settings["parts"])
        return compute_shape(rows, dim, len(widths), widths[0], settings)

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return layout(rows, self.shape(rows, dim, settings), settings)

    def width(self, rows: int, dim: int, settings: Mapping[str, Any]) -> int:
        """Return the bits of a stored code."""
        return self.shape(rows, dim, settings).width

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        codes, codebook = stored["codes"], stored["codebook"]
        shape = self.shape(codes.shape[0], dim, settings)
        rows: Tensor = torch.ops.recpress.product_codes(
            codes, codebook, ids, dim, shape.num_codebooks, shape.width
        )
        return rows


FORMAT = ProductCodesFormat()


class ProductCodes(StepSettings):
    """Store embedding tables as a few codes per row, each for one part of its columns."""

    kind: Literal["product_codes"] = "product_codes"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    parts: int = Field(
        4,
        ge=1,
        description="Number of parts into which the columns are split, and of codes per row; at "
        "most one part per column.",
    )
    bits: CodeBits = 8  # of a code
    codebook_type: CodebookType = Field(
        "float32",
        description="How codebooks are stored. float16 codebooks are trained only by refit_codes.",
    )
    codebook_share: CodebookShare = 0.5  # largest share of the table's float32 bytes

    @property
    def storage(self) -> TableFormat:
        """The format that the step writes."""
        return FORMAT

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the stored layout of a table."""
        return self.model_dump(include={"parts", "bits", "codebook_type", "codebook_share"})

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Fit the codebooks of a table, float ``(rows, dim)``."""
        count, dim = rows.shape
        shape = FORMAT.shape(count, dim, self.settings())
        return {
            "codebook": convert_codebook(fit(rows, self.parts, shape.levels), self.codebook_type)
        }

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode a block of rows, float ``(rows, dim)``; ``params`` is the result of ``fit``."""
        codes = encode(block, params["codebook"], self.parts)
        levels = len(params["codebook"]) // codes.shape[1]
        return {"codes": pack(codes, compute_code_width(levels))}
