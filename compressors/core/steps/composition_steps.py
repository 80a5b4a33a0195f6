"""Shared code of steps that replace tables by compositions of smaller tables.

A composition computes each row of a table from smaller tables, its parts: for example, a row of a
low-rank table is a row of a narrow table, its part, times a matrix, which the composition stores
itself. The functions select tables, replace them by compositions, and predict the result in a dry
run. Each step supplies the design of a composition (its kind and settings for one table) and the
function that fits its tensors.
"""

from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.composed import Design
from compressors.core.modules.formats import TensorSpec
from compressors.core.placeholders import placeholder
from compressors.core.steps.decisions import (
    AppliedStep,
    Decision,
    StepPlan,
    choose_tables,
    selected_units,
)
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit, pack_table, swap
from compressors.quantize.calibration.lookup_counts import lookup_counts

UNSEEN = 0.5
"""Added to every lookup count: a row that training never looks up may be requested in serving."""

DesignFunction = Callable[[int, int], Design | Reason]
"""Returns a table's design from its rows and width, or the reason why it is not composed."""


class FittedParts(NamedTuple):
    """The fitted tensors of a composition.

    Attributes:
        stored: the tensors that the composition stores itself, such as a matrix, by name.
        parts: float32 weight ``(rows, dim)`` of each part, by name.
        reasons: facts about the fit, which are added to the reasons of the table's plan line.
    """

    stored: dict[str, Tensor]
    parts: dict[str, Tensor]
    reasons: tuple[Reason, ...] = ()


Designs = Mapping[str, Design]
"""By table name, the composition that replaces the table."""


class ComposingStep(StepSettings):
    """Settings of a method that replaces tables by compositions whose shapes it plans."""

    effect: ClassVar[Effect] = "parts"  # a table is replaced by a composition of smaller tables

    def dry_run(self, model: Model, plan: StepPlan[Designs]) -> Model:
        """Replace every selected table by its composition with placeholder tensors."""
        return dry_run_composed(model, plan.payload)


def choose_composed(
    model: Model,
    tables: tuple[str, ...],
    min_rows: int,
    kind: str,
    design: DesignFunction,
    *,
    only_if_smaller: bool = True,
) -> StepPlan[Designs]:
    """Select the tables to compose: a decision for each table, a design for each selected one.

    Args:
        model: the model whose tables are considered.
        tables: patterns of table names.
        min_rows: tables with fewer rows are skipped.
        kind: the step's ``kind``.
        design: returns a table's design, or the reason why it is not composed.
        only_if_smaller: skip a table if composing saves no bytes. False: compose it anyway, because
            later steps reduce its bytes.

    Raises:
        NothingToCompress: a pattern matches no table.
    """
    units = Unit.of(model.module)
    decisions = choose_tables(units, tables, min_rows, kind, with_heads=True)
    designs: dict[str, Design] = {}
    for unit in selected_units(units, decisions):
        rows, dim = unit.weight.shape
        result = design(rows, dim)
        if isinstance(result, Design):
            bytes_after = result.bytes(rows, dim)
            if bytes_after < unit.bytes or not only_if_smaller:
                designs[unit.name] = result
                composed = Reason("composed", step=kind, what=result.reason)
                decisions[unit.name] = Decision("taken", (composed,))
                continue
            result = Reason(
                "not_smaller_composed", rows=rows, dim=dim, before=unit.bytes, after=bytes_after
            )
        decisions[unit.name] = Decision("skipped", (result,))
    return StepPlan(decisions, designs)


def row_weights(
    model: Model, bench: Bench, tables: Collection[str], *, weighted: bool
) -> dict[str, Tensor]:
    """Return the weight of each row's error in a fit: float64 ``(rows,)``, by table name.

    With ``weighted``, a row's weight is its lookup count in the training data plus ``UNSEEN``,
    otherwise 1.
    """
    if weighted:
        return {name: count + UNSEEN for name, count in lookup_counts(model, bench, tables).items()}
    units = [unit for unit in Unit.of(model.module) if unit.name in tables]
    return {unit.name: torch.ones(unit.rows, dtype=torch.float64) for unit in units}


def recompose(
    model: Model,
    designs: Designs,
    fit: Callable[[str, Tensor, Design], FittedParts],
) -> AppliedStep:
    """Replace tables by fitted compositions.

    Args:
        model: a copy that shares its tensors with the original; its units are replaced in place.
        designs: by table name, the composition that replaces the table.
        fit: returns the tensors for a table's name, its weight ``(rows, dim)`` and its design.
    """
    outcomes: dict[str, Decision] = {}
    for unit in Unit.of(model.module):
        if unit.name not in designs:
            continue
        rows, dim = unit.weight.shape
        fitted = fit(unit.name, unit.weight, designs[unit.name])
        # Files store no strides: a transposed tensor would be contiguous after loading, and
        # products with it would be rounded differently.
        stored = {name: tensor.contiguous() for name, tensor in fitted.stored.items()}
        parts = {name: tensor.contiguous() for name, tensor in fitted.parts.items()}
        composed = designs[unit.name].table(rows, dim, stored, parts)
        swap(model.module, unit.name, pack_table(unit.module, composed))
        outcomes[unit.name] = Decision("taken", fitted.reasons)
    return AppliedStep(model, outcomes)


def dry_run_composed(model: Model, designs: Designs) -> Model:
    """Replace tables by compositions of placeholder tensors, with the same shapes and bytes."""
    for unit in Unit.of(model.module):
        if unit.name not in designs:
            continue
        rows, dim = unit.weight.shape
        design = designs[unit.name]
        layout = design.composition.layout(rows, dim, design.settings)
        parts = design.composition.parts(rows, dim, design.settings)
        composed = design.table(
            rows,
            dim,
            {name: placeholder(spec) for name, spec in layout.items()},
            {name: placeholder(TensorSpec(part, torch.float32)) for name, part in parts.items()},
        )
        swap(model.module, unit.name, pack_table(unit.module, composed))
    return model


def share_or_number(value: float, whole: int) -> int:
    """Convert a share of ``whole`` (``value`` below 1) or a count to a count in [1, ``whole``]."""
    return min(whole, max(1, round(value * whole if value < 1 else value)))
