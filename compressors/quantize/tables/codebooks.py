"""Sizes of codebooks, and the stored layout of codes and codebooks.

A codebook is a list of vectors, its *entries*; a *code* is the index of an entry. A table may have
several codebooks; the stored tensor ``codebook`` concatenates them.

The bytes of a codebook do not depend on the number of rows, so for a small table it could take more
bytes than the codes save. Therefore the number of entries is limited by two settings: the bits of a
code, and the share of the original table's bytes that codebooks may take.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from compressors.core.modules.formats import TensorSpec
from compressors.errors.steps import ValueNotStorable

WIDTHS = (2, 4, 8)
"""The numbers of bits that a stored code can have."""

CodebookType = Literal["float32", "float16"]

CodeBits = Annotated[
    int, Field(ge=1, le=8, description="Bits of a code; a codebook has 2 ** bits entries.")
]
CodebookShare = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Largest bytes of a table's codebooks, as a share of its float32 bytes; small "
        "tables get fewer entries.",
    ),
]


def compute_code_width(levels: int) -> int:
    """Return the bits of a stored code for a codebook of ``levels`` (at most 256) entries."""
    return next(width for width in WIDTHS if levels <= 1 << width)


def row_bytes(count: int, width: int) -> int:
    """Return the bytes of a row of ``count`` codes of ``width`` bits, with padding."""
    return -(-count * width // 8)


class Shape(NamedTuple):
    """Sizes of a table's codes and codebooks.

    Attributes:
        num_codebooks: number of codebooks, and of codes per row.
        levels: number of entries of each codebook.
        dim: numbers per entry.
        width: bits of a stored code.
    """

    num_codebooks: int
    levels: int
    dim: int
    width: int


def compute_shape(
    rows: int, dim: int, num_codebooks: int, entry_dim: int, settings: Mapping[str, Any]
) -> Shape:
    """Compute the sizes of the codebooks of a table of ``rows x dim``.

    Args:
        rows: number of rows of the table.
        dim: number of dimensions of the table.
        num_codebooks: number of codebooks, and of codes per row.
        entry_dim: numbers per codebook entry.
        settings: ``bits`` of a code, ``codebook_type``, and ``codebook_share``.

    Returns:
        The sizes. ``levels`` is the smaller of ``2 ** bits`` and the number of entries that
        ``codebook_share`` allows, but at least 2.
    """
    size = getattr(torch, settings["codebook_type"]).itemsize
    # The original table takes 4 bytes per weight.
    allowed = int(settings["codebook_share"] * 4 * rows * dim // (num_codebooks * entry_dim * size))
    levels = max(min(1 << settings["bits"], allowed), 2)
    return Shape(num_codebooks, levels, entry_dim, compute_code_width(levels))


def layout(rows: int, shape: Shape, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
    """Return shape and dtype of the packed codes and of the concatenated codebooks.

    ``rows_per_entry=0``: codebooks belong to the whole table, not to its rows.
    """
    codebook = (shape.num_codebooks * shape.levels, shape.dim)
    return {
        "codes": TensorSpec((rows, row_bytes(shape.num_codebooks, shape.width)), torch.uint8),
        "codebook": TensorSpec(
            codebook, getattr(torch, settings["codebook_type"]), rows_per_entry=0
        ),
    }


def entry_indices(codes: Tensor, entries: int) -> Tensor:
    """Convert codes ``(*, codebooks)`` to row indices of the concatenated codebooks.

    ``entries`` is the number of entries of all codebooks together.
    """
    num_codebooks = codes.shape[-1]
    first_entries = torch.arange(num_codebooks, device=codes.device) * (entries // num_codebooks)
    return codes.long() + first_entries


def convert_codebook(codebook: Tensor, dtype: CodebookType) -> Tensor:
    """Convert a codebook to the dtype in which it is stored.

    Raises:
        ValueNotStorable: a number is beyond float16.
    """
    stored = codebook.to(getattr(torch, dtype))
    if not bool(stored.isfinite().all()):
        raise ValueNotStorable("codebook_beyond_float16", value=float(codebook.abs().max()))
    return stored
