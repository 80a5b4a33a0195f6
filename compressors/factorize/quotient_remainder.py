"""Quotient-remainder embedding tables: one short table for quotients and one for remainders.

Row ``id`` is ``quotient[id // m]`` plus or times ``remainder[id % m]``, where ``m`` is the setting
``buckets``. A table of ``rows`` rows becomes two tables with ``ceil(rows / m) + m`` rows in total.
The total is smallest if ``m`` is about ``sqrt(rows)``.

Paper: Shi et al. 2019, https://arxiv.org/abs/1909.02107 (compositional embeddings, section 2).
Differs: in the paper both tables are trained from scratch, so training adapts the rows to the
sharing. Here they are fitted to the rows of a trained table by least squares, with rows weighted by
their lookup counts if ``weighted`` is set. The ids of a trained table are in arbitrary order, so
rows that share a quotient or a remainder are not similar, and the error is large if the two tables
are much shorter than the original. Rows could be sorted by similarity, but the map from ids to
sorted rows would take 4 bytes per id, as many as a row of 8 numbers with 4 bits each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.composed import Composition, Design, Parts, PartSpec, sum_counts
from compressors.core.modules.formats import TensorSpec
from compressors.core.steps.composition_steps import (
    ComposingStep,
    Designs,
    FittedParts,
    choose_composed,
    recompose,
    row_weights,
    share_or_number,
)
from compressors.core.steps.decisions import AppliedStep, StepPlan
from compressors.core.steps.unit_settings import MinRows, TablePatterns

Operation = Literal["add", "multiply"]

MAX_ROUNDS, MIN_GAIN = 100, 1e-6
"""Limits of alternating least squares: number of rounds, and relative gain at which to stop."""


@torch.library.custom_op("recpress::divided_by", mutates_args=())
def divided_by(ids: Tensor, divisor: int) -> Tensor:
    """Divide non-negative int64 ids ``(*)`` by a number and round down.

    This is a custom operator, because torch exports floor division as eight ONNX nodes. Truncating
    division is exported with float32 numbers, which cannot represent all integers beyond 2^24.
    """
    return torch.div(ids, divisor, rounding_mode="floor")


@divided_by.register_fake
def _(ids: Tensor, divisor: int) -> Tensor:
    return torch.empty_like(ids)


def fit_sum(table: Tensor, weight: Tensor, buckets: int) -> tuple[Tensor, Tensor]:
    """Fit two tables whose rows are added, by least squares.

    If the shorter table is fixed, the normal equations of the longer one are diagonal. So only a
    system of the shorter table's size is solved, at most about ``sqrt(rows)`` rows (the Schur
    complement). If a row is added to all rows of one table and subtracted from all rows of the
    other, the sums do not change. It is chosen so that the mean row of the shorter table is half of
    the weighted mean row of ``table``.

    Args:
        table: float, ``(rows, dim)``.
        weight: weight of each row's squared error, ``(rows,)``, all positive.
        buckets: the divisor m, at most ``rows``.

    Returns:
        ``quotient`` ``(ceil(rows / m), dim)`` and ``remainder`` ``(m, dim)``, float32.
    """
    weight_matrix, sums, totals, weights = _sum_normal_equations(table, weight, buckets)
    # Solve for the shorter table; the longer one follows from it. Both are indices into the pairs
    # ``totals`` and ``weights``: 0 for the table of quotients, 1 for that of remainders.
    short, long = (1, 0) if buckets <= weight_matrix.shape[0] else (0, 1)
    across = weight_matrix if short == 1 else weight_matrix.T  # (long, short)
    scaled_across = across / weights[long].unsqueeze(1)
    system = torch.diag(weights[short]) - across.T @ scaled_across  # (short, short), singular
    right_side = totals[short] - scaled_across.T @ totals[long]  # (short, dim)
    # Every row of ``system`` sums to zero. The added constant makes the solution unique.
    constraint = weights[short].mean()
    short_rows = torch.linalg.solve(system + constraint / len(system), right_side)  # (short, dim)
    long_rows = (totals[long] - across @ short_rows) / weights[long].unsqueeze(1)
    shift = (sums / weights[0].sum()) / 2 - short_rows.mean(dim=0)
    short_rows, long_rows = short_rows + shift, long_rows - shift
    quotient, remainder = (long_rows, short_rows) if short == 1 else (short_rows, long_rows)
    return quotient.float(), remainder.float()


def fit_product(
    table: Tensor, weight: Tensor, buckets: int, rounds: int = MAX_ROUNDS
) -> tuple[Tensor, Tensor]:
    """Fit two tables whose rows are multiplied, by alternating least squares.

    Each half round computes the optimum of one table for the given other one, so the error never
    increases; the result may be a local optimum. A float64 copy of the table is in memory during
    the fit.

    Args:
        table: float, ``(rows, dim)``.
        weight: weight of each row's squared error, ``(rows,)``, all positive.
        buckets: the divisor m, at most ``rows``.
        rounds: largest number of rounds; the fit stops early if a round gains almost nothing.

    Returns:
        ``quotient`` ``(ceil(rows / m), dim)`` and ``remainder`` ``(m, dim)``, float32.
    """
    rows, dim = table.shape
    quotients = -(-rows // buckets)
    weight_matrix = torch.zeros(quotients * buckets, dtype=torch.float64)
    weight_matrix[:rows] = weight
    weight_matrix = weight_matrix.reshape(quotients, buckets)
    weighted = torch.zeros(dim, quotients * buckets, dtype=torch.float64)
    weighted[:, :rows] = (table.double() * weight.double().unsqueeze(1)).T
    weighted = weighted.reshape(dim, quotients, buckets)
    noise = torch.randn(buckets, dim, generator=torch.Generator().manual_seed(0))
    # Without noise, a dimension whose rows sum to zero would stay at zero.
    remainder = 1 + 0.1 * noise.double()
    explained = 0.0
    for _ in range(rounds):
        quotient, _ = _compute_optimal_rows(weighted, weight_matrix, remainder)
        remainder, new_explained = _compute_optimal_rows(weighted.mT, weight_matrix.T, quotient)
        if new_explained - explained <= MIN_GAIN * new_explained:
            break
        explained = new_explained
    # Only the product of the two tables' scales is determined: give both the same root mean square.
    root_mean_squares = [
        rows_of_table.square().mean(dim=0).sqrt() for rows_of_table in (quotient, remainder)
    ]
    factor = torch.where(
        root_mean_squares[0] * root_mean_squares[1] > 0,
        root_mean_squares[1] / root_mean_squares[0],
        1.0,
    ).sqrt()
    return (quotient * factor).float(), (remainder / factor).float()


def _compute_optimal_rows(
    weighted: Tensor, weight_matrix: Tensor, other: Tensor
) -> tuple[Tensor, float]:
    """Return the optimal rows of one short table for given rows of the other.

    In the shapes, ``n`` is the number of rows of the optimized table, ``k`` of the other one.

    Args:
        weighted: weight times value of every row of the original table, ``(dim, n, k)``.
        weight_matrix: weights of the rows of the original table, ``(n, k)``.
        other: the rows of the other table, ``(k, dim)``.

    Returns:
        The rows ``(n, dim)``, and the explained part of the original table's weighted sum of
        squares.
    """
    numerator = torch.bmm(weighted, other.T.unsqueeze(2)).squeeze(2).T  # (n, dim)
    denominator = weight_matrix @ other.square()
    best = torch.where(denominator > 0, numerator / denominator, 0.0)
    return best, float((best * numerator).sum())


def _sum_normal_equations(
    table: Tensor, weight: Tensor, buckets: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute the sums in the normal equations.

    Returns:
        The weights as a matrix ``(quotients, m)``, the weighted sum of all rows ``(dim,)``, and two
        pairs. Each pair has a tensor for the table of quotients and one for that of remainders: the
        weighted sums of the rows that share a quotient (or remainder), ``(quotients, dim)`` and
        ``(m, dim)``, and the sums of their weights, ``(quotients,)`` and ``(m,)``.
    """
    rows, dim = table.shape
    quotients = -(-rows // buckets)
    exact_weight = weight.double()
    weighted = table.double() * exact_weight.unsqueeze(1)
    ids = torch.arange(rows)
    totals = (
        torch.zeros(quotients, dim, dtype=torch.float64).index_add_(0, ids // buckets, weighted),
        torch.zeros(buckets, dim, dtype=torch.float64).index_add_(0, ids % buckets, weighted),
    )
    weight_matrix = torch.zeros(quotients * buckets, dtype=torch.float64)
    weight_matrix[:rows] = exact_weight
    weight_matrix = weight_matrix.reshape(quotients, buckets)
    return (
        weight_matrix,
        weighted.sum(dim=0),
        totals,
        (weight_matrix.sum(dim=1), weight_matrix.sum(dim=0)),
    )


@dataclass(frozen=True)
class QuotientRemainderComposition:
    """A table composed of two smaller tables (its *parts*), for quotients and remainders of ids.

    They are ``quotient`` ``(ceil(rows / m), dim)`` and ``remainder`` ``(m, dim)``. The protocol
    ``Composition`` (``core/modules/composed.py``) explains the methods. ``learned``: names of the
    stored tensors that training may change; there are none.
    """

    name: str = "quotient_remainder"
    learned: tuple[str, ...] = ()

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {}

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        buckets = settings["buckets"]
        return {
            "quotient": PartSpec(-(-rows // buckets), dim),
            "remainder": PartSpec(buckets, dim),
        }

    def lookup_counts(
        self,
        stored: Mapping[str, Tensor],
        counts: Tensor,
        settings: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        ids, buckets = torch.arange(len(counts)), settings["buckets"]
        quotients = -(-len(counts) // buckets)
        return {
            "quotient": sum_counts(counts, ids // buckets, quotients),
            "remainder": sum_counts(counts, ids % buckets, buckets),
        }

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        parts: Parts,
        ids: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        int64_ids, buckets = ids.long(), settings["buckets"]
        quotient_row: Tensor = parts["quotient"](torch.ops.recpress.divided_by(int64_ids, buckets))
        remainder_row: Tensor = parts["remainder"](int64_ids % buckets)
        if settings["operation"] == "add":
            return quotient_row + remainder_row
        return quotient_row * remainder_row


COMPOSITION: Composition = QuotientRemainderComposition()


class QuotientRemainder(ComposingStep):
    """Replace embedding tables by two short ones, for quotients and remainders of ids."""

    kind: Literal["quotient_remainder"] = "quotient_remainder"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    buckets: float = Field(
        0,
        ge=0,
        description="Number of remainders. 0: the square root of the table's rows, which gives the "
        "fewest bytes. Below 1: as a share of the table's rows. From 1 on: a number.",
    )
    operation: Operation = Field(
        "add", description="How the two rows of an id are combined, element by element."
    )
    weighted: bool = Field(
        False,
        description="Weight the error of each row by its lookups in the training data. False: all "
        "rows have equal weight.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, if lookup counts are used."""
        return ("train",) if self.weighted else ()

    def plan(self, model: Model, bench: Bench) -> StepPlan[Designs]:
        """Select the tables to replace; give a reason for each other table."""

        def design(rows: int, dim: int) -> Design | Reason:
            buckets = share_or_number(self.buckets or max(1.0, round(rows**0.5)), rows)
            settings = {"buckets": buckets, "operation": self.operation}
            reason = Reason(
                "quotient_and_remainder",
                quotients=-(-rows // buckets),
                buckets=buckets,
                operation=self.operation,
            )
            return Design(COMPOSITION, settings, reason)

        return choose_composed(model, self.tables, self.min_rows, self.kind, design)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Designs]) -> AppliedStep:
        """Fit two short tables to every selected table.

        Raises:
            RowsMissing: ``weighted`` is set, and there are no training rows.
        """
        designs = plan.payload
        weights = row_weights(model, bench, designs, weighted=self.weighted)
        solve = fit_sum if self.operation == "add" else fit_product

        def fit(name: str, table: Tensor, design: Design) -> FittedParts:
            quotient, remainder = solve(table, weights[name], design.settings["buckets"])
            parts = {"quotient": quotient, "remainder": remainder}
            return FittedParts(stored={}, parts=parts)

        return recompose(model, designs, fit)
