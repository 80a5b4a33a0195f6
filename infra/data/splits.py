"""Convert parquet files to tensors as a bundle's signature declares, and check ids and lists.

A split is one parquet file, or a folder of part files that are read in the order of their names.
Files are read in record batches, so only the tensors and one batch are in memory. Data that does
not match the signature exactly is an error with column, rule and rows. No value is cast, filled in
or truncated to match, except that a tokenizer truncates texts.

A matrix is an input whose tensor holds several inputs, its fields. An input is ragged (a jagged
bag, a sequence, tokens) if its rows are lists of different lengths, stored one after another.

Layout of ``data.safetensors``, one file per split:

ragged input            the input's name, ``(all ids,)``, and ``@bounds/<name>``, int64
                        ``(rows + 1,)``: the ids of row ``i`` are ``[bounds[i], bounds[i + 1])``
any other input         the input's name, ``(rows, *shape)``, the declared dtype
matrix                  each field like an input, under the field's name
``@label``              float32 ``(rows,)``, or ``(rows, outputs)`` for several outputs; all 1 if
                        an output has no label; NaN in rows for which ``label_where`` is 0
``@group``              int64 ``(rows,)``; integers are unchanged, other values are numbered in
                        the order of their first appearance
``@time``               ``(rows,)``; timestamps as int64 microseconds since 1970, numbers as
                        int64 or float64
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file

from compressors.contracts import (
    RAGGED,
    DataInput,
    DenseInput,
    Frozen,
    IdInput,
    IntegerInput,
    JaggedBag,
    KeyInput,
    PaddedBag,
    SequenceInput,
    Signature,
    TokensInput,
)
from infra.data.column_arrays import (
    check_equal_lengths,
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
)
from infra.data.tokenization import TextTokenizer, load_tokenizers
from infra.memory import require_memory
from infra.store.disk import translate_os_errors

FILE = "data.safetensors"


class Prepared(Frozen):
    """A split written as tensors: number of rows, bytes of the file, and names of the tensors."""

    rows: int
    bytes: int
    tensors: tuple[str, ...]


def prepare(
    parquet: Path,
    signature: Signature,
    into: Path,
    tokenizer_files: Mapping[str, Path] = MappingProxyType({}),
) -> Prepared:
    """Write one split as ``into/data.safetensors`` in the layout of this module's docstring.

    Args:
        parquet: a file, or a folder of part files.
        signature: the inputs and outputs, and the columns that they read.
        into: the folder to write to; created if missing.
        tokenizer_files: the file of each tokenizer that an input names, by this name.

    Raises:
        DataRefused: a column is missing or has the wrong type; a value is null, NaN, infinite,
            outside int32 or not a valid label; or a list is longer than its input allows. The error
            lists every violated rule with its column, its first rows and their number. Or a
            tokenizer cannot be used.
        OutOfMemory: the tensors do not fit in memory.
    """
    contents = inspect_split(parquet, signature)
    check_columns(contents, parquet, signature)
    reserved = [item.name for item in signature.data_inputs if item.name.startswith("@")]
    refuse_if_any(
        parquet, [f"input {name!r}: names that begin with '@' are reserved." for name in reserved]
    )
    tokenizers = load_tokenizers(signature, tokenizer_files)
    require_memory(_compute_bytes_needed(contents, signature), f"Converting {parquet} to tensors")
    out = _allocate(contents, signature)
    violations, group_numbers = Violations(), dict[Any, int]()
    for first, batch in batches(contents, (use.column for use in column_uses(signature))):
        batch_rows = slice(first, first + batch.num_rows)
        for item in signature.data_inputs:
            if isinstance(item, TokensInput):
                _write_texts(tokenizers[item.name], batch, first, out, violations)
            else:
                _write_batch(item, batch, first, out, violations)
        check_equal_lengths(signature, batch, first, violations)
        labels = out["@label"].reshape(contents.rows, -1)  # a view: (rows, outputs)
        for index, output in enumerate(signature.outputs):
            if output.label is not None:
                labels[batch_rows, index] = convert_labels(output, batch, first, violations)
        if signature.group is not None:
            column = batch.column(signature.group)
            out["@group"][batch_rows] = convert_groups(
                column, signature.group, first, group_numbers, violations
            )
        if signature.time is not None:
            column = batch.column(signature.time)
            out["@time"][batch_rows] = convert_times(column, signature.time, first, violations)
    violations.refuse(parquet)
    for item in signature.data_inputs:
        if isinstance(item, RAGGED):
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


def _compute_bytes_needed(contents: SplitContents, signature: Signature) -> int:
    """Return the total size of a split's tensors in bytes."""
    row_bytes = sum(
        math.prod(item.shape) * np.dtype(item.dtype).itemsize
        for item in signature.data_inputs
        if not isinstance(item, RAGGED)
    )
    ragged = [item for item in signature.data_inputs if isinstance(item, RAGGED)]
    id_bytes = sum(
        _compute_max_ids(item, contents) * np.dtype(item.dtype).itemsize for item in ragged
    )
    # Per row: 8 bytes for the bounds of each ragged input, 4 for each label, 16 for group and time.
    labels = 4 * len(signature.outputs)
    return contents.rows * (row_bytes + 8 * len(ragged) + labels + 16) + id_bytes


