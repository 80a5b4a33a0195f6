"""Convert parquet files to tensors as a bundle's signature declares, and check ids and lists.

A split is one parquet file, or a folder of part files that are read in the order of their names.
Files are read in record batches, so only the tensors and one batch are in memory. Data that does
not match the signature exactly is an error with column, rule and rows. No value is cast, filled in
or truncated to match.

Layout of ``data.safetensors``, one file per split:

id, dense, padded bag   the input's name, ``(rows, *shape)``, the declared dtype
jagged bag              the input's name, ``(all ids,)``, and ``@bounds/<name>``, int64
                        ``(rows + 1,)``: the ids of row ``i`` are ``[bounds[i], bounds[i + 1])``
``@label``              float32 ``(rows,)``; all 1 if the signature has no label
``@group``              int64 ``(rows,)``; integers are unchanged, other values are numbered in
                        the order of their first appearance
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
)
from infra.data.column_arrays import (
    convert_floats,
    convert_groups,
    convert_ids,
    convert_labels,
    convert_times,
)
from infra.data.parquet import (
    Array,
    SplitContents,
    Violations,
    batches,
    check_columns,
    column_uses,
    flatten,
    inspect_split,
    is_list,
    refuse_if_any,
    to_plain_times,
)
from infra.errors import DataRefused
from infra.memory import require_memory
from infra.store.disk import translate_os_errors

FILE = "data.safetensors"
MAX_UNUSED_LENGTH, MAX_LENGTH_FACTOR = 4096, 8
"""A bag's declared length is at most 4096, or 8 times the longest list in the data if larger."""


class Prepared(Frozen):
    """A split written as tensors: number of rows, bytes of the file, and names of the tensors."""

    rows: int
    bytes: int
    tensors: tuple[str, ...]


class IdStatistics(Frozen):
    """Statistics of one id or bag input in one split.

    Attributes:
        min_id: smallest id; None if there is no id.
        max_id: largest id; None if there is no id.
        longest: length of the longest list of a bag; 0 for an id input.
        nulls: number of null ids and null lists.
    """

    min_id: int | None = None
    max_id: int | None = None
    longest: int = 0
    nulls: int = 0


class SplitStatistics(Frozen):
    """Statistics of one split; times have the unit of the tensor ``@time``.

    ``inputs`` contains the statistics of each id and bag input by name.
    """

    rows: int
    label_mean: float | None
    time_min: float | int | None = None
    time_max: float | int | None = None
    inputs: dict[str, IdStatistics] = Field(default_factory=dict)


def prepare(parquet: Path, signature: Signature, into: Path) -> Prepared:
    """Write one split as ``into/data.safetensors`` in the layout of this module's docstring.

    Args:
        parquet: a file, or a folder of part files.
        signature: the inputs and outputs, and the columns that they read.
        into: the folder to write to; created if missing.

    Raises:
        DataRefused: a column is missing or has the wrong type; a value is null, NaN, infinite,
            outside int32 or not a valid label; or a list is longer than its input allows. The error
            lists every violated rule with its column, its first rows and their number.
        OutOfMemory: the tensors do not fit in memory.
    """
    contents = inspect_split(parquet, signature)
    check_columns(contents, parquet, signature)
    reserved = [item.name for item in signature.inputs if item.name.startswith("@")]
    refuse_if_any(
        parquet, [f"input {name!r}: names that begin with '@' are reserved." for name in reserved]
    )
    require_memory(_bytes_needed(contents, signature), f"Converting {parquet} to tensors")
    out, output = _allocate(contents, signature), signature.single_output
    violations, codes = Violations(), dict[Any, int]()
    for first, batch in batches(contents, (use.column for use in column_uses(signature))):
        batch_rows = slice(first, first + batch.num_rows)
        for item in signature.inputs:
            _write_batch(item, batch, first, out, violations)
        if output.label is not None:
            column = batch.column(output.label)
            out["@label"][batch_rows] = convert_labels(
                column, output.label, output.task_kind, first, violations
            )
        if signature.group is not None:
            column = batch.column(signature.group)
            out["@group"][batch_rows] = convert_groups(
                column, signature.group, first, codes, violations
            )
        if signature.time is not None:
            column = batch.column(signature.time)
            out["@time"][batch_rows] = convert_times(column, signature.time, first, violations)
    violations.refuse(parquet)
    for item in signature.inputs:
        if isinstance(item, JaggedBag):
            out[item.name] = out[item.name][: out[f"@bounds/{item.name}"][-1]]
    return Prepared(rows=contents.rows, bytes=save(out, into), tensors=tuple(out))


