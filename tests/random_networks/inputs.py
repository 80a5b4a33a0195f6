"""Rows for random networks, including edge cases, and the policies for invalid ids in Python.

A served graph has a policy for ids outside of a table. An input's ``out_of_range`` is ``error``
(the row gets no score), ``default_row`` (the input's default row replaces the id), or ``clamp``
(the nearest valid id replaces it). A row with a list that is too long gets no score.
``replace_invalid_ids`` implements this row by row in Python. It shares no code with the served
graph, so a comparison of both can find errors.

``tables`` is the number of rows by table, ``scales`` the standard deviation by dense input, and
``row_count`` the number of rows of one table. ``lists`` are the ids of an input, one list per row.
Offsets such as ``seed + 17`` give each function other random rows.
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


def draw_typical_rows(
    signature: Signature,
    tables: Mapping[str, int],
    count: int,
    scales: Mapping[str, float],
    seed: int,
) -> Rows:
    """Draw rows with valid ids, lists from empty to full, and normally distributed dense inputs."""
    rng = random.Random(f"rows {seed}")
    generator = torch.Generator().manual_seed(seed + 1)  # not the seed of the network's weights
    rows: Rows = {}
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            standard_normal = torch.randn((count, *item.shape), generator=generator)
            rows[item.name] = standard_normal * scales.get(item.name, 1.0)
        else:
            row_count = tables[item.table]
            lists = [_draw_typical_ids(item, row_count, rng) for _ in range(count)]
            rows |= _to_tensors(item, lists)
    return rows


def draw_edge_rows(
    signature: Signature, tables: Mapping[str, int], scales: Mapping[str, float], seed: int
) -> Rows:
    """Draw rows with edge cases: first, last and invalid ids; empty, full and too long lists.

    In each row one input is an edge case and the others are typical. In the last rows all inputs
    are edge cases whose ids are within their tables; a list may still be too long.
    """
    id_inputs = [item for item in signature.inputs if not isinstance(item, DenseInput)]
    # Only the number of edge cases is used here, which is the same for every number of table rows.
    edges = [
        (item.name, edge)
        for item in id_inputs
        for edge in range(len(_list_edge_cases(item, row_count=9)))
    ]
    count = len(edges) + 6  # 6 rows in which all inputs are edge cases
    rng = random.Random(f"edges {seed}")
    rows = draw_typical_rows(signature, tables, count, scales, seed + 17)
    for item in id_inputs:
        row_count = tables[item.table]
        lists = [_draw_typical_ids(item, row_count, rng) for _ in range(count)]
        edge_lists = _list_edge_cases(item, row_count)
        for row, (name, edge) in enumerate(edges):
            if name == item.name:
                lists[row] = edge_lists[edge]
        valid_lists = [ids for ids in edge_lists if all(0 <= i < row_count for i in ids)]
        for row in range(len(edges), count):
            lists[row] = rng.choice(valid_lists)
        if isinstance(item, JaggedBag):  # covers a batch that ends with an empty list
            lists[-1] = []
        rows |= _to_tensors(item, lists)
    return rows


def draw_extreme_rows(
    signature: Signature, tables: Mapping[str, int], scales: Mapping[str, float], seed: int
) -> Rows:
    """Draw rows whose dense inputs are zero, tiny, or up to 1000 standard deviations."""
    count = 2 * len(EXTREMES)
    rows = draw_typical_rows(signature, tables, count, scales, seed + 31)
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            scale = scales.get(item.name, 1.0)
            for row, value in enumerate(EXTREMES):
                rows[item.name][row, row % item.shape[0]] = value * scale
                rows[item.name][len(EXTREMES) + row] = value * scale
    return rows


def make_empty_rows(signature: Signature, tables: Mapping[str, int], count: int) -> Rows:
    """Return rows in which every list is empty, and every id and every dense value is zero."""
    rows: Rows = {}
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            rows[item.name] = torch.zeros(count, *item.shape)
        else:
            ids = [] if isinstance(item, JaggedBag | PaddedBag) else [0] * max(1, _width(item))
            rows |= _to_tensors(item, [ids] * count)
    return rows


def _width(item: AnyInput) -> int:
    return item.shape[0] if item.shape else 1


def _draw_typical_ids(item: AnyInput, row_count: int, rng: random.Random) -> list[int]:
    if isinstance(item, JaggedBag | PaddedBag):
        return [rng.randrange(row_count) for _ in range(rng.randint(0, item.shape[0]))]
    return [rng.randrange(row_count) for _ in range(_width(item))]


def _list_edge_cases(item: AnyInput, row_count: int) -> list[list[int]]:
    """Return edge-case lists of ids; how many there are does not depend on ``row_count``."""
    invalid_ids = [-1, row_count, row_count + 7, 2**31 - 1, -(2**31)]
    if item.dtype == "int64":
        invalid_ids.append(2**40)
    width, last_id = _width(item), row_count - 1
    if isinstance(item, JaggedBag | PaddedBag):
        valid_lists = [[0] * width, [last_id] * width, [last_id], []]
        # Padding ids (usually 0) between, and then before, an id that is not padding.
        valid_lists.append([last_id, *[0] * (width - 2), last_id] if width > 1 else [0])
        valid_lists.append([*[0] * (width - 1), last_id])
        with_invalid_id = [[*[last_id] * (width - 1), value] for value in invalid_ids]
        with_invalid_id.append([invalid_ids[0]])
        too_long = [[0] * (width + 1)] if isinstance(item, JaggedBag) else []
        return [*valid_lists, *with_invalid_id, *too_long]
    with_invalid_id = [[*[0] * (width - 1), value] for value in invalid_ids]
    return [[0] * width, [last_id] * width, *with_invalid_id]


def _to_tensors(item: AnyInput, lists: list[list[int]]) -> Rows:
    """Convert lists of ids to the tensors of an input."""
    dtype = getattr(torch, item.dtype)
    if isinstance(item, JaggedBag):
        lengths = torch.tensor([len(ids) for ids in lists], dtype=torch.int64)
        values = torch.tensor([i for ids in lists for i in ids], dtype=dtype)
        offsets = lengths.cumsum(0) - lengths
        second = lengths if item.layout == "lengths" else offsets
        return dict(zip(tensor_names(item), (values, second), strict=True))
    if isinstance(item, PaddedBag):
        lists = [[*ids, *[item.padding_id] * (item.shape[0] - len(ids))] for ids in lists]
    ids = torch.tensor(lists, dtype=dtype)
    return {item.name: ids if item.shape else ids[:, 0]}


def take_ids_of_rows(item: AnyInput, rows: Rows) -> list[list[int]]:
    """Return the ids of each row as a list."""
    if not isinstance(item, JaggedBag):
        ids = rows[item.name]
        return ids.reshape(len(ids), -1).tolist()
    values, offsets = (rows[name].tolist() for name in tensor_names(item))
    if item.layout == "lengths":
        lengths = offsets
        offsets = [sum(lengths[:row]) for row in range(len(lengths))]
    ends = [*offsets[1:], len(values)]
    return [values[start:end] for start, end in zip(offsets, ends, strict=True)]


def replace_invalid_ids(
    signature: Signature, tables: Mapping[str, int], rows: Rows
) -> tuple[Rows, Tensor]:
    """Apply the policies for invalid ids and for too long lists to rows.

    Returns:
        The rows with every invalid id replaced by a valid one, and a bool mask ``(rows,)`` of the
        rows that must get no score. Ids of these rows are replaced too, so that torch can run.
    """
    valid_rows, without_score = dict(rows), None
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            continue
        lists, row_count = take_ids_of_rows(item, rows), tables[item.table]
        has_error = []
        for ids in lists:
            has_invalid_id = any(not 0 <= i < row_count for i in ids)
            is_too_long = isinstance(item, JaggedBag) and len(ids) > item.shape[0]
            has_error.append((item.out_of_range == "error" and has_invalid_id) or is_too_long)
        mask = torch.tensor(has_error)
        without_score = mask if without_score is None else without_score | mask
        valid_lists = [[_to_valid_id(i, item, row_count) for i in ids] for ids in lists]
        valid_rows |= _to_tensors(item, valid_lists)
    if without_score is None:
        without_score = torch.zeros(len(next(iter(rows.values()))), dtype=torch.bool)
    return valid_rows, without_score


def _to_valid_id(i: int, item: AnyInput, row_count: int) -> int:
    if 0 <= i < row_count:
        return i
    if item.out_of_range == "default_row":
        return item.default_row
    return min(max(i, 0), row_count - 1)


def select_rows(signature: Signature, rows: Rows, indices: list[int]) -> Rows:
    """Return the rows of a batch with these indices."""
    selected: Rows = {}
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            selected[item.name] = rows[item.name][indices]
        else:
            lists = take_ids_of_rows(item, rows)
            selected |= _to_tensors(item, [lists[index] for index in indices])
    return selected
