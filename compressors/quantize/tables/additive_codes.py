"""Additive codes weighted by lookup counts: the format with the best quality per byte of a row.

The storage format is that of ``residual_codes``: a row is the sum of one entry of each codebook.
The fit of codes and codebooks differs, which at least halves the error at a few codes per row:

- rows are weighted by a power of their lookup counts in training; with ``sensitive`` each lookup is
  weighted by the squared gradient of the network's output;
- columns and pairs of columns are weighted by the same gradients (``sensitive``): squared error is
  computed after a linear transform of the table;
- codes are found by *beam search*: the ``beam`` best partial sums are kept from codebook to
  codebook, instead of only the best one;
- all codebooks are fitted to the codes together by least squares. Between rounds, noise is added to
  them, less each round, so that they leave the poor local optimum of residual fitting.

With one codebook this is k-means of rows, weighted by lookup counts.

Sources: Babenko and Lempitsky 2014, https://doi.org/10.1109/CVPR.2014.124 (additive codes, beam
search); Martinez et al. 2018, LSQ++, https://doi.org/10.1007/978-3-030-01270-0_30 (codebook
perturbations that decrease to zero).
Differs: rows have weights, and the best round is kept, not the last.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import PackedTable, TableFormat
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import Applied, Decision, StepPlan, choose_tables
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from compressors.core.units import Unit, pack_table, swap
from compressors.errors.compression import NothingToCompress
from compressors.metrics.validation_score import quality
from compressors.quantize.calibration.lookup_counts import lookup_counts, sensitivities
from compressors.quantize.kernels.bitpacking import pack
from compressors.quantize.kernels.lloyd import kmeans, nearest, squared_distance
from compressors.quantize.tables.codebooks import CodeBits, CodebookShare, CodebookType, as_stored
from compressors.quantize.tables.residual_codes import FORMAT, decode, least_squares

BLOCK = 4_096
"""Rows that are encoded at once: a beam of 16 over 256 entries holds 64 MB."""
SAMPLE = 65_536
"""Rows that codebooks are fitted on, at most: those that count most."""
CALM = 4
"""Rounds at the end without shaking."""


def lookup_weight(mattered: Tensor, lookups: float, power: float) -> Tensor:
    """Weight of each row's squared error, float64 ``(rows,)``, all positive.

    Args:
        mattered: sum of the weights of each row's lookups, ``(rows,)``.
        lookups: number of lookups of all rows.
        power: exponent of the result.
    """
    total = float(mattered.sum())
    if not total > 0:  # no output depends on this table
        return torch.ones(len(mattered), dtype=torch.float64)
    # A row without lookups in training may be used in serving: it counts as half a mean lookup.
    usual = total / lookups
    return (mattered.double() / usual + 0.5).pow(power)


def stretch(sensitivity: Tensor) -> Tensor:
    """Matrix ``(dim, dim)`` that transforms a table so that squared error is the weighted one.

    Half of each column's weight is equal for all columns, because gradients at a row give the cost
    of small errors only.

    Args:
        sensitivity: sum of outer products of the output's gradients, ``(dim, dim)``.
    """
    matrix = sensitivity.double()
    even = torch.eye(len(matrix), dtype=torch.float64)
    size = float(matrix.diagonal().mean())
    if not size > 0:  # no output depends on this table
        return even.float()
    root: Tensor = torch.linalg.cholesky(matrix / size + even)
    return root.float()


def encode(table: Tensor, codebook: Tensor, books: int, beam: int) -> Tensor:
    """Codes of each row by beam search: uint8 ``(rows, books)``, not packed.

    Args:
        table: float ``(rows, dim)``.
        codebook: ``(books * levels, dim)``, the codebooks concatenated.
        books: number of codebooks.
        beam: number of partial sums that are kept; 1 is greedy. The result is the best of them.
    """
    each = codebook.float().reshape(books, -1, codebook.shape[1])
    squares = each.square().sum(dim=2)  # (books, levels)
    found = []
    for begin in range(0, len(table), BLOCK):
        rows = table[begin : begin + BLOCK].float()
        left = rows.unsqueeze(1)  # (rows, carried, dim)
        error = rows.square().sum(dim=1, keepdim=True)  # (rows, carried)
        codes = torch.empty(len(rows), 1, 0, dtype=torch.int64)  # (rows, carried, so far)
        for book, square in zip(each, squares, strict=True):
            levels = len(book)
            after = error.unsqueeze(2) + square - 2 * (left @ book.T)  # (rows, carried, levels)
            carried = min(beam, after.shape[1] * levels)
            error, place = after.flatten(1).topk(carried, dim=1, largest=False)
            parent, code = place // levels, place % levels  # (rows, carried)
            before = codes.gather(1, parent.unsqueeze(2).expand(-1, -1, codes.shape[2]))
            codes = torch.cat([before, code.unsqueeze(2)], dim=2)
            left = left.gather(1, parent.unsqueeze(2).expand(-1, -1, left.shape[2])) - book[code]
        found.append(codes[:, 0].to(torch.uint8))
    return torch.cat(found)


def fit(
    table: Tensor,
    weight: Tensor,
    books: int,
    levels: int,
    *,
    rounds: int = 25,
    beam: int = 16,
    shake: float = 0.1,
    seed: int = 0,
) -> tuple[Tensor, tuple[float, ...]]:
    """Fit the codebooks of a table.

    Args:
        table: float ``(rows, dim)``.
        weight: weight of each row's squared error, ``(rows,)``, not all zero.
        books: number of codebooks.
        levels: number of entries of each codebook.
        rounds: rounds that fit codes and codebooks in turn, after residual fitting.
        beam: width of the beam search for codes.
        shake: noise added to the codebooks before the codes of the first round are searched, in
            standard deviations of their numbers; falls to zero ``CALM`` rounds before the end.
        seed: seed of the noise.

    Returns:
        The codebooks of the best round, float32 ``(books * levels, dim)``, and the weighted squared
        error of residual fitting and after each round.
    """
    # Scaling does not change codes, but rows far from unit size would lose precision.
    size = float(table.float().square().mean().sqrt()) or 1.0
    rows, counts = table.float() / size, weight.double()
    left, fitted = rows, []
    for number in range(books):
        book = kmeans(left, levels, counts, seed=number).codebook
        left = left - book[nearest(left, book)]
        fitted.append(book)
    codebook = torch.cat(fitted)
    generator = torch.Generator().manual_seed(seed)
    best, least, errors = codebook, float("inf"), []
    for number in range(rounds + 1):
        codes = encode(rows, codebook, books, beam)
        lost = squared_distance(rows, decode(codes, codebook)) * counts
        errors.append(float(lost.sum()))
        if errors[-1] < least:
            best, least = codebook, errors[-1]
        if books == 1:  # k-means is the full fit
            break
        codebook = least_squares(rows, codes, codebook, counts)
        calmed = max(0.0, 1 - number / max(1, rounds - CALM))
        noise = torch.randn(codebook.shape, generator=generator)
        codebook = codebook + shake * calmed * float(codebook.std()) * noise
    return best * size, tuple(error * size**2 for error in errors)


class AdditiveCodes(StepSettings):
    """Store embedding tables as a few codes a row, fitted to the rows that are looked up."""

    kind: Literal["additive_codes"] = "additive_codes"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    codebooks: int = Field(4, ge=1, le=16, description="Codebooks, and codes of a row.")
    bits: CodeBits = 4
    traffic: float = Field(
        0.5,
        ge=0,
        le=2,
        description="Rows count by their lookups in training to this power; 0: all the same.",
    )
    sensitive: bool = Field(
        True,
        description="Lookups and columns count by how much the output depends on them, instead of "
        "all the same.",
    )
    rounds: int = Field(25, ge=0, description="In which codes and codebooks are fitted in turn.")
    beam: int = Field(16, ge=1, le=64, description="Sums carried on in the search for codes.")
    shake: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Noise on codebooks in the first round, in their standard deviations.",
    )
    draws: int = Field(
        1,
        ge=1,
        le=32,
        description="How often a table is fitted with other noise; the network is best on the "
        "validation rows with the fit that stays.",
    )
    codebook_type: CodebookType = Field("float16", description="How codebooks are stored.")
    codebook_share: CodebookShare = 0.5

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, for lookup counts and sensitivity; validation rows, to select a fit."""
        train: tuple[Part, ...] = ("train",) if self.traffic or self.sensitive else ()
        return (*train, "validation") if self.draws > 1 else train

    @property
    def storage(self) -> TableFormat:
        """The format this step writes."""
        return FORMAT

    def settings(self) -> dict[str, Any]:
        """The settings that determine the stored layout of a table."""
        return self.model_dump(include={"codebooks", "bits", "codebook_type", "codebook_share"})

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the tables to encode; give a reason for each other table.

        Raises:
            NothingToCompress: validation rows select the fit, and the task has no row metric.
        """
        if self.draws > 1 and not bench.signature.scores_rows:
            raise NothingToCompress("row_metric_for_draws_missing", step=self.kind)
        units = Unit.of(model.module)
        decisions = choose_tables(units, self.tables, self.min_rows, self.kind)
        for unit in units:
            if unit.name in decisions and decisions[unit.name].selected:
                laid = FORMAT.layout(unit.rows, unit.weight.shape[1], self.settings()).values()
                size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in laid)
                if size >= unit.bytes:
                    larger = Reason("not_smaller", step=self.kind, bytes=size, present=unit.bytes)
                    decisions[unit.name] = Decision("skipped", (larger,))
        return StepPlan(decisions, None)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> Applied:
        """Replace every chosen table.

        Raises:
            CompressionError: the bench has no training rows, or a codebook is beyond float16.
        """
        taken = plan.units(model.module)
        names = [unit.name for unit in taken]
        slopes = sensitivities(model, bench, names) if self.sensitive else {}
        counts = lookup_counts(model, bench, names) if self.traffic and not self.sensitive else {}
        for unit in taken:
            rows, dim = unit.weight.shape
            weight, matrix = torch.ones(rows, dtype=torch.float64), torch.eye(dim)
            if self.sensitive:
                found = slopes[unit.name]
                weight = lookup_weight(found.rows, found.lookups, self.traffic)
                matrix = stretch(found.columns)
            elif self.traffic:
                count = counts[unit.name]
                weight = lookup_weight(count, float(count.sum()), self.traffic)
            best: tuple[float, nn.Module] | None = None
            for seed in range(self.draws):
                stored = self._encoded(unit.weight, weight, matrix, seed)
                packed = PackedTable(FORMAT, rows, dim, self.settings(), stored)
                found_table = pack_table(unit.module, packed)
                judged = self._judged(model, bench, unit.name, found_table)
                if best is None or judged > best[0]:
                    best = judged, found_table
            if best is not None:
                swap(model.module, unit.name, best[1])
        return Applied(model)

    def _judged(self, model: Model, bench: Bench, name: str, table: nn.Module) -> float:
        """The validation quality with one fit of a table; a constant if there is only one fit."""
        if self.draws == 1 or bench.validation is None:
            return 0.0
        tried = model.private().module
        swap(tried, name, table)
        return quality(tried, bench.signature, bench.validation)

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace every selected table by its new form with placeholder tensors."""
        units = plan.units(model.module)
        return dry_run_packed(model, units, table=FORMAT, settings=self.settings())

    def _encoded(
        self, table: Tensor, weight: Tensor, matrix: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """The stored tensors of a table, fitted to its rows times ``matrix``."""
        rows, dim = table.shape
        shape = FORMAT.shape(rows, dim, self.settings())
        seen = weight.topk(min(rows, SAMPLE)).indices.sort().values
        codebook, _ = fit(
            table[seen].float() @ matrix,
            weight[seen],
            shape.books,
            shape.levels,
            rounds=self.rounds,
            beam=self.beam,
            shake=self.shake,
            seed=seed,
        )
        stored = as_stored(codebook @ torch.linalg.inv(matrix), self.codebook_type)
        turned = stored.float() @ matrix
        found = [
            encode(table[begin : begin + BLOCK].float() @ matrix, turned, shape.books, self.beam)
            for begin in range(0, rows, BLOCK)
        ]
        return {"codes": pack(torch.cat(found), shape.width), "codebook": stored}