def save(tensors: dict[str, Array], into: Path) -> int:
    """Write tensors as ``into/data.safetensors``; an existing file is replaced when complete.

    Returns:
        Size of the file in bytes.

    Raises:
        SettingRefused, StoreUnavailable: the file cannot be written.
    """
    into.mkdir(parents=True, exist_ok=True)
    final, partial = into / FILE, into / f".data-{os.getpid()}.partial"
    try:
        with translate_os_errors(final, "write"):
            save_file(tensors, partial)
            size = partial.stat().st_size
            partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    return size


def _bytes_needed(contents: SplitContents, signature: Signature) -> int:
    """Return the total size of a split's tensors in bytes."""
    row_bytes = sum(
        math.prod(item.shape) * np.dtype(item.dtype).itemsize
        for item in signature.inputs
        if not isinstance(item, JaggedBag)
    )
    jagged = [item for item in signature.inputs if isinstance(item, JaggedBag)]
    id_bytes = sum(
        contents.values[item.columns[0]] * np.dtype(item.dtype).itemsize for item in jagged
    )
    # Per row: 8 bytes for the bounds of each jagged bag, and 20 for label, group and time.
    return contents.rows * (row_bytes + 8 * len(jagged) + 20) + id_bytes


def _allocate(contents: SplitContents, signature: Signature) -> dict[str, Array]:
    """Return tensors for all rows of a split; most of their values are not initialized."""
    out: dict[str, Array] = {}
    for item in signature.inputs:
        if isinstance(item, JaggedBag):
            out[item.name] = np.empty(contents.values[item.columns[0]], item.dtype)
            out[f"@bounds/{item.name}"] = np.zeros(contents.rows + 1, np.int64)
        else:
            out[item.name] = np.empty((contents.rows, *item.shape), item.dtype)
    out["@label"] = np.ones(contents.rows, np.float32)
    if signature.group is not None:
        out["@group"] = np.empty(contents.rows, np.int64)
    if signature.time is not None:
        is_float = contents.kinds[signature.time] == "float"
        out["@time"] = np.empty(contents.rows, np.float64 if is_float else np.int64)
    return out


def _write_batch(
    item: IdInput | DenseInput | PaddedBag | JaggedBag,
    batch: pa.RecordBatch,
    first: int,
    out: dict[str, Array],
    violations: Violations,
) -> None:
    """Write one batch of one input to its tensor.

    Args:
        item: the input.
        batch: the record batch.
        first: row number of the batch's first row in the split.
        out: the tensors of the split by name.
        violations: collects values and lists that do not match the input.
    """
    rows, target = batch.num_rows, out[item.name][first : first + batch.num_rows]
    if isinstance(item, IdInput):
        for index, name in enumerate(item.columns):
            ids = convert_ids(batch.column(name), name, first + np.arange(rows), violations)
            target.reshape(rows, -1)[:, index] = ids
        return
    name = item.columns[0]
    if isinstance(item, DenseInput) and not is_list(batch.column(name)):
        for index, name in enumerate(item.columns):
            numbers = convert_floats(batch.column(name), name, first + np.arange(rows), violations)
            target[:, index] = numbers
        return
    values, value_rows, lengths = flatten(batch.column(name), name, first, violations)
    limit = item.shape[0]
    if isinstance(item, DenseInput):
        numbers = convert_floats(values, name, first + value_rows, violations)
        wrong_lengths = np.flatnonzero(lengths != limit)
        if len(wrong_lengths):
            length = lengths[wrong_lengths[0]]
            rule = f"a list has {length} value(s), input {item.name!r} has {limit}"
            violations.add(name, rule, first + wrong_lengths)
            return
        target[:] = numbers.reshape(rows, limit)
        return
    ids = convert_ids(values, name, first + value_rows, violations)
    too_long = np.flatnonzero(lengths > limit)
    if len(too_long):
        length = lengths[too_long[0]]
        rule = f"a list has {length} ids, input {item.name!r} takes at most {limit}"
        violations.add(name, rule, first + too_long)
    elif isinstance(item, PaddedBag):
        target[:] = item.padding_id
        target[np.arange(limit) < lengths[:, None]] = ids
    else:
        bounds = out[f"@bounds/{item.name}"][first : first + rows + 1]
        bounds[1:] = bounds[0] + np.cumsum(lengths)
        out[item.name][bounds[0] : bounds[-1]] = ids


def split_statistics(parquet: Path, signature: Signature) -> SplitStatistics:
    """Compute the statistics of one split in one pass over its data.

    Args:
        parquet: a file, or a folder of part files.
        signature: the inputs and outputs, and the columns that they read.

    Raises:
        DataRefused: a column is missing, has the wrong type, or cannot be read.
    """
    contents = inspect_split(parquet, signature)
    check_columns(contents, parquet, signature)
    inputs = {item.name: IdStatistics() for item in signature.inputs if item.kind != "dense"}
    label_column, label_count, label_sum = signature.single_output.label, 0, 0.0
    low: float | int | None = None
    high: float | int | None = None
    for _, batch in batches(contents, (use.column for use in column_uses(signature))):
        for item in signature.inputs:
            for name in item.columns if item.name in inputs else ():
                inputs[item.name] = _update_statistics(inputs[item.name], batch.column(name))
        if label_column is not None:
            label = batch.column(label_column)
            label_count += len(label) - label.null_count
            label_sum += pc.sum(label.cast(pa.float64(), safe=False)).as_py() or 0.0
        if signature.time is not None:
            limits = pc.min_max(to_plain_times(batch.column(signature.time))).as_py()
            low, high = _smaller(low, limits["min"]), _larger(high, limits["max"])
    mean = label_sum / label_count if label_count else None
    return SplitStatistics(
        rows=contents.rows, label_mean=mean, time_min=low, time_max=high, inputs=inputs
    )


