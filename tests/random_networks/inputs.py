"""Rows for random networks, among them rows at every edge, and what a request policy does to them.

The policy is written here a second time, in plain torch and row by row, so that the policy inside a
served graph is compared with something that does not share its code.
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
EXTREMES = (0.0, 1e-8, -1e-8, 1.0, -1.0, 30.0, -30.0, 1000.0, -1000.0)


def typical_rows(
    signature: Signature,
    tables: Mapping[str, int],
    count: int,
    scales: Mapping[str, float],
    seed: int,
) -> Rows:
    """Rows within every range: lists from empty to full, raw numbers of their usual size."""
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
    """Rows at the edges of ids and lists: bounds, beyond them, empty, full and too long lists.

    Each row has one input at an edge and the others as usual; the last rows have all at an edge.
    """
    named = [item for item in signature.inputs if not isinstance(item, DenseInput)]
    edges = [(item.name, edge) for item in named for edge in range(len(_edges(item, 9)))]
    count = len(edges) + 6
    rng = random.Random(f"edges {seed}")
    rows = typical_rows(signature, tables, count, scales, seed + 17)
    for item in named:
        high = tables[item.table]
        lists = [_usual_ids(item, high, rng) for _ in range(count)]
        found = _edges(item, high)
        for row, (name, edge) in enumerate(edges):
            if name == item.name:
                lists[row] = found[edge]
        inside = [ids for ids in found if all(0 <= i < high for i in ids)]
        for row in range(len(edges), count):
            lists[row] = rng.choice(inside)
        if isinstance(item, JaggedBag):  # all lists of a batch but one are empty in no test else
            lists[-1] = []
        rows |= _packed(item, lists)
    return rows


def extreme_rows(
    signature: Signature, tables: Mapping[str, int], scales: Mapping[str, float], seed: int
) -> Rows:
    """Rows whose raw numbers are zero, tiny, or far beyond their usual size."""
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
    """Rows of which every list is empty, every id is zero and every number is zero."""
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
    """Lists of ids at an edge, as many for every number of rows."""
    bad = [-1, high, high + 7, 2**31 - 1, -(2**31)]
    if item.dtype == "int64":
        bad.append(2**40)
    width, last = _width(item), high - 1
    if isinstance(item, JaggedBag | PaddedBag):
        full = [[0] * width, [last] * width, [last], []]
        middle = [[last, *[0] * (width - 2), last][:width]] if width > 1 else [[0]]
        late = [[*[0] * (width - 1), last]]
        refused = [[*[last] * (width - 1), value] for value in bad] + [[bad[0]]]
        long = [[0] * (width + 1)] if isinstance(item, JaggedBag) else []
        return [*full, *middle, *late, *refused, *long]
    return [[0] * width, [last] * width, *([*[0] * (width - 1), value] for value in bad)]


def _packed(item: AnyInput, lists: list[list[int]]) -> Rows:
    """Lists of ids as the tensors of an input."""
    dtype = getattr(torch, item.dtype)
    if isinstance(item, JaggedBag):
        lengths = torch.tensor([len(ids) for ids in lists], dtype=torch.int64)
        values = torch.tensor([i for ids in lists for i in ids], dtype=dtype)
        second = lengths if item.layout == "lengths" else lengths.cumsum(0) - lengths
        return dict(zip(tensor_names(item), (values, second), strict=True))
    if isinstance(item, PaddedBag):
        lists = [[*ids, *[item.padding_id] * (item.shape[0] - len(ids))] for ids in lists]
    ids = torch.tensor(lists, dtype=dtype)
    return {item.name: ids if item.shape else ids[:, 0]}


def unpacked(item: AnyInput, rows: Rows) -> list[list[int]]:
    """The ids of each row."""
    if not isinstance(item, JaggedBag):
        ids = rows[item.name]
        return ids.reshape(len(ids), -1).tolist()
    values, second = (rows[name].tolist() for name in tensor_names(item))
    if item.layout == "lengths":
        begins = [sum(second[:row]) for row in range(len(second))]
    else:
        begins = second
    ends = [*begins[1:], len(values)]
    return [values[begin:end] for begin, end in zip(begins, ends, strict=True)]


def allowed(signature: Signature, tables: Mapping[str, int], rows: Rows) -> tuple[Rows, Tensor]:
    """Rows with every id within its table, and which rows must get no score."""
    within, refused = dict(rows), None
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            continue
        lists, high = unpacked(item, rows), tables[item.table]
        bad = []
        for row, ids in enumerate(lists):
            outside = [not 0 <= i < high for i in ids]
            long = isinstance(item, JaggedBag) and len(ids) > item.shape[0]
            bad.append((item.out_of_range == "error" and any(outside)) or long)
            instead = item.default_row if item.out_of_range == "default_row" else None
            lists[row] = [
                i if not out else (min(max(i, 0), high - 1) if instead is None else instead)
                for i, out in zip(ids, outside, strict=True)
            ]
        mine = torch.tensor(bad)
        refused = mine if refused is None else refused | mine
        within |= _packed(item, lists)
    if refused is None:
        refused = torch.zeros(len(next(iter(rows.values()))), dtype=torch.bool)
    return within, refused


def some_rows(signature: Signature, rows: Rows, places: list[int]) -> Rows:
    """Some rows of a batch, by number."""
    chosen: Rows = {}
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            chosen[item.name] = rows[item.name][places]
        else:
            lists = unpacked(item, rows)
            chosen |= _packed(item, [lists[place] for place in places])
    return chosen
