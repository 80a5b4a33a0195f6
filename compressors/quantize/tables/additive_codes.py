"""Additive codes, fitted to the rows that are looked up and to the network's sensitivity.

The storage format is that of ``residual_codes``: a row is the sum of one entry of each codebook.
Codes and codebooks are fitted in another way. With a few codes per row, this at least halves the
error of ``residual_codes``:

- Rows are weighted by a power of their lookup counts in training. With ``sensitive``, each lookup
  is weighted by the squared gradient of the network's output.
- With ``sensitive``, columns and pairs of columns are also weighted by these gradients: the squared
  error is computed after a linear transform of the table.
- Codes are found by *beam search*: after each codebook, the ``beam`` best partial sums are kept
  instead of only the best one.
- All codebooks are fitted together to the codes by least squares. Between rounds, noise is added to
  the codebooks, less in each round, so that the fit does not stay in a poor local optimum.

With one codebook, this is k-means of rows, weighted by lookup counts.

Sources: Babenko and Lempitsky 2014, https://doi.org/10.1109/CVPR.2014.124 (additive codes, beam
search); Martinez et al. 2018, LSQ++, https://doi.org/10.1007/978-3-030-01270-0_30 (codebook
perturbations that decrease to zero).
Differs: rows have weights, and the result is that of the best round, not of the last.
"""

from typing import Any, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from compressors.contracts import Bench, Part
from compressors.core.model import Model
from compressors.core.modules.formats import PackedTable, TableFormat
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import AppliedStep, StepPlan, choose_tables
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import MinRows, TablePatterns
from compressors.core.units import Unit, pack_table, swap
from compressors.errors.compression import NothingToCompress
from compressors.metrics.validation_score import quality
from compressors.quantize.calibration.lookup_counts import lookup_counts, sensitivities
from compressors.quantize.kernels.bitpacking import pack
from compressors.quantize.kernels.lloyd import kmeans, nearest_entries, squared_distance
from compressors.quantize.tables.codebooks import (
    CodeBits,
    CodebookShare,
    CodebookType,
    convert_codebook,
)
from compressors.quantize.tables.residual_codes import FORMAT, decode, least_squares

BLOCK = 4_096
"""Rows that are encoded at once; with a beam of 16 and 256 entries, this takes 64 MB."""

SAMPLE = 65_536
"""Largest number of rows to which codebooks are fitted: those with the largest weights."""

ROUNDS_WITHOUT_NOISE = 4
"""Number of last rounds in which no noise is added to the codebooks."""


def lookup_weight(importance: Tensor, lookups: float, power: float) -> Tensor:
    """Return the weight of each row's squared error, float64 ``(rows,)``, all positive.

    Args:
        importance: for each row, the sum of the weights of its lookups, ``(rows,)``.
        lookups: number of lookups of all rows.
        power: exponent of the result.
    """
    total = float(importance.sum())
    if not total > 0:  # no output depends on this table
        return torch.ones(len(importance), dtype=torch.float64)
    # A row without lookups in training may be used in serving: it counts as half a mean lookup.
    mean = total / lookups
    return (importance.double() / mean + 0.5).pow(power)


def weighting_matrix(sensitivity: Tensor) -> Tensor:
    """Return the matrix, float32 ``(dim, dim)``, that transforms rows for the weighted error.

    The squared error of rows times this matrix is the squared error of the rows, weighted by the
    sensitivity. On average, half of a column's weight comes from the sensitivity, and the other
    half is equal for all columns, because the gradients only measure the cost of small errors.

    Args:
        sensitivity: sum of outer products of the output's gradients, ``(dim, dim)``.
    """
    matrix = sensitivity.double()
    identity = torch.eye(len(matrix), dtype=torch.float64)
    mean = float(matrix.diagonal().mean())
    if not mean > 0:  # no output depends on this table
        return identity.float()
    root: Tensor = torch.linalg.cholesky(matrix / mean + identity)
    return root.float()


