"""Residual quantization of embedding tables: a row is the sum of one entry of each codebook.

Each of the ``codebooks`` has ``2 ** bits`` entries as wide as the table; a row is stored as one
code per codebook. In the code, ``num_codebooks`` is the number of codebooks, and the tensor
``codebook`` concatenates them. A table of ``rows x dim`` float32 shrinks from ``4 * rows * dim`` to
``rows * ceil(codebooks * bits / 8)`` bytes and codebooks of ``4 * codebooks * dim * 2 ** bits``.

There are two ways to fit the codebooks, with the same storage format:

- *residual*: each codebook is fitted to the residuals that the previous ones leave (Chen et al.
  2010, https://doi.org/10.3390/s101211259);
- *additive*, with ``refine`` above 0: afterwards, rounds fit all codebooks to the codes by least
  squares, and then select new codes (Babenko and Lempitsky 2014,
  https://doi.org/10.1109/CVPR.2014.124). Differs: codes are not found by beam search. They are
  selected greedily and then one at a time while the others are fixed (iterated conditional modes).
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
from compressors.quantize.kernels.lloyd import (
    KMeansFit,
    kmeans,
    nearest_entries,
    sample_rows,
    squared_distance,
)
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

MAX_PASSES = 8
"""Largest number of passes in which each code of a row is selected again.

The passes end when no code changes.
"""

DAMPING = 1e-6
"""Weight of each entry's previous value in least squares, as a share of the mean row weight.

