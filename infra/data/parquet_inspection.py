"""The child process that reads an untrusted parquet file once, completely, within limits.

Such a file can end the process that reads it (a damaged footer aborts the C++ reader), declare rows
that it does not have, or expand to any size. So a child process first reads every column that is
needed, within limits of memory and time, and reports the counts of rows and values. Afterwards the
parent process can read the file safely with the same library and batches.
``parquet_inspector.py`` starts the child process and sends it requests, one JSON line each.

This module imports only pyarrow and numpy, so that the process starts quickly.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH_ROWS = 65_536
MIN_BATCH_ROWS = 256
BATCH_VALUES = 2**24
"""Most values of one batch (128 MiB of float64), if the footer states the values per row."""

MEMORY_LIMIT = 2 * 2**30
"""Bytes of memory that the child process may use in addition to its memory at the start."""

EXPANDED_BYTES = 2**30
EXPANSION = 1000
"""A file may decode to ``EXPANDED_BYTES`` (1 GiB), or to ``EXPANSION`` times its size if larger."""

MAX_COLUMNS = 20_000
MAX_NAME_CHARACTERS = 4 * 2**20
"""Most characters of all column names together."""

BUFFER_BYTES = 2**20


class NotUsable(Exception):
    """A file cannot be used.

    Attributes:
        code: a code of ``DataRefused``.
        fields: the fields of that code except ``file``.
    """

    def __init__(self, code: str, **fields: Any) -> None:
        super().__init__(code)
        self.code = code
        self.fields = fields


def get_kind(dtype: pa.DataType) -> str:
    """Return the general name of a column type, such as ``integer`` or ``list of float``.

    Bit width, unit and encoding are omitted, except that a timestamp may have a time zone.
    """
    types = pa.types
    if types.is_dictionary(dtype):
        return get_kind(dtype.value_type)
    if types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
        return f"list of {get_kind(dtype.value_type)}"
    if types.is_timestamp(dtype):
        return "timestamp with time zone" if dtype.tz else "timestamp"
    names = (
        ("integer", types.is_integer),
        ("float", types.is_floating),
        ("boolean", types.is_boolean),
        ("date", types.is_date),
        ("time of day", types.is_time),
        ("decimal", types.is_decimal),
        ("string", types.is_string),
        ("string", types.is_large_string),
        ("binary", types.is_binary),
        ("binary", types.is_large_binary),
    )
    return next((name for name, matches in names if matches(dtype)), str(dtype)[:200])


def open_parquet(file: str | Path) -> pq.ParquetFile:
    """Open a parquet file that is read through a buffer of 1 MiB per column.

    So the memory does not depend on the size of row groups.
    """
    return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)


def record_batches(
    source: pq.ParquetFile, columns: list[str], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Yield record batches of some columns; dictionary-encoded columns are decoded."""
    for batch in source.iter_batches(batch_rows, columns=columns, use_threads=False):
        arrays = [decode_dictionary(column) for column in batch.columns]
        yield pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)


