"""What the steps that make tables of smaller ones have in common: all but how a table is fitted."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.composed import Design
from compressors.core.modules.formats import TensorSpec
from compressors.core.placeholders import placeholder
from compressors.core.units import Choice, Unit, choose_tables, pack_table, swap
from compressors.quantize.calibration.lookup_counts import lookup_counts

UNSEEN = 0.5
"""A row that was never looked up still gets an answer: it counts as half a lookup."""

Shaped = Callable[[int, int], Design | Reason]
"""From a table's rows and width to what it becomes, or the reason why it stays."""


class FittedParts(NamedTuple):
    """Tensors of a composition: its own, and the float32 weights of its parts."""

    stored: dict[str, Tensor]
    parts: dict[str, Tensor]


def choose_composed(
    model: Model,
    tables: tuple[str, ...],
    min_rows: int,
    kind: str,
    shaped: Shaped,
    *,
    smaller: bool = True,
) -> tuple[dict[str, Choice], dict[str, Design]]:
    """Which tables are made of smaller ones, why the others stay, and what each becomes.

    Args:
        model: whose tables.
        tables: patterns of their names.
        min_rows: of a table that is taken.
        kind: the step's tag.
        shaped: what a table becomes.
        smaller: a table stays if it would take no less; without, that is for later steps to do.
    """
    units = Unit.of(model.module)
    choices = choose_tables(units, tables, min_rows, kind)
    designs: dict[str, Design] = {}
    for unit in units:
        if unit.name not in choices or not choices[unit.name].take:
            continue
        rows, dim = unit.weight.shape
        made = shaped(rows, dim)
        if isinstance(made, Design):
            after = made.bytes(rows, dim)
            if after < unit.bytes or not smaller:
                designs[unit.name] = made
                taken = Reason("composed", step=kind, what=made.reason)
                choices[unit.name] = Choice(True, (taken,))
                continue
            made = Reason(
                "not_smaller_composed", rows=rows, dim=dim, before=unit.bytes, after=after
            )
        choices[unit.name] = Choice(False, (made,))
    return choices, designs


def row_weights(
    model: Model, bench: Bench, tables: Collection[str], *, weighted: bool
) -> dict[str, Tensor]:
    """How much the error of each row counts: float64 ``(rows,)`` by table, all positive."""
    if weighted:
        return {name: count + UNSEEN for name, count in lookup_counts(model, bench, tables).items()}
    units = [unit for unit in Unit.of(model.module) if unit.name in tables]
    return {unit.name: torch.ones(unit.rows, dtype=torch.float64) for unit in units}


def recompose(
    model: Model,
    designs: Mapping[str, Design],
    fit: Callable[[str, Tensor, Design], FittedParts],
) -> Model:
    """Replace tables by compositions.

    Args:
        model: of a private tree; its units are replaced.
        designs: by unit, what it becomes.
        fit: from a unit's name, its weight ``(rows, dim)`` and what it becomes to its tensors.
    """
    for unit in Unit.of(model.module):
        if unit.name not in designs:
            continue
        rows, dim = unit.weight.shape
        fitted = fit(unit.name, unit.weight, designs[unit.name])
        # A file keeps no strides, and the product of a transposed matrix rounds otherwise.
        stored = {name: tensor.contiguous() for name, tensor in fitted.stored.items()}
        parts = {name: tensor.contiguous() for name, tensor in fitted.parts.items()}
        composed = designs[unit.name].table(rows, dim, stored, parts)
        swap(model.module, unit.name, pack_table(unit.module, composed))
    return model


def dry_run_composed(model: Model, designs: Mapping[str, Design]) -> Model:
    """The same over placeholders."""
    for unit in Unit.of(model.module):
        if unit.name not in designs:
            continue
        rows, dim = unit.weight.shape
        made = designs[unit.name]
        laid = made.composition.layout(rows, dim, made.settings)
        parts = made.composition.parts(rows, dim, made.settings)
        composed = made.table(
            rows,
            dim,
            {name: placeholder(spec) for name, spec in laid.items()},
            {name: placeholder(TensorSpec(part, torch.float32)) for name, part in parts.items()},
        )
        swap(model.module, unit.name, pack_table(unit.module, composed))
    return model


def share_or_number(value: float, whole: int) -> int:
    """A setting that is a share below 1 and a number from 1 on, between 1 and ``whole``."""
    return min(whole, max(1, round(value * whole if value < 1 else value)))
