"""Sizes of the codebooks of vector codes, and the stored layout of codes and codebooks.

The bytes of a codebook do not depend on the number of rows. So the number of its entries is limited
by the bits of a code in the recipe, and by a share of the bytes of the original table.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from compressors.core.modules.formats import TensorSpec
from compressors.errors.steps import ValueNotStorable

WIDTHS = (2, 4, 8)
"""Bits that a code may take as stored."""

CodebookType = Literal["float32", "float16"]

CodeBits = Annotated[
    int, Field(ge=1, le=8, description="Of a code: 2 to this power are the entries of a codebook.")
]
CodebookShare = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Share of a table's float32 bytes that its codebooks may take; small tables "
        "get fewer entries.",
    ),
]


def width_of(levels: int) -> int:
    """Bits of a stored code that distinguishes ``levels`` entries, at most 256."""
    return next(width for width in WIDTHS if levels <= 1 << width)


def row_bytes(count: int, width: int) -> int:
    """Bytes of a row of ``count`` codes of ``width`` bits, padding included."""
    return -(-count * width // 8)


class Shape(NamedTuple):
    """Sizes of a table's codes and codebooks.

    There are ``books`` codebooks of ``levels`` entries of ``dim`` numbers each; ``width`` is the
    number of bits of a stored code.
    """

    books: int
    levels: int
    dim: int
    width: int


def shape_of(rows: int, dim: int, books: int, entry: int, settings: Mapping[str, Any]) -> Shape:
    """Compute the sizes of the codebooks of a table of ``rows x dim``.

    Args:
        rows: number of rows of the table.
        dim: number of dimensions of the table.
        books: number of codebooks, and of codes per row.
        entry: numbers per codebook entry.
        settings: ``bits`` of a code, ``codebook_type``, and ``codebook_share``.

    Returns:
        ``levels`` is ``2 ** bits``, or as many as the share allows, and never below 2.
    """
    size = getattr(torch, settings["codebook_type"]).itemsize
    allowed = int(settings["codebook_share"] * 4 * rows * dim // (books * entry * size))
    levels = max(min(1 << settings["bits"], allowed), 2)
    return Shape(books, levels, entry, width_of(levels))


def layout(rows: int, shape: Shape, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """The stored tensors: codes uint8, packed, and all codebooks concatenated."""
    codebook = (shape.books * shape.levels, shape.dim)
    return {
        "codes": TensorSpec((rows, row_bytes(shape.books, shape.width)), torch.uint8),
        "codebook": TensorSpec(codebook, getattr(torch, settings["codebook_type"]), every=0),
    }


def entry_of(codes: Tensor, entries: int) -> Tensor:
    """Convert codes ``(*, books)`` to row indices of the concatenated codebooks."""
    books = codes.shape[-1]
    return codes.long() + torch.arange(books, device=codes.device) * (entries // books)


def as_stored(codebook: Tensor, dtype: CodebookType) -> Tensor:
    """Convert a codebook to the type in which it is stored.

    Raises:
        CompressionError: an entry is beyond float16.
    """
    stored = codebook.to(getattr(torch, dtype))
    if not bool(stored.isfinite().all()):
        raise ValueNotStorable("codebook_beyond_float16", value=float(codebook.abs().max()))
    return stored
