"""Embedding tables as a small codebook of numbers and a few bits per weight.

The numbers of the codebook, the *levels*, follow the distribution of the weights instead of being
evenly spaced. A weight is a level, selected by its code, times the scale of its row: for example,
16 levels for the table and 4 bits per weight. A table of ``rows x dim`` float32 shrinks from
``4 * rows * dim`` to ``rows * (ceil(dim * bits / 8) + 2) + 4 * 2 ** bits`` bytes with a float16
scale per row.

Sources: Han et al. 2016, https://arxiv.org/abs/1510.00149 (weights shared by k-means);
Guan et al. 2019, https://arxiv.org/abs/1911.02079 (codebooks for embedding tables).
Differs: one codebook per table and, by default, a scale per row, while Guan et al. fit a codebook
to each row or to classes of rows. Codebook and scales are fitted in turn.
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
from compressors.errors.steps import ValueNotStorable
from compressors.quantize.kernels.bitpacking import pack, unpack
from compressors.quantize.kernels.lloyd import sample_rows, scalar_kmeans
from compressors.quantize.tables.codebooks import row_bytes

RowScale = Literal["none", "float16", "float32"]
FITTED_VALUES = 2**21
"""Largest number of weights to which a codebook is fitted; more do not give better levels."""

ALTERNATIONS = 3
"""Number of rounds in which codes and scales, or codebook and scales, are fitted in turn."""


def fit(
    table: Tensor, bits: int, scale_type: RowScale = "float16", weight: Tensor | None = None
) -> Tensor:
    """Fit the codebook of a table.

    Args:
        table: float ``(rows, dim)``; large tables are sampled.
        bits: bits of a code.
        scale_type: dtype of the scale by which each row is divided; ``none``: no scale.
        weight: weight of each row, ``(rows,)``; None: equal weights. Allowed only if the table is
            not sampled.

    Returns:
        float32 ``(2 ** bits,)``, ascending.

    Raises:
        ValueNotStorable: a weight is too large for a float16 scale.
        ValueError: rows are weighted, and the table is so large that it would be sampled.
    """
    max_rows = max(FITTED_VALUES // table.shape[1], 1)
    rows = sample_rows(table, max_rows)
    if weight is not None and len(table) > max_rows:
        raise ValueError(f"Expected row weights for at most {max_rows} rows, got {len(table)}.")
    counts = torch.ones(len(rows)) if weight is None else weight
    scale = torch.ones(len(rows), 1)
    if scale_type != "none":
        scale = largest_weights(rows, scale_type).float()
    best, least_error = torch.empty(0), float("inf")
    for _ in range(ALTERNATIONS if scale_type != "none" else 1):
        # The squared error of a weight is that of its scaled value times the squared scale.
        value_weights = (counts.double().unsqueeze(1) * scale.double().square()).expand_as(rows)
        # Rows of zeros have no scale and are ignored.
        values = rows / scale.where(scale > 0, torch.ones_like(scale))
        fitted = scalar_kmeans(values.flatten(), 1 << bits, value_weights.flatten())
        codebook = fitted.codebook.flatten()
        codes, stored = encode(rows, codebook, scale_type)
        scale = torch.ones(len(rows), 1) if stored is None else stored.float()
        row_errors = (codebook[codes.long()] * scale - rows).double().square().sum(dim=1)
        error = float((row_errors * counts.double()).sum())
        if error >= least_error:
            break
        best, least_error = codebook, error
    return best


def largest_weights(rows: Tensor, scale_type: RowScale) -> Tensor:
    """Return the largest absolute weight of each row as a scale: ``(rows, 1)``, positive.

    Raises:
        ValueNotStorable: a weight is beyond float16.
    """
    dtype = torch.float16 if scale_type == "float16" else torch.float32
    smallest = 2.0**-24 if scale_type == "float16" else torch.finfo(torch.float32).tiny
    stored = rows.abs().amax(dim=1, keepdim=True).clamp(min=smallest).to(dtype)
    if not bool(stored.isfinite().all()):
        raise ValueNotStorable("weight_beyond_float16", weight=float(rows.abs().max()))
    return stored


def encode(
    table: Tensor, codebook: Tensor, scale_type: RowScale = "float16"
) -> tuple[Tensor, Tensor | None]:
    """Fit codes and row scales in turn: the nearest level of every weight, and the best scale.

    Args:
        table: float ``(rows, dim)``.
        codebook: ascending, ``(levels,)``.
        scale_type: how the scales are stored.

    Returns:
        ``codes`` uint8 ``(rows, dim)``, not packed, and ``scale`` ``(rows, 1)`` or None.

    Raises:
        ValueNotStorable: a weight is too large for a float16 scale.
    """
    rows = table.float()
    if scale_type == "none":
        return _find_nearest_codes(rows, codebook), None
    scale = largest_weights(rows, scale_type)
    codes = _find_nearest_codes(rows / scale.float(), codebook)
    for _ in range(ALTERNATIONS):
        levels = codebook[codes.long()]
        square = levels.square().sum(dim=1, keepdim=True)
        fitted = ((levels * rows).sum(dim=1, keepdim=True) / square).to(scale.dtype)
        is_usable = fitted.isfinite() & (fitted > 0)
        fitted = torch.where(is_usable, fitted, scale)
        new_codes = _find_nearest_codes(rows / fitted.float(), codebook)
        better = _compute_row_errors(rows, codebook, new_codes, fitted) < _compute_row_errors(
            rows, codebook, codes, scale
        )
        scale, codes = torch.where(better, fitted, scale), torch.where(better, new_codes, codes)
    # The codebook may not contain zero: a scale of zero keeps a row of zeros exact.
    scale = torch.where((rows == 0).all(dim=1, keepdim=True), torch.zeros_like(scale), scale)
    return codes, scale


def _find_nearest_codes(values: Tensor, codebook: Tensor) -> Tensor:
    """Return the codes of the levels nearest to scaled values, uint8 in the same shape."""
    boundaries = (codebook[1:] + codebook[:-1]) / 2
    return torch.bucketize(values, boundaries).to(torch.uint8)


def _compute_row_errors(rows: Tensor, codebook: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the squared error of each decoded row: ``(rows, 1)``."""
    error = codebook[codes.long()] * scale.float() - rows
    return error.square().sum(dim=1, keepdim=True)


