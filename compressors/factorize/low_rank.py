"""Low-rank embedding tables: a table of fewer columns times one small matrix.

A table of ``rows x dim`` float32 becomes a table of ``rows x rank``, named ``narrow``, and a matrix
``projection`` ``(rank, dim)``: every row is a linear combination of ``rank`` directions. ``narrow``
is an ordinary table, so a later step may quantize it.

Source: Eckart and Young 1936 (the truncated singular value decomposition is the closest matrix
of a given rank); for embedding tables, for example, https://arxiv.org/abs/1809.10853.
Differs: rows may be weighted by their lookup counts, so that often looked-up rows have smaller
errors (Srebro and Jaakkola 2003; with one weight per row there is a closed form). The weighted mean
of the rows is subtracted first and stored separately, as ``mean``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.composed import Composition, Design, Parts, PartSpec
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


def factorize(table: Tensor, rank: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the closest low-rank approximation of a table, with one weight per row.

    Args:
        table: float, ``(rows, dim)``.
        rank: number of directions, at most ``dim``.
        weight: weight of each row's squared error, ``(rows,)``, not all zero.

    Returns:
        ``reduced`` ``(rows, rank)``, ``projection`` ``(rank, dim)`` with orthonormal rows, and
        ``mean`` ``(dim,)``, all float32: the table is about ``reduced @ projection + mean``. Only
        the weighted covariance ``(dim, dim)`` is decomposed.
    """
    normalized_weight = (weight / weight.sum()).to(torch.float64).unsqueeze(1)  # (rows, 1)
    rows = table.to(torch.float64)
    mean = (normalized_weight * rows).sum(dim=0)  # (dim,)
    centered = rows - mean
    covariance = centered.T @ (normalized_weight * centered)  # (dim, dim)
    _, vectors = torch.linalg.eigh(covariance)  # in ascending order of eigenvalues
    projection = vectors.T.flip(0)[:rank]  # (rank, dim)
    # The sign of an eigenvector is arbitrary: fix it, so that results are reproducible.
    sign = torch.gather(projection, 1, projection.abs().argmax(dim=1, keepdim=True)).sign()
    projection = projection * sign
    return (centered @ projection.T).float(), projection.float(), mean.float()


@dataclass(frozen=True)
class LowRankComposition:
    """A table composed of one smaller table (its *part*) and two tensors.

    The part is ``narrow`` ``(rows, rank)``. The tensors are ``projection`` ``(rank, dim)`` and
    ``mean`` ``(dim,)``, float32. The protocol ``Composition`` (``core/modules/composed.py``)
    explains the methods. ``learned``: names of the stored tensors that training may change.
    ``rows_per_entry=0``: the tensor belongs to the whole table, not to its rows.
    """

    name: str = "low_rank"
    learned: tuple[str, ...] = ("projection", "mean")

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {
            "projection": TensorSpec((settings["rank"], dim), torch.float32, rows_per_entry=0),
            "mean": TensorSpec((dim,), torch.float32, rows_per_entry=0),
        }

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        return {"narrow": PartSpec(rows, settings["rank"])}

    def lookup_counts(
        self,
        stored: Mapping[str, Tensor],
        counts: Tensor,
        settings: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        return {"narrow": counts}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        parts: Parts,
        ids: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        reduced: Tensor = parts["narrow"](ids)  # (*ids, rank)
        return torch.matmul(reduced, stored["projection"]) + stored["mean"]

    def multiply(self, stored: Mapping[str, Tensor], parts: Parts, x: Tensor) -> Tensor:
        projected = F.linear(x, stored["projection"])  # (*, rank)
        mean = torch.matmul(x, stored["mean"].unsqueeze(1))  # (*, 1), the same for every row
        # ``narrow`` may be compressed. Then its weight is no tensor but a ``TableWeight``, which
        # ``F.linear`` accepts.
        return F.linear(projected, parts["narrow"].weight) + mean  # type: ignore[arg-type]


COMPOSITION: Composition = LowRankComposition()


class LowRank(ComposingStep):
    """Replace each embedding table by a table of fewer columns and one small matrix."""

    kind: Literal["low_rank"] = "low_rank"
    tables: TablePatterns = ("*",)
    min_rows: MinRows = 1
    rank: float = Field(
        0.5,
        gt=0,
        description="Numbers stored per row. Below 1: as a share of the table's width. From 1 "
        "on: a number.",
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
        """Select the tables to factorize; give a reason for each other table."""
        return choose_composed(model, self.tables, self.min_rows, self.kind, self.design)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Designs]) -> AppliedStep:
        """Replace every selected table by its factors.

        Raises:
            RowsMissing: ``weighted`` is set, and there are no training rows.
        """
        designs = plan.payload
        weights = row_weights(model, bench, designs, weighted=self.weighted)

        def fit(name: str, table: Tensor, design: Design) -> FittedParts:
            reduced, projection, mean = factorize(table, design.settings["rank"], weights[name])
            stored = {"projection": projection, "mean": mean}
            return FittedParts(stored, parts={"narrow": reduced})

        return recompose(model, designs, fit)

    def design(self, rows: int, dim: int) -> Design:
        """Return how a table of ``rows x dim`` is composed."""
        rank = share_or_number(self.rank, dim)
        return Design(COMPOSITION, {"rank": rank}, Reason("narrower_rows", dim=dim, rank=rank))
