"""Find the tables in which a network looks up each column of the data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressors.inspection.forward_arguments import Argument, Call
from compressors.inspection.observed_call import (
    CallFailed,
    Lookup,
    Observation,
    Tensors,
    argument_tensors,
    observe,
)
from compressors.inspection.sample import Sample, SampleColumn

TOLERANCE = 1e-5
"""Largest difference of outputs that count as equal, relative to 1 + the largest value. Float32
sums differ by less if their order changes."""


@dataclass(frozen=True)
class Reading:
    """How a network reads one column.

    Attributes:
        offsets: by table, the number that the network adds to an id to get the row.
        is_computed: whether the network computes rows of a table from the column in another way.
        changes_output: whether an output depends on the column.
    """

    offsets: Mapping[str, int]
    is_computed: bool
    changes_output: bool


def read_column(
    network: nn.Module,
    call: Call,
    argument: Argument,
    column: str,
    sample: Sample,
    tensors: Tensors,
    before: Observation,
) -> Reading:
    """Change the values of one column, and return which lookups and outputs that changes.

    Args:
        network: the network.
        call: how it is called with the tensors.
        argument: the argument that the column fills, alone or with other columns.
        column: name of the column.
        sample: the sampled columns.
        tensors: all input tensors.
        before: the result of the call with ``tensors``.
    """
    changed = {**sample, column: _replace_values(sample[column])}
    dtype = tensors[argument.name].dtype
    try:
        after = observe(network, call, {**tensors, **argument_tensors(argument, changed, dtype)})
    except CallFailed:  # another value of a constant column may be no row of the table
        return _read_by_value(sample[column], before)
    offsets: dict[str, int] = {}
    is_computed = False
    for first, second in zip(before.lookups, after.lookups, strict=False):
        if first.ids.shape == second.ids.shape and torch.equal(first.ids, second.ids):
            continue
        offset = _find_offset(sample[column], first.ids, second.ids)
        if offset is None or offsets.get(first.table, offset) != offset:
            is_computed = True
        else:
            offsets[first.table] = offset
    changes = not _are_equal_outputs(before.returned, after.returned)
    return Reading({} if is_computed else offsets, is_computed, changes)


def _read_by_value(column: SampleColumn, observation: Observation) -> Reading:
    """Return how a network reads a column that cannot be changed: by tables with equal ids."""
    # There are no ids of a second call. ``ids + 1``, which differs everywhere, replaces them.
    tables = {
        lookup.table: 0
        for lookup in observation.lookups
        if _find_offset(column, lookup.ids, lookup.ids + 1) == 0
    }
    return Reading(tables, is_computed=False, changes_output=True)


def _replace_values(column: SampleColumn) -> SampleColumn:
    """Return a column in which each value is replaced by another one that the column has.

    A number is replaced by the number of the previous row. Lists keep their length, so that masks
    and positions stay the same. Constant columns get other values.
    """
    if column.is_list:
        unique = np.unique(np.concatenate(column.values))
        others = np.roll(unique, 1) if len(unique) > 1 else _replace_by_neighbours(unique)
        values: Any = tuple(others[np.searchsorted(unique, item)] for item in column.values)
    else:
        values = np.roll(column.values, 1)
        if np.array_equal(values, column.values):
            values = _replace_by_neighbours(values)
    return replace(column, values=values)


def _replace_by_neighbours(values: Any) -> Any:
    """Return ``value - 1`` for each positive value, and ``value + 1`` for any other."""
    return np.where(values > 0, values - 1, values + 1).astype(values.dtype)


def _find_offset(column: SampleColumn, ids: Tensor, changed: Tensor) -> int | None:
    """Return what the network adds to the values of a column; None if it does something else.

    Args:
        column: the column of integers.
        ids: the looked-up ids of the sampled rows.
        changed: the ids after the values of the column were changed.
    """
    rows = len(column.values)
    if column.is_list:
        return 0 if _contains(column, ids) else None
    if not column.is_integer or ids.numel() % rows != 0 or ids.shape != changed.shape:
        return None
    by_row = ids.reshape(rows, -1)
    differs = (by_row != changed.reshape(rows, -1)).any(dim=0)  # ids that depend on the column
    differences = by_row[:, differs] - torch.from_numpy(column.values)[:, None]
    if differences.numel() == 0 or bool((differences != differences.flatten()[0]).any()):
        return None
    return int(differences.flatten()[0])


def _contains(column: SampleColumn, ids: Tensor) -> bool:
    """Return whether the ids of each row include its list, with or without ids such as padding."""
    if ids.numel() == sum(map(len, column.values)):
        flat = np.concatenate(column.values)
        return bool(np.array_equal(np.sort(ids.reshape(-1).numpy()), np.sort(flat)))
    rows = len(column.values)
    if ids.numel() % rows:
        return False
    by_row = ids.reshape(rows, -1).numpy()
    return all(
        np.isin(values, row).all() for values, row in zip(column.values, by_row, strict=True)
    )


def tensors_in(returned: Any) -> list[Tensor]:
    """Return the tensors in what a network returned, which may be a tensor, sequence or mapping."""
    if isinstance(returned, Tensor):
        return [returned]
    if isinstance(returned, Mapping):
        returned = list(returned.values())
    if isinstance(returned, tuple | list):
        return [tensor for item in returned for tensor in tensors_in(item)]
    return []


def same_outputs(first: Any, second: Any) -> bool:
    """Return whether two calls returned equal values, up to rounding."""
    pairs = zip(tensors_in(first), tensors_in(second), strict=False)
    return all(_is_close(a.double(), b.double()) for a, b in pairs)


def _is_close(first: Tensor, second: Tensor) -> bool:
    """Return whether two outputs are equal up to rounding; NaN and infinity equal nothing."""
    if first.shape != second.shape or not bool((first.isfinite() & second.isfinite()).all()):
        return False
    largest = float(second.abs().max()) if second.numel() else 0.0
    return bool(((first - second).abs() <= TOLERANCE * (1 + largest)).all())


def _are_equal_outputs(first: Any, second: Any) -> bool:
    """Return whether two calls returned the same bits."""
    pairs = zip(tensors_in(first), tensors_in(second), strict=False)
    return all(torch.equal(a, b) for a, b in pairs)


def is_looked_up(tensor: Tensor, lookups: tuple[Lookup, ...]) -> bool:
    """Return whether ids of a tensor were looked up, perhaps with a number added."""
    rows = len(tensor)
    for lookup in lookups:
        if lookup.ids.numel() % rows:
            continue
        ids = lookup.ids.reshape(rows, -1)
        for column in tensor.reshape(rows, -1).unbind(dim=1):
            # Positions of the looked-up ids that are the column plus one number in all rows.
            constant = (ids - column[:, None] == ids[0] - column[0]).all(dim=0)
            if bool(constant.any()) and bool((column != column[0]).any()):
                return True
    return False
