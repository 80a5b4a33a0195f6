"""Read the columns that a signature uses from parquet files, and check their types.

A split is one file, or a folder of part files that are read in the order of their names. Row
numbers in errors start at 0 and continue through all parts.
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

from compressors.contracts import (
    DenseInput,
    IdInput,
    IntegerInput,
    KeyInput,
    Output,
    Signature,
    TokensInput,
)
from infra.data.parquet_inspection import (
    BATCH_ROWS,
    decode_dictionary,
    get_kind,
    open_parquet,
    record_batches,
)
from infra.data.parquet_inspector import inspect_parquet
from infra.errors import DataRefused

ROWS_SHOWN = 20
"""Most row numbers that an error lists for one violated rule."""

# Column types, as ``get_kind`` names them. Moments are points in time.
NUMBERS = ("integer", "float", "boolean")
MOMENTS = ("timestamp", "timestamp with time zone", "date")
SCALARS = (*NUMBERS, *MOMENTS, "string", "binary", "decimal", "time of day")

Array = NDArray[Any]


class ColumnUse(NamedTuple):
    """One use of a column by a signature. A column may have several, such as input and group.

    Attributes:
        column: name of the column.
        purpose: the use, for messages, such as ``the label``.
        kinds: the accepted column types, as ``get_kind`` names them.
        remedy: what to do if the column has another type.
    """

    column: str
    purpose: str
    kinds: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class SplitContents:
    """Counts and column types of a split, read from all data and not only from the footers.

    Attributes:
        files: the part files, in reading order.
        rows: number of rows of all parts.
        kinds: type of each column, as ``get_kind`` names it.
        values: number of values of each column that the signature uses; a list has several.
        longest: length of the longest list of each such column; 0 for a column without lists.
        repeated: names that occur several times among the columns of a file.
        batch_rows: rows per record batch to read the files with.
    """

    files: tuple[Path, ...]
    rows: int
    kinds: dict[str, str]
    values: dict[str, int]
    longest: dict[str, int]
    repeated: frozenset[str]
    batch_rows: int


@dataclass
class Violations:
    """Collects violations of rules in the data: their number and first rows by column and rule."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    rows: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def add(self, column: str, rule: str, rows: Array) -> None:
        """Add violations of one rule.

        Args:
            column: name of the column.
            rule: the violated rule, as text.
            rows: int64 (violations,), row number in the split of each invalid value.
        """
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
        refuse_if_any(parquet, lines)


def refuse_if_any(parquet: Path, lines: list[str]) -> None:
    """Raise ``DataRefused`` with these lines, if there are any."""
    if lines:
        raise DataRefused("schema_unfit", path=str(parquet), problems=tuple(lines))


def column_uses(signature: Signature) -> tuple[ColumnUse, ...]:
    """List the columns that a signature reads: one entry per use, in the signature's order.

    Values of an ``IdInput`` are looked up in a table, those of an ``IntegerInput`` are not. A
    ``KeyInput`` identifies an item and is not passed to the model.
    """
    id_remedy = "Encode it to row numbers of the table and store it as int64."
    uses: list[ColumnUse] = []
    for item in signature.data_inputs:
        purpose = f"input {item.name!r}"
        for column in item.columns:
            if isinstance(item, IdInput):
                uses.append(ColumnUse(column, purpose, ("integer",), id_remedy))
            elif isinstance(item, IntegerInput | KeyInput):
                uses.append(ColumnUse(column, purpose, ("integer",), "Store it as int64."))
            elif isinstance(item, TokensInput):
                uses.append(ColumnUse(column, purpose, ("string",), "Store one text a row."))
            elif isinstance(item, DenseInput):
                list_kinds = tuple(f"list of {kind}" for kind in NUMBERS)
                kinds: tuple[str, ...] = list_kinds
                if len(item.columns) > 1:
                    kinds = NUMBERS
                elif item.shape == (1,):
                    kinds = NUMBERS + list_kinds
                uses.append(ColumnUse(column, purpose, kinds, "Store it as float32."))
            else:
                uses.append(ColumnUse(column, purpose, ("list of integer",), id_remedy))
    uses.extend(
        ColumnUse(output.label, _name_label(output, signature), NUMBERS, "Store it as a number.")
        for output in signature.outputs
        if output.label is not None
    )
    uses.extend(
        ColumnUse(
            output.label_where,
            f"the condition of {_name_label(output, signature)}",
            NUMBERS,
            "Store it as 0 and 1.",
        )
        for output in signature.outputs
        if output.label_where is not None
    )
    if signature.group is not None and not signature.scores_rows:
        # Other values than integers would be numbered separately in each split, but this task
        # compares the groups of different splits.
        remedy = "Number the groups the same way in every split."
        uses.append(ColumnUse(signature.group, "the group", ("integer",), remedy))
    elif signature.group is not None:
        uses.append(
            ColumnUse(signature.group, "the group", SCALARS, "Store one plain value a row.")
        )
    if signature.time is not None:
        kinds = ("integer", "float", *MOMENTS)
        uses.append(ColumnUse(signature.time, "the time", kinds, "Store a timestamp or a number."))
    return tuple(uses)


