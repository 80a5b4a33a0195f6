"""Audit a TensorRT engine before it is accepted; needs neither a GPU nor TensorRT.

A builder may *widen* a table or layer: convert its packed weights (int8, int4, ...) to a wider
type, so that the compression is lost. The audit detects this from the builder's log. *Packed bytes*
are the bytes of all tensors as the plan stores them. The plan is recpress's list of the format of
each table and layer, not TensorRT's serialized engine.

*Weights.* The log contains the bytes of the engine's weights. If they exceed the packed bytes by
more than a tolerance, a table, a scale or a dense layer was widened.

*Scratch.* A table that is widened before its lookup (the operator Gather) is written completely
into scratch memory, the temporary memory of a call. So scratch memory smaller than one fp16 copy
of the table proves that the table is not widened. ``build.py`` also builds a twin: an engine of the
same graph with half the rows in every large table. Its scratch memory must be the same ("flat").

If a graph multiplies by a table, its scores take scratch memory in proportion to the rows of the
table and of the request. Such a table is not cut, and scratch memory is that of an engine for
requests of one row.

*Sparsity.* The builder decides by measured time whether layers with 2:4 zeros run on sparse
kernels. The audit reads the decision from the log; it rejects no engine for it.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from compressors.contracts.targets.builder import TableWeights
from infra.errors import BuildRefused

if TYPE_CHECKING:
    import onnx

TWIN_ROWS = 200_000
"""Tables with fewer rows are not cut for the twin.

The scratch memory that a smaller table adds cannot be distinguished from activations.
"""

GROWTH = 0.1
"""Largest allowed difference between the scratch memory of engine and twin.

It is a share of the bytes that were removed for the twin from the table that lost the fewest.
Measured: for graphs that widen no table the difference is 0; a widened table adds 1.3 to 1.9 times
the removed bytes.
"""

MAX_WEIGHTS_FACTOR = 1.1
MAX_EXTRA_BYTES = 64 * 1024
"""Weights of an engine may take at most ``packed_bytes * MAX_WEIGHTS_FACTOR + MAX_EXTRA_BYTES``.