def decode_dictionary(column: pa.Array) -> pa.Array:
    """Decode a dictionary-encoded column; return any other column unchanged."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def inspect(file: str, columns: Iterable[str]) -> dict[str, Any]:
    """Read some columns of a file to its end and count their rows and values.

    Args:
        file: path of a parquet file.
        columns: names of the columns to read; names that the file does not contain are skipped.

    Returns:
        The fields of ``parquet_inspector.Inspected``: ``rows``; ``kinds``, a list of [name, type]
        of all columns; ``values``, number of values by column read; ``longest``, length of the
        longest list by column read; ``batch_rows``, rows per batch to read the file with.

    Raises:
        NotUsable: the file has too many columns, states a wrong number of rows, or expands too far.
        Exception: pyarrow may raise exceptions of any class on a damaged file.
    """
    with open_parquet(file) as source:
        schema, footer = source.schema_arrow, source.metadata
        kinds = [[name, get_kind(schema.field(k).type)] for k, name in enumerate(schema.names)]
        name_characters = sum(len(name) for name in schema.names)
        if len(kinds) > MAX_COLUMNS or name_characters > MAX_NAME_CHARACTERS:
            raise NotUsable(
                "too_many_columns",
                columns=len(kinds),
                characters=name_characters,
                most_columns=MAX_COLUMNS,
                most_characters=MAX_NAME_CHARACTERS,
            )
        # Repeated names are not read; the parent reports them.
        names = [name for name in dict.fromkeys(columns) if schema.names.count(name) == 1]
        batch_rows = _choose_batch_rows(footer, names)
        counts = (
            _count_values(source, names, batch_rows, _compute_max_decoded_bytes(file))
            if names
            else None
        )
        if counts is not None and counts["rows"] != footer.num_rows:
            raise NotUsable("footer_rows_differ", expected=footer.num_rows, got=counts["rows"])
    counts = counts or {"rows": footer.num_rows, "values": {}, "longest": {}}
    return {**counts, "kinds": kinds, "batch_rows": batch_rows}


def _count_values(
    source: pq.ParquetFile, columns: list[str], batch_rows: int, most_bytes: int
) -> dict[str, Any]:
    """Read columns to the end of the file and count rows and values by column.

    Raises:
        NotUsable: the decoded columns have more than ``most_bytes``.
    """
    rows, size = 0, 0
    values, longest = dict.fromkeys(columns, 0), dict.fromkeys(columns, 0)
    for batch in record_batches(source, columns, batch_rows):
        batch.validate(full=True)
        rows += batch.num_rows
        for name in columns:
            column = batch.column(name)
            if get_kind(column.type).startswith("list of "):
                list_values = decode_dictionary(pc.list_flatten(column))
                lengths = pc.list_value_length(column).fill_null(0)
                values[name] += len(list_values)
                longest[name] = max(longest[name], pc.max(lengths).as_py() or 0)
                size += list_values.nbytes
            else:
                values[name] += len(column)
                size += column.nbytes
        if size > most_bytes:
            raise NotUsable("expands_too_far", most_bytes=most_bytes, factor=EXPANSION)
    return {"rows": rows, "values": values, "longest": longest}


def _compute_max_decoded_bytes(file: str) -> int:
    """Return the number of bytes that a file may decode to."""
    return max(EXPANDED_BYTES, EXPANSION * Path(file).stat().st_size)


def _choose_batch_rows(footer: pq.FileMetaData, columns: list[str]) -> int:
    """Choose the number of rows per batch from the values per row that the footer states.

    The footer may be wrong, so this is only an estimate.
    """
    values_per_row = 1
    for index in range(footer.num_row_groups):
        row_group = footer.row_group(index)
        values = 0
        for column in range(row_group.num_columns):  # a list column has paths such as name.list
            chunk = row_group.column(column)
            if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
                values += max(chunk.num_values, 0)
        values_per_row = max(values_per_row, values // max(row_group.num_rows, 1))
    return int(np.clip(BATCH_VALUES // values_per_row, MIN_BATCH_ROWS, BATCH_ROWS))


# --- the child process -----------------------------------------------------------------------


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """Inspect one file and return the response for the parent.

    The response has the fields of ``inspect``; or ``refused``, the code and fields of a
    ``NotUsable``; or ``memory`` if the limit was exceeded; or ``errno`` of an ``OSError``.
    """
    try:
        return inspect(request["file"], request["columns"])
    except NotUsable as fault:
        return _encode_refusal(fault)
    except MemoryError:
        return {"memory": True}
    except OSError as fault:
        if fault.errno is not None:
            return {"errno": fault.errno}
        return _encode_refusal(_build_unreadable(fault))
    except Exception as fault:  # the reader raises errors of many classes on damaged files
        return _encode_refusal(_build_unreadable(fault))


def _encode_refusal(fault: NotUsable) -> dict[str, Any]:
    return {"refused": {"code": fault.code, "fields": fault.fields}}


def _build_unreadable(fault: Exception) -> NotUsable:
    """Return the error for an exception of pyarrow, with its message on one line."""
    reason = " ".join(str(fault).split())[:500].encode(errors="replace").decode()
    return NotUsable("unreadable", problem=reason)


def limit_memory(additional_bytes: int) -> int:
    """Limit the address space of this process to ``additional_bytes`` more than it has now.

    A lower limit that was inherited from the parent stays in force.

    Returns:
        The number of bytes that the process may still allocate.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    inherited = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    limits = [used + additional_bytes, *inherited]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    return min(limits) - used


def main() -> None:
    """Process requests, one line of JSON each, until the parent closes the pipe.

    The first line of the output is the number of bytes that this process may allocate.
    """
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")  # 1: standard output, 2: standard error
    os.dup2(2, 1)  # so that output of libraries does not mix with the responses
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pa.set_io_thread_count(1)
    pa.set_cpu_count(1)
    print(json.dumps({"memory": limit_memory(MEMORY_LIMIT)}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # If the parent has ended, this timer of the kernel ends the process, 5 s after the parent's
        # time limit. Python cannot interrupt native code.
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 5)
        response = json.dumps(respond(request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(response, file=out, flush=True)


if __name__ == "__main__":
    main()
