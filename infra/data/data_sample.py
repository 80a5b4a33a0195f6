"""Sample rows of a data file, and summarize its columns, before a signature exists.

A draft is the folder that becomes a bundle when it is packed. ``DraftRefused`` is raised if no
draft can be written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra.data.parquet import SplitContents, batches, flatten, part_files
from infra.data.parquet_inspector import inspect_parquet
from infra.errors import DraftRefused

SAMPLE_ROWS = 256
"""Rows of the sample.

With so many rows it is improbable that ids equal those of another column by chance, or that all
logits are in the range of probabilities.
"""

USABLE = {
    "integer": "integer",
    "boolean": "float",
    "float": "float",
    "list of integer": "integer_list",
    "list of float": "float_list",
}
"""The types of columns of numbers, which a network can read, and their kind in a summary."""

TEXT = "text"
"""The kind of a column of strings."""

OTHER = "other"
"""The kind of a column of any other type."""

KINDS = {**USABLE, "string": TEXT}
"""The types of all columns that are sampled, and their kind in a summary."""

TRAIN = "train"


@dataclass
class ColumnSummary:
    """The sampled values of one column, and statistics of all its values in all splits.

    Attributes:
        kind: a value of ``USABLE``, ``TEXT`` or ``OTHER``.
        values: int64 or float32 ``(rows,)``, or one such array per row; a list of strings for
            texts; none of another type.
        shortest: length of the shortest list; 0 without lists.
        longest: length of the longest list; 0 without lists.
        low: smallest integer; 0 for floats.
        high: largest integer; 0 for floats.
    """

    kind: str
    values: Any = field(default_factory=list)
    shortest: int = 0
    longest: int = 0
    low: int = 0
    high: int = 0


def data_files(folder: Path, splits: tuple[str, ...]) -> dict[str, Path]:
    """Return the files or folders of the splits in a folder, by split.

    Args:
        folder: contains ``train.parquet`` or a folder ``train`` with parquet files, and the same
            for ``test`` and other splits.
        splits: the names of splits to look for.

    Raises:
        DraftRefused: there is no train or test data.
    """
    found = {
        split: path
        for split in splits
        for path in (folder / split, folder / f"{split}.parquet")
        if path.exists()
    }
    if missing := [split for split in (TRAIN, "test") if split not in found]:
        got = tuple(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ()
        raise DraftRefused("data_missing", folder=str(folder), got=got or f"no {missing[0]} data")
    return found


def summarize_columns(files: Mapping[str, Path]) -> dict[str, ColumnSummary]:
    """Sample rows of the training data, and compute the ranges of all columns in all splits.

    Nulls count as 0 or as an empty text; packing refuses them with their row numbers. A column
    whose type differs between splits or part files, or that a part lacks, has the kind ``OTHER``.

    Args:
        files: the file or folder of each split, with ``train``.

    Raises:
        DataRefused: a file cannot be read.
        DraftRefused: a split has no rows.
    """
    summaries: dict[str, ColumnSummary] = {}
    for split in sorted(files, key=lambda name: name != TRAIN):  # the training data first
        contents = _inspect(files[split])
        kinds = {name: KINDS.get(kind, OTHER) for name, kind in contents.kinds.items()}
        if split == TRAIN:
            summaries = {name: ColumnSummary(kind) for name, kind in kinds.items()}
        for name, summary in summaries.items():
            if kinds.get(name, summary.kind) != summary.kind:
                summary.kind = OTHER
        names = [name for name in summaries if kinds.get(name, OTHER) == summaries[name].kind]
        names = [name for name in names if summaries[name].kind in USABLE.values()]
        texts = [name for name, summary in summaries.items() if summary.kind == TEXT]
        if split == TRAIN and texts:
            _, batch = next(batches(contents, texts))
            for name in texts:
                summaries[name].values = _sample_rows(batch.column(name)).fill_null("").to_pylist()
        for first, batch in batches(contents, names):
            for name in names:
                _add(summaries[name], batch.column(name), is_first=split == TRAIN and first == 0)
    return summaries


def _inspect(path: Path) -> SplitContents:
    """Inspect the files of a split, and return the types of their columns.

    The first inspection reads only the types. The second one reads the columns with a type in
    ``KINDS`` to their end.

    Raises:
        DataRefused: there is no file, or a file cannot be read.
        DraftRefused: there are no rows.
    """
    files = part_files(path)
    inspections = [inspect_parquet(file, []) for file in files]
    kinds = {
        name: kind if all(part.kinds.count((name, kind)) == 1 for part in inspections) else OTHER
        for name, kind in inspections[0].kinds
    }
    names = [name for name, kind in kinds.items() if kind in KINDS]
    inspections = [inspect_parquet(file, names) for file in files]
    rows = sum(part.rows for part in inspections)
    if rows == 0:
        raise DraftRefused("data_without_rows", path=str(path))
    batch_rows = min(part.batch_rows for part in inspections)
    # ``values``, ``longest`` and ``repeated`` are not needed here, so they are empty.
    return SplitContents(files, rows, kinds, {}, {}, frozenset(), batch_rows)


def _add(summary: ColumnSummary, column: pa.Array, *, is_first: bool) -> None:
    """Add a record batch to a summary; sample the rows of the first one."""
    is_list = summary.kind.endswith("_list")
    values, _, lengths = flatten(column)
    if is_list and len(lengths):
        shortest = int(lengths.min())
        summary.shortest = shortest if is_first else min(summary.shortest, shortest)
        summary.longest = max(summary.longest, int(lengths.max()))
    if summary.kind.startswith("integer") and len(values):
        ends = pc.min_max(values).as_py()
        if ends["min"] is not None:
            summary.low = ends["min"] if is_first else min(summary.low, ends["min"])
            summary.high = ends["max"] if is_first else max(summary.high, ends["max"])
    if is_first:
        summary.values = _sample_values(summary, column)


def _sample_rows(column: pa.Array) -> pa.Array:
    """Return ``SAMPLE_ROWS`` rows spread over a record batch."""
    rows = np.unique(np.linspace(0, len(column) - 1, SAMPLE_ROWS).astype(np.int64))
    return column.take(pa.array(rows))


def _sample_values(summary: ColumnSummary, column: pa.Array) -> Any:
    """Return the values of the sampled rows of a record batch as numbers."""
    chosen = _sample_rows(column)
    if not summary.kind.endswith("_list"):
        return _to_numbers(summary, chosen)
    values, _, lengths = flatten(chosen)
    return tuple(np.split(_to_numbers(summary, values), np.cumsum(lengths)[:-1]))


def _to_numbers(summary: ColumnSummary, values: pa.Array) -> NDArray[Any]:
    """Return values as int64 or float32, with 0 for nulls."""
    dtype, fill = (np.int64, 0) if summary.kind.startswith("integer") else (np.float32, 0.0)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int64())
    result: NDArray[Any] = values.fill_null(fill).to_numpy(zero_copy_only=False).astype(dtype)
    return result
