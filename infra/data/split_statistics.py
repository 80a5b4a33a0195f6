"""Statistics of a split's integers and lists, and checks that they fit the signature."""

from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from compressors.contracts import (
    BoundedInput,
    DenseInput,
    Frozen,
    IdInput,
    IntegerInput,
    KeyInput,
    ListInput,
    MatrixInput,
    PaddedBag,
    SequenceInput,
    Signature,
    TokensInput,
    all_tables,
    value_ranges,
)
from infra.data.column_arrays import check_equal_lengths
from infra.data.parquet import (
    Violations,
    batches,
    check_columns,
    column_uses,
    flatten,
    inspect_split,
    is_list,
    to_plain_times,
)
from infra.errors import DataRefused

MAX_UNUSED_LENGTH, MAX_LENGTH_FACTOR = 4096, 8
"""A bag's declared length is at most 4096, or 8 times the longest list in the data if larger."""

EXACT_IN_FLOAT32 = 2**24
"""float32 represents every integer up to this one exactly."""


class IdStatistics(Frozen):
    """Statistics of the ids or other integers of one input, or of one column, in one split.

    Attributes:
        min_id: smallest id; None if there is no id.
        max_id: largest id; None if there is no id.
        shortest: length of the shortest list; None without lists.
        longest: length of the longest list; 0 without lists.
        nulls: number of null ids and null lists.
    """

    min_id: int | None = None
    max_id: int | None = None
    shortest: int | None = None
    longest: int = 0
    nulls: int = 0


class SplitStatistics(Frozen):
    """Statistics of one split; times have the unit of the tensor ``@time``.

    ``inputs`` contains the statistics of each input of integers by name, and ``columns`` the
    statistics of each column that such an input reads.
    """

    rows: int
    time_min: float | int | None = None
    time_max: float | int | None = None
    inputs: dict[str, IdStatistics] = Field(default_factory=dict)
    columns: dict[str, IdStatistics] = Field(default_factory=dict)


def split_statistics(parquet: Path, signature: Signature) -> SplitStatistics:
    """Compute the statistics of one split in one pass over its data.

    Args:
        parquet: a file, or a folder of part files.
        signature: the inputs and outputs, and the columns that they read.

    Raises:
        DataRefused: a column is missing, has the wrong type, or cannot be read; or the lists of two
            sequences that must have equal lengths differ.
    """
    contents = inspect_split(parquet, signature)
    check_columns(contents, parquet, signature)
    integer_inputs = [
        item for item in signature.data_inputs if not isinstance(item, DenseInput | TokensInput)
    ]
    columns = {name: IdStatistics() for item in integer_inputs for name in item.columns}
    low: float | int | None = None
    high: float | int | None = None
    violations = Violations()
    for first, batch in batches(contents, (use.column for use in column_uses(signature))):
        for name, known in columns.items():
            columns[name] = _combine(known, _compute_statistics(batch.column(name)))
        check_equal_lengths(signature, batch, first, violations)
        if signature.time is not None:
            ends = pc.min_max(to_plain_times(batch.column(signature.time))).as_py()
            low, high = _select_smaller(low, ends["min"]), _select_larger(high, ends["max"])
    violations.refuse(parquet)
    inputs = {
        item.name: reduce(_combine, [columns[name] for name in item.columns])
        for item in integer_inputs
    }
    return SplitStatistics(
        rows=contents.rows,
        time_min=low,
        time_max=high,
        inputs=inputs,
        columns=columns,
    )


def _compute_statistics(column: pa.Array) -> IdStatistics:
    """Compute the statistics of one column of a batch."""
    values, _, lengths = flatten(column)
    ends = pc.min_max(values).as_py()
    has_lists = is_list(column)
    return IdStatistics(
        min_id=ends["min"],
        max_id=ends["max"],
        shortest=int(lengths.min()) if has_lists and len(lengths) else None,
        longest=int(lengths.max(initial=0)) if has_lists else 0,
        nulls=column.null_count + (values.null_count if has_lists else 0),
    )


def _combine(first: IdStatistics, second: IdStatistics) -> IdStatistics:
    """Return the statistics of the values of both."""
    return IdStatistics(
        min_id=_select_smaller(first.min_id, second.min_id),
        max_id=_select_larger(first.max_id, second.max_id),
        shortest=_select_smaller(first.shortest, second.shortest),
        longest=max(first.longest, second.longest),
        nulls=first.nulls + second.nulls,
    )


def _select_smaller(known: Any, new: Any) -> Any:
    """Return the smaller value; a value that is None is ignored."""
    return min((value for value in (known, new) if value is not None), default=None)


def _select_larger(known: Any, new: Any) -> Any:
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
    for item in signature.data_inputs:
        longest = max(
            (
                split.inputs[item.name].longest
                for split in statistics.values()
                if item.name in split.inputs
            ),
            default=0,
        )
        most = max(MAX_UNUSED_LENGTH, MAX_LENGTH_FACTOR * longest)
        if (
            isinstance(item, ListInput)
            and not isinstance(item, TokensInput)
            and item.shape[0] > most
        ):
            lines.append(
                f"input {item.name!r}: its shape allows lists of {item.shape[0]} ids, and the "
                f"longest in the data has {longest}. Set shape to at most {most}."
            )
    if lines:
        raise DataRefused("shapes_unfit", problems=tuple(lines))


def requires_known_values(split: str, item: BoundedInput) -> bool:
    """Return whether values of an input that are out of range are an error in this split.

    The settings ``clamp`` and ``default_row`` of ``out_of_range`` are for values that were not in
    the training data, so they apply to validation and test data. In the other splits every value
    must be valid.
    """
    return split not in ("validation", "test") or item.out_of_range == "error"


