"""Drop embedding tables: replace the tables of unimportant features by one row each.

Tables are ranked by permutation importance (Breiman 2001, sec. 10; Fisher et al. 2019,
https://arxiv.org/abs/1801.01489): the decrease of the metric on the validation rows if the outputs
of a table are permuted between rows. Tables are tried in ascending order of importance. A table is
dropped if the metric of the network without it and without those already dropped, on the same rows,
stays within the allowed loss.

A dropped table returns its mean row, weighted by lookup counts, for every id, so the next layers do
not change. The step ``channels`` or a distilled student can then remove the inputs of these layers
that the table fills with constants.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.composed import ComposedTable, Composition, Parts, PartSpec
from compressors.core.modules.formats import TensorSpec
from compressors.core.steps.composition_steps import UNSEEN
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_tables, defer
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.steps.unit_settings import MinRows
from compressors.core.units import Unit, pack_table, swap
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import RowsMissing
from compressors.metrics.validation_score import quality
from compressors.quantize.calibration.lookup_counts import lookup_counts


@dataclass(frozen=True)
class ConstantComposition:
    """A table without parts that returns the same ``row``, float32 ``(dim,)``, for every id.

    A composition defines how a table computes its rows from stored tensors and from inner tables,
    its *parts*. The protocol ``Composition`` (``core/modules/composed.py``) explains the methods.
    ``learned``: names of the tensors that training may change. ``rows_per_entry=0``: the tensor
    belongs to the whole table, not to its rows.
    """

    name: str = "constant"
    learned: tuple[str, ...] = ("row",)

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {"row": TensorSpec((dim,), torch.float32, rows_per_entry=0)}

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        return {}

    def lookup_counts(
        self,
        stored: Mapping[str, Tensor],
        counts: Tensor,
        settings: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        return {}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        parts: Parts,
        ids: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        row = stored["row"]
        return row.expand(*ids.shape, row.shape[0])


COMPOSITION: Composition = ConstantComposition()


def permutation_loss(model: Model, bench: Bench, name: str, baseline: float, repeats: int) -> float:
    """Measure how much the validation metric falls when a table's outputs are permuted.

    Outputs are permuted within each batch of ``metrics.validation_score.SCORING_ROWS`` rows.

    Args:
        model: the network.
        bench: with validation rows.
        name: name of the table.
        baseline: the metric without permutation.
        repeats: number of permutations; the result is the mean over them.

    Raises:
        RowsMissing: there are no validation rows.
    """
    if bench.validation is None:
        raise RowsMissing("validation_rows_missing", step="drop_tables")
    private = model.private().module  # a copy of the modules that shares the tensors
    generator = torch.Generator().manual_seed(bench.seed)

    def permute(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output[torch.randperm(len(output), generator=generator)]

    private.get_submodule(name).register_forward_hook(permute)
    qualities = [quality(private, bench.signature, bench.validation) for _ in range(repeats)]
    return baseline - sum(qualities) / repeats


class DropTables(StepSettings):
    """Replace unimportant embedding tables by one row, within an allowed loss of quality."""

    effect: ClassVar[Effect] = "parts"  # a table is replaced by a composition (of one row)

    kind: Literal["drop_tables"] = "drop_tables"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables that may be dropped: module names, with * for any characters."
    )
    min_rows: MinRows = 1
    most_loss: float = Field(
        0.0,
        ge=0,
        description="Largest allowed decrease of the metric on validation rows, for all dropped "
        "tables together.",
    )
    repeats: int = Field(
        3, ge=1, description="Number of permutations per table; their mean loss ranks the table."
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Validation rows, to select tables; training rows, to weight the rows of the mean."""
        return ("train", "validation")

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the tables that may be dropped; only ``apply`` measures which ones are.

        Raises:
            NothingToCompress: the signature's task has no metric of single rows.
        """
        if not bench.signature.scores_rows:
            raise NothingToCompress("row_metric_missing", step=self.kind)
        units = Unit.of(model.module)
        decisions = choose_tables(units, self.tables, self.min_rows, self.kind)
        condition = Reason(
            "dropped_if",
            step=self.kind,
            metric=bench.signature.judged_by,
            most_loss=self.most_loss,
        )

        def bytes_of_one_row(unit: Unit) -> int:
            return unit.weight.shape[1] * 4  # float32

        deferred = defer(units, decisions, condition, bytes_of_one_row)
        return StepPlan(deferred, payload=None)  # ``apply`` needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Drop tables in ascending order of importance if the loss is within ``most_loss``.

        Raises:
            RowsMissing: the bench lacks validation or training rows.
        """
        if bench.validation is None:
            raise RowsMissing("validation_rows_missing", step=self.kind)
        units = {unit.name: unit for unit in plan.units(model.module)}
        counts = lookup_counts(model, bench, units)
        baseline = quality(model.module, bench.signature, bench.validation)
        importance = {
            name: permutation_loss(model, bench, name, baseline, self.repeats) for name in units
        }
        metric = bench.signature.judged_by
        outcomes: dict[str, Decision] = {}
        for name in sorted(units, key=lambda name: importance[name]):
            candidate = model.private()
            unit = units[name]
            # ``pack_table`` puts the new table into a ``Bag`` if it replaces an EmbeddingBag.
            constant = pack_table(unit.module, _build_mean_row_table(unit, counts[name]))
            swap(candidate.module, name, constant)
            change = quality(candidate.module, bench.signature, bench.validation) - baseline
            if change >= -self.most_loss:
                model = candidate
                dropped = Reason("table_dropped", metric=metric, change=change)
                outcomes[name] = Decision("taken", (dropped,))
            else:
                why_kept = Reason("table_kept", metric=metric, change=change)
                outcomes[name] = Decision("skipped", (why_kept,))
        return AppliedStep(model, outcomes)


def _build_mean_row_table(unit: Unit, counts: Tensor) -> ComposedTable:
    """Build a table that returns the mean of the unit's rows, weighted by lookup counts."""
    weight = unit.weight
    rows, dim = weight.shape
    # UNSEEN is added to every count, so that rows without lookups have some weight.
    normalized_counts = (counts + UNSEEN) / (counts + UNSEEN).sum()
    row = (normalized_counts.unsqueeze(1) * weight.double()).sum(dim=0).float()
    return ComposedTable(COMPOSITION, rows, dim, settings={}, stored={"row": row}, parts={})
