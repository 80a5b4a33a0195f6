"""Split embedding tables into two: the most looked-up (hot) rows and the other (cold) rows.

A few rows receive most of the lookups. Both parts are ordinary tables, so later steps of the recipe
may store each in a different format: ``rowwise_int8`` on ``*.hot``, ``rowwise_int2`` on ``*.cold``.
A lookup reads both tables and selects the row of the right one.

Source: https://arxiv.org/abs/2108.02191 splits tables by lookup counts to keep hot rows in fast
memory. Differs: here the split determines the format, and both tables are in the same memory.
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
from compressors.core.modules.composed import Composition, Design, Parts, PartSpec
from compressors.core.modules.formats import TensorSpec
from compressors.core.steps.composition_steps import (
    ComposingStep,
    Designs,
    FittedParts,
    choose_composed,
    recompose,
)
from compressors.core.steps.decisions import AppliedStep, StepPlan
from compressors.core.steps.unit_settings import MinRows
from compressors.prune.tables.kept_rows import BLOCK, build_kept_map, lookup_share, select_highest
from compressors.quantize.calibration.lookup_counts import lookup_counts


@dataclass(frozen=True)
class TiersComposition:
    """Two inner tables ``hot`` and ``cold``, with rows in the original order, and a map of rows.

    The map has two tensors for blocks of 128 rows (``build_kept_map`` in
    ``prune/tables/kept_rows.py``): ``within``, a row's rank among the hot (or, negative, the cold)
    rows of its block, and ``before``, the number of hot rows before each block. The custom op
    ``kept_row_index`` computes from them a row's index in ``hot``, or -1 minus its index in
    ``cold``.

    A composition defines how a table computes its rows from stored tensors and from inner tables,
    its *parts*. The protocol ``Composition`` (``core/modules/composed.py``) explains the methods.
    ``rows_per_entry``: number of rows per entry of a stored tensor. ``learned``: names of the
    stored tensors that training may change.
    """

    name: str = "tiers"
    learned: tuple[str, ...] = ()

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        return {
            "within": TensorSpec((rows,), torch.int8),
            "before": TensorSpec((-(-rows // BLOCK),), torch.int32, rows_per_entry=BLOCK),
        }

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        hot = settings["hot"]
        return {"hot": PartSpec(hot, dim), "cold": PartSpec(rows - hot, dim)}

    def lookup_counts(
        self,
        stored: Mapping[str, Tensor],
        counts: Tensor,
        settings: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        ids = torch.arange(len(counts))
        hot = torch.ops.recpress.kept_row_index(stored["within"], stored["before"], ids) >= 0
        return {"hot": counts[hot], "cold": counts[~hot]}

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        parts: Parts,
        ids: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        index = torch.ops.recpress.kept_row_index(stored["within"], stored["before"], ids)
        hot: Tensor = parts["hot"](index.clamp(min=0))
        cold: Tensor = parts["cold"]((-1 - index).clamp(min=0))
        return torch.where((index >= 0).unsqueeze(-1), hot, cold)


COMPOSITION: Composition = TiersComposition()


class Tiers(ComposingStep):
    """Split embedding tables into rows that are looked up often and the other rows."""

    kind: Literal["tiers"] = "tiers"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to split: module names, with * for any characters."
    )
    min_rows: MinRows = 2
    hot: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of a table's rows that go to part 'hot': those with the most lookups in "
        "the training data.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, to count how often each row is looked up."""
        return ("train",)

    def plan(self, model: Model, bench: Bench) -> StepPlan[Designs]:
        """Select the tables to split; give a reason for each other table."""
        # ``only_if_smaller=False``: splitting alone saves no bytes; later steps that compress the
        # parts do.
        return choose_composed(
            model, self.tables, max(self.min_rows, 2), self.kind, self.design, only_if_smaller=False
        )

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Designs]) -> AppliedStep:
        """Split every selected table by its lookup counts.

        Raises:
            RowsMissing: there are no training rows.
        """
        designs = plan.payload
        counts = lookup_counts(model, bench, designs)

        def fit(name: str, table: Tensor, design: Design) -> FittedParts:
            hot = select_highest(counts[name], design.settings["hot"])
            hot_lookups = Reason("hot_lookups", share=lookup_share(counts[name], hot))
            within, before = build_kept_map(hot)
            stored = {"within": within, "before": before}
            parts = {"hot": table[hot], "cold": table[~hot]}
            return FittedParts(stored, parts, reasons=(hot_lookups,))

        return recompose(model, designs, fit)

    def design(self, rows: int, dim: int) -> Design:
        """Design the composition of a table of ``rows x dim``."""
        hot = min(rows - 1, max(1, round(self.hot * rows)))
        return Design(COMPOSITION, {"hot": hot}, Reason("hot_rows", hot=hot, rows=rows))