def encode(table: Tensor, codebook: Tensor, num_codebooks: int, beam: int) -> Tensor:
    """Find the codes of each row by beam search: uint8 ``(rows, num_codebooks)``, not packed.

    Args:
        table: float ``(rows, dim)``.
        codebook: ``(num_codebooks * levels, dim)``, the codebooks concatenated.
        num_codebooks: number of codebooks.
        beam: number of partial sums that are kept; 1 is greedy. The best of them is returned.
    """
    codebooks = codebook.float().reshape(num_codebooks, -1, codebook.shape[1])
    squares = codebooks.square().sum(dim=2)  # (num_codebooks, levels)
    best_codes = []
    for begin in range(0, len(table), BLOCK):
        rows = table[begin : begin + BLOCK].float()
        residuals = rows.unsqueeze(1)  # (rows, sums, dim)
        error = rows.square().sum(dim=1, keepdim=True)  # (rows, sums)
        codes = torch.empty(len(rows), 1, 0, dtype=torch.int64)  # (rows, sums, codes so far)
        for book, square in zip(codebooks, squares, strict=True):
            levels = len(book)
            errors = error.unsqueeze(2) + square - 2 * (residuals @ book.T)  # (rows, sums, levels)
            sums = min(beam, errors.shape[1] * levels)
            error, index = errors.flatten(1).topk(sums, dim=1, largest=False)
            parent, code = index // levels, index % levels  # (rows, sums)
            previous_codes = codes.gather(1, parent.unsqueeze(2).expand(-1, -1, codes.shape[2]))
            codes = torch.cat([previous_codes, code.unsqueeze(2)], dim=2)
            parents = parent.unsqueeze(2).expand(-1, -1, residuals.shape[2])
            residuals = residuals.gather(1, parents) - book[code]
        best_codes.append(codes[:, 0].to(torch.uint8))
    return torch.cat(best_codes)


