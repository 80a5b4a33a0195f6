"""A retrieval model's splits as tensors: interactions joined with the features of their items.

The split ``items`` is the catalogue: the inputs of the item tower, one row per item. The other
splits hold interactions: the inputs of the query tower, and the item's id. ``prepare`` adds the
item's other inputs, so that every row is a complete input of the model, as for any other task.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from compressors.contracts import ITEMS, JaggedBag, Signature
from infra.data import splits as data
from infra.data.parquet import Array, Faults
from infra.data.splits import Prepared
from infra.errors import DataRefused
from infra.store.temporary import scratch_folder


def prepare(paths: Mapping[str, Path], split: str, signature: Signature, into: Path) -> Prepared:
    """Write one split as ``into/data.safetensors``, for any task.

    Args:
        paths: parquet file or folder by split name; ``retrieval`` reads ``items`` in addition to
            ``split``.
        split: name of the split to write.
        signature: the bundle's.
        into: a folder; created if missing.

    Raises:
        DataRefused: as ``data.prepare``; an item is in the catalogue twice or not at all; two test
            rows of one query differ in the inputs of the query tower.
    """
    prepared = data.prepare(paths[split], signature.of_split(split), into)
    if signature.item is None:
        return prepared
    tensors = load_file(into / data.FILE)
    if split == ITEMS:
        _require_unique(paths[split], tensors, signature)
        return prepared
    if split == "test":
        _require_one_request(paths[split], tensors, signature)
    with scratch_folder("items") as scratch:
        data.prepare(paths[ITEMS], signature.of_split(ITEMS), scratch)
        items = load_file(scratch / data.FILE)
    _join(paths[split], tensors, items, signature)
    size = data.save(tensors, into)
    return Prepared(rows=prepared.rows, bytes=size, tensors=tuple(tensors))


def _require_unique(parquet: Path, items: dict[str, Array], signature: Signature) -> None:
    faults, (column,) = Faults(), _item_columns(signature)
    _, first = np.unique(items[str(signature.item)], return_index=True)
    again = np.setdiff1d(np.arange(len(items[str(signature.item)])), first)
    faults.note(column, "an item that stands in an earlier row too", again)
    faults.refuse(parquet)


def _require_one_request(parquet: Path, tensors: dict[str, Array], signature: Signature) -> None:
    """Raise if rows of one query differ in its inputs: the model evaluates each query once."""
    assert signature.towers is not None  # noqa: S101 - the signature's own rule
    faults = Faults()
    _, first, query = np.unique(tensors["@group"], return_index=True, return_inverse=True)
    same = first[query]  # (rows,): the first row of each row's query
    for item in signature.only(signature.towers.query.inputs).inputs:
        values = tensors[item.name]
        if isinstance(item, JaggedBag):
            bounds = tensors[f"@bounds/{item.name}"]
            lengths = np.diff(bounds)
            differs = lengths != lengths[same]
            kept = np.flatnonzero(~differs)
            mine = _places(bounds[kept], lengths[kept])
            other = _places(bounds[same[kept]], lengths[kept])
            unlike = np.repeat(kept, lengths[kept])[values[mine] != values[other]]
            differs[unlike] = True
        else:
            differs = (values != values[same]).reshape(len(same), -1).any(axis=1)
        rule = f"differs from the first row of the same {signature.group}, which is one query"
        faults.note(item.columns[0], rule, np.flatnonzero(differs))
    faults.refuse(parquet)


def _join(
    parquet: Path, tensors: dict[str, Array], items: dict[str, Array], signature: Signature
) -> None:
    """Add the catalogue's features of each row's item."""
    assert signature.towers is not None  # noqa: S101 - the signature's own rule
    wanted, known = tensors[str(signature.item)], items[str(signature.item)]
    order = np.argsort(known)
    place = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    faults, (column,) = Faults(), _item_columns(signature)
    faults.note(column, "an item that is not in 'items'", np.flatnonzero(known[place] != wanted))
    faults.refuse(parquet)
    for item in signature.only(signature.towers.item.inputs).inputs:
        if item.name == signature.item:
            continue
        if not isinstance(item, JaggedBag):
            tensors[item.name] = items[item.name][place]
            continue
        bounds = items[f"@bounds/{item.name}"]
        lengths = np.diff(bounds)[place]
        tensors[item.name] = items[item.name][_places(bounds[place], lengths)]
        tensors[f"@bounds/{item.name}"] = np.concatenate([[0], np.cumsum(lengths)])


def _places(begin: Array, lengths: Array) -> Array:
    """Return the positions of all list values, concatenated, from starts and lengths."""
    edges = np.cumsum(lengths) - lengths
    places: Array = np.repeat(begin - edges, lengths) + np.arange(int(lengths.sum()))
    return places


def _item_columns(signature: Signature) -> tuple[str, ...]:
    return next(item.columns for item in signature.inputs if item.name == signature.item)


def require_items(splits: Collection[str], signature: Signature, where: object) -> None:
    """Raise if a retrieval model has no catalogue, or another model has one.

    Raises:
        DataRefused: names which of the two is the case.
    """
    if signature.item is not None and ITEMS not in splits:
        raise DataRefused("catalogue_missing", place=str(where), split=ITEMS)
    if signature.item is None and ITEMS in splits:
        raise DataRefused("catalogue_unexpected", place=str(where), split=ITEMS)