Measured with TensorRT-RTX 1.7: packed bytes + 2.5 KB for int8, int4 and fp16 tables and for int8
and fp16 dense layers from 0.3 KB to 13 MB. The constant is for the padding of many small tensors,
the 10 % for other builders, which were not measured. The smallest possible widening of a whole
model (fp16 scales stored as fp32) adds 11 % to int8 tables with 16 columns (2 bytes to the 18 of a
row), and more to tables with fewer columns or fewer bits per value.
"""

_WIDE_BYTES = 2  # per element of fp16, the narrowest type that a table can be widened to
_SCRATCH = re.compile(r"\b(?:Max|Total) Scratch Memory:\s*(\d+)")
_WEIGHTS = re.compile(r"\bTotal Weights Memory:\s*(\d+)")

# Logs of TensorRT up to 9 list the names of the layers; logs of 10 and later contain their number.
_ELIGIBLE = (
    re.compile(r"\(Sparsity\) Layers eligible for sparse math:(?P<names>.*)"),
    re.compile(r"\(Sparsity\) Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics"),
)
_PICKED = (
    re.compile(r"\(Sparsity\) .*picked sparse implementation for layers:(?P<names>.*)"),
    re.compile(r"\(Sparsity\) Chose (?P<count>\d+) layer\(s\) using sparse tactics"),
)

Sparsity = tuple[Literal["used", "not used", "unknown"] | None, str | None]
"""The result of ``judge_sparsity``: outcome and reason."""
Scratch = tuple[Literal["flat", "grows", "not checkable"], str, tuple[str, ...]]
"""The result of ``judge_scratch``: outcome, reason, and tables proven not to be widened."""


def read_log_bytes(messages: Sequence[str], version: str) -> tuple[int, int]:
    """Read the bytes of scratch memory and of weights of an engine from the builder's log.

    Args:
        messages: the builder's log; if a number occurs several times, the largest counts.
        version: the version of TensorRT, for the error.

    Returns:
        Bytes of scratch memory, bytes of weights.

    Raises:
        BuildRefused: this version does not log them, so no audit is possible.
    """
    totals = []
    for name, pattern in (("Max Scratch Memory", _SCRATCH), ("Total Weights Memory", _WEIGHTS)):
        values = [int(hit.group(1)) for text in messages for hit in pattern.finditer(text)]
        if not values:
            raise BuildRefused("log_line_missing", version=version, line=name)
        totals.append(max(values))
    return totals[0], totals[1]


def check_weights(weights_bytes: int, packed_bytes: int, constant_bytes: dict[str, int]) -> None:
    """Raise if an engine has more bytes of weights than ``packed_bytes`` and a tolerance.

    Args:
        weights_bytes: bytes of the engine's weights.
        packed_bytes: bytes of all tensors as the plan stores them.
        constant_bytes: bytes of the network's constants per type, for the error.

    Raises:
        BuildRefused: a weight was widened.
    """
    limit = int(packed_bytes * MAX_WEIGHTS_FACTOR) + MAX_EXTRA_BYTES
    if weights_bytes > limit:
        parts = tuple(f"{kind} {size:,}" for kind, size in sorted(constant_bytes.items()))
        raise BuildRefused(
            "weights_widened",
            weights_bytes=weights_bytes,
            packed_bytes=packed_bytes,
            most_bytes=limit,
            constants=parts,
        )


def find_tables(
    model: "onnx.ModelProto", tables: Sequence[TableWeights]
) -> dict[str, list["onnx.TensorProto"]]:
    """Find the initializers of every table in an ONNX graph.

    Args:
        model: the graph.
        tables: name, number of rows and names of the initializers of each table.

    Returns:
        The initializers by the name of the table's module.

    Raises:
        BuildRefused: the graph lacks an initializer, or its first dimension does not match the
            table's rows.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    initializers: dict[str, list[onnx.TensorProto]] = {}
    for table in tables:
        for name in table.initializers:
            if name not in stored:
                raise BuildRefused("initializer_missing", table=table.module, initializer=name)
            # None for an initializer of the whole table, such as a codebook: its first dimension
            # does not depend on the rows.
            shape, expected_rows = list(stored[name].dims), table.entries(name, table.rows)
            if expected_rows is not None and (not shape or shape[0] != expected_rows):
                raise BuildRefused(
                    "initializer_rows_differ",
                    table=table.module,
                    initializer=name,
                    expected=expected_rows,
                    shape=tuple(shape),
                )
            initializers.setdefault(table.module, []).append(stored[name])
    return initializers


def count_widened_bytes(tensors: Sequence["onnx.TensorProto"]) -> int:
    """Return the bytes of an fp16 copy of a table: its largest initializer, 2 bytes per element."""
    return max(_count_elements(tensor) for tensor in tensors) * _WIDE_BYTES


def halve_large_tables(model: "onnx.ModelProto", tables: Sequence[TableWeights]) -> int | None:
    """Cut every table with ``TWIN_ROWS`` rows or more to half its rows, in place.

    Tables that are multiplied are not cut.

    Files of external data are not changed: rows are contiguous, so it is enough to change the
    length in the graph.

    Returns:
        Bytes that were removed from the table that lost the fewest; None if no table is large
        enough to be cut.
    """
    large = [table for table in tables if table.rows >= TWIN_ROWS and not table.multiplied]
    initializers = find_tables(model, large)
    # A shared table may be listed twice; it is cut once.
    cut: dict[str, int] = {}
    removed = []
    for table in large:
        # ``rows_per_entry`` is the number of rows that share one entry of an initializer, such as a
        # scale. Keep whole groups of such rows, and an even number of groups, so that 4-bit rows of
        # odd width end on a byte.
        group_rows = math.lcm(*(n for n in table.rows_per_entry.values() if n))
        kept_rows = table.rows // (4 * group_rows) * 2 * group_rows
        for tensor in initializers[table.module]:
            entries = table.entries(tensor.name, kept_rows)
            if tensor.name not in cut:
                cut[tensor.name] = 0 if entries is None else _cut_rows(tensor, entries)
        removed.append(sum(cut[tensor.name] for tensor in initializers[table.module]))
    del model.graph.value_info[:]  # shapes of the uncut graph
    return min(removed, default=None)


