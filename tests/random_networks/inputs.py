"""Rows for random networks, including edge cases, and a reference for the request policy.

The request policy defines what a served graph does with ids outside of a table and with lists that
are too long. ``replace_invalid_ids`` implements it row by row in Python. It shares no code with the
policy in a served graph, so a comparison of both can find errors.

``tables`` is the number of rows by table, ``scales`` the standard deviation by dense input.
``high`` is the number of rows of one table.
"""

import random
from collections.abc import Mapping

import torch
from torch import Tensor

from compressors.contracts import (
    AnyInput,
    DenseInput,
    JaggedBag,
    PaddedBag,
    Signature,
    tensor_names,
)

Rows = dict[str, Tensor]
Lists = dict[str, list[list[int]]]
# Values of dense inputs as multiples of their standard deviation.
EXTREMES = (0.0, 1e-8, -1e-8, 1.0, -1.0, 30.0, -30.0, 1000.0, -1000.0)


def typical_rows(
    signature: Signature,
    tables: Mapping[str, int],
    count: int,
    scales: Mapping[str, float],
    seed: int,
) -> Rows:
    """Return rows with valid ids, lists from empty to full, and dense inputs of usual scale."""
    rng = random.Random(f"rows {seed}")
    generator = torch.Generator().manual_seed(seed + 1)
    rows: Rows = {}
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            usual = torch.randn((count, *item.shape), generator=generator)
            rows[item.name] = usual * scales.get(item.name, 1.0)
        else:
            high = tables[item.table]
            rows |= _packed(item, [_usual_ids(item, high, rng) for _ in range(count)])
    return rows


def edge_rows(
    signature: Signature, tables: Mapping[str, int], scales: Mapping[str, float], seed: int
) -> Rows:
    """Return rows with edge cases: ids at and beyond the bounds; empty, full and too long lists.

    In each row one input is an edge case and the others are typical. In the last rows all inputs
    are edge cases whose ids are within their tables; a list may still be too long.
    """
    id_inputs = [item for item in signature.inputs if not isinstance(item, DenseInput)]
    # Only the number of edge cases is used here; it is the same for a table of 9 rows.
    edges = [(item.name, edge) for item in id_inputs for edge in range(len(_edges(item, high=9)))]
    count = len(edges) + 6  # 6 rows in which all inputs are edge cases
    rng = random.Random(f"edges {seed}")
    rows = typical_rows(signature, tables, count, scales, seed + 17)
    for item in id_inputs:
        high = tables[item.table]
        lists = [_usual_ids(item, high, rng) for _ in range(count)]
        edge_lists = _edges(item, high)
        for row, (name, edge) in enumerate(edges):
            if name == item.name:
                lists[row] = edge_lists[edge]
        inside = [ids for ids in edge_lists if all(0 <= i < high for i in ids)]
        for row in range(len(edges), count):
            lists[row] = rng.choice(inside)
        if isinstance(item, JaggedBag):  # covers a batch that ends with an empty list
            lists[-1] = []
        rows |= _packed(item, lists)
    return rows


def extreme_rows(
    signature: Signature, tables: Mapping[str, int], scales: Mapping[str, float], seed: int
) -> Rows:
    """Return rows whose dense inputs are zero, tiny, or far larger than usual."""
    count = 2 * len(EXTREMES)
    rows = typical_rows(signature, tables, count, scales, seed + 31)
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            scale = scales.get(item.name, 1.0)
            for row, value in enumerate(EXTREMES):
                rows[item.name][row, row % item.shape[0]] = value * scale
                rows[item.name][len(EXTREMES) + row] = value * scale
    return rows


def empty_rows(signature: Signature, tables: Mapping[str, int], count: int) -> Rows:
    """Return rows in which every list is empty, and every id and every dense value is zero."""
    rows: Rows = {}
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            rows[item.name] = torch.zeros(count, *item.shape)
        else:
            ids = [] if isinstance(item, JaggedBag | PaddedBag) else [0] * max(1, _width(item))
            rows |= _packed(item, [ids] * count)
    return rows


def _width(item: AnyInput) -> int:
    return item.shape[0] if item.shape else 1


