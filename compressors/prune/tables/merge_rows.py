"""Merge equal and nearly equal rows of embedding tables.

Rows closer to each other than a tolerance become one row: their mean, weighted by lookup counts.

Source: leader clustering (Hartigan 1975, ch. 3). The most looked-up row is a leader, and rows
within the tolerance of it join its group; the next leader is the most looked-up row without a
group.
Differs: only rows in the same cell of a grid are compared, so that millions of rows cost as much
time as sorting them. The grid covers the principal directions of the table. Two similar rows on
both sides of a cell border may stay separate, but rows farther from their leader than the tolerance
are never merged.
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
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_tables, defer
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.steps.unit_settings import MinRows
from compressors.core.units import Unit, pack_table, swap
from compressors.prune.tables.row_map import COMPOSITION, byte_planes
from compressors.quantize.calibration.lookup_counts import lookup_counts

DIRECTIONS = 4
"""Dimensions of the grid. With more of them fewer rows are compared, but more similar pairs are in
different cells."""

CELL_WIDTH = 4
"""Width of a cell as a multiple of the tolerance. Wider cells miss fewer pairs of similar rows."""


def merge_similar_rows(table: Tensor, weight: Tensor, within: float) -> tuple[Tensor, Tensor]:
    """Merge rows within a tolerance of each other.

    Args:
        table: float, ``(rows, dim)``.
        weight: weight of each row, positive ``(rows,)``: heavier rows are leaders, and a merged
            row is the weighted mean.
        within: largest distance of a row from its leader, as a share of the root mean square length
            of a row. 0 merges only rows that are equal bit for bit, except for the sign of zero.

    Returns:
        ``index`` int64 ``(rows,)`` and ``merged_rows`` float32 ``(merged, dim)``: each row is
        replaced by ``merged_rows[index]``. Merged rows have the order of the first table rows that
        they replace.
    """
    distinct, distinct_of_row = torch.unique(table, dim=0, return_inverse=True)
    total = torch.zeros(len(distinct), dtype=torch.float64)
    total = total.index_add_(0, distinct_of_row, weight.double())
    leader = _find_leaders(distinct, total, within) if within > 0 else torch.arange(len(distinct))
    group = leader[distinct_of_row]  # (rows,): the leader of each row
    # Number the groups by their first row, so that the result does not depend on sorting.
    first_row = torch.full((len(distinct),), len(table)).scatter_reduce(
        0, group, torch.arange(len(table)), "amin"
    )
    groups = first_row.sort().indices[: int((first_row < len(table)).sum())]
    index_of_group = torch.empty(len(distinct), dtype=torch.int64)
    index_of_group[groups] = torch.arange(len(groups))
    index = index_of_group[group]
    weights = weight.double().unsqueeze(1)
    sums = torch.zeros(len(groups), table.shape[1], dtype=torch.float64)
    sums = sums.index_add_(0, index, weights * table.double())
    weight_sums = torch.zeros(len(groups), 1, dtype=torch.float64).index_add_(0, index, weights)
    return index, (sums / weight_sums).float()


def _find_leaders(table: Tensor, weight: Tensor, within: float) -> Tensor:
    """Find the leader of each row: int64 ``(rows,)``. No two rows of the table may be equal."""
    tolerance = within * float(table.double().square().sum(dim=1).mean().sqrt())
    leader = torch.arange(len(table))
    for members in _group_by_cell(table, CELL_WIDTH * tolerance):
        remaining = members[weight[members].sort(descending=True, stable=True).indices]
        while len(remaining) > 1:
            # In float64: rounding must not merge rows just outside the tolerance.
            difference = table[remaining].double() - table[remaining[0]].double()
            is_close = difference.square().sum(dim=1).sqrt() <= tolerance
            leader[remaining[is_close]] = remaining[0]
            remaining = remaining[~is_close]
    return leader


def _group_by_cell(table: Tensor, width: float) -> list[Tensor]:
    """Return the row numbers in each cell of a grid, for cells with more than one row."""
    centered = table.double() - table.double().mean(dim=0)
    _, vectors = torch.linalg.eigh(centered.T @ centered)
    principal = vectors[:, -DIRECTIONS:]  # (dim, directions)
    cell = (centered @ principal / max(width, torch.finfo(torch.float64).tiny)).floor()
    cell_of_row, counts = torch.unique(cell, dim=0, return_inverse=True, return_counts=True)[1:]
    members = torch.split(cell_of_row.sort(stable=True).indices, counts.tolist())
    return [rows for rows in members if len(rows) > 1]


class MergeRows(StepSettings):
    """Merge rows of embedding tables that are equal or nearly equal.

    The result is a composition, a table built from smaller ones (``row_map.py``): the table
    ``unique`` of merged rows, and a map from each id to the index of its row, stored as the tensor
    ``planes``. The composition's setting ``places`` is the number of rows of ``unique``.
    """

    effect: ClassVar[Effect] = "parts"  # a table is replaced by a smaller table and a map

    kind: Literal["merge_rows"] = "merge_rows"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to search: module names, with * for any characters."
    )
    min_rows: MinRows = 1
    within: float = Field(
        0.0,
        ge=0,
        description="Largest distance of a merged row from the leader of its group, as a share of "
        "the root mean square length of the table's rows. 0: merge only equal rows.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, to weight rows by their lookup counts."""
        return ("train",)

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the tables to search; only ``apply`` finds out whether rows can be merged.

        The plan contains bounds of the bytes; the lower one is that of a table with one row.
        """
        units = Unit.of(model.module)
        decisions = choose_tables(units, self.tables, self.min_rows, self.kind)
        reason = (
            Reason("merged_within", step=self.kind, within=self.within)
            if self.within
            else Reason("merged_equal", step=self.kind)
        )

        def bytes_with_one_row(unit: Unit) -> int:
            return Design(COMPOSITION, {"places": 1}, reason).bytes(*unit.weight.shape)

        deferred = defer(units, decisions, reason, bytes_with_one_row)
        return StepPlan(deferred, payload=None)  # ``apply`` needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Merge rows in every table in which this saves more bytes than the map takes.

        Raises:
            RowsMissing: there are no training rows.
        """
        units = plan.units(model.module)
        counts = lookup_counts(model, bench, [unit.name for unit in units])
        outcomes: dict[str, Decision] = {}
        for unit in units:
            rows, dim = unit.weight.shape
            weight = counts[unit.name] + UNSEEN  # so that rows without lookups have some weight
            index, unique = merge_similar_rows(unit.weight, weight, self.within)
            reason = Reason("merged_rows", rows=rows, unique=len(unique))
            design = Design(COMPOSITION, {"places": len(unique)}, reason)
            if design.bytes(rows, dim) >= unit.bytes:
                outcomes[unit.name] = Decision("skipped", (reason,))
                continue
            outcomes[unit.name] = Decision("taken", (reason,))
            stored = {"planes": byte_planes(index, len(unique))}
            table = design.table(rows, dim, stored, {"unique": unique})
            # ``pack_table`` puts the new table into a ``Bag`` if it replaces an EmbeddingBag.
            swap(model.module, unit.name, pack_table(unit.module, table))
        return AppliedStep(model, outcomes)