def _name_label(output: Output, signature: Signature) -> str:
    """Name the label of an output in messages."""
    return f"the label of {output.name!r}" if signature.has_several_outputs else "the label"


def inspect_split(parquet: Path, signature: Signature) -> SplitContents:
    """Read the files of a split once, in a child process, and count their rows and values.

    Args:
        parquet: a file, or a folder of part files.
        signature: its columns are read.

    Raises:
        DataRefused: there is no parquet file; or a file cannot be read within the limits of
            ``parquet_inspection``; or parts differ in the type of a column.
    """
    files = part_files(parquet)
    columns = [use.column for use in column_uses(signature)]
    rows, kinds, batch_rows = 0, dict[str, str](), BATCH_ROWS
    values, longest = dict[str, int](), dict[str, int]()
    repeated: set[str] = set()
    for file in files:
        counts = inspect_parquet(file, columns)
        names = Counter(name for name, _ in counts.kinds)
        repeated.update(name for name, count in names.items() if count > 1)
        file_kinds = dict(counts.kinds)
        if file == files[0]:
            kinds = file_kinds
        differences = [
            f"column {name!r} is {file_kinds.get(name, 'missing')} in {file.name}, but "
            f"{kinds.get(name, 'missing')} in {files[0].name}. Write all parts alike."
            for name in {**kinds, **file_kinds}
            if file_kinds.get(name) != kinds.get(name)
        ]
        refuse_if_any(parquet, differences)
        rows += counts.rows
        batch_rows = min(batch_rows, counts.batch_rows)
        for name, count in counts.values.items():
            values[name] = values.get(name, 0) + count
            longest[name] = max(longest.get(name, 0), counts.longest[name])
    return SplitContents(files, rows, kinds, values, longest, frozenset(repeated), batch_rows)


def part_files(parquet: Path) -> tuple[Path, ...]:
    """Return the parquet files of a split in reading order."""
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


def check_columns(contents: SplitContents, parquet: Path, signature: Signature) -> None:
    """Raise if a column that the signature uses is missing, or has a type that it cannot use.

    Args:
        contents: the inspected files.
        parquet: their file or folder, for the error message.
        signature: the columns and their uses.

    Raises:
        DataRefused: there is such a column, for which the error has a line with the remedy; or the
            files have no rows; or the longest list of a dense input has less than half of the
            values that the input needs.
    """
    lines = [] if contents.rows else ["it has no rows."]
    for column, purpose, kinds, remedy in dict.fromkeys(column_uses(signature)):
        kind = contents.kinds.get(column)
        if kind is None:
            lines.append(f"column {column!r} is missing; {purpose} reads it.")
        elif column in contents.repeated:
            lines.append(f"column {column!r} is there more than once. Keep one.")
        elif kind not in kinds:
            if kind.endswith("float") and kinds[0].endswith("integer"):
                remedy = _explain_not_integers(contents, column)
            lines.append(
                f"column {column!r}: {purpose} needs {' or '.join(kinds)}, found {kind} in all "
                f"{contents.rows} row(s). {remedy}"
            )
    if not lines:
        lines = [
            f"column {item.columns[0]!r}: input {item.name!r} has {item.shape[0]} values in a "
            f"row, and the longest list has {contents.longest[item.columns[0]]}."
            for item in signature.data_inputs
            if isinstance(item, DenseInput)
            and len(item.columns) == 1
            and item.shape[0] > max(1, 2 * contents.longest[item.columns[0]])
        ]
    refuse_if_any(parquet, lines)


