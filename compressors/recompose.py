"""What the steps that make tables of smaller ones have in common: all but how a table is fitted."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressors.composed import ComposedTable, Composition
from compressors.contracts import Bench
from compressors.model import Model
from compressors.stand_ins import composed_outline
from compressors.traffic import lookups
from compressors.units import Choice, Unit, choose_tables, pack_table, swap

UNSEEN = 0.5  # a row that was never looked up still gets an answer: it counts as half a lookup


class Making(NamedTuple):
    """What a table becomes: the form, its settings, and what the plan says of it."""

    form: Composition
    settings: Mapping[str, Any]
    reason: str


Form = Callable[[int, int], Making | str]
"""From a table's rows and width to what it becomes, or the reason why it stays."""


class Fitted(NamedTuple):
    """Tensors of a composition: its own, and the float32 weights of its parts."""

    stored: dict[str, Tensor]
    parts: dict[str, Tensor]


def made_bytes(form: Composition, rows: int, dim: int, settings: Mapping[str, Any]) -> int:
    """Bytes of a composed table, its plain parts included."""
    own = form.layout(rows, dim, settings).values()
    parts = form.parts(rows, dim, settings).values()
    return sum(torch.Size(s.shape).numel() * s.dtype.itemsize for s in own) + sum(
        4 * part.rows * part.dim for part in parts
    )


def choose_makings(
    model: Model, tables: tuple[str, ...], min_rows: int, kind: str, form: Form
) -> tuple[dict[str, Choice], dict[str, Making]]:
    """Which tables are made of smaller ones, why the others stay, and what each becomes."""
    units = Unit.of(model.module)
    choices = choose_tables(units, tables, min_rows, kind)
    makings: dict[str, Making] = {}
    for unit in units:
        if unit.name not in choices or not choices[unit.name].take:
            continue
        rows, dim = unit.weight.shape
        made = form(rows, dim)
        if not isinstance(made, str):
            after = made_bytes(made.form, rows, dim, made.settings)
            if after < unit.bytes:
                makings[unit.name] = made
                choices[unit.name] = replace(choices[unit.name], reason=made.reason)
                continue
            made = f"{rows} x {dim} would be no smaller: {unit.bytes} -> {after} bytes"
        choices[unit.name] = Choice(False, made)
    return choices, makings


def row_weights(
    model: Model, bench: Bench, tables: Collection[str], *, weighted: bool
) -> dict[str, Tensor]:
    """How much the error of each row counts: float64 ``(rows,)`` by table, all positive."""
    if weighted:
        return {name: count + UNSEEN for name, count in lookups(model, bench, tables).items()}
    units = [unit for unit in Unit.of(model.module) if unit.name in tables]
    return {unit.name: torch.ones(unit.rows, dtype=torch.float64) for unit in units}


def recompose(
    model: Model, makings: Mapping[str, Making], fit: Callable[[str, Tensor, Making], Fitted]
) -> Model:
    """Replace tables by compositions.

    Args:
        model: of a private tree; its units are replaced.
        makings: by unit, what it becomes.
        fit: from a unit's name, its weight ``(rows, dim)`` and what it becomes to its tensors.
    """
    for unit in Unit.of(model.module):
        if unit.name not in makings:
            continue
        made = makings[unit.name]
        rows, dim = unit.weight.shape
        fitted = fit(unit.name, unit.weight, made)
        # A file keeps no strides, and the product of a transposed matrix rounds otherwise.
        stored = {name: tensor.contiguous() for name, tensor in fitted.stored.items()}
        parts = {name: tensor.contiguous() for name, tensor in fitted.parts.items()}
        composed = ComposedTable(made.form, rows, dim, made.settings, stored, parts)
        swap(model.module, unit.name, pack_table(unit.module, composed))
    return model


def recomposed_outline(model: Model, makings: Mapping[str, Making]) -> Model:
    """The same over stand-ins."""
    return composed_outline(
        model, {name: (made.form, made.settings) for name, made in makings.items()}
    )


def share_or_number(value: float, whole: int) -> int:
    """A setting that is a share below 1 and a number from 1 on, between 1 and ``whole``."""
    return min(whole, max(1, round(value * whole if value < 1 else value)))
