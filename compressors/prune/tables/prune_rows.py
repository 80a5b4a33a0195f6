"""Prune the least important rows of embedding tables.

A lookup of a pruned row returns the nearest kept row, one shared row, or zeros. If all pruned rows
have the same replacement, the map of kept rows takes one byte per row (``kept_rows.py``). Otherwise
it takes as many bytes per row as the number of kept rows needs (``row_map.py``). The kept rows are
an ordinary table, which a later step may quantize.

With ``min_lookups`` the rows that the training data looks up at least that often are kept, instead
of a fixed share of rows. In most tables of ids, many of the other rows were hardly trained, so
their values are still near their initialization.

Sources: Molchanov et al. 2019, https://arxiv.org/abs/1906.10771, eq. 8 (the squared product of
gradient and weight, for importance ``gradient``); https://arxiv.org/abs/2101.07577 (rows of tables
pruned during training with learned thresholds). Differs: the network is already trained, and the
plan gives the share of lookups that pruning affects.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressors.contracts import Bench, Part, read_renamed
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error
from compressors.core.model import Model
from compressors.core.modules.composed import Composition, Design, Parts, PartSpec, sum_counts
from compressors.core.modules.formats import TensorSpec
from compressors.core.steps.composition_steps import (
    UNSEEN,
    ComposingStep,
    Designs,
    FittedParts,
    choose_composed,
    dry_run_composed,
    recompose,
)
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_tables, defer
from compressors.core.steps.unit_settings import MinRows
from compressors.core.units import Unit
from compressors.prune.tables import row_map
from compressors.prune.tables.kept_rows import BLOCK, build_kept_map, lookup_share, select_highest
from compressors.prune.tables.row_map import byte_planes
from compressors.quantize.calibration.lookup_counts import lookup_counts, squared_gradients
from compressors.quantize.kernels.lloyd import nearest_entries


@dataclass(frozen=True)
class KeptRowsComposition:
    """A table ``kept`` of the kept rows, whose last row replaces all pruned rows, and a map.

    The map is ``within`` and ``before`` of ``kept_rows.build_kept_map``. A composition defines how
    a table computes its rows from stored tensors and from inner tables, its *parts*. The protocol
    ``Composition`` (``core/modules/composed.py``) explains the methods. ``rows_per_entry``: number
    of rows per entry of a stored tensor. ``learned``: names of the stored tensors that training may
    change.
    """

    name: str = "kept_rows"
    learned: tuple[str, ...] = ()

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {
            "within": TensorSpec((rows,), torch.int8),
            "before": TensorSpec((-(-rows // BLOCK),), torch.int32, rows_per_entry=BLOCK),
        }

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        return {"kept": PartSpec(settings["kept"] + 1, dim)}

    def lookup_counts(
        self, stored: Mapping[str, Tensor], counts: Tensor, settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        ids, kept_count = torch.arange(len(counts)), settings["kept"]
        index = torch.ops.recpress.kept_row_index(stored["within"], stored["before"], ids)
        return {
            "kept": sum_counts(counts, torch.where(index < 0, kept_count, index), kept_count + 1)
        }

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        parts: Parts,
        ids: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        index = torch.ops.recpress.kept_row_index(stored["within"], stored["before"], ids)
        rows: Tensor = parts["kept"](torch.where(index < 0, settings["kept"], index))
        return rows


COMPOSITION: Composition = KeptRowsComposition()


class PruneRows(ComposingStep):
    """Remove the least important rows of embedding tables."""

    # A preset includes the step only if its loss of quality can be measured on validation rows.
    requires_budget: ClassVar[bool] = True

    kind: Literal["prune_rows"] = "prune_rows"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to prune: module names, with * for any characters."
    )
    min_rows: MinRows = 1
    keep: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of a table's rows to keep. Not used with min_lookups.",
    )
    importance: Annotated[
        Literal["lookups", "norm", "gradient"], read_renamed({"traffic": "lookups"})
    ] = Field(
        "lookups",
        description="Row score. lookups: number of lookups in training. norm: length of the "
        "row. gradient: estimated change of the loss if the row is removed.",
    )
    min_lookups: int = Field(
        0,
        ge=0,
        description="Prune the rows that training looks up fewer times than this, instead of a "
        "share. 0: 'keep' decides. Requires importance 'lookups'.",
    )
    pruned: Literal["nearest", "shared", "zero"] = Field(
        "nearest",
        description="Replacement of a pruned row. nearest: the nearest kept row. shared: the mean "
        "of the pruned rows. zero: zeros. The map of shared and zero takes one byte per row.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, to count lookups: for importance and for the report."""
        return ("train",)

    @model_validator(mode="after")
    def _require_importance_for_min_lookups(self) -> Self:
        if self.min_lookups and self.importance != "lookups":
            raise value_error("min_lookups_without_importance", importance=self.importance)
        return self

    def plan(self, model: Model, bench: Bench) -> StepPlan[Designs]:
        """Select the tables to prune; give a reason for each other table.

        With ``min_lookups``, ``apply`` decides, because it counts the lookups; the plan then
        contains only bounds of the bytes.
        """
        min_rows = max(self.min_rows, 2)
        if not self.min_lookups:
            return choose_composed(model, self.tables, min_rows, self.kind, self.design)
        reason = Reason("rows_by_lookups", step=self.kind, min_lookups=self.min_lookups)
        units = Unit.of(model.module)
        decisions = choose_tables(units, self.tables, min_rows, self.kind)

        def bytes_with_one_row(unit: Unit) -> int:
            return self._design_table(1, reason).bytes(*unit.weight.shape)

        deferred = defer(units, decisions, reason, bytes_with_one_row)
        return StepPlan(deferred, payload={})  # no designs yet

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Designs]) -> AppliedStep:
        """Replace every selected table by its kept rows and a map.

        Raises:
            RowsMissing: there are no training rows.
            StepRefused: importance is ``gradient``, and the task has no loss.
        """
        designs, skipped = plan.payload, dict[str, Decision]()
        if self.min_lookups:
            names = [unit.name for unit in plan.units(model.module)]
            counts = lookup_counts(model, bench, names)
            designs, skipped = self._design_by_lookups(model, counts)
        else:
            counts = lookup_counts(model, bench, designs)
        by_gradient = self.importance == "gradient"
        gradients = squared_gradients(model, bench, designs) if by_gradient else {}

        def fit(name: str, table: Tensor, design: Design) -> FittedParts:
            match self.importance:
                case "lookups":
                    score = counts[name]
                case "norm":
                    score = table.double().square().sum(dim=1)
                case "gradient":
                    score = (gradients[name] * table.square()).double().sum(dim=1)
            is_kept = select_highest(
                score, design.settings[_COUNT_SETTING[design.composition.name]]
            )
            affected = Reason("pruned_lookups", share=lookup_share(counts[name], ~is_kept))
            reasons = (design.reason, affected) if self.min_lookups else (affected,)
            return self._build_parts(table, is_kept, counts[name])._replace(reasons=reasons)

        pruned = recompose(model, designs, fit)
        return AppliedStep(pruned.model, {**skipped, **pruned.outcomes})

    def _build_parts(self, weight: Tensor, is_kept: Tensor, count: Tensor) -> FittedParts:
        """Build the map and the table of the kept rows.

        Args:
            weight: the table, float ``(rows, dim)``.
            is_kept: bool ``(rows,)``.
            count: lookups of each row, ``(rows,)``; weights of the mean of the pruned rows.
        """
        if self.pruned == "nearest":
            index = torch.empty(len(is_kept), dtype=torch.int64)
            index[is_kept] = torch.arange(int(is_kept.sum()))
            index[~is_kept] = nearest_entries(weight[~is_kept], weight[is_kept])
            planes = byte_planes(index, int(is_kept.sum()))
            return FittedParts(stored={"planes": planes}, parts={"unique": weight[is_kept]})
        within, before = build_kept_map(is_kept)
        shared = torch.zeros(weight.shape[1])
        if self.pruned != "zero":
            shared = _compute_mean_row(weight, ~is_kept, count)
        rows = torch.cat([weight[is_kept], shared.unsqueeze(0)])
        return FittedParts(stored={"within": within, "before": before}, parts={"kept": rows})

    def smallest_dry_run(self, model: Model, plan: StepPlan[Designs]) -> Model:
        """Predict the smallest shapes; with ``min_lookups``, as if no row had so many lookups."""
        if not self.min_lookups:
            return self.dry_run(model, plan)
        no_lookups = {
            unit.name: torch.zeros(()).expand(unit.rows) for unit in plan.units(model.module)
        }
        return dry_run_composed(model, self._design_by_lookups(model, no_lookups)[0])

    def _design_by_lookups(
        self, model: Model, counts: Mapping[str, Tensor]
    ) -> tuple[dict[str, Design], dict[str, Decision]]:
        """Design each table from its lookup counts; give a reason for each table not pruned.

        A table is pruned only if this still saves bytes when a later step stores the rows in four
        bits, because the map of rows does not become smaller then.
        """
        designs: dict[str, Design] = {}
        skipped: dict[str, Decision] = {}
        for unit in Unit.of(model.module):
            if unit.name not in counts:
                continue
            rows, dim = unit.weight.shape
            kept_count = max(1, int((counts[unit.name] >= self.min_lookups).sum()))
            reason = Reason(
                "kept_rows_by_lookups", kept=kept_count, rows=rows, min_lookups=self.min_lookups
            )
            design = self._design_table(kept_count, reason)
            packed_row_bytes = min(2 * dim, -(-dim // 2) + 2)  # as float16, or as int4 with a scale
            part_rows = sum(
                p.rows for p in design.composition.parts(rows, dim, design.settings).values()
            )
            map_bytes = design.bytes(rows, dim) - 4 * part_rows * dim  # without the float32 rows
            packed_bytes = map_bytes + part_rows * packed_row_bytes
            if kept_count < rows and packed_bytes < rows * packed_row_bytes:
                designs[unit.name] = design
            else:
                why = design.reason, Reason("row_map_too_large")
                skipped[unit.name] = Decision("skipped", why)
        return designs, skipped

    def design(self, rows: int, dim: int) -> Design:
        """Design the composition of a table of ``rows x dim``."""
        kept_count = min(rows - 1, max(1, round(self.keep * rows)))
        reason = Reason("kept_rows", kept=kept_count, rows=rows, importance=self.importance)
        return self._design_table(kept_count, reason)

    def _design_table(self, kept_count: int, reason: Reason) -> Design:
        composition = row_map.COMPOSITION if self.pruned == "nearest" else COMPOSITION
        return Design(composition, {_COUNT_SETTING[composition.name]: kept_count}, reason)


_BLOCK_ROWS = 65_536
# By composition, the name of the setting that holds the number of kept rows.
_COUNT_SETTING = {COMPOSITION.name: "kept", row_map.COMPOSITION.name: "places"}


def _compute_mean_row(weight: Tensor, chosen: Tensor, count: Tensor) -> Tensor:
    """Compute the mean of the chosen rows, weighted by their lookups: float32 ``(dim,)``.

    The rows are summed in blocks, because most rows of a large table may be chosen.
    """
    total, total_lookups = torch.zeros(weight.shape[1], dtype=torch.float64), 0.0
    for begin in range(0, len(weight), _BLOCK_ROWS):
        block = slice(begin, begin + _BLOCK_ROWS)
        # UNSEEN is added to every count, so that rows without lookups have some weight.
        lookups = count[block][chosen[block]].double() + UNSEEN
        total += lookups @ weight[block][chosen[block]].double()
        total_lookups += float(lookups.sum())
    return (total / total_lookups).float()