def _explain_not_integers(contents: SplitContents, column: str) -> str:
    """Return why a float column cannot be read as ids (nulls, fractions), and the remedy.

    The remedy alone is returned if all values are whole numbers.
    """
    violations = Violations()
    for first, batch in batches(contents, (column,)):
        values, rows, _ = flatten(batch.column(column))
        numbers = values.cast(pa.float64()).fill_null(np.nan).to_numpy(zero_copy_only=False)
        is_nan = np.isnan(numbers)
        is_fraction = ~is_nan & (numbers != np.floor(numbers))
        violations.add(column, "null or NaN", first + rows[is_nan])
        violations.add(column, "fraction", first + rows[is_fraction])
    texts = [
        f"{count} value(s) are a {rule}, first in row(s) "
        f"{', '.join(map(str, violations.rows[column, rule]))}."
        for (column, rule), count in violations.counts.items()
    ]
    return " ".join([*texts, "Cast it to int64" + (" when they are gone." if texts else ".")])


def batches(
    contents: SplitContents, columns: Iterable[str]
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the record batches of some columns, each with the row number of its first row.

    Args:
        contents: the inspected files.
        columns: names of the columns; a name that occurs twice is read once.

    Raises:
        DataRefused: a file cannot be read to its end, or has changed since the inspection.
    """
    names = list(dict.fromkeys(columns))
    row = 0
    for file in contents.files:
        try:
            with open_parquet(file) as source:
                for batch in record_batches(source, names, contents.batch_rows):
                    yield row, batch
                    row += batch.num_rows
        except MemoryError:
            raise
        except (pa.ArrowException, OSError) as fault:
            raise DataRefused("file_broken_off", file=str(file), problem=str(fault)) from fault
    if row != contents.rows:
        raise DataRefused(
            "file_changed", file=str(contents.files[0]), expected=contents.rows, got=row
        )


def is_list(column: pa.Array) -> bool:
    """Return whether the values of a column are lists."""
    return get_kind(column.type).startswith("list of ")


def flatten(
    column: pa.Array, name: str = "", first: int = 0, violations: Violations | None = None
) -> tuple[pa.Array, Array, Array]:
    """Flatten a column of lists; the values of any other column are unchanged.

    Args:
        column: a column of one record batch.
        name: name of the column, for ``violations``.
        first: row number of the batch's first row in the split, for ``violations``.
        violations: if given, collects rows whose list is null.

    Returns:
        The values; int64 (values,), the row of each value in the batch; int64 (rows,), the number
        of values of each row.
    """
    if not is_list(column):
        return column, np.arange(len(column)), np.ones(len(column), np.int64)
    if violations is not None:
        violations.add(name, "null list (write an empty one)", first + null_positions(column))
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    values = decode_dictionary(pc.list_flatten(column))
    return values, np.repeat(np.arange(len(column)), lengths), lengths.astype(np.int64)


def null_positions(column: pa.Array) -> Array:
    """Return the positions of the nulls in a column."""
    return np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))


def to_plain_times(column: pa.Array) -> pa.Array:
    """Convert times to int64 microseconds since 1970, and numbers to int64 or float64."""
    kind = get_kind(column.type)
    if kind in MOMENTS:
        zone = getattr(column.type, "tz", None)
        column = column.cast(pa.timestamp("us", zone), safe=False)
    return column.cast(pa.float64() if kind == "float" else pa.int64())