def judge_scratch(
    scratch_bytes: int,
    twin_bytes: int | None,
    removed_bytes: int | None,
    copy_bytes: dict[str, int],
) -> Scratch:
    """Judge whether scratch memory depends on the number of rows of a table.

    Args:
        scratch_bytes: scratch bytes of the engine.
        twin_bytes: scratch bytes of the twin with half the rows; None if there is no twin.
        removed_bytes: the result of ``halve_large_tables``.
        copy_bytes: bytes of a complete fp16 copy of each table, by the name of its module.

    Returns:
        ``flat``, ``grows`` or ``not checkable`` (activations take enough scratch memory to hide a
        widened table); the reason; the tables that are proven not to be widened.
    """
    proven = tuple(sorted(name for name, size in copy_bytes.items() if size > scratch_bytes))
    if twin_bytes is not None and removed_bytes is not None:
        growth = abs(scratch_bytes - twin_bytes)
        if growth > GROWTH * removed_bytes:
            return "grows", f"{scratch_bytes:,} bytes; {twin_bytes:,} with half the rows", ()
    if not copy_bytes:
        return "not checkable", "the model has no table", ()
    largest = max(copy_bytes, key=lambda name: copy_bytes[name])
    if largest not in proven:
        return (
            "not checkable",
            f"the largest table {largest!r} takes {copy_bytes[largest]:,} bytes as fp16, which the "
            f"{scratch_bytes:,} bytes of scratch memory for activations could hide",
            proven,
        )
    reason = f"{scratch_bytes:,} bytes, less than an fp16 copy of {largest!r}"
    if twin_bytes is not None:
        reason += f"; {twin_bytes:,} with half the rows"
    return "flat", reason, proven


def judge_sparsity(messages: Sequence[str], sparse_layers: int, version: str) -> Sparsity:
    """Read from the builder's log whether layers with 2:4 zeros run on sparse kernels.

    Args:
        messages: the builder's log.
        sparse_layers: number of layers with 2:4 zeros, for which sparse kernels are allowed.
        version: the version of TensorRT, for the reason.

    Returns:
        ``used`` (sparse kernels are used), ``not used`` (the builder uses none) or
        ``unknown`` (the log does not report it); and the reason. None for both without such
        layers.
    """
    if not sparse_layers:
        return None, None
    eligible, picked = _count_layers(messages, _ELIGIBLE), _count_layers(messages, _PICKED)
    if eligible is None or picked is None:
        return "unknown", (
            f"{sparse_layers} layers have 2:4 zeros; the log of TensorRT {version} does not report "
            "which run on sparse kernels. A builder without a GPU leaves the choice to the GPU "
            "that runs the engine: compare the latency with the dense model there"
        )
    if picked:
        return "used", f"{picked} of {sparse_layers} layers with 2:4 zeros run on sparse kernels"
    why = "dense kernels were faster for all" if eligible else "none was eligible"
    return "not used", (
        f"of {sparse_layers} layers with 2:4 zeros {eligible} were eligible for sparse kernels and "
        f"none runs on one: {why}"
    )


def _count_layers(messages: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> int | None:
    """Return the number of layers in the last line that matches; None if no line matches.

    The builder writes such a line each time it chooses kernels.
    """
    count = None
    for text in messages:
        for pattern in patterns:
            for hit in pattern.finditer(text):
                groups = hit.groupdict()
                if "count" in groups:
                    count = int(groups["count"])
                else:
                    count = sum(bool(name.strip()) for name in groups["names"].split(","))
    return count


def _count_elements(tensor: "onnx.TensorProto") -> int:
    """Return the number of elements of an initializer."""
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def _cut_rows(tensor: "onnx.TensorProto", rows: int) -> int:
    """Keep the first ``rows`` rows of an initializer, in place; return the bytes removed."""
    import onnx
    from onnx import numpy_helper

    external = {entry.key: entry for entry in tensor.external_data}
    is_external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if not is_external and not tensor.raw_data:  # values in a typed field: rewrite as raw bytes
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    if is_external and "length" not in external:
        raise BuildRefused("initializer_length_missing", initializer=tensor.name)
    before = int(external["length"].value) if is_external else len(tensor.raw_data)
    bits = round(8 * before / _count_elements(tensor))  # per element
    tensor.dims[0] = rows
    after = _count_elements(tensor) * bits // 8
    if is_external:
        external["length"].value = str(after)
    else:
        tensor.raw_data = tensor.raw_data[:after]
    return before - after
