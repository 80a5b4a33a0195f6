"""The audit a TensorRT engine must pass before it is accepted; needs no GPU or TensorRT.

*Weights.* The builder logs the bytes of the engine's weights. If they exceed the plan's packed
bytes, a table, a scale or a dense layer was widened.

*Sparsity.* The builder chooses by time whether layers with 2:4 zeros run on sparse kernels. Its log
contains the choice; if no layer uses sparse kernels, the result reports that they are not faster.

*Scratch.* A table that is widened before its Gather is written completely into scratch memory at
every call. So scratch memory smaller than one fp16 copy of the table proves that the table is not
widened. A twin of the graph with half the rows is also built: its scratch memory must be the same.
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
"""Tables with fewer rows get no twin: below, other scratch memory hides what a table adds."""

GROWTH = 0.1
"""Share of the smallest cut table's removed bytes by which the two scratch sizes may differ.

Measured: flat graphs differ by exactly 0, a materialised table by 1.3 to 1.9 times
what was removed.
"""

WIDENED = 1.1
WIDENED_BYTES = 64 * 1024
"""Weights may be ``packed * WIDENED + WIDENED_BYTES``.

Measured with TensorRT-RTX 1.7: packed + 2.5 KB for int8, int4 and fp16 tables and for int8 and
fp16 dense layers from 0.3 KB to 13 MB. The constant is for the padding of many small tensors, the
10 % for builders that were never measured. The cheapest widening that changes a whole model, fp16
scales folded to fp32, adds 11 % to int8 rows of 16 and more to anything smaller.
"""

_WIDE_BYTES = 2  # the narrowest type a table can be widened to
_SCRATCH = re.compile(r"\b(?:Max|Total) Scratch Memory:\s*(\d+)")
_WEIGHTS = re.compile(r"\bTotal Weights Memory:\s*(\d+)")

# Up to TensorRT 9 names; from 10 on numbers, followed by names in verbose logs.
_ELIGIBLE = (
    re.compile(r"\(Sparsity\) Layers eligible for sparse math:(?P<names>.*)"),
    re.compile(r"\(Sparsity\) Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics"),
)
_PICKED = (
    re.compile(r"\(Sparsity\) .*picked sparse implementation for layers:(?P<names>.*)"),
    re.compile(r"\(Sparsity\) Chose (?P<count>\d+) layer\(s\) using sparse tactics"),
)

Sparsity = tuple[Literal["picked", "did not pay", "not told"] | None, str | None]
Scratch = tuple[Literal["flat", "grows", "not checkable"], str, tuple[str, ...]]


def log_bytes(messages: Sequence[str], version: str) -> tuple[int, int]:
    """Read scratch and weights bytes of the engine from the builder's log.

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
    """Raise if an engine has more bytes of weights than the plan packed.

    Raises:
        BuildRefused: a weight was widened.
    """
    limit = int(packed_bytes * WIDENED) + WIDENED_BYTES
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
    """Find the initializers of every table, by module.

    Raises:
        BuildRefused: the graph lacks one, or its first dimension does not match the table's rows.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    initializers: dict[str, list[onnx.TensorProto]] = {}
    for table in tables:
        for name in table.initializers:
            if name not in stored:
                raise BuildRefused("initializer_missing", table=table.module, initializer=name)
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


def widened_bytes(tensors: Sequence["onnx.TensorProto"]) -> int:
    """Return the bytes of an fp16 copy of a table: its largest initializer, 2 bytes per element."""
    return max(_elements(tensor) for tensor in tensors) * _WIDE_BYTES


def halve(model: "onnx.ModelProto", tables: Sequence[TableWeights]) -> int | None:
    """Cut every table with ``TWIN_ROWS`` rows or more to half its rows, in place.

    External data is not moved: rows are contiguous, so only the length changes.

    Returns:
        Bytes removed from the table with the smallest removal; None if no table is large enough.
    """
    large = [table for table in tables if table.rows >= TWIN_ROWS]
    initializers = find_tables(model, large)
    # A shared table may be listed twice; it is cut once.
    cut: dict[str, int] = {}
    removed = []
    for table in large:
        together = math.lcm(*(every for every in table.every.values() if every))
        kept_rows = table.rows // (4 * together) * 2 * together
        for tensor in initializers[table.module]:
            entries = table.entries(tensor.name, kept_rows)
            if tensor.name not in cut:
                cut[tensor.name] = 0 if entries is None else _cut(tensor, entries)
        removed.append(sum(cut[tensor.name] for tensor in initializers[table.module]))
    del model.graph.value_info[:]  # shapes of the uncut graph
    return min(removed, default=None)


def judge_scratch(
    scratch_bytes: int,
    twin_bytes: int | None,
    removed_bytes: int | None,
    widened: dict[str, int],
) -> Scratch:
    """Judge whether scratch memory depends on the rows; returns the reason and proven tables.

    Args:
        scratch_bytes: scratch bytes of the engine.
        twin_bytes: scratch bytes of the twin with half the rows; None if no table is large enough
            for a twin.
        removed_bytes: the result of ``halve``.
        widened: bytes of a complete fp16 copy per table.
    """
    proven = tuple(sorted(name for name, size in widened.items() if size > scratch_bytes))
    if twin_bytes is not None and removed_bytes is not None:
        growth = abs(scratch_bytes - twin_bytes)
        if growth > GROWTH * removed_bytes:
            return "grows", f"{scratch_bytes:,} bytes; {twin_bytes:,} with half the rows", ()
    if not widened:
        return "not checkable", "the model has no table", ()
    largest = max(widened, key=lambda name: widened[name])
    if largest not in proven:
        return (
            "not checkable",
            f"the largest table {largest!r} takes {widened[largest]:,} bytes as fp16, which the "
            f"{scratch_bytes:,} bytes of scratch memory for activations could hide",
            proven,
        )
    reason = f"{scratch_bytes:,} bytes, less than an fp16 copy of {largest!r}"
    if twin_bytes is not None:
        reason += f"; {twin_bytes:,} with half the rows"
    return "flat", reason, proven


def judge_sparsity(messages: Sequence[str], ordered: int, version: str) -> Sparsity:
    """Judge from the builder's log how layers with 2:4 zeros run: an outcome and its reason.

    Args:
        messages: the builder's log.
        ordered: number of layers with such zeros.
        version: the version of TensorRT.
    """
    if not ordered:
        return None, None
    eligible, picked = _counted(messages, _ELIGIBLE), _counted(messages, _PICKED)
    if eligible is None or picked is None:
        return "not told", (
            f"{ordered} layers have 2:4 zeros; the log of TensorRT {version} does not say which "
            "would run on sparse kernels. Builders without a GPU leave that to where the engine "
            "runs: measure it there, against the dense model"
        )
    if picked:
        return "picked", f"{picked} of {ordered} layers with 2:4 zeros run on sparse kernels"
    why = "dense kernels were faster for all" if eligible else "none was eligible"
    return "did not pay", (
        f"of {ordered} layers with 2:4 zeros {eligible} were eligible for sparse kernels and none "
        f"runs on one: {why}"
    )


def _counted(messages: Sequence[str], patterns: Sequence[re.Pattern[str]]) -> int | None:
    """Return the layer count in the last such line: there is one per choice of tactics."""
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


def _elements(tensor: "onnx.TensorProto") -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def _cut(tensor: "onnx.TensorProto", rows: int) -> int:
    """Keep the first ``rows`` (even, so that 4-bit rows end on a byte); return bytes removed."""
    import onnx
    from onnx import numpy_helper

    external = {entry.key: entry for entry in tensor.external_data}
    outside = tensor.data_location == onnx.TensorProto.EXTERNAL
    if not outside and not tensor.raw_data:  # values in a typed field: rewrite as raw bytes
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    if outside and "length" not in external:
        raise BuildRefused("initializer_length_missing", initializer=tensor.name)
    before = int(external["length"].value) if outside else len(tensor.raw_data)
    whole = _elements(tensor)
    bits = round(8 * before / whole)
    tensor.dims[0] = rows
    after = _elements(tensor) * bits // 8
    if outside:
        external["length"].value = str(after)
    else:
        tensor.raw_data = tensor.raw_data[:after]
    return before - after