def check_ids(
    statistics: dict[str, SplitStatistics], signature: Signature, rows_of_table: dict[str, int]
) -> None:
    """Raise if integers are out of range, or lists are longer than their input allows.

    Each input's ``default_row`` and ``padding_id`` are checked too. Integers of the data are
    checked in the splits for which ``requires_known_values`` returns True.

    Args:
        statistics: statistics of each split by name.
        signature: the inputs and their tables, and ``out_of_range``: what happens to other ids.
        rows_of_table: number of rows by table name.

    Raises:
        DataRefused: one line per problem, with input, table, its rows, the id and the split.
    """
    lines: list[str] = []
    for item in signature.data_inputs:
        if isinstance(item, DenseInput | KeyInput):
            continue
        unknown = [table for table in all_tables(item) if table not in rows_of_table]
        if unknown:
            known = ", ".join(sorted(rows_of_table)) or "none"
            lines += [
                f"input {item.name!r} reads table {table!r}; there is {known}." for table in unknown
            ]
            continue
        lines += _describe_setting_problems(item, rows_of_table)
        for split, split_ids in statistics.items():
            # The catalogue of a retrieval model has other inputs than its splits.
            if item.name in split_ids.inputs:
                lines += _describe_split_problems(item, split, split_ids, rows_of_table)
    lines += _describe_inexact_ids(signature, rows_of_table)
    if lines:
        raise DataRefused("ids_unfit", problems=tuple(lines))


def _describe_inexact_ids(signature: Signature, rows_of_table: dict[str, int]) -> list[str]:
    """Return a line for each field of a float matrix with ids that float32 cannot represent.

    A matrix is one tensor whose columns hold several inputs, its fields.
    """
    return [
        f"matrix {item.name!r}, field {field.name!r}: id {largest} is not exact in float32. Use a "
        "matrix of dtype 'int64', or pass these ids as an input."
        for item in signature.inputs
        if isinstance(item, MatrixInput) and item.dtype == "float32"
        for field in item.fields
        if not isinstance(field, DenseInput) and set(all_tables(field)) <= set(rows_of_table)
        for largest in [max(column.last for column in value_ranges(field, rows_of_table))]
        if largest > EXACT_IN_FLOAT32
    ]


def _describe_setting_problems(item: BoundedInput, rows_of_table: dict[str, int]) -> list[str]:
    """Return a line for each setting of an input that is not a row of its tables."""
    if isinstance(item, IntegerInput):
        return []
    lines = []
    if isinstance(item, IdInput) and item.fields:
        # Several columns share a table. The network adds ``field.offset`` to an id of the column;
        # the sum is the row of the table.
        for column, field in zip(item.columns, item.fields, strict=True):
            low, high = field.first + field.offset, field.first + field.rows - 1 + field.offset
            lines += [
                f"input {item.name!r}, column {column!r}: rows {low} to {high} are not in table "
                f"{table!r} of {rows_of_table[table]} rows."
                for table in all_tables(item)
                if low < 0 or high >= rows_of_table[table]
            ]
            if not field.first <= field.default_row < field.first + field.rows:
                last = field.first + field.rows - 1
                lines.append(
                    f"input {item.name!r}, column {column!r}: default_row {field.default_row} is "
                    f"not one of its ids ({field.first} to {last})."
                )
        return lines
    special_ids = {"default_row": item.default_row}
    if isinstance(item, PaddedBag | SequenceInput):
        special_ids["padding_id"] = item.padding_id
    for table in all_tables(item):
        rows = rows_of_table[table]
        lines += [
            f"input {item.name!r}: {setting} {value} is not in table {table!r} of {rows} rows "
            f"(0 to {rows - 1})."
            for setting, value in special_ids.items()
            if value >= rows
        ]
    return lines


def _describe_split_problems(
    item: BoundedInput, split: str, statistics: SplitStatistics, rows_of_table: dict[str, int]
) -> list[str]:
    """Return a line for each smallest or largest value of a split that is out of range."""
    lines = []
    ranges = value_ranges(item, rows_of_table)
    if len(ranges) == 1:
        found = [(f"input {item.name!r}", statistics.inputs[item.name])]
    else:
        found = [
            (f"input {item.name!r}, column {column!r}", statistics.columns[column])
            for column in item.columns
        ]
    for (source, ids), (first, last, _) in zip(found, ranges, strict=True):
        extremes = (ids.min_id, ids.max_id) if requires_known_values(split, item) else ()
        outside = {id_ for id_ in extremes if id_ is not None and not first <= id_ <= last}
        if isinstance(item, IntegerInput):
            lines += [
                f"split {split!r}, {source}: value {value} is not from {first} to {last}. Fix the "
                "values, or change 'low' and 'high'."
                for value in sorted(outside)
            ]
            continue
        rows = {table: rows_of_table[table] for table in all_tables(item)}
        smallest = min(rows, key=rows.__getitem__)
        lines += [
            f"split {split!r}, {source}: id {id_} is not in table {smallest!r} of {rows[smallest]} "
            f"rows ({first} to {last}). Fix the ids, or pack the table they belong to."
            for id_ in sorted(outside)
        ]
    shortest, longest = statistics.inputs[item.name].shortest, statistics.inputs[item.name].longest
    if isinstance(item, SequenceInput) and shortest is not None and shortest < item.min_length:
        lines.append(
            f"split {split!r}, input {item.name!r}: a list has {shortest} ids, the input needs at "
            f"least {item.min_length}. Remove such rows, or lower min_length."
        )
    if isinstance(item, ListInput) and longest > item.shape[0]:
        lines.append(
            f"split {split!r}, input {item.name!r}: a list has {longest} ids, the "
            f"input takes at most {item.shape[0]}. Cut the lists, or raise shape."
        )
    return lines
