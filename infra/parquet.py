"""Parquet files as record batches: which columns a schema reads, and what is wrong with them.

A split is one file or a folder of part files, read in the order of their names. Rows are counted
through all parts from 0; every refusal names rows by that number.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from compressors.contracts import DenseInput, IdInput, Schema
from infra.errors import DataRefused

BATCH_ROWS = 65_536
ROWS_SHOWN = 20

NUMBERS = ("integer", "float", "boolean")
MOMENTS = ("timestamp", "timestamp with time zone", "date")
SCALARS = (*NUMBERS, *MOMENTS, "string", "binary", "decimal", "time of day")

Array = NDArray[Any]


class Need(NamedTuple):
    """What one column must hold for one use; ``kinds`` as ``kind_of`` names them."""

    column: str
    use: str
    kinds: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class Survey:
    """What the footers of a split's files say, before any row is read."""

    files: tuple[Path, ...]
    rows: int
    kinds: dict[str, str]
    most_values: dict[str, int]
    repeated: frozenset[str]


@dataclass
class Faults:
    """Broken rules of one pass, counted by column and rule; only the first rows are kept."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    rows: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def note(self, column: str, rule: str, rows: Array) -> None:
        """Add broken rows; ``rows`` are row numbers in the split, once a broken value."""
        if len(rows) == 0:
            return
        key = (column, rule)
        self.counts[key] = self.counts.get(key, 0) + len(rows)
        kept = self.rows.setdefault(key, [])
        for row in dict.fromkeys(rows[:ROWS_SHOWN].tolist()):
            if len(kept) < ROWS_SHOWN and row not in kept:
                kept.append(row)

    def refuse(self, parquet: Path) -> None:
        """Raise ``DataRefused`` with one line for each broken rule, if there is any."""
        lines = [
            f"column {column!r}: {rule}; {self.counts[column, rule]} value(s), "
            f"first in row(s) {', '.join(map(str, self.rows[column, rule]))}."
            for column, rule in self.counts
        ]
        refuse(parquet, lines)


def refuse(parquet: Path, lines: list[str]) -> None:
    """Raise ``DataRefused`` with these lines, if there are any."""
    if lines:
        raise DataRefused(f"{parquet} does not fit the schema:\n- " + "\n- ".join(lines))


def needs(schema: Schema) -> tuple[Need, ...]:
    """Every column a schema reads, once a use, in the schema's order."""
    whole = "Encode it to row numbers of the table and store it as int64."
    found: list[Need] = []
    for item in schema.inputs:
        use = f"input {item.name!r}"
        for column in item.columns:
            if isinstance(item, IdInput):
                found.append(Need(column, use, ("integer",), whole))
            elif isinstance(item, DenseInput):
                lists = tuple(f"list of {kind}" for kind in NUMBERS)
                many = len(item.columns) > 1
                kinds = NUMBERS if many else NUMBERS + lists if item.shape == (1,) else lists
                found.append(Need(column, use, kinds, "Store it as float32."))
            else:
                found.append(Need(column, use, ("list of integer",), whole))
    if schema.label is not None:
        found.append(Need(schema.label, "the label", NUMBERS, "Store it as a number."))
    if schema.group is not None and schema.task == "retrieval":
        # Other values are numbered split by split, and here splits are compared.
        remedy = "Number the groups the same way in every split."
        found.append(Need(schema.group, "the group", ("integer",), remedy))
    elif schema.group is not None:
        found.append(Need(schema.group, "the group", SCALARS, "Store one plain value a row."))
    if schema.time is not None:
        kinds = ("integer", "float", *MOMENTS)
        found.append(Need(schema.time, "the time", kinds, "Store a timestamp or a number."))
    return tuple(found)


def kind_of(dtype: pa.DataType) -> str:
    """A column type in one word; widths and encodings do not matter here."""
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
    return next((word for word, fits in words if fits(dtype)), str(dtype))


def survey(parquet: Path) -> Survey:
    """Read the footers of a split's files.

    Raises:
        DataRefused: there is no parquet file, one cannot be read, or parts differ in a type.
    """
    files = _part_files(parquet)
    rows, kinds, most = 0, dict[str, str](), dict[str, int]()
    repeated: set[str] = set()
    for file in files:
        try:
            with pq.ParquetFile(file) as source:
                columns, metadata = source.schema_arrow, source.metadata
        except (pa.ArrowException, OSError) as fault:
            raise DataRefused(f"{file} is not a readable parquet file: {fault}") from fault
        repeated.update(name for name in columns.names if columns.names.count(name) > 1)
        here = {name: kind_of(columns.field(i).type) for i, name in enumerate(columns.names)}
        if file == files[0]:
            kinds = here
        odd = [
            f"column {name!r} is {here.get(name, 'missing')} in {file.name}, but "
            f"{kinds.get(name, 'missing')} in {files[0].name}. Write all parts alike."
            for name in {**kinds, **here}
            if here.get(name) != kinds.get(name)
        ]
        refuse(parquet, odd)
        rows += metadata.num_rows
        for group in range(metadata.num_row_groups):
            for leaf in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(leaf)
                top = _owner(chunk.path_in_schema, here)
                most[top] = most.get(top, 0) + chunk.num_values
    return Survey(files, rows, kinds, most, frozenset(repeated))


