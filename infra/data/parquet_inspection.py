"""Read a parquet file once, completely, in a process that may be killed.

An untrusted parquet file can end the process that reads it (a damaged footer aborts the C++
reader), declare rows that it does not have, or expand to any size. A child process therefore reads
every column that a schema needs, with limits of memory and time (``parquet_inspector.py`` is the
parent's side), and reports its counts. The parent can then read the same file with the same
library, the same batches, and no more memory.

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
LEAST_BATCH_ROWS = 256
BATCH_VALUES = 2**24
"""Values of one batch, as far as the footer says how many a row has: 128 MiB of doubles."""

MEMORY_LIMIT = 2 * 2**30
EXPANDED_BYTES = 2**30
EXPANSION = 1000
"""A file may decode to 1 GiB, or to 1000 times its own size if that is more."""

MAX_COLUMNS = 20_000
MAX_NAME_BYTES = 4 * 2**20
BUFFER_BYTES = 2**20


class NotUsable(Exception):
    """Why a file is refused: a code of ``DataRefused`` and its fields, except for the file."""

    def __init__(self, code: str, **fields: Any) -> None:
        super().__init__(code)
        self.code = code
        self.fields = fields


def kind_of(dtype: pa.DataType) -> str:
    """Return a column type in one word, without its width and encoding."""
    types = pa.types
    if types.is_dictionary(dtype):
        return kind_of(dtype.value_type)
    if types.is_list(dtype) or types.is_large_list(dtype) or types.is_fixed_size_list(dtype):
        return f"list of {kind_of(dtype.value_type)}"
    if types.is_timestamp(dtype):
        return "timestamp with time zone" if dtype.tz else "timestamp"
    words = (
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
    return next((word for word, fits in words if fits(dtype)), str(dtype)[:200])


def opened(file: str | Path) -> pq.ParquetFile:
    """Open a parquet file for reading through small buffers, independent of its row-group size."""
    return pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)


def record_batches(
    source: pq.ParquetFile, columns: list[str], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Yield record batches of some columns, with dictionaries decoded."""
    for batch in source.iter_batches(batch_rows, columns=columns, use_threads=False):
        plain = [decoded(column) for column in batch.columns]
        yield pa.RecordBatch.from_arrays(plain, names=batch.schema.names)


def decoded(column: pa.Array) -> pa.Array:
    """Decode a dictionary-encoded column; return any other column unchanged."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def inspect(file: str, columns: Iterable[str]) -> dict[str, Any]:
    """Read some columns of a file to its end and count their rows and values.

    Args:
        file: a parquet file.
        columns: columns to read; those the file lacks are skipped.

    Returns:
        ``rows``; ``kinds`` as [name, kind] of every column in order; ``values`` and ``longest``
        by column: its number of values and the length of its longest list; ``batch_rows``.

    Raises:
        NotUsable: the footer declares a wrong number of rows, or the file expands too far.
        Exception: any exception of the reader on a damaged file.
    """
    with opened(file) as source:
        schema, footer = source.schema_arrow, source.metadata
        kinds = [[name, kind_of(schema.field(at).type)] for at, name in enumerate(schema.names)]
        names = sum(len(name) for name in schema.names)
        if len(kinds) > MAX_COLUMNS or names > MAX_NAME_BYTES:
            raise NotUsable(
                "too_many_columns",
                columns=len(kinds),
                characters=names,
                most_columns=MAX_COLUMNS,
                most_characters=MAX_NAME_BYTES,
            )
        wanted = [name for name in dict.fromkeys(columns) if schema.names.count(name) == 1]
        batch_rows = _batch_rows(footer, wanted)
        found = _count(source, wanted, batch_rows, _most_bytes(file)) if wanted else None
        if found is not None and found["rows"] != footer.num_rows:
            raise NotUsable("footer_rows_differ", expected=footer.num_rows, got=found["rows"])
    counts = found or {"rows": footer.num_rows, "values": {}, "longest": {}}
    return {**counts, "kinds": kinds, "batch_rows": batch_rows}


def _count(
    source: pq.ParquetFile, columns: list[str], batch_rows: int, most_bytes: int
) -> dict[str, Any]:
    rows, size = 0, 0
    values, longest = dict.fromkeys(columns, 0), dict.fromkeys(columns, 0)
    for batch in record_batches(source, columns, batch_rows):
        batch.validate(full=True)
        rows += batch.num_rows
        for name in columns:
            column = batch.column(name)
            if kind_of(column.type).startswith("list of "):
                flat = decoded(pc.list_flatten(column))
                lengths = pc.list_value_length(column).fill_null(0)
                values[name] += len(flat)
                longest[name] = max(longest[name], pc.max(lengths).as_py() or 0)
                size += flat.nbytes
            else:
                values[name] += len(column)
                size += column.nbytes
        if size > most_bytes:
            raise NotUsable("expands_too_far", most_bytes=most_bytes, factor=EXPANSION)
    return {"rows": rows, "values": values, "longest": longest}


def _most_bytes(file: str) -> int:
    return max(EXPANDED_BYTES, EXPANSION * Path(file).stat().st_size)


def _batch_rows(footer: pq.FileMetaData, columns: list[str]) -> int:
    """Choose the rows per batch, fewer if rows have many values; the footer may be wrong."""
    most = 1
    for group in range(footer.num_row_groups):
        facts = footer.row_group(group)
        values = 0
        for leaf in range(facts.num_columns):
            chunk = facts.column(leaf)
            if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
                values += max(chunk.num_values, 0)
        most = max(most, values // max(facts.num_rows, 1))
    return int(np.clip(BATCH_VALUES // most, LEAST_BATCH_ROWS, BATCH_ROWS))


# --- the child process -----------------------------------------------------------------------


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Build the child's response for one file: its counts, or why it is refused."""
    try:
        return inspect(request["file"], request["columns"])
    except NotUsable as fault:
        return _refused(fault)
    except MemoryError:
        return {"memory": True}
    except OSError as fault:
        if fault.errno is not None:
            return {"errno": fault.errno}
        return _refused(_unreadable(fault))
    except Exception as fault:  # the reader raises errors of many classes on damaged files
        return _refused(_unreadable(fault))


def _refused(fault: NotUsable) -> dict[str, Any]:
    return {"refused": {"code": fault.code, "fields": fault.fields}}


def _unreadable(fault: Exception) -> NotUsable:
    reason = " ".join(str(fault).split())[:500].encode(errors="replace").decode()
    return NotUsable("unreadable", problem=reason)


def limit_memory(most: int) -> int:
    """Limit this process to ``most`` bytes more than it has; returns the bytes it may use.

    A lower limit inherited from the parent is kept.
    """
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits = [held + most, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    return min(limits) - held


def main() -> None:
    """Process requests, one JSON line each, until the parent closes the pipe."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the responses
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pa.set_io_thread_count(1)
    pa.set_cpu_count(1)
    print(json.dumps({"memory": limit_memory(MEMORY_LIMIT)}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        # Native code cannot be interrupted from Python; the kernel's timer ends the process if the
        # parent no longer exists.
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 5)
        reply = json.dumps(answer(request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, file=out, flush=True)


if __name__ == "__main__":
    main()