def fit(
    table: Tensor,
    weight: Tensor,
    num_codebooks: int,
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
        num_codebooks: number of codebooks.
        levels: number of entries of each codebook.
        rounds: rounds that fit codes and codebooks in turn, after residual fitting.
        beam: width of the beam search for codes.
        shake: noise added to the codebooks before the codes of the first round are searched, in
            standard deviations of their numbers. It falls to zero before the last
            ``ROUNDS_WITHOUT_NOISE`` rounds.
        seed: seed of the noise.

    Returns:
        The codebooks of the best round, float32 ``(num_codebooks * levels, dim)``, and the weighted
        squared error of residual fitting and after each round.
    """
    # Scaling does not change the codes, but rows of very large or small numbers lose precision.
    root_mean_square = float(table.float().square().mean().sqrt()) or 1.0
    rows, counts = table.float() / root_mean_square, weight.double()
    residuals, fitted = rows, []
    for number in range(num_codebooks):
        book = kmeans(residuals, levels, counts, seed=number).codebook
        residuals = residuals - book[nearest_entries(residuals, book)]
        fitted.append(book)
    codebook = torch.cat(fitted)
    generator = torch.Generator().manual_seed(seed)
    best, least_error, errors = codebook, float("inf"), []
    for number in range(rounds + 1):
        codes = encode(rows, codebook, num_codebooks, beam)
        row_errors = squared_distance(rows, decode(codes, codebook)) * counts
        errors.append(float(row_errors.sum()))
        if errors[-1] < least_error:
            best, least_error = codebook, errors[-1]
        if num_codebooks == 1:  # k-means has already fitted the only codebook
            break
        codebook = least_squares(rows, codes, codebook, counts)
        decay = max(0.0, 1 - number / max(1, rounds - ROUNDS_WITHOUT_NOISE))
        noise = torch.randn(codebook.shape, generator=generator)
        codebook = codebook + shake * decay * float(codebook.std()) * noise
    return best * root_mean_square, tuple(error * root_mean_square**2 for error in errors)


class AdditiveCodes(StepSettings):
    """Store embedding tables as a few codes per row, fitted to the rows that are looked up."""

    kind: Literal["additive_codes"] = "additive_codes"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    codebooks: int = Field(4, ge=1, le=16, description="Number of codebooks, and of codes per row.")
    bits: CodeBits = 4  # of a code
    lookup_power: float = Field(
        0.5,
        validation_alias=AliasChoices("lookup_power", "traffic"),  # the earlier name
        ge=0,
        le=2,
        description="A row's weight is its number of lookups in training to this power; 0: equal "
        "weights.",
    )
    sensitive: bool = Field(
        True,
        description="Weight lookups and columns by the squared gradient of the network's output, "
        "instead of equally.",
    )
    rounds: int = Field(25, ge=0, description="Rounds that fit codes and codebooks in turn.")
    beam: int = Field(
        16, ge=1, le=64, description="Partial sums kept in the beam search for codes."
    )
    shake: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Noise added to codebooks in the first round, in their standard deviations.",
    )
    draws: int = Field(
        1,
        ge=1,
        le=32,
        description="Number of fits of a table, each with other noise; the one with the best "
        "validation metric is used.",
    )
    codebook_type: CodebookType = Field("float16", description="How codebooks are stored.")
    codebook_share: CodebookShare = 0.5  # largest share of the table's float32 bytes

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, for lookup counts and sensitivity; validation rows, to select a fit."""
        train: tuple[Part, ...] = ("train",) if self.lookup_power or self.sensitive else ()
        return (*train, "validation") if self.draws > 1 else train

    @property
    def storage(self) -> TableFormat:
        """The format that the step writes."""
        return FORMAT

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the stored layout of a table."""
        return self.model_dump(include={"codebooks", "bits", "codebook_type", "codebook_share"})

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the tables to encode; give a reason for each other table.

        Raises:
            NothingToCompress: a pattern matches no table; or validation rows select among several
            fits, and the task has no metric of rows.
        """
        if self.draws > 1 and not bench.signature.scores_rows:
            raise NothingToCompress("row_metric_for_draws_missing", step=self.kind)
        units = Unit.of(model.module)
        decisions = choose_tables(
            units, self.tables, self.min_rows, self.kind, FORMAT, self.settings()
        )
        return StepPlan(decisions, None)  # None: apply() needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Replace every selected table.

        Raises:
            RowsMissing: the bench has no training rows.
            ValueNotStorable: a number of a codebook is beyond float16.
        """
        selected = plan.units(model.module)
        names = [unit.name for unit in selected]
        by_table = sensitivities(model, bench, names) if self.sensitive else {}
        counts = (
            lookup_counts(model, bench, names) if self.lookup_power and not self.sensitive else {}
        )
        for unit in selected:
            rows, dim = unit.weight.shape
            weight, matrix = torch.ones(rows, dtype=torch.float64), torch.eye(dim)
            if self.sensitive:
                sensitivity = by_table[unit.name]
                weight = lookup_weight(sensitivity.rows, sensitivity.lookups, self.lookup_power)
                matrix = weighting_matrix(sensitivity.columns)
            elif self.lookup_power:
                count = counts[unit.name]
                weight = lookup_weight(count, float(count.sum()), self.lookup_power)
            best: tuple[float, nn.Module] | None = None
            for seed in range(self.draws):
                stored = self._fit_and_encode(unit.weight, weight, matrix, seed)
                packed = PackedTable(FORMAT, rows, dim, self.settings(), stored)
                # ``pack_table`` puts the new table into a ``Bag`` if it replaces an EmbeddingBag.
                table = pack_table(unit.module, packed)
                metric = self._measure_validation_metric(model, bench, unit.name, table)
                if best is None or metric > best[0]:
                    best = metric, table
            if best is not None:
                swap(model.module, unit.name, best[1])
        return AppliedStep(model)

    def _measure_validation_metric(
        self, model: Model, bench: Bench, name: str, table: nn.Module
    ) -> float:
        """Return the validation metric with one fit of a table; 0 if there is only one fit."""
        if self.draws == 1 or bench.validation is None:
            return 0.0
        candidate = model.private().module
        swap(candidate, name, table)
        return quality(candidate, bench.signature, bench.validation)

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace every selected table by one in the format, with zeros that take no memory."""
        units = plan.units(model.module)
        return dry_run_packed(model, units, table=FORMAT, settings=self.settings())

    def _fit_and_encode(
        self, table: Tensor, weight: Tensor, matrix: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """Return the stored tensors of a table, fitted to its rows times ``matrix``."""
        rows, dim = table.shape
        shape = FORMAT.shape(rows, dim, self.settings())
        sampled = weight.topk(min(rows, SAMPLE)).indices.sort().values
        codebook, _ = fit(
            table[sampled].float() @ matrix,
            weight[sampled],
            shape.num_codebooks,
            shape.levels,
            rounds=self.rounds,
            beam=self.beam,
            shake=self.shake,
            seed=seed,
        )
        stored = convert_codebook(codebook @ torch.linalg.inv(matrix), self.codebook_type)
        transformed = stored.float() @ matrix
        codes = [
            encode(
                table[begin : begin + BLOCK].float() @ matrix,
                transformed,
                shape.num_codebooks,
                self.beam,
            )
            for begin in range(0, rows, BLOCK)
        ]
        return {"codes": pack(torch.cat(codes), shape.width), "codebook": stored}
