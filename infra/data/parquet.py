"""Parquet files as record batches: columns that a signature needs, and checks of those columns.

A split is one file or a folder of part files, read in the order of their names. Row numbers start
at 0 and continue through all parts; errors use these numbers.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from compressors.contracts import DenseInput, IdInput, Signature
from infra.data.parquet_inspection import BATCH_ROWS, decoded, kind_of, opened, record_batches
from infra.data.parquet_inspector import inspect_parquet
from infra.errors import DataRefused

ROWS_SHOWN = 20

NUMBERS = ("integer", "float", "boolean")
MOMENTS = ("timestamp", "timestamp with time zone", "date")
SCALARS = (*NUMBERS, *MOMENTS, "string", "binary", "decimal", "time of day")

Array = NDArray[Any]


class Need(NamedTuple):
    """The column types that one use of a column accepts; ``kinds`` are names from ``kind_of``."""

    column: str
    use: str
    kinds: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class Survey:
    """Counts of a split's files, taken from the data and not from the footers.

    ``values`` and ``longest`` have an entry for each column that the signature reads: its number of
    values, and the length of its longest list (0 without lists).
    """

    files: tuple[Path, ...]
    rows: int
    kinds: dict[str, str]
    values: dict[str, int]
    longest: dict[str, int]
    repeated: frozenset[str]
    batch_rows: int


@dataclass
class Faults:
    """Violations found in one pass, counted by column and rule; only the first rows are kept."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    rows: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def note(self, column: str, rule: str, rows: Array) -> None:
        """Add violations; ``rows`` are row numbers in the split, one entry per invalid value."""
        if len(rows) == 0:
            return
        key = (column, rule)
        self.counts[key] = self.counts.get(key, 0) + len(rows)
        shown_rows = self.rows.setdefault(key, [])
        for row in dict.fromkeys(rows[:ROWS_SHOWN].tolist()):
            if len(shown_rows) < ROWS_SHOWN and row not in shown_rows:
                shown_rows.append(row)

    def refuse(self, parquet: Path) -> None:
        """Raise ``DataRefused`` with one line per violated rule, if there is any."""
        lines = [
            f"column {column!r}: {rule}; {self.counts[column, rule]} value(s), "
            f"first in row(s) {', '.join(map(str, self.rows[column, rule]))}."
            for column, rule in self.counts
        ]
        refuse(parquet, lines)


def refuse(parquet: Path, lines: list[str]) -> None:
    """Raise ``DataRefused`` with these lines, if there are any."""
    if lines:
        raise DataRefused("schema_unfit", path=str(parquet), problems=tuple(lines))


def needs(signature: Signature) -> tuple[Need, ...]:
    """List every column a signature reads, one entry per use, in the signature's order."""
    whole = "Encode it to row numbers of the table and store it as int64."
    needed: list[Need] = []
    for item in signature.inputs:
        use = f"input {item.name!r}"
        for column in item.columns:
            if isinstance(item, IdInput):
                needed.append(Need(column, use, ("integer",), whole))
            elif isinstance(item, DenseInput):
                lists = tuple(f"list of {kind}" for kind in NUMBERS)
                many = len(item.columns) > 1
                kinds = NUMBERS if many else NUMBERS + lists if item.shape == (1,) else lists
                needed.append(Need(column, use, kinds, "Store it as float32."))
            else:
                needed.append(Need(column, use, ("list of integer",), whole))
    needed.extend(
        Need(output.label, "the label", NUMBERS, "Store it as a number.")
        for output in signature.outputs
        if output.label is not None
    )
    if signature.group is not None and not signature.scores_rows:
        # Other values are numbered separately in each split, and here splits are compared.
        remedy = "Number the groups the same way in every split."
        needed.append(Need(signature.group, "the group", ("integer",), remedy))
    elif signature.group is not None:
        needed.append(Need(signature.group, "the group", SCALARS, "Store one plain value a row."))
    if signature.time is not None:
        kinds = ("integer", "float", *MOMENTS)
        needed.append(Need(signature.time, "the time", kinds, "Store a timestamp or a number."))
    return tuple(needed)


