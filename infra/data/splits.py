"""Convert parquet files to tensors as a bundle's signature declares.

A split is one parquet file or a folder of part files, read in the order of their names and by
record batches: memory is the output and one batch. Data that does not match the signature exactly
is refused with column, rule and rows; no value is cast, filled or cut to match.

Layout of ``data.safetensors``, one file per split:

id, dense, padded bag   the input's name, ``(rows, *shape)``, the declared dtype
jagged bag              the input's name, ``(all ids,)``, and ``@bounds/<name>``, int64
                        ``(rows + 1,)``: row ``i`` holds ids ``bounds[i]`` to ``bounds[i + 1]``
``@label``              float32 ``(rows,)``; all 1 where the signature names no label
``@group``              int64 ``(rows,)``; integers unchanged, other values numbered in the
                        order it first appears
``@time``               ``(rows,)``; timestamps as int64 microseconds since 1970, numbers as
                        int64 or float64
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from safetensors.numpy import save_file

from compressors.contracts import (
    DenseInput,
    Frozen,
    IdInput,
    JaggedBag,
    PaddedBag,
    Signature,
    TaskKind,
)
from infra.data.parquet import (
    Array,
    Faults,
    Survey,
    batches,
    check_columns,
    flat,
    is_list,
    needs,
    nulls,
    plain_times,
    refuse,
    survey,
)
from infra.errors import DataRefused
from infra.memory import require_memory
from infra.store.disk import translated

FILE = "data.safetensors"
UNSEEN_LENGTH, UNSEEN_FACTOR = 4096, 8
"""How long a declared list may be without data: 4096, or eight times the longest list there is."""
INT32 = np.iinfo(np.int32)
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Prepared(Frozen):
    """One split as tensors: rows, size of the file in bytes, names of the tensors in it."""

    rows: int
    bytes: int
    tensors: tuple[str, ...]


class IdStatistics(Frozen):
    """Statistics of one id or bag input in one split; the ids are None if there are none.

    ``longest`` is the longest list of a bag and 0 for ids; ``nulls`` counts ids and lists.
    """

    min_id: int | None = None
    max_id: int | None = None
    longest: int = 0
    nulls: int = 0


class SplitStatistics(Frozen):
    """Statistics of one split, computed in one pass; times in the unit of ``@time``."""

    rows: int
    label_mean: float | None
    time_min: float | int | None = None
    time_max: float | int | None = None
    inputs: dict[str, IdStatistics] = Field(default_factory=dict)


def prepare(parquet: Path, signature: Signature, into: Path) -> Prepared:
    """Write one split as ``into/data.safetensors`` (layout: this module's docstring).

    Args:
        parquet: a file, or a folder of part files.
        signature: maps columns to tensors.
        into: a folder; created if missing.

    Raises:
        DataRefused: a column is missing or of the wrong type; a value is null, NaN, infinite,
            out of int32 or no label; a list is longer than its input allows. Every violated rule of
            the pass is listed with its column, its rows and their number.
    """
    found = survey(parquet, signature)
    check_columns(found, parquet, signature)
    taken = [item.name for item in signature.inputs if item.name.startswith("@")]
    refuse(parquet, [f"input {name!r}: names starting with '@' are ours." for name in taken])
    require_memory(_bytes_needed(found, signature), f"{parquet} as tensors")
    out, output = _allocate(found, signature), signature.single_output
    faults, codes = Faults(), dict[Any, int]()
    for first, batch in batches(found, (need.column for need in needs(signature))):
        here = slice(first, first + batch.num_rows)
        for item in signature.inputs:
            _fill(item, batch, first, out, faults)
        if output.label is not None:
            column = batch.column(output.label)
            out["@label"][here] = _labels(column, output.label, output.task_kind, first, faults)
        if signature.group is not None:
            column = batch.column(signature.group)
            out["@group"][here] = _groups(column, signature.group, first, codes, faults)
        if signature.time is not None:
            column = batch.column(signature.time)
            out["@time"][here] = _times(column, signature.time, first, faults)
    faults.refuse(parquet)
    for item in signature.inputs:
        if isinstance(item, JaggedBag):
            out[item.name] = out[item.name][: out[f"@bounds/{item.name}"][-1]]
    return Prepared(rows=found.rows, bytes=save(out, into), tensors=tuple(out))


def save(tensors: dict[str, Array], into: Path) -> int:
    """Write to a temporary name and rename, so that an existing file is always complete."""
    into.mkdir(parents=True, exist_ok=True)
    final, partial = into / FILE, into / f".data-{os.getpid()}.partial"
    try:
        with translated(final, "write"):
            save_file(tensors, partial)
            size = partial.stat().st_size
            partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    return size


def _bytes_needed(found: Survey, signature: Signature) -> int:
    """Return the bytes of the tensors of a split."""
    each = sum(
        math.prod(item.shape) * np.dtype(item.dtype).itemsize
        for item in signature.inputs
        if not isinstance(item, JaggedBag)
    )
    jagged = [item for item in signature.inputs if isinstance(item, JaggedBag)]
    flat = sum(found.values[item.columns[0]] * np.dtype(item.dtype).itemsize for item in jagged)
    return found.rows * (each + 8 * len(jagged) + 20) + flat  # bounds; label, group and time


def _allocate(found: Survey, signature: Signature) -> dict[str, Array]:
    out: dict[str, Array] = {}
    for item in signature.inputs:
        if isinstance(item, JaggedBag):
            out[item.name] = np.empty(found.values[item.columns[0]], item.dtype)
            out[f"@bounds/{item.name}"] = np.zeros(found.rows + 1, np.int64)
        else:
            out[item.name] = np.empty((found.rows, *item.shape), item.dtype)
    out["@label"] = np.ones(found.rows, np.float32)
    if signature.group is not None:
        out["@group"] = np.empty(found.rows, np.int64)
    if signature.time is not None:
        is_float = found.kinds[signature.time] == "float"
        out["@time"] = np.empty(found.rows, np.float64 if is_float else np.int64)
    return out


def _fill(
    item: IdInput | DenseInput | PaddedBag | JaggedBag,
    batch: pa.RecordBatch,
    first: int,
    out: dict[str, Array],
    faults: Faults,
) -> None:
    """Write one batch of one input at its offset."""
    rows, target = batch.num_rows, out[item.name][first : first + batch.num_rows]
    if isinstance(item, IdInput):
        for place, name in enumerate(item.columns):
            ids = _ids(batch.column(name), name, first + np.arange(rows), faults)
            target.reshape(rows, -1)[:, place] = ids
        return
    name = item.columns[0]
    if isinstance(item, DenseInput) and not is_list(batch.column(name)):
        for place, name in enumerate(item.columns):
            numbers = _floats(batch.column(name), name, first + np.arange(rows), faults)
            target[:, place] = numbers
        return
    values, parents, lengths = flat(batch.column(name), name, first, faults)
    limit = item.shape[0]
    if isinstance(item, DenseInput):
        numbers = _floats(values, name, first + parents, faults)
        odd = np.flatnonzero(lengths != limit)
        if len(odd):
            rule = f"a list has {lengths[odd[0]]} value(s), input {item.name!r} has {limit}"
            faults.note(name, rule, first + odd)
            return
        target[:] = numbers.reshape(rows, limit)
        return
    ids = _ids(values, name, first + parents, faults)
    long = np.flatnonzero(lengths > limit)
    if len(long):
        rule = f"a list has {lengths[long[0]]} ids, input {item.name!r} takes at most {limit}"
        faults.note(name, rule, first + long)
    elif isinstance(item, PaddedBag):
        target[:] = item.padding_id
        target[np.arange(limit) < lengths[:, None]] = ids
    else:
        bounds = out[f"@bounds/{item.name}"][first : first + rows + 1]
        bounds[1:] = bounds[0] + np.cumsum(lengths)
        out[item.name][bounds[0] : bounds[-1]] = ids


def _ids(column: pa.Array, name: str, rows: Array, faults: Faults) -> Array:
    faults.note(name, "null", rows[nulls(column)])
    ids: Array = column.fill_null(0).to_numpy(zero_copy_only=False)
    wide = (ids < INT32.min) | (ids > INT32.max)
    faults.note(name, "id does not fit int32", rows[wide])
    return ids


def _floats(column: pa.Array, name: str, rows: Array, faults: Faults) -> Array:
    """Convert a numeric column to float64, checked to be finite in float32."""
    faults.note(name, "null", rows[nulls(column)])
    plain = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    numbers: Array = plain.cast(pa.float64(), safe=False).fill_null(0).to_numpy()
    faults.note(name, "NaN", rows[np.isnan(numbers)])
    faults.note(name, "infinite or beyond float32", rows[np.abs(numbers) > FLOAT32_MAX])
    return np.clip(numbers, -FLOAT32_MAX, FLOAT32_MAX)


def _labels(column: pa.Array, name: str, kind: TaskKind, first: int, faults: Faults) -> Array:
    rows = first + np.arange(len(column))
    labels = _floats(column, name, rows, faults)
    if kind.labels == "clicks":
        wrong = (labels != 0) & (labels != 1) & ~np.isnan(labels)
        faults.note(name, f"a {kind.name} label is 0 or 1", rows[wrong])
    else:
        faults.note(name, f"a {kind.name} label is at least 0", rows[labels < 0])
    return labels


def _groups(
    column: pa.Array, name: str, first: int, codes: dict[Any, int], faults: Faults
) -> Array:
    rows = first + np.arange(len(column))
    faults.note(name, "null", rows[nulls(column)])
    if pa.types.is_integer(column.type):
        numbers: Array = column.fill_null(0).to_numpy(zero_copy_only=False)
        faults.note(name, "does not fit int64", rows[numbers > np.iinfo(np.int64).max])
        return numbers.astype(np.int64)
    if pa.types.is_floating(column.type):
        numbers = column.cast(pa.float64()).fill_null(0).to_numpy()
        faults.note(name, "NaN", rows[np.isnan(numbers)])
    coded = column.dictionary_encode()
    local = [codes.setdefault(value, len(codes)) for value in coded.dictionary.to_pylist()]
    places = coded.indices.fill_null(0).to_numpy(zero_copy_only=False)
    return np.asarray(np.array(local or [0], np.int64)[places])


def _times(column: pa.Array, name: str, first: int, faults: Faults) -> Array:
    rows = first + np.arange(len(column))
    faults.note(name, "null", rows[nulls(column)])
    times = plain_times(column).fill_null(0).to_numpy(zero_copy_only=False)
    if times.dtype == np.float64:
        faults.note(name, "NaN or infinite", rows[~np.isfinite(times)])
    return np.asarray(times)


def split_statistics(parquet: Path, signature: Signature) -> SplitStatistics:
    """Compute statistics of one split in one pass: rows, label mean, time range, ids and lists.

    Raises:
        DataRefused: a column is missing, of the wrong type, or unreadable.
    """
    found = survey(parquet, signature)
    check_columns(found, parquet, signature)
    inputs = {item.name: IdStatistics() for item in signature.inputs if item.kind != "dense"}
    label_column, labels, total = signature.single_output.label, 0, 0.0
    low: float | int | None = None
    high: float | int | None = None
    for _, batch in batches(found, (need.column for need in needs(signature))):
        for item in signature.inputs:
            for name in item.columns if item.name in inputs else ():
                inputs[item.name] = _widened(inputs[item.name], batch.column(name))
        if label_column is not None:
            label = batch.column(label_column)
            labels += len(label) - label.null_count
            total += pc.sum(label.cast(pa.float64(), safe=False)).as_py() or 0.0
        if signature.time is not None:
            ends = pc.min_max(plain_times(batch.column(signature.time))).as_py()
            low, high = _least(low, ends["min"]), _most(high, ends["max"])
    mean = total / labels if labels else None
    return SplitStatistics(
        rows=found.rows, label_mean=mean, time_min=low, time_max=high, inputs=inputs
    )


def _widened(known: IdStatistics, column: pa.Array) -> IdStatistics:
    values, _, lengths = flat(column)
    ends = pc.min_max(values).as_py()
    in_lists = values.null_count if is_list(column) else 0
    longest = int(lengths.max(initial=0)) if is_list(column) else 0
    return IdStatistics(
        min_id=_least(known.min_id, ends["min"]),
        max_id=_most(known.max_id, ends["max"]),
        longest=max(known.longest, longest),
        nulls=known.nulls + column.null_count + in_lists,
    )


def _least(known: Any, new: Any) -> Any:
    return min((value for value in (known, new) if value is not None), default=None)


def _most(known: Any, new: Any) -> Any:
    return max((value for value in (known, new) if value is not None), default=None)


def check_shapes(statistics: dict[str, SplitStatistics], signature: Signature) -> None:
    """Raise if a bag's declared length is far from the lengths of the lists in the data.

    A served graph and every batch have the declared width, so it decides their memory.

    Args:
        statistics: by split name.
        signature: the bags and their shapes.

    Raises:
        DataRefused: one line per bag.
    """
    lines: list[str] = []
    for item in signature.inputs:
        found = [
            facts.inputs[item.name] for facts in statistics.values() if item.name in facts.inputs
        ]
        longest = max((facts.longest for facts in found), default=0)
        most = max(UNSEEN_LENGTH, UNSEEN_FACTOR * longest)
        if isinstance(item, PaddedBag | JaggedBag) and item.shape[0] > most:
            lines.append(
                f"input {item.name!r}: its shape allows lists of {item.shape[0]} ids, and the "
                f"longest in the data has {longest}. Set shape to at most {most}."
            )
    if lines:
        raise DataRefused("shapes_unfit", problems=tuple(lines))


def policed(split: str, item: IdInput | PaddedBag | JaggedBag) -> bool:
    """Return whether ids outside the table are an error in this split.

    ``clamp`` and ``default_row`` are policies for ids that the model has never seen, so they apply
    to validation and test data. All ids of the data that a model learns from must be in its table.
    """
    return split not in ("validation", "test") or item.out_of_range == "error"


def check_ids(
    statistics: dict[str, SplitStatistics], signature: Signature, rows_of_table: dict[str, int]
) -> None:
    """Raise for ids outside their table, lists that are too long, and settings outside the table.

    Args:
        statistics: by split name.
        signature: inputs, their tables and out-of-range policies.
        rows_of_table: by table name.

    Raises:
        DataRefused: one line per problem, with input, table, its rows, the id and the split.
    """
    lines: list[str] = []
    for item in signature.inputs:
        if isinstance(item, DenseInput):
            continue
        rows = rows_of_table.get(item.table)
        if rows is None:
            known = ", ".join(sorted(rows_of_table)) or "none"
            lines.append(f"input {item.name!r} reads table {item.table!r}; there is {known}.")
            continue
        where = f"table {item.table!r} of {rows} rows"
        spare = {"default_row": item.default_row}
        if isinstance(item, PaddedBag):
            spare["padding_id"] = item.padding_id
        lines += [
            f"input {item.name!r}: {setting} {value} is not in {where} (0 to {rows - 1})."
            for setting, value in spare.items()
            if value >= rows
        ]
        for split, facts in statistics.items():
            seen = facts.inputs.get(item.name)
            if seen is None:  # the catalogue has items, the other splits interactions
                continue
            wrong = {seen.min_id, seen.max_id} - {None} if policed(split, item) else set()
            lines += [
                f"split {split!r}, input {item.name!r}: id {found} is not in {where} "
                f"(0 to {rows - 1}). Fix the ids, or pack the table they belong to."
                for found in sorted(i for i in wrong if i is not None and not 0 <= i < rows)
            ]
            if not isinstance(item, IdInput) and seen.longest > item.shape[0]:
                lines.append(
                    f"split {split!r}, input {item.name!r}: a list has {seen.longest} ids, the "
                    f"input takes at most {item.shape[0]}. Cut the lists, or raise shape."
                )
    if lines:
        raise DataRefused("ids_unfit", problems=tuple(lines))
