"""Convert the splits of any model to tensors; for a retrieval model, join rows with their items.

The split ``items`` of a retrieval model is the catalogue: one row per item, with the inputs of the
item tower. The rows of the other splits are interactions: the inputs of the query tower and the id
of an item. ``prepare`` adds that item's other inputs, so that every row is a complete input of the
model, as for any other task. ``RAGGED`` inputs are lists of different lengths, which are stored one
after another; ``@bounds/<name>`` contains the bounds of each row's list.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors.numpy import load_file

from compressors.contracts import ITEMS, RAGGED, Signature
from infra.data import splits as data
from infra.data.parquet import Array, Violations
from infra.data.splits import Prepared
from infra.errors import DataRefused
from infra.store.temporary import scratch_folder


def prepare(
    paths: Mapping[str, Path],
    split: str,
    signature: Signature,
    into: Path,
    tokenizer_files: Mapping[str, Path] = MappingProxyType({}),
) -> Prepared:
    """Write one split as ``into/data.safetensors``; the layout is described in ``splits.py``.

    Args:
        paths: parquet file or folder by split name. For a retrieval model it contains ``items`` in
            addition to ``split``.
        split: name of the split to write.
        signature: signature of the bundle.
        into: the folder to write to; created if missing.
        tokenizer_files: the file of each tokenizer that an input names, by this name.

    Raises:
        DataRefused: a split is not valid (``splits.prepare``); or an item occurs twice in the
            catalogue, or is missing from it; or two test rows of one query differ in the inputs of
            the query tower.
    """
    prepared = data.prepare(paths[split], signature.of_split(split), into, tokenizer_files)
    if signature.item is None:
        return prepared
    tensors = load_file(into / data.FILE)
    if split == ITEMS:
        _require_unique_items(paths[split], tensors, signature)
        return prepared
    if split == "test":
        _require_equal_queries(paths[split], tensors, signature)
    with scratch_folder("items") as scratch:
        data.prepare(paths[ITEMS], signature.of_split(ITEMS), scratch, tokenizer_files)
        items = load_file(scratch / data.FILE)
    _join(paths[split], tensors, items, signature)
    size = data.save(tensors, into)
    return Prepared(rows=prepared.rows, bytes=size, tensors=tuple(tensors))


def _require_unique_items(parquet: Path, items: dict[str, Array], signature: Signature) -> None:
    """Raise if an item occurs twice in the catalogue."""
    violations, (column,) = Violations(), _find_item_id_columns(signature)
    _, first_rows = np.unique(items[str(signature.item)], return_index=True)
    repeated = np.setdiff1d(np.arange(len(items[str(signature.item)])), first_rows)
    violations.add(column, "an item that is in an earlier row too", repeated)
    violations.refuse(parquet)


def _require_equal_queries(parquet: Path, tensors: dict[str, Array], signature: Signature) -> None:
    """Raise if rows of one query differ in a query input, since the model evaluates a query once.

    Rows belong to one query if their values of ``@group`` are equal.
    """
    assert signature.towers is not None  # noqa: S101 - a retrieval signature always has towers
    violations = Violations()
    _, first_rows, query_indices = np.unique(
        tensors["@group"], return_index=True, return_inverse=True
    )
    first_row = first_rows[query_indices]  # (rows,): the first row with the same query
    for query_input in signature.only(signature.towers.query.inputs).data_inputs:
        values = tensors[query_input.name]
        if isinstance(query_input, RAGGED):
            bounds = tensors[f"@bounds/{query_input.name}"]
            lengths = np.diff(bounds)
            differs = lengths != lengths[first_row]
            rows = np.flatnonzero(~differs)  # rows whose lists have equal lengths
            positions = _list_positions(bounds[rows], lengths[rows])
            first_positions = _list_positions(bounds[first_row[rows]], lengths[rows])
            is_unequal = values[positions] != values[first_positions]
            differs[np.repeat(rows, lengths[rows])[is_unequal]] = True
        else:
            differs = (values != values[first_row]).reshape(len(first_row), -1).any(axis=1)
        rule = f"differs from the first row of the same {signature.group}, which is one query"
        violations.add(query_input.columns[0], rule, np.flatnonzero(differs))
    violations.refuse(parquet)


def _join(
    parquet: Path, tensors: dict[str, Array], items: dict[str, Array], signature: Signature
) -> None:
    """Add the other inputs of each row's item from the catalogue to ``tensors``.

    Args:
        parquet: file or folder of the rows, for the error message.
        tensors: the tensors of the rows, by name; inputs of the item tower are added.
        items: the tensors of the catalogue, by name.
        signature: signature of the bundle.

    Raises:
        DataRefused: an item is not in the catalogue.
    """
    assert signature.towers is not None  # noqa: S101 - a retrieval signature always has towers
    row_ids, item_ids = tensors[str(signature.item)], items[str(signature.item)]
    permutation = np.argsort(item_ids)
    insertion_points = np.searchsorted(item_ids, row_ids, sorter=permutation)
    # (rows,): the row of the catalogue with the item of each row
    position = permutation[insertion_points.clip(max=len(item_ids) - 1)]
    violations, (column,) = Violations(), _find_item_id_columns(signature)
    is_missing = item_ids[position] != row_ids
    violations.add(column, "an item that is not in 'items'", np.flatnonzero(is_missing))
    violations.refuse(parquet)
    for item_input in signature.only(signature.towers.item.inputs).data_inputs:
        name = item_input.name
        if name == signature.item:
            continue
        if not isinstance(item_input, RAGGED):
            tensors[name] = items[name][position]
            continue
        bounds = items[f"@bounds/{name}"]
        lengths = np.diff(bounds)[position]
        tensors[name] = items[name][_list_positions(bounds[position], lengths)]
        tensors[f"@bounds/{name}"] = np.concatenate([[0], np.cumsum(lengths)])


def _list_positions(starts: Array, lengths: Array) -> Array:
    """Return the positions of the values of several lists in the tensor of all values.

    Args:
        starts: int64 (lists,), position of the first value of each list.
        lengths: int64 (lists,), number of values of each list.

    Returns:
        int64 (sum of lengths,), the positions of the first list, then of the second, and so on.
    """
    result_starts = np.cumsum(lengths) - lengths
    positions: Array = np.repeat(starts - result_starts, lengths) + np.arange(int(lengths.sum()))
    return positions


def _find_item_id_columns(signature: Signature) -> tuple[str, ...]:
    """Return the columns of the input with the item's id."""
    inputs = signature.inputs
    return next(candidate.columns for candidate in inputs if candidate.name == signature.item)


def require_items(splits: Collection[str], signature: Signature, place: object) -> None:
    """Raise if a retrieval model has no catalogue, or if any other model has one.

    Args:
        splits: names of the splits.
        signature: signature of the bundle.
        place: what contains the splits, for the error message.

    Raises:
        DataRefused: the catalogue is missing or unexpected.
    """
    if signature.item is not None and ITEMS not in splits:
        raise DataRefused("catalogue_missing", place=str(place), split=ITEMS)
    if signature.item is None and ITEMS in splits:
        raise DataRefused("catalogue_unexpected", place=str(place), split=ITEMS)