def _update_statistics(known: IdStatistics, column: pa.Array) -> IdStatistics:
    """Return the statistics of an input after one more batch of one of its columns."""
    values, _, lengths = flatten(column)
    limits = pc.min_max(values).as_py()
    nulls_in_lists = values.null_count if is_list(column) else 0
    longest = int(lengths.max(initial=0)) if is_list(column) else 0
    return IdStatistics(
        min_id=_smaller(known.min_id, limits["min"]),
        max_id=_larger(known.max_id, limits["max"]),
        longest=max(known.longest, longest),
        nulls=known.nulls + column.null_count + nulls_in_lists,
    )


def _smaller(known: Any, new: Any) -> Any:
    """Return the smaller value; a value that is None is ignored."""
    return min((value for value in (known, new) if value is not None), default=None)


def _larger(known: Any, new: Any) -> Any:
    """Return the larger value; a value that is None is ignored."""
    return max((value for value in (known, new) if value is not None), default=None)


def check_shapes(statistics: dict[str, SplitStatistics], signature: Signature) -> None:
    """Raise if the declared length of a bag is far greater than the longest list in the data.

    Served graphs and batches have the declared length, so it determines the memory they need.

    Args:
        statistics: statistics of each split by name.
        signature: the bags and their shapes.

    Raises:
        DataRefused: one line for each such bag.
    """
    lines: list[str] = []
    for item in signature.inputs:
        longest = max(
            (
                split.inputs[item.name].longest
                for split in statistics.values()
                if item.name in split.inputs
            ),
            default=0,
        )
        most = max(MAX_UNUSED_LENGTH, MAX_LENGTH_FACTOR * longest)
        if isinstance(item, PaddedBag | JaggedBag) and item.shape[0] > most:
            lines.append(
                f"input {item.name!r}: its shape allows lists of {item.shape[0]} ids, and the "
                f"longest in the data has {longest}. Set shape to at most {most}."
            )
    if lines:
        raise DataRefused("shapes_unfit", problems=tuple(lines))


def requires_known_ids(split: str, item: IdInput | PaddedBag | JaggedBag) -> bool:
    """Return whether ids outside the table of an input are an error in this split.

    The policies ``clamp`` and ``default_row`` are for ids that were not in the training data, so
    they apply to validation and test data. In the other splits every id must be in the table.
    """
    return split not in ("validation", "test") or item.out_of_range == "error"


def check_ids(
    statistics: dict[str, SplitStatistics], signature: Signature, rows_of_table: dict[str, int]
) -> None:
    """Raise if ids are outside their table, or lists are longer than their input allows.

    Each input's ``default_row`` and ``padding_id`` are checked too. Ids of the data are checked in
    the splits for which ``requires_known_ids`` returns True.

    Args:
        statistics: statistics of each split by name.
        signature: inputs, their tables and their policies for ids outside the table.
        rows_of_table: number of rows by table name.

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
        special_ids = {"default_row": item.default_row}
        if isinstance(item, PaddedBag):
            special_ids["padding_id"] = item.padding_id
        lines += [
            f"input {item.name!r}: {setting} {value} is not in {where} (0 to {rows - 1})."
            for setting, value in special_ids.items()
            if value >= rows
        ]
        for split, of_split in statistics.items():
            ids = of_split.inputs.get(item.name)
            if ids is None:  # the catalogue of a retrieval model has other inputs than its splits
                continue
            limits = (ids.min_id, ids.max_id) if requires_known_ids(split, item) else ()
            outside = {id_ for id_ in limits if id_ is not None and not 0 <= id_ < rows}
            lines += [
                f"split {split!r}, input {item.name!r}: id {id_} is not in {where} "
                f"(0 to {rows - 1}). Fix the ids, or pack the table they belong to."
                for id_ in sorted(outside)
            ]
            if not isinstance(item, IdInput) and ids.longest > item.shape[0]:
                lines.append(
                    f"split {split!r}, input {item.name!r}: a list has {ids.longest} ids, the "
                    f"input takes at most {item.shape[0]}. Cut the lists, or raise shape."
                )
    if lines:
        raise DataRefused("ids_unfit", problems=tuple(lines))
