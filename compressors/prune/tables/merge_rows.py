"""Merge equal and nearly equal rows of embedding tables.

Rows closer to each other than a tolerance become one row: their mean, weighted by lookup counts.
Groups are found by leader clustering (Hartigan 1975, ch. 3): the most looked-up row is a leader,
and rows within the tolerance of it join its group. Differs: only rows in the same cell of a grid
over the table's strongest directions are compared, so that the cost for millions of rows is that of
sorting them. Two near rows on both sides of a cell border may stay separate, but rows farther from
their leader than the tolerance are never merged.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.composed import Design
from compressors.core.steps.composition_steps import UNSEEN
from compressors.core.steps.decisions import Applied, Decision, StepPlan, choose_tables
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.steps.unit_settings import MinRows
from compressors.core.units import Unit, pack_table, swap
from compressors.prune.tables.row_map import COMPOSITION, byte_planes
from compressors.quantize.calibration.lookup_counts import lookup_counts

DIRECTIONS = 4
"""Of the grid. More make smaller cells, so fewer comparisons, and more pairs missed at borders."""

CELLS_PER_REACH = 4
"""A cell is so many times as wide as rows may be apart: wider ones miss fewer pairs."""


def merged(table: Tensor, weight: Tensor, within: float) -> tuple[Tensor, Tensor]:
    """Merge rows within a tolerance of each other.

    Args:
        table: float, ``(rows, dim)``.
        weight: weight of each row, positive ``(rows,)``: heavier rows are leaders, and a merged
            row is the weighted mean.
        within: largest distance of a row from its leader, as a share of the root mean square length
            of a row. 0 merges only rows that are equal bit for bit, except for the sign of zero.

    Returns:
        ``place`` int64 ``(rows,)`` and ``rows`` float32 ``(places, dim)``: each row is about
        ``rows[place]``. Places are in the order of their first row.
    """
    exact, first = torch.unique(table, dim=0, return_inverse=True)
    total = torch.zeros(len(exact), dtype=torch.float64).index_add_(0, first, weight.double())
    lead = _leaders(exact, total, within) if within > 0 else torch.arange(len(exact))
    lead = lead[first]  # (rows,): the group of each row
    # Number the groups by their first row, so that the result does not depend on sorting.
    order = torch.full((len(exact),), len(table)).scatter_reduce(
        0, lead, torch.arange(len(table)), "amin"
    )
    used = order.sort().indices[: int((order < len(table)).sum())]
    place = torch.empty(len(exact), dtype=torch.int64)
    place[used] = torch.arange(len(used))
    place = place[lead]
    share = weight.double().unsqueeze(1)
    shape = (len(used), table.shape[1])
    sums = torch.zeros(shape, dtype=torch.float64).index_add_(0, place, share * table.double())
    rows = sums / torch.zeros(len(used), 1, dtype=torch.float64).index_add_(0, place, share)
    return place, rows.float()


def _leaders(table: Tensor, weight: Tensor, within: float) -> Tensor:
    """The leader of each row, int64 ``(rows,)``; no two rows are equal."""
    reach = within * float(table.double().square().sum(dim=1).mean().sqrt())
    lead = torch.arange(len(table))
    for members in _cells(table, CELLS_PER_REACH * reach):
        left = members[weight[members].sort(descending=True, stable=True).indices]
        while len(left) > 1:
            # Rounding must not merge rows just outside the tolerance.
            gap = (table[left].double() - table[left[0]].double()).square().sum(dim=1).sqrt()
            follows = gap <= reach
            lead[left[follows]] = left[0]
            left = left[~follows]
    return lead


def _cells(table: Tensor, width: float) -> list[Tensor]:
    """The rows of each cell of a grid, for cells with more than one row."""
    centred = table.double() - table.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    strongest = vectors[:, -DIRECTIONS:]  # (dim, directions)
    cell = (centred @ strongest / max(width, torch.finfo(torch.float64).tiny)).floor()
    number, counts = torch.unique(cell, dim=0, return_inverse=True, return_counts=True)[1:]
    members = torch.split(number.sort(stable=True).indices, counts.tolist())
    return [rows for rows in members if len(rows) > 1]


class MergeRows(StepSettings):
    """Make one of the rows of embedding tables that are equal, or nearly."""

    effect: ClassVar[Effect] = "parts"

    kind: Literal["merge_rows"] = "merge_rows"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to search: module names, with * for any characters."
    )
    min_rows: MinRows = 1
    within: float = Field(
        0.0,
        ge=0,
        description="How far apart merged rows may lie, as a share of a row's usual length; 0 for "
        "equal rows only.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, to weight rows by their lookup counts."""
        return ("train",)

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the tables to search; ``apply`` finds out whether rows can be merged."""
        units = Unit.of(model.module)
        decisions = choose_tables(units, self.tables, self.min_rows, self.kind)
        reason = (
            Reason("merged_within", step=self.kind, within=self.within)
            if self.within
            else Reason("merged_equal", step=self.kind)
        )
        for unit in StepPlan(decisions, None).units(model.module):
            one = Design(COMPOSITION, {"places": 1}, reason).bytes(*unit.weight.shape)
            decisions[unit.name] = Decision(
                "deferred", (reason,), (min(one, unit.bytes), unit.bytes)
            )
        return StepPlan(decisions, None)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> Applied:
        """Merge rows in every table in which this saves more bytes than the map takes."""
        taken = plan.units(model.module)
        counts = lookup_counts(model, bench, [unit.name for unit in taken])
        outcomes: dict[str, Decision] = {}
        for unit in taken:
            rows, dim = unit.weight.shape
            place, unique = merged(unit.weight, counts[unit.name] + UNSEEN, self.within)
            reason = Reason("merged_rows", rows=rows, unique=len(unique))
            design = Design(COMPOSITION, {"places": len(unique)}, reason)
            if design.bytes(rows, dim) >= unit.bytes:
                outcomes[unit.name] = Decision("skipped", (reason,))
                continue
            outcomes[unit.name] = Decision("taken", (reason,))
            stored = {"planes": byte_planes(place, len(unique))}
            table = design.table(rows, dim, stored, {"unique": unique})
            swap(model.module, unit.name, pack_table(unit.module, table))
        return Applied(model, outcomes)