def _part_files(parquet: Path) -> tuple[Path, ...]:
    if parquet.is_file():
        return (parquet,)
    if not parquet.is_dir():
        fault = "is neither a file nor a folder" if parquet.exists() else "does not exist"
        raise DataRefused(f"{parquet} {fault}. Give a parquet file or a folder of them.")
    visible = sorted(p for p in parquet.rglob("*.parquet") if p.name[0] not in "._")
    nested = [path for path in visible if path.parent != parquet]
    if nested:
        raise DataRefused(
            f"{parquet} has parquet files in subfolders ({nested[0].relative_to(parquet)}), whose "
            "names may carry columns. Write the part files into one folder."
        )
    for path in visible:
        if not path.is_file():  # opening a pipe would wait for a writer
            raise DataRefused(f"{path} is not a plain file. Put the part file itself there.")
    if not visible:
        raise DataRefused(f"{parquet} has no *.parquet file. Give a file or a folder of them.")
    return tuple(visible)


def _owner(path: str, columns: dict[str, str]) -> str:
    """The column a leaf such as ``genres.list.element`` belongs to."""
    parts = path.split(".")
    tries = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in tries if name in columns), path)


def check_columns(found: Survey, parquet: Path, schema: Schema) -> None:
    """Refuse missing columns and columns of a kind their use cannot read.

    Raises:
        DataRefused: one line for each, with the remedy; also when there are no rows.
    """
    lines = [] if found.rows else ["it has no rows."]
    for column, use, kinds, remedy in dict.fromkeys(needs(schema)):
        kind = found.kinds.get(column)
        if kind is None:
            lines.append(f"column {column!r} is missing; {use} reads it.")
        elif column in found.repeated:
            lines.append(f"column {column!r} is there more than once. Keep one.")
        elif kind not in kinds:
            why = remedy
            if kind.endswith("float") and kinds[0].endswith("integer"):
                why = _why_not_integers(found, column)
            lines.append(
                f"column {column!r}: {use} needs {' or '.join(kinds)}, found {kind} in all "
                f"{found.rows} row(s). {why}"
            )
    refuse(parquet, lines)


def _why_not_integers(found: Survey, column: str) -> str:
    """What keeps a float column from being ids: nulls, fractions, or only its type."""
    faults = Faults()
    for first, batch in batches(found, (column,)):
        values, parents, _ = flat(batch.column(column))
        numbers = values.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
        gone = np.isnan(numbers)
        faults.note(column, "null or NaN", first + parents[gone])
        faults.note(column, "fraction", first + parents[~gone & (numbers != np.floor(numbers))])
    texts = [
        f"{count} value(s) are a {rule}, first in row(s) "
        f"{', '.join(map(str, faults.rows[column, rule]))}."
        for (column, rule), count in faults.counts.items()
    ]
    return " ".join([*texts, "Cast it to int64" + (" when they are gone." if texts else ".")])


def batches(found: Survey, columns: Iterable[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Record batches of some columns, each with the split's row number of its first row.

    Raises:
        DataRefused: a file cannot be read to its end.
    """
    wanted = list(dict.fromkeys(columns))
    row = 0
    for file in found.files:
        try:
            with pq.ParquetFile(file) as source:
                for batch in source.iter_batches(BATCH_ROWS, columns=wanted):
                    plain = [decoded(column) for column in batch.columns]
                    yield row, pa.RecordBatch.from_arrays(plain, names=batch.schema.names)
                    row += batch.num_rows
        except (pa.ArrowException, OSError) as fault:
            raise DataRefused(f"{file} breaks off while it is read: {fault}") from fault


def decoded(column: pa.Array) -> pa.Array:
    """A dictionary-encoded column as its values, any other as it is."""
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def is_list(column: pa.Array) -> bool:
    """Whether a column holds a list per row."""
    return kind_of(column.type).startswith("list of ")


def flat(
    column: pa.Array, name: str = "", first: int = 0, faults: Faults | None = None
) -> tuple[pa.Array, Array, Array]:
    """Lists as values, the row each value is from, and values per row; scalars as themselves."""
    if not is_list(column):
        return column, np.arange(len(column)), np.ones(len(column), np.int64)
    if faults is not None:
        faults.note(name, "null list (write an empty one)", first + nulls(column))
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    values = decoded(pc.list_flatten(column))
    return values, np.repeat(np.arange(len(column)), lengths), lengths.astype(np.int64)


def nulls(column: pa.Array) -> Array:
    """Positions of the nulls."""
    return np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))


def plain_times(column: pa.Array) -> pa.Array:
    """Timestamps and dates as int64 microseconds since 1970, numbers as int64 or float64."""
    kind = kind_of(column.type)
    if kind in MOMENTS:
        zone = getattr(column.type, "tz", None)
        column = column.cast(pa.timestamp("us", zone), safe=False)
    return column.cast(pa.float64() if kind == "float" else pa.int64())
