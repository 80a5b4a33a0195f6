"""Additive codes fitted to how often rows are looked up: the fewest bytes a row for its quality.

Stored as ``residual_codes`` are: a row is the sum of one entry of each codebook. What differs is
how codes and codebooks are found, which at a few codes a row halves the error or better:

- rows count by their lookups in training, to a power, and with ``sensitive`` each lookup by how
  much the network's output depends on it: by its squared slope;
- columns, and pairs of them, count by the same (``sensitive``): squared error is taken after the
  table was turned and stretched accordingly;
- codes are found by *beam search*: the ``beam`` best sums so far are carried from codebook to
  codebook, instead of the one that is best so far;
- all codebooks are fitted to the codes together by least squares, and between the rounds they are
  *shaken*, less each round, so that they leave the poor optimum that residual fitting begins at.

With one codebook this is k-means of rows, weighted by lookups.

Sources: Babenko and Lempitsky 2014, https://doi.org/10.1109/CVPR.2014.124 (additive codes, beam
search); Martinez et al. 2018, LSQ++, https://doi.org/10.1007/978-3-030-01270-0_30 (codebook
perturbations that fall to nothing).
Differs: rows have weights, and the best round is kept, not the last.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Change, Frozen, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import PackedTable, TableFormat
from compressors.core.placeholders import dry_run_packed
from compressors.core.step_settings import MinRows, TablePatterns
from compressors.core.units import Choice, Unit, choose_tables, pack_table, swap
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
    """How much each row's error counts, float64 ``(rows,)``, all above zero.

    Args:
        mattered: what the lookups of each row count, added up, ``(rows,)``.
        lookups: how many there were of all rows.
        power: of the result.
    """
    total = float(mattered.sum())
    if not total > 0:  # nothing that was looked at depends on this table
        return torch.ones(len(mattered), dtype=torch.float64)
    # A row that was never looked up still gets an answer: it counts as half a usual lookup.
    usual = total / lookups
    return (mattered.double() / usual + 0.5).pow(power)


def stretch(sensitivity: Tensor) -> Tensor:
    """The matrix ``(dim, dim)`` that a table is multiplied by, so that plain squared error counts.

    Half of each column's weight is the same for all: the network's slope at a row says what small
    errors cost, not large ones.

    Args:
        sensitivity: outer products of the output's gradients, added up, ``(dim, dim)``.
    """
    matrix = sensitivity.double()
    even = torch.eye(len(matrix), dtype=torch.float64)
    size = float(matrix.diagonal().mean())
    if not size > 0:  # nothing that was looked at depends on this table
        return even.float()
    root: Tensor = torch.linalg.cholesky(matrix / size + even)
    return root.float()


def encode(table: Tensor, codebook: Tensor, books: int, beam: int) -> Tensor:
    """Codes of each row by beam search: uint8 ``(rows, books)``, not packed.

    Args:
        table: float ``(rows, dim)``.
        codebook: ``(books * levels, dim)``, one book below the other.
        books: how many there are.
        beam: sums that are carried on; 1 is greedy. The result is the best of them.
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
    """The codebooks of a table.

    Args:
        table: float ``(rows, dim)``.
        weight: how much each row's squared error counts, ``(rows,)``, not all zero.
        books: codebooks.
        levels: entries of each.
        rounds: of codes and codebooks in turn, after residual fitting.
        beam: of the search for codes.
        shake: noise that is added to codebooks before the first round's codes are found, in
            standard deviations of their numbers; falls to zero ``CALM`` rounds before the end.
        seed: of the noise.

    Returns:
        The codebooks of the best round, float32 ``(books * levels, dim)``, and the weighted squared
        error of residual fitting and after each round.
    """
    # A common factor makes no difference to codes; rows far from size one would to what is held.
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
        if books == 1:  # k-means has done all there is to do
            break
        codebook = least_squares(rows, codes, codebook, counts)
        calmed = max(0.0, 1 - number / max(1, rounds - CALM))
        noise = torch.randn(codebook.shape, generator=generator)
        codebook = codebook + shake * calmed * float(codebook.std()) * noise
    return best * size, tuple(error * size**2 for error in errors)


class AdditiveCodes(Frozen):
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
        """Training rows say what is looked up and what it matters; validation rows choose."""
        train: tuple[Part, ...] = ("train",) if self.traffic or self.sensitive else ()
        return (*train, "validation") if self.draws > 1 else train

    @property
    def changes(self) -> Change:
        """The selected tables are stored in another format."""
        return "format"

    @property
    def storage(self) -> TableFormat:
        """The format this step writes."""
        return FORMAT

    def settings(self) -> dict[str, Any]:
        """The settings that determine the stored layout of a table."""
        return self.model_dump(include={"codebooks", "bits", "codebook_type", "codebook_share"})

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:
        """Select the tables to encode; give a reason for each other table.

        Raises:
            NothingToCompress: validation rows are to choose, and the task has no metric of rows.
        """
        if self.draws > 1 and bench.signature.task == "retrieval":
            raise NothingToCompress("row_metric_for_draws_missing", step=self.kind)
        units = Unit.of(model.module)
        choices = choose_tables(units, self.tables, self.min_rows, self.kind)
        for unit in units:
            if unit.name in choices and choices[unit.name].take:
                laid = FORMAT.layout(unit.rows, unit.weight.shape[1], self.settings()).values()
                size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in laid)
                if size >= unit.bytes:
                    larger = Reason("not_smaller", step=self.kind, bytes=size, present=unit.bytes)
                    choices[unit.name] = Choice(False, (larger,))
        return choices

    def apply(self, model: Model, bench: Bench) -> Model:
        """Replace every chosen table.

        Raises:
            CompressionError: the bench has no training rows, or a codebook is beyond float16.
        """
        choices = self.choose(model, bench)
        taken = [u for u in Unit.of(model.module) if u.name in choices and choices[u.name].take]
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
        return model

    def _judged(self, model: Model, bench: Bench, name: str, table: nn.Module) -> float:
        """How good the network is with one fit of a table; all the same where there is but one."""
        if self.draws == 1 or bench.validation is None:
            return 0.0
        tried = model.private().module
        swap(tried, name, table)
        return quality(tried, bench.signature, bench.validation)

    def dry_run(self, model: Model, bench: Bench) -> Model:
        """Replace every selected table by its new form with placeholder tensors."""
        chosen = self.choose(model, bench)
        return dry_run_packed(model, chosen, table=FORMAT, settings=self.settings())

    def _encoded(
        self, table: Tensor, weight: Tensor, matrix: Tensor, seed: int
    ) -> dict[str, Tensor]:
        """Stored tensors of a table, whose rows times ``matrix`` are to be near."""
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
