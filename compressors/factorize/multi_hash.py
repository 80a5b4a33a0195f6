"""Multi-hash embedding tables: each row is a sum of shared rows selected by hashes of the id.

Row ``id`` is ``mean + sum over j of buckets[h_j(id)]``, where ``buckets`` is a short table of
shared rows and ``h_1``, ``h_2``, ... are hash functions. If ``signed`` is set, a second hash of
each function gives the sign of its term. Two rows are equal only if all their hashes collide.

Source: Weinberger et al. 2009, https://arxiv.org/abs/0902.2206 (hashing with signs); Svenstrup et
al. 2017, https://arxiv.org/abs/1709.03933 (several hashes into one table); the functions are those
of Carter and Wegman 1979, ``(a * id + b) mod p mod buckets``.
Differs: in the papers, buckets are trained from scratch, and importance weights are learned for
each id. Here buckets are the least-squares optimum for a trained table, with rows weighted by their
lookup counts if ``weighted`` is set. The best of several random draws of functions is used, and a
mean row is stored separately. Signs make sums of random rows unbiased; fitted rows do not benefit
from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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

PRIME = 2**31 - 1
"""The largest prime below 2^31: with ids and coefficients below it, a * id + b fits an int64."""

BLOCK = 65_536
"""Rows that are decoded at once, to limit memory."""

MAX_ITERATIONS, TOLERANCE = 1000, 1e-6
"""Limits of conjugate gradients: number of iterations, and relative residual at which to stop."""


def coefficients(hashes: int, seed: int, *, signed: bool) -> Tensor:
    """Draw the coefficients of random hash functions: int64 ``(hashes, 2)``.

    If ``signed`` is set, the result is ``(hashes, 4)``: also the coefficients of sign hashes.
    """
    generator = torch.Generator().manual_seed(seed)
    functions = torch.randint(0, PRIME, (hashes, 4), generator=generator)
    # A multiplier of zero would map all ids to one bucket.
    functions[:, 0::2] = functions[:, 0::2].clamp(min=1)
    return functions if signed else functions[:, :2].contiguous()


def hash_ids(ids: Tensor, coefficients: Tensor, buckets: int) -> Tensor:
    """Hash int64 ids ``(*)`` in [0, 2^31 - 1) to bucket numbers: int64 ``(*, hashes)``."""
    mixed = ids.unsqueeze(-1) * coefficients[:, 0] + coefficients[:, 1]
    return mixed % PRIME % buckets


def hash_signs(ids: Tensor, coefficients: Tensor) -> Tensor:
    """Hash int64 ids ``(*)`` to the signs of their buckets, 1 or -1: float32 ``(*, hashes)``."""
    mixed = ids.unsqueeze(-1) * coefficients[:, 2] + coefficients[:, 3]
    return 1.0 - 2.0 * (mixed % PRIME % 2).float()


class HashFit(NamedTuple):
    """The least-squares fit for one draw of hash functions.

    Attributes:
        buckets: the shared rows, float32 ``(buckets, dim)``.
        mean: the row that is added to every sum, float32 ``(dim,)``.
        error: weighted mean of the squared errors of the table's rows.
    """

    buckets: Tensor
    mean: Tensor
    error: float


def fit(table: Tensor, weight: Tensor, functions: Tensor, buckets: int) -> HashFit:
    """Fit the buckets and the mean row to a table by least squares.

    The solver is conjugate gradients on the normal equations, for all dimensions at once, with a
    Jacobi preconditioner: the diagonal is the weight of the rows that use each bucket. The solver
    starts at zero, so of several optimal solutions it finds one with a small norm. It is
    deterministic, and decodes one block of rows at a time.

    Args:
        table: float, ``(rows, dim)``.
        weight: weight of each row's squared error, ``(rows,)``, all positive.
        functions: coefficients of the hash functions, ``(hashes, 2)`` or ``(hashes, 4)``.
        buckets: number of buckets.
    """
    normalized_weight = (weight / weight.sum()).double()
    system = _System(normalized_weight, functions, buckets)
    right_side = system.transposed(table)  # (buckets + 1, dim)
    # A bucket without rows stays at zero.
    diagonal = system.diagonal().clamp(min=1e-300).unsqueeze(1)
    solution = torch.zeros_like(right_side)
    residual = right_side.clone()
    preconditioned = residual / diagonal
    direction = preconditioned.clone()
    norm = (residual * preconditioned).sum(dim=0)  # (dim,)
    stop_norm = norm * TOLERANCE**2
    for _ in range(MAX_ITERATIONS):
        if bool((norm <= stop_norm).all()):
            break
        normal_direction = system.normal(direction)
        curvature = (direction * normal_direction).sum(dim=0)
        step_size = torch.where(curvature > 0, norm / curvature.clamp(min=1e-300), 0.0)
        solution += step_size * direction
        residual -= step_size * normal_direction
        preconditioned = residual / diagonal
        new_norm = (residual * preconditioned).sum(dim=0)
        ratio = torch.where(norm > 0, new_norm / norm.clamp(min=1e-300), 0.0)
        direction = preconditioned + ratio * direction
        norm = new_norm
    # With the residual r = b - Ax, the squared error x'Ax - 2b'x + c is c - x'(b + r).
    error = system.squares(table) - float((solution * (right_side + residual)).sum())
    return HashFit(solution[:-1].float(), solution[-1].float(), error)


def best_fit(
    table: Tensor, weight: Tensor, draws: Sequence[Tensor], buckets: int
) -> tuple[Tensor, HashFit]:
    """Fit several draws of hash functions; return the one with the smallest error and its fit.

    Collisions are random: of six draws for the item table of MovieLens 100K, the best had half
    the error of the worst. Of draws with equal errors the first one is returned.
    """
    fits = [(functions, fit(table, weight, functions, buckets)) for functions in draws]
    return min(fits, key=lambda candidate: candidate[1].error)


class _System:
    """The linear system from buckets and mean to rows, without building its matrix.

    A solution is ``(buckets + 1, dim)``: the buckets, and the mean as the last row.
    ``normalized_weight`` is each row's weight, with a sum of 1.
    """

    def __init__(self, normalized_weight: Tensor, functions: Tensor, buckets: int) -> None:
        ids = torch.arange(len(normalized_weight))
        self.normalized_weight, self.buckets = normalized_weight, buckets
        self.index = hash_ids(ids, functions, buckets)  # (rows, hashes)
        self.sign = hash_signs(ids, functions).double() if functions.shape[1] == 4 else None

    def transposed(self, rows: Tensor) -> Tensor:
        """Multiply weighted rows ``(rows, dim)`` by the transposed matrix: ``(buckets + 1, dim)``.

        The result is the weighted sum of the rows of each bucket, and of all rows.
        """
        total = torch.zeros(self.buckets + 1, rows.shape[1], dtype=torch.float64)
        for begin in range(0, len(rows), BLOCK):
            self._add(total, rows[begin : begin + BLOCK].double(), begin)
        return total

    def normal(self, solution: Tensor) -> Tensor:
        """Multiply a solution ``(buckets + 1, dim)`` by the matrix of the normal equations.

        The result is ``transposed`` of the rows that the solution represents.
        """
        total = torch.zeros_like(solution)
        for begin in range(0, len(self.index), BLOCK):
            decoded = solution[-1].expand(len(self.index[begin : begin + BLOCK]), -1).clone()
            for j in range(self.index.shape[1]):
                decoded += self._apply_signs(
                    solution[self.index[begin : begin + BLOCK, j]], begin, j
                )
            self._add(total, decoded, begin)
        return total

    def squares(self, rows: Tensor) -> float:
        """Return the weighted sum of the squared norms of rows ``(rows, dim)``."""
        total = 0.0
        for begin in range(0, len(rows), BLOCK):
            each = rows[begin : begin + BLOCK].double().square().sum(dim=1)
            total += float(self.normalized_weight[begin : begin + BLOCK] @ each)
        return total

    def diagonal(self) -> Tensor:
        """Return the diagonal of the normal equations, ``(buckets + 1,)``.

        It is the total weight of the rows that use each bucket, and of all rows.
        """
        total = torch.zeros(self.buckets + 1, dtype=torch.float64)
        for j in range(self.index.shape[1]):
            total.index_add_(0, self.index[:, j], self.normalized_weight)
        total[-1] = self.normalized_weight.sum()
        return total

    def _add(self, total: Tensor, rows: Tensor, begin: int) -> None:
        """Add the weighted rows of a block, which starts at row ``begin``, to their buckets."""
        end = begin + len(rows)
        weighted = rows * self.normalized_weight[begin:end].unsqueeze(1)
        for j in range(self.index.shape[1]):
            total.index_add_(0, self.index[begin:end, j], self._apply_signs(weighted, begin, j))
        total[-1] += weighted.sum(dim=0)

    def _apply_signs(self, rows: Tensor, begin: int, j: int) -> Tensor:
        """Multiply the rows of a block by the signs of hash function ``j``, if there are signs."""
        if self.sign is None:
            return rows
        return rows * self.sign[begin : begin + len(rows), j].unsqueeze(1)


@dataclass(frozen=True)
class MultiHashComposition:
    """A table composed of one smaller table (its *part*) and two tensors.

    The part is ``buckets`` ``(buckets, dim)``. The tensors are ``functions``, the coefficients of
    the hash functions, int64 ``(hashes, 2 or 4)``, and ``mean`` ``(dim,)``. The protocol
    ``Composition`` (``core/modules/composed.py``) explains the methods. ``learned``: names of the
    stored tensors that training may change. ``rows_per_entry=0``: the tensor belongs to the whole
    table, not to its rows.
    """

    name: str = "multi_hash"
    learned: tuple[str, ...] = ("mean",)

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        width = 4 if settings["signed"] else 2
        return {
            "functions": TensorSpec((settings["hashes"], width), torch.int64, rows_per_entry=0),
            "mean": TensorSpec((dim,), torch.float32, rows_per_entry=0),
        }

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        return {"buckets": PartSpec(settings["buckets"], dim)}

    def lookup_counts(
        self, stored: Mapping[str, Tensor], counts: Tensor, settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        buckets = settings["buckets"]
        ids = torch.arange(len(counts))
        bucket_of_hash = hash_ids(ids, stored["functions"], buckets)  # (rows, hashes)
        count_of_hash = counts.unsqueeze(1).expand_as(bucket_of_hash)
        summed = sum_counts(count_of_hash.reshape(-1), bucket_of_hash.reshape(-1), buckets)
        return {"buckets": summed}

    def lookup(
        self, stored: Mapping[str, Tensor], parts: Parts, ids: Tensor, settings: Mapping[str, Any]
    ) -> Tensor:
        int64_ids, functions = ids.long(), stored["functions"]
        rows: Tensor = parts["buckets"](hash_ids(int64_ids, functions, settings["buckets"]))
        if settings["signed"]:
            rows = rows * hash_signs(int64_ids, functions).unsqueeze(-1)
        return rows.sum(dim=-2) + stored["mean"]  # (*ids, hashes, dim) -> (*ids, dim)


COMPOSITION: Composition = MultiHashComposition()


class MultiHash(ComposingStep):
    """Replace rows of embedding tables by sums of shared rows, selected by hashing."""

    kind: Literal["multi_hash"] = "multi_hash"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    buckets: float = Field(
        0.5,
        gt=0,
        description="Number of shared rows. Below 1: as a share of the table's rows. From 1 on: a "
        "number.",
    )
    hashes: int = Field(
        2, ge=1, le=8, description="Number of hash functions: each row is the sum of so many rows."
    )
    draws: int = Field(
        4, ge=1, description="Number of random draws of hash functions; the best fit is kept."
    )
    signed: bool = Field(
        False, description="Add or subtract each shared row, as a second hash function decides."
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
        """Select the tables to compress; give a reason for each other table."""

        def design(rows: int, dim: int) -> Design | Reason:
            if rows >= PRIME:
                return Reason("too_many_rows", rows=rows, limit=PRIME)
            buckets = share_or_number(self.buckets, rows)
            settings = {"buckets": buckets, "hashes": self.hashes, "signed": self.signed}
            reason = (
                Reason("signed_hashed_rows", buckets=buckets, hashes=self.hashes)
                if self.signed
                else Reason("hashed_rows", buckets=buckets, hashes=self.hashes)
            )
            return Design(COMPOSITION, settings, reason)

        return choose_composed(model, self.tables, self.min_rows, self.kind, design)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Designs]) -> AppliedStep:
        """Draw hash functions and fit buckets to every selected table.

        Raises:
            RowsMissing: ``weighted`` is set, and there are no training rows.
        """
        designs = plan.payload
        weights = row_weights(model, bench, designs, weighted=self.weighted)
        functions = coefficients(self.hashes * self.draws, bench.seed, signed=self.signed)
        draws = torch.split(functions, self.hashes)

        def fit_table(name: str, table: Tensor, design: Design) -> FittedParts:
            buckets = design.settings["buckets"]
            best, hash_fit = best_fit(table, weights[name], draws, buckets)
            stored = {"functions": best.clone(), "mean": hash_fit.mean}
            return FittedParts(stored, parts={"buckets": hash_fit.buckets})

        return recompose(model, designs, fit_table)