Entries that the rows do not determine keep their previous values.
"""


def fit(
    table: Tensor, num_codebooks: int, levels: int, refine: int = 0, weight: Tensor | None = None
) -> KMeansFit:
    """Fit the codebooks of a table.

    Args:
        table: float ``(rows, dim)``; large tables are sampled.
        num_codebooks: number of codebooks.
        levels: number of entries of each codebook.
        refine: largest number of rounds that fit all codebooks together.
        weight: weight of each row, ``(rows,)``, only for tables that are not sampled.

    Returns:
        float32 ``(num_codebooks * levels, dim)``, the codebooks concatenated, and the squared error
        of the rows after residual fitting and after each round that lowered it.

    Raises:
        ValueError: rows are weighted, and the table is so large that it is sampled.
    """
    rows = sample_rows(table)
    if weight is not None and len(weight) != len(rows):
        raise ValueError(f"Expected row weights for at most {len(rows)} rows, got {len(table)}.")
    counts = torch.ones(len(rows), dtype=torch.float64) if weight is None else weight.double()
    residuals, fitted = rows, []
    for number in range(num_codebooks):
        book = kmeans(residuals, levels, weight, seed=number).codebook
        residuals = residuals - book[nearest_entries(residuals, book)]
        fitted.append(book)
    codebook = torch.cat(fitted)
    codes = encode(rows, codebook, num_codebooks)
    errors = [_compute_error(rows, codes, codebook, counts)]
    for _ in range(refine):
        refined = least_squares(rows, codes, codebook, counts)
        codes = encode(rows, refined, num_codebooks)
        error = _compute_error(rows, codes, refined, counts)
        if error >= errors[-1]:
            break
        codebook = refined
        errors.append(error)
    return KMeansFit(codebook, tuple(errors))


def least_squares(rows: Tensor, codes: Tensor, codebook: Tensor, weight: Tensor) -> Tensor:
    """Fit all codebooks to given codes by least squares.

    Args:
        rows: float ``(rows, dim)``.
        codes: uint8 ``(rows, num_codebooks)``.
        codebook: the previous codebooks, ``(num_codebooks * levels, dim)``. Entries that the rows
            do not determine keep their values.
        weight: weight of each row, float64 ``(rows,)``.

    Returns:
        The new codebooks, ``(num_codebooks * levels, dim)`` in the dtype of ``codebook``.
    """
    entries = len(codebook)
    indices = entry_indices(codes, entries)  # (rows, num_codebooks)
    # The normal equations: the total weight of the rows that use two entries together, and the
    # weighted sums of the rows that use an entry.
    pair_weights = torch.zeros(entries * entries, dtype=torch.float64)
    right_side = torch.zeros(codebook.shape, dtype=torch.float64)
    for entry in indices.unbind(1):
        right_side.index_add_(0, entry, rows.double() * weight.unsqueeze(1))
        for other_entry in indices.unbind(1):
            pair_weights.index_add_(0, entry * entries + other_entry, weight)
    damping = DAMPING * float(weight.mean())
    matrix = pair_weights.reshape(entries, entries) + damping * torch.eye(
        entries, dtype=torch.float64
    )
    solved: Tensor = torch.linalg.solve(matrix, right_side + damping * codebook.double())
    return solved.to(codebook.dtype)


def encode(table: Tensor, codebook: Tensor, num_codebooks: int) -> Tensor:
    """Compute the codes of each row: uint8 ``(rows, num_codebooks)``, not packed.

    The first codes are greedy: each selects the entry nearest to the residual of the previous ones.
    Then each code in turn is selected again while the others are fixed, until no code changes. No
    pass increases a row's error.

    Args:
        table: float ``(rows, dim)``.
        codebook: ``(num_codebooks * levels, dim)``.
        num_codebooks: number of codebooks.
    """
    rows = table.float()
    codebooks = codebook.float().reshape(num_codebooks, -1, codebook.shape[1])
    residuals, codes = rows, []
    for book in codebooks:
        codes.append(nearest_entries(residuals, book))
        residuals = residuals - book[codes[-1]]
    for _ in range(MAX_PASSES if num_codebooks > 1 else 0):
        changed = False
        for number, book in enumerate(codebooks):
            others = torch.zeros_like(rows)
            for other, other_codes in enumerate(codes):
                if other != number:
                    others = others + codebooks[other][other_codes]
            new_codes = nearest_entries(rows - others, book)
            changed = changed or not torch.equal(new_codes, codes[number])
            codes[number] = new_codes
        if not changed:
            break
    return torch.stack(codes, dim=1).to(torch.uint8)


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    """Decode codes ``(*, num_codebooks)`` to float32 weights ``(*, dim)``."""
    return codebook[entry_indices(codes, len(codebook))].float().sum(dim=-2)


def _compute_error(rows: Tensor, codes: Tensor, codebook: Tensor, weight: Tensor) -> float:
    """Return the squared error of the decoded rows, each times its weight, summed."""
    return float((squared_distance(rows, decode(codes, codebook)) * weight).sum())


@torch.library.custom_op("recpress::residual_codes", mutates_args=())
def residual_codes(
    codes: Tensor, codebook: Tensor, ids: Tensor, num_codebooks: int, width: int
) -> Tensor:
    """Look up rows of a stored table as float32 ``(*ids, dim)``.

    ``codes`` are packed with ``width`` bits each, ``codebook`` is ``(num_codebooks * levels,
    dim)``.
    """
    return decode(unpack(codes[ids], num_codebooks, width), codebook)


@residual_codes.register_fake
def _(codes: Tensor, codebook: Tensor, ids: Tensor, num_codebooks: int, width: int) -> Tensor:
    return codebook.new_empty((*ids.shape, codebook.shape[1]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_codebooks, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, codebook, ids = ctx.saved_tensors
    entry = entry_indices(
        unpack(codes[ids], ctx.num_codebooks, ctx.width), len(codebook)
    )  # (*ids, num_codebooks)
    flat = grad.reshape(-1, codebook.shape[1])
    total = torch.zeros(codebook.shape, device=grad.device)
    for indices in entry.reshape(-1, ctx.num_codebooks).unbind(1):
        total.index_add_(0, indices, flat)
    return None, total.to(codebook.dtype), None, None, None


residual_codes.register_autograd(_compute_gradients, setup_context=_setup_context)


@dataclass(frozen=True)
class ResidualCodesFormat:
    """Stores packed ``codes`` uint8, and ``codebook`` ``(codebooks * levels, dim)``.

    ``learned``: names of the tensors that training may change. The protocol ``TableFormat``
    (``core/modules/formats.py``) explains the methods.
    """

    name: str = "residual_codes"
    learned: tuple[str, ...] = ("codebook",)

    def shape(self, rows: int, dim: int, settings: Mapping[str, Any]) -> Shape:
        """Return the sizes of the codes and codebooks of a ``rows x dim`` table."""
        return compute_shape(rows, dim, settings["codebooks"], dim, settings)

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
        rows: Tensor = torch.ops.recpress.residual_codes(
            codes, codebook, ids, shape.num_codebooks, shape.width
        )
        return rows


FORMAT = ResidualCodesFormat()


class ResidualCodes(StepSettings):
    """Store embedding tables as a few codes per row, whose codebook entries are summed."""

    kind: Literal["residual_codes"] = "residual_codes"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    codebooks: int = Field(2, ge=1, le=16, description="Number of codebooks, and of codes per row.")
    bits: CodeBits = 8  # of a code
    refine: int = Field(
        8,
        ge=0,
        description="Largest number of rounds that fit all codebooks together (additive codes); "
        "0: each codebook is only fitted to the residuals of those before it.",
    )
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
        return self.model_dump(include={"codebooks", "bits", "codebook_type", "codebook_share"})

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Fit the codebooks of a table, float ``(rows, dim)``."""
        count, dim = rows.shape
        shape = FORMAT.shape(count, dim, self.settings())
        fitted = fit(rows, shape.num_codebooks, shape.levels, self.refine)
        return {"codebook": convert_codebook(fitted.codebook, self.codebook_type)}

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode a block of rows, float ``(rows, dim)``; ``params`` is the result of ``fit``."""
        codes = encode(block, params["codebook"], self.codebooks)
        return {"codes": pack(codes, compute_code_width(len(params["codebook"]) // self.codebooks))}