def _usual_ids(item: AnyInput, high: int, rng: random.Random) -> list[int]:
    if isinstance(item, JaggedBag | PaddedBag):
        return [rng.randrange(high) for _ in range(rng.randint(0, item.shape[0]))]
    return [rng.randrange(high) for _ in range(_width(item))]


def _edges(item: AnyInput, high: int) -> list[list[int]]:
    """Return edge-case lists of ids; their number does not depend on ``high``."""
    invalid_ids = [-1, high, high + 7, 2**31 - 1, -(2**31)]
    if item.dtype == "int64":
        invalid_ids.append(2**40)
    width, last = _width(item), high - 1
    if isinstance(item, JaggedBag | PaddedBag):
        full = [[0] * width, [last] * width, [last], []]
        middle = [[last, *[0] * (width - 2), last][:width]] if width > 1 else [[0]]
        last_only = [[*[0] * (width - 1), last]]
        refused = [[*[last] * (width - 1), value] for value in invalid_ids] + [[invalid_ids[0]]]
        long = [[0] * (width + 1)] if isinstance(item, JaggedBag) else []
        return [*full, *middle, *last_only, *refused, *long]
    return [[0] * width, [last] * width, *([*[0] * (width - 1), value] for value in invalid_ids)]


def _packed(item: AnyInput, lists: list[list[int]]) -> Rows:
    """Convert lists of ids to the tensors of an input."""
    dtype = getattr(torch, item.dtype)
    if isinstance(item, JaggedBag):
        lengths = torch.tensor([len(ids) for ids in lists], dtype=torch.int64)
        values = torch.tensor([i for ids in lists for i in ids], dtype=dtype)
        bounds_or_lengths = lengths if item.layout == "lengths" else lengths.cumsum(0) - lengths
        return dict(zip(tensor_names(item), (values, bounds_or_lengths), strict=True))
    if isinstance(item, PaddedBag):
        lists = [[*ids, *[item.padding_id] * (item.shape[0] - len(ids))] for ids in lists]
    ids = torch.tensor(lists, dtype=dtype)
    return {item.name: ids if item.shape else ids[:, 0]}


def ids_of_rows(item: AnyInput, rows: Rows) -> list[list[int]]:
    """Return the ids of each row."""
    if not isinstance(item, JaggedBag):
        ids = rows[item.name]
        return ids.reshape(len(ids), -1).tolist()
    values, bounds_or_lengths = (rows[name].tolist() for name in tensor_names(item))
    if item.layout == "lengths":
        starts = [sum(bounds_or_lengths[:row]) for row in range(len(bounds_or_lengths))]
    else:
        starts = bounds_or_lengths
    ends = [*starts[1:], len(values)]
    return [values[start:end] for start, end in zip(starts, ends, strict=True)]


def replace_invalid_ids(
    signature: Signature, tables: Mapping[str, int], rows: Rows
) -> tuple[Rows, Tensor]:
    """Apply the request policy to rows.

    Returns:
        The rows with every id replaced by one within its table, and a bool mask ``(rows,)`` of the
        rows that must get no score.
    """
    within, refused = dict(rows), None
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            continue
        lists, high = ids_of_rows(item, rows), tables[item.table]
        is_refused = []
        for row, ids in enumerate(lists):
            outside = [not 0 <= i < high for i in ids]
            long = isinstance(item, JaggedBag) and len(ids) > item.shape[0]
            is_refused.append((item.out_of_range == "error" and any(outside)) or long)
            replacement = item.default_row if item.out_of_range == "default_row" else None
            lists[row] = [
                i if not out else (min(max(i, 0), high - 1) if replacement is None else replacement)
                for i, out in zip(ids, outside, strict=True)
            ]
        item_refused = torch.tensor(is_refused)
        refused = item_refused if refused is None else refused | item_refused
        within |= _packed(item, lists)
    if refused is None:
        refused = torch.zeros(len(next(iter(rows.values()))), dtype=torch.bool)
    return within, refused


def some_rows(signature: Signature, rows: Rows, indices: list[int]) -> Rows:
    """Return the rows of a batch with these indices."""
    selected: Rows = {}
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            selected[item.name] = rows[item.name][indices]
        else:
            lists = ids_of_rows(item, rows)
            selected |= _packed(item, [lists[index] for index in indices])
    return selected