def survey(parquet: Path, signature: Signature) -> Survey:
    """Read a split's files once, in a separate process, and count their rows and values.

    Raises:
        DataRefused: there is no parquet file, one cannot be read within the limits of
            ``parquet_inspection``, or parts differ in a type.
    """
    files = _part_files(parquet)
    columns = [need.column for need in needs(signature)]
    rows, kinds, batch_rows = 0, dict[str, str](), BATCH_ROWS
    values, longest = dict[str, int](), dict[str, int]()
    repeated: set[str] = set()
    for file in files:
        inspected = inspect_parquet(file, columns)
        names = Counter(name for name, _ in inspected.kinds)
        repeated.update(name for name, count in names.items() if count > 1)
        here = dict(inspected.kinds)
        if file == files[0]:
            kinds = here
        odd = [
            f"column {name!r} is {here.get(name, 'missing')} in {file.name}, but "
            f"{kinds.get(name, 'missing')} in {files[0].name}. Write all parts alike."
            for name in {**kinds, **here}
            if here.get(name) != kinds.get(name)
        ]
        refuse(parquet, odd)
        rows += inspected.rows
        batch_rows = min(batch_rows, inspected.batch_rows)
        for name, count in inspected.values.items():
            values[name] = values.get(name, 0) + count
            longest[name] = max(longest.get(name, 0), inspected.longest[name])
    return Survey(files, rows, kinds, values, longest, frozenset(repeated), batch_rows)


def _part_files(parquet: Path) -> tuple[Path, ...]:
    if parquet.is_file():
        return (parquet,)
    if not parquet.is_dir():
        if parquet.exists():
            raise DataRefused("parquet_of_other_kind", path=str(parquet))
        raise DataRefused("parquet_missing", path=str(parquet))
    visible = sorted(p for p in parquet.rglob("*.parquet") if p.name[0] not in "._")
    nested = [path for path in visible if path.parent != parquet]
    if nested:
        raise DataRefused(
            "parquet_in_subfolders", path=str(parquet), file=str(nested[0].relative_to(parquet))
        )
    for path in visible:
        if not path.is_file():  # opening a pipe would wait for a writer
            raise DataRefused("part_no_plain_file", path=str(path))
    if not visible:
        raise DataRefused("parquet_absent", path=str(parquet))
    return tuple(visible)


def check_columns(found: Survey, parquet: Path, signature: Signature) -> None:
    """Raise if a column is missing or has a type that its use cannot read.

    Raises:
        DataRefused: one line per column, with the remedy; also if there are no rows.
    """
    lines = [] if found.rows else ["it has no rows."]
    for column, use, kinds, remedy in dict.fromkeys(needs(signature)):
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
    if not lines:
        lines = [
            f"column {item.columns[0]!r}: input {item.name!r} has {item.shape[0]} values in a "
            f"row, and the longest list has {found.longest[item.columns[0]]}."
            for item in signature.inputs
            if isinstance(item, DenseInput)
            and len(item.columns) == 1
            and item.shape[0] > max(1, 2 * found.longest[item.columns[0]])
        ]
    refuse(parquet, lines)


def _why_not_integers(found: Survey, column: str) -> str:
    """Return why a float column cannot hold ids: nulls, fractions, or only its type."""
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
    """Yield record batches of some columns, each with the row number of its first row.

    Raises:
        DataRefused: a file cannot be read to its end.
    """
    names = list(dict.fromkeys(columns))
    row = 0
    for file in found.files:
        try:
            with opened(file) as source:
                for batch in record_batches(source, names, found.batch_rows):
                    yield row, batch
                    row += batch.num_rows
        except MemoryError:
            raise
        except (pa.ArrowException, OSError) as fault:
            raise DataRefused("file_broken_off", file=str(file), problem=str(fault)) from fault
    if row != found.rows:
        raise DataRefused("file_changed", file=str(found.files[0]), expected=found.rows, got=row)


def is_list(column: pa.Array) -> bool:
    """Return whether a column holds a list per row."""
    return kind_of(column.type).startswith("list of ")


def flat(
    column: pa.Array, name: str = "", first: int = 0, faults: Faults | None = None
) -> tuple[pa.Array, Array, Array]:
    """Flatten lists into values, row of each value, values per row; scalars are unchanged."""
    if not is_list(column):
        return column, np.arange(len(column)), np.ones(len(column), np.int64)
    if faults is not None:
        faults.note(name, "null list (write an empty one)", first + nulls(column))
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    values = decoded(pc.list_flatten(column))
    return values, np.repeat(np.arange(len(column)), lengths), lengths.astype(np.int64)


def nulls(column: pa.Array) -> Array:
    """Return the positions of the nulls."""
    return np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))


def plain_times(column: pa.Array) -> pa.Array:
    """Convert times to int64 microseconds since 1970, numbers to int64 or float64."""
    kind = kind_of(column.type)
    if kind in MOMENTS:
        zone = getattr(column.type, "tz", None)
        column = column.cast(pa.timestamp("us", zone), safe=False)
    return column.cast(pa.float64() if kind == "float" else pa.int64())
