"""Convert a parquet column to an array, and collect its invalid values.

A ``convert_*`` function converts the values of one column in one record batch to an array
(values,), whose entries for invalid values are arbitrary (``convert_labels`` reads a second
column). ``name`` is the column's name, and ``violations`` collects invalid values with their rows.
A function receives either ``rows``, int64 (values,), the row number of each value in the split, or
``first``, that of the first value.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from compressors.contracts import Output, SequenceInput, Signature
from infra.data.parquet import Array, Violations, flatten, null_positions, to_plain_times

INT32 = np.iinfo(np.int32)
FLOAT32_MAX = float(np.finfo(np.float32).max)


def convert_ids(column: pa.Array, name: str, rows: Array, violations: Violations) -> Array:
    """Convert a column of ids to integers; nulls and ids outside int32 are violations."""
    violations.add(name, "null", rows[null_positions(column)])
    ids: Array = column.fill_null(0).to_numpy(zero_copy_only=False)
    is_outside = (ids < INT32.min) | (ids > INT32.max)
    violations.add(name, "id does not fit int32", rows[is_outside])
    return ids


def convert_floats(column: pa.Array, name: str, rows: Array, violations: Violations) -> Array:
    """Convert a column to float64; nulls and values not finite in float32 are violations."""
    violations.add(name, "null", rows[null_positions(column)])
    plain = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    numbers: Array = plain.cast(pa.float64(), safe=False).fill_null(0).to_numpy()
    violations.add(name, "NaN", rows[np.isnan(numbers)])
    violations.add(name, "infinite or beyond float32", rows[np.abs(numbers) > FLOAT32_MAX])
    return np.clip(numbers, -FLOAT32_MAX, FLOAT32_MAX)


def convert_labels(
    output: Output, batch: pa.RecordBatch, first: int, violations: Violations
) -> Array:
    """Convert the labels of an output to float64; NaN where column ``output.label_where`` is not 1.

    Args:
        output: an output with a label.
        batch: rows of the data.
        first: row number of the batch's first row in the split.
        violations: collects values that are no label of the task kind, and values of the column
            ``label_where`` other than 0 and 1.
    """
    name, kind = str(output.label), output.task_kind
    column = batch.column(name)
    is_used = np.ones(len(column), bool)
    rows = first + np.arange(len(column))
    if output.label_where is not None:
        condition = convert_floats(
            batch.column(output.label_where), output.label_where, rows, violations
        )
        is_flag = (condition == 0) | (condition == 1) | np.isnan(condition)
        violations.add(output.label_where, "a condition is 0 or 1", rows[~is_flag])
        is_used = condition == 1
        column, rows = column.filter(pa.array(is_used)), rows[is_used]
    labels = convert_floats(column, name, rows, violations)
    if kind.labels == "clicks":  # 0 or 1
        is_invalid = (labels != 0) & (labels != 1) & ~np.isnan(labels)
        violations.add(name, f"a {kind.name} label is 0 or 1", rows[is_invalid])
    else:
        violations.add(name, f"a {kind.name} label is at least 0", rows[labels < 0])
    result = np.full(len(is_used), np.nan)
    result[is_used] = labels
    return result


def convert_groups(
    column: pa.Array, name: str, first: int, group_numbers: dict[Any, int], violations: Violations
) -> Array:
    """Convert a group column to int64: integers stay, other values get numbers in order.

    ``group_numbers`` contains the number of each value of earlier batches; new values are added.
    """
    rows = first + np.arange(len(column))
    violations.add(name, "null", rows[null_positions(column)])
    if pa.types.is_integer(column.type):
        numbers: Array = column.fill_null(0).to_numpy(zero_copy_only=False)
        violations.add(name, "does not fit int64", rows[numbers > np.iinfo(np.int64).max])
        return numbers.astype(np.int64)
    if pa.types.is_floating(column.type):
        numbers = column.cast(pa.float64()).fill_null(0).to_numpy()
        violations.add(name, "NaN", rows[np.isnan(numbers)])
    encoded = column.dictionary_encode()
    unique_numbers = [
        group_numbers.setdefault(value, len(group_numbers))
        for value in encoded.dictionary.to_pylist()
    ]
    indices = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
    return np.asarray(np.array(unique_numbers or [0], np.int64)[indices])


def convert_times(column: pa.Array, name: str, first: int, violations: Violations) -> Array:
    """Convert a time column to int64 or float64; nulls and non-finite values are violations.

    Timestamps become microseconds since 1970, other numbers are unchanged.
    """
    rows = first + np.arange(len(column))
    violations.add(name, "null", rows[null_positions(column)])
    times = to_plain_times(column).fill_null(0).to_numpy(zero_copy_only=False)
    if times.dtype == np.float64:
        violations.add(name, "NaN or infinite", rows[~np.isfinite(times)])
    return np.asarray(times)


def check_equal_lengths(
    signature: Signature, batch: pa.RecordBatch, first: int, violations: Violations
) -> None:
    """Add violations for sequences that must have lists of equal length, but have not.

    Args:
        signature: the sequences, some with ``same_length_as``.
        batch: a record batch of the split.
        first: row number of the batch's first row in the split.
        violations: collects the rows.
    """
    sequences = {item.name: item for item in signature.inputs if isinstance(item, SequenceInput)}
    for item in sequences.values():
        other = sequences.get(str(item.same_length_as))
        if other is not None:
            name, other_name = item.columns[0], other.columns[0]
            # The third result of ``flatten`` is the number of values of each row.
            lengths, expected = (flatten(batch.column(column))[2] for column in (name, other_name))
            rule = f"a list has another length than that of column {other_name!r} in its row"
            violations.add(name, rule, first + np.flatnonzero(lengths != expected))