def decode(codes: Tensor, codebook: Tensor, scale: Tensor | None) -> Tensor:
    """Decode codes ``(*, dim)`` and scales ``(*, 1)`` to float32 weights ``(*, dim)``."""
    levels = codebook[codes.long()]
    return levels if scale is None else levels * scale.float()


@torch.library.custom_op("recpress::kmeans_table", mutates_args=())
def kmeans_table(
    codes: Tensor, codebook: Tensor, scale: Tensor | None, ids: Tensor, dim: int, width: int
) -> Tensor:
    """Look up rows of a stored table as float32 ``(*ids, dim)``.

    ``codes`` are packed with ``width`` bits each, ``codebook`` is ``(levels,)``, ``scale`` is
    ``(rows, 1)``.
    """
    row_scale = None if scale is None else scale[ids]
    return decode(unpack(codes[ids], dim, width), codebook, row_scale)


@kmeans_table.register_fake
def _(
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor | None,
    ids: Tensor,
    dim: int,
    width: int,
) -> Tensor:
    return codebook.new_empty((*ids.shape, dim))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, codebook, scale, ids, ctx.dim, ctx.width = inputs
    ctx.has_scale = scale is not None
    ctx.save_for_backward(codes, codebook, *([scale] if ctx.has_scale else []), ids)


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, codebook, *scales, ids = ctx.saved_tensors
    indices = unpack(codes[ids], ctx.dim, ctx.width).long()  # in the codebook, (*ids, dim)
    grad_scale = None
    if ctx.has_scale:
        by_lookup = (grad * codebook[indices]).sum(dim=-1).reshape(-1)  # (lookups,)
        total = torch.zeros(len(scales[0]), device=grad.device)
        total.index_add_(0, ids.reshape(-1), by_lookup)
        grad_scale = total.unsqueeze(1).to(scales[0].dtype)
        grad = grad * scales[0][ids].float()
    grad_codebook = torch.zeros_like(codebook).index_add_(0, indices.reshape(-1), grad.reshape(-1))
    return None, grad_codebook, grad_scale, None, None, None


kmeans_table.register_autograd(_compute_gradients, setup_context=_setup_context)


@dataclass(frozen=True)
class KMeansFormat:
    """Stores packed ``codes`` uint8, ``codebook`` float32 ``(levels,)`` and ``scale``.

    ``learned``: names of the tensors that training may change. ``rows_per_entry=0``: the codebook
    belongs to the whole table, not to its rows. The protocol ``TableFormat``
    (``core/modules/formats.py``) explains the methods.
    """

    name: str = "kmeans"
    learned: tuple[str, ...] = ("codebook", "scale")

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        bits, scale = settings["bits"], settings["scale"]
        specs = {
            "codes": TensorSpec((rows, row_bytes(dim, bits)), torch.uint8),
            "codebook": TensorSpec((1 << bits,), torch.float32, rows_per_entry=0),
        }
        if scale != "none":
            specs["scale"] = TensorSpec((rows, 1), getattr(torch, scale))
        return specs

    def width(self, rows: int, dim: int, settings: Mapping[str, Any]) -> int:
        """Return the bits of a stored code."""
        return int(settings["bits"])

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        rows: Tensor = torch.ops.recpress.kmeans_table(
            stored["codes"], stored["codebook"], stored.get("scale"), ids, dim, settings["bits"]
        )
        return rows


FORMAT = KMeansFormat()


class KMeans(StepSettings):
    """Store embedding tables as a codebook of numbers and a few bits per weight."""

    kind: Literal["kmeans"] = "kmeans"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    bits: Literal[2, 4, 8] = Field(4, description="Bits of a weight's code: 4, 16 or 256 levels.")
    scale: RowScale = Field(
        "float16",
        description="How the scale of each row is stored. none: rows have no scale, which saves "
        "its bytes.",
    )

    @property
    def storage(self) -> TableFormat:
        """The format that the step writes."""
        return FORMAT

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the stored layout of a table."""
        return {"bits": self.bits, "scale": self.scale}

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Fit the codebook of a table, float ``(rows, dim)``."""
        return {"codebook": fit(rows, self.bits, self.scale)}

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode a block of rows, float ``(rows, dim)``; ``params`` is the result of ``fit``."""
        codes, scale = encode(block, params["codebook"], self.scale)
        stored = {"codes": pack(codes, self.bits)}
        return stored if scale is None else {**stored, "scale": scale}