def _compute_max_ids(item: JaggedBag | SequenceInput, contents: SplitContents) -> int:
    """Return the number of an input's ids in a split.

    For texts, which are not tokenized yet, it is the largest possible number.
    """
    values = contents.values[item.columns[0]]
    return values * item.shape[0] if isinstance(item, TokensInput) else values


def _allocate(contents: SplitContents, signature: Signature) -> dict[str, Array]:
    """Return tensors for all rows of a split; most of their values are not initialized."""
    out: dict[str, Array] = {}
    for item in signature.data_inputs:
        if isinstance(item, RAGGED):
            out[item.name] = np.empty(_compute_max_ids(item, contents), item.dtype)
            out[f"@bounds/{item.name}"] = np.zeros(contents.rows + 1, np.int64)
        else:
            out[item.name] = np.empty((contents.rows, *item.shape), item.dtype)
    outputs = (len(signature.outputs),) if signature.has_several_outputs else ()
    out["@label"] = np.ones((contents.rows, *outputs), np.float32)
    if signature.group is not None:
        out["@group"] = np.empty(contents.rows, np.int64)
    if signature.time is not None:
        is_float = contents.kinds[signature.time] == "float"
        out["@time"] = np.empty(contents.rows, np.float64 if is_float else np.int64)
    return out


def _write_batch(
    item: DataInput,
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
    if isinstance(item, IdInput | IntegerInput | KeyInput):
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
        return
    shortest = item.min_length if isinstance(item, SequenceInput) else 0
    if (too_short := np.flatnonzero(lengths < shortest)).size:
        length = lengths[too_short[0]]
        rule = f"a list has {length} ids, input {item.name!r} needs at least {shortest}"
        violations.add(name, rule, first + too_short)
    elif isinstance(item, PaddedBag):
        target[:] = item.padding_id
        target[np.arange(limit) < lengths[:, None]] = ids
    else:
        _write_lists(item, ids, lengths, first, out)


def _write_texts(
    tokenizer: TextTokenizer,
    batch: pa.RecordBatch,
    first: int,
    out: dict[str, Array],
    violations: Violations,
) -> None:
    """Tokenize one batch of an input's texts, and write the ids.

    The last four arguments are those of ``_write_batch``.
    """
    item = tokenizer.item
    ids, lengths = tokenizer.convert(batch.column(item.columns[0]), first, violations)
    _write_lists(item, ids, lengths, first, out)


def _write_lists(
    item: DataInput, ids: Array, lengths: Array, first: int, out: dict[str, Array]
) -> None:
    """Write the lists of one batch of a ragged input, and their bounds.

    Args:
        item: the input.
        ids: the ids of all rows, one after another, ``(ids,)``.
        lengths: the number of ids of each row, int64 ``(rows,)``.
        first: row number of the batch's first row in the split.
        out: the tensors of the split by name.
    """
    bounds = out[f"@bounds/{item.name}"][first : first + len(lengths) + 1]
    bounds[1:] = bounds[0] + np.cumsum(lengths)
    out[item.name][bounds[0] : bounds[-1]] = ids
