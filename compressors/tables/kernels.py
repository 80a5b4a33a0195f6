"""Compiled loops over table rows: what ``grid`` specifies, bit for bit, in one pass over memory.

A row is read once, from its ends to its codes, where plain torch reads and writes a block for every
operation. Compiled by numba when they are first called and kept beside this file (or, where that
cannot be written, in numba's own cache), so that takes its seconds once.

Three devices make the loops fast without changing a bit:

- The bits of positive floats are ordered as the floats are, and integers have no rule about NaN
  that would keep a compiler from looking at sixteen at once.
- A float below 2^22 is rounded to the nearest integer, ties to even, by adding 1.5 * 2^23: the
  sum has no place for the rest, and its lowest bits are the integer.
- float16 is made from the bits of a float32, since compilers for old processors have no such type.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from compressors.errors import CompressionError
from compressors.tables.grid import Fitted, Grid

Function = TypeVar("Function", bound=Callable[..., Any])

ROUNDER = np.float32(1.5 * 2**23)
INFINITE = np.int32(0x7F800000)
ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
SMALLEST_16 = np.float32(2.0**-24)
SMALLEST_32 = np.float32(2.0**-126)
LARGEST_16 = np.float32(65504)
HALF = np.float32(0.5)
ZERO = np.float32(0)

THREAD_VALUES = 2**18
"""A thread is given no less than this many values: starting one takes as long as half of them."""


def encode(rows: Tensor, grid: Grid, bits: int) -> tuple[Tensor, Fitted]:
    """Encode rows whose ranges end at their largest weights: ``min_max`` and ``nearest`` in one.

    Args:
        rows: float, ``(rows, dim)``; the first of them begins a range.
        grid: levels, type of the scales, and how many rows share one (not 0).
        bits: 8, a byte a code; or 4, planar as in ``planar``.

    Returns:
        Codes uint8 ``(rows, dim)`` or ``(rows, ceil(dim / 2))``, negative ones as their two's
        complement where a byte is a code, plus 8 where it is half of one; and what ``clipping.fit``
        would give.

    Raises:
        CompressionError: a weight is not finite, or too large for the type of the scales.
    """
    count, dim = rows.shape
    together = grid.rows_per_scale
    values, codes = _floats(rows), _room(rows, bits)
    scale = torch.empty(-(-count // together), 1, dtype=grid.dtype)
    offset = None if grid.symmetric else torch.empty_like(scale)
    top = np.float32(grid.half if grid.symmetric else grid.levels - 1)
    stored_scale, stored_offset = _words(scale), _words(scale if offset is None else offset)

    def part(begin: int, end: int) -> int:
        entries = slice(begin // together, -(-end // together))
        worst: int = _min_max(
            values[begin:end],
            together,
            top,
            grid.symmetric,
            bits == 4,
            codes.numpy()[begin:end],
            stored_scale[0][entries],
            stored_scale[1][entries],
            stored_offset[0][entries],
            stored_offset[1][entries],
        )
        return -1 if worst < 0 else begin + worst

    bad = _in_threads(part, count, dim, together)
    if bad >= 0:
        raise _refused(rows[bad : bad + TILE * together], bad, grid)
    return codes, Fitted(scale, offset)


def encode_as(rows: Tensor, fitted: Fitted, grid: Grid, bits: int) -> Tensor:
    """Encode rows to the levels nearest to them, where scales and offsets are known.

    Args:
        rows: finite, float, ``(rows, dim)``; the first of them begins a range.
        fitted: of these rows, or of the whole table where that is one range.
        grid: levels, and how many rows share a scale.
        bits: as for ``encode``.

    Returns:
        Codes as ``encode`` gives them.
    """
    count, dim = rows.shape
    values, codes = _floats(rows), _room(rows, bits)
    top = np.float32(grid.half if grid.symmetric else grid.levels - 1)
    scales = _floats(fitted.scale)[:, 0]
    offsets = np.zeros_like(scales) if fitted.offset is None else _floats(fitted.offset)[:, 0]
    together = grid.rows_per_scale or max(count, 1)

    def part(begin: int, end: int) -> int:
        found = slice(begin // together, -(-end // together)) if grid.rows_per_scale else slice(1)
        into = codes.numpy()[begin:end]
        _nearest(
            values[begin:end], scales[found], offsets[found], together, top, grid.symmetric,
            bits == 4, into,
        )  # fmt: skip
        return -1

    _in_threads(part, count, dim, grid.rows_per_scale or 1)
    return codes


def _floats(values: Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", values.detach().cpu().float().contiguous().numpy())


def _room(rows: Tensor, bits: int) -> Tensor:
    """Where the codes of some rows go."""
    count, dim = rows.shape
    # Large arrays of numpy lie in large pages, which are there several times sooner.
    return torch.from_numpy(np.empty((count, dim if bits == 8 else -(-dim // 2)), np.uint8))


def _words(stored: Tensor) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """The bits of stored numbers as 16 and as 32 bit words: one of the two is empty."""
    flat = stored.view(-1).numpy()
    if stored.dtype == torch.float16:
        return flat.view(np.uint16), np.empty(0, np.uint32)
    return np.empty(0, np.uint16), flat.view(np.uint32)


def _in_threads(part: Callable[[int, int], int], rows: int, dim: int, together: int) -> int:
    """Run over all rows with as many threads as torch would use; the first bad row, or -1."""
    threads = min(torch.get_num_threads(), max(rows * dim // THREAD_VALUES, 1))
    if threads == 1:
        return part(0, rows)
    each = -(-rows // (threads * together)) * together
    with ThreadPoolExecutor(threads) as pool:
        begun = [
            pool.submit(part, begin, min(begin + each, rows)) for begin in range(0, rows, each)
        ]
        return next((bad for work in begun if (bad := work.result()) >= 0), -1)


def _refused(rows: Tensor, begin: int, grid: Grid) -> CompressionError:
    """What is wrong with the range that begins at a row."""
    bad = (~torch.isfinite(rows)).any(dim=1)
    if bool(bad.any()):
        row = begin + int(bad.to(torch.uint8).argmax())
        return CompressionError(f"Row {row} has a NaN or infinite weight; it cannot be stored.")
    remedy = (
        "Set the step's scale to 'float32'"
        if grid.scale == "float16"
        else "Leave the table out of the step"
    )
    return CompressionError(
        f"A weight of {float(rows.abs().max()):g} needs a scale or an offset above {grid.scale}'s "
        f"largest number. {remedy}."
    )


# --- compiled --------------------------------------------------------------------------------


def _compiled(function: Function) -> Function:
    """Compiled when it is first called; other threads run meanwhile."""
    try:
        return cast("Function", numba.njit(function, nogil=True, cache=True, error_model="numpy"))
    except RuntimeError:  # nothing can be written anywhere: every process compiles for itself
        return cast("Function", numba.njit(function, nogil=True, error_model="numpy"))


def _bitcast(given: Any, result: Any, to: Any) -> Any:
    """A compiler intrinsic that reads the bits of one type as another."""

    def bitcast(context: Any, value: Any) -> Any:  # noqa: ARG001
        def made(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
            return builder.bitcast(values[0], to)

        return result(given), made

    return intrinsic(bitcast)


_bits: Callable[[Any], np.int32] = _bitcast(types.float32, types.int32, ir.IntType(32))
"""The bits of a float32."""
_float: Callable[[Any], np.float32] = _bitcast(types.int32, types.float32, ir.FloatType())
"""The float32 of these bits."""


@_compiled
def _to_16(number: np.float32) -> np.int32:
    """A float32 below 65520 in size as float16 bits, rounded to the nearest, ties to even."""
    bits = _bits(number)
    size = bits & ALL_BUT_SIGN
    normal = (size + np.int32(0xFFF) + ((size >> np.int32(13)) & np.int32(1))) >> np.int32(13)
    normal -= np.int32(112 << 10)
    # Below 2^-14 float16 steps evenly by 2^-24, which is the last place of a float32 at 0.5.
    small = _bits(_float(size) + HALF) - _bits(HALF)
    sign = (bits >> np.int32(16)) & np.int32(0x8000)
    return (small if size < np.int32(113 << 23) else normal) | sign


@_compiled
def _from_16(bits: np.int32) -> np.float32:
    """The float32 of finite float16 bits."""
    size = bits & np.int32(0x7FFF)
    small = np.float32(size) * SMALLEST_16
    normal = _float((size << np.int32(13)) + np.int32(112 << 23))
    number = small if size < np.int32(0x400) else normal
    return -number if bits & np.int32(0x8000) else number


@_compiled
def _scale_16(scale: np.float32, top: np.float32) -> np.int32:
    """``grid._stored_scale`` in float16, as bits."""
    bits = _to_16(max(scale, SMALLEST_16))
    clipped = scale * top > _from_16(bits) * (top + HALF)
    return bits + np.int32(1) if clipped else bits


@_compiled
def _below_16(low: np.float32) -> np.int32:
    """The largest float16 that is not above a number, as bits."""
    bits = _to_16(low)
    if _from_16(bits) <= low:
        return bits
    if bits & np.int32(0x7FFF) == np.int32(0):
        return np.int32(0x8001)
    return bits + np.int32(1) if bits & np.int32(0x8000) else bits - np.int32(1)


@_compiled
def _largest(rows: NDArray[np.float32], begin: int, end: int) -> np.int32:
    """The largest size among the numbers of rows, as bits; above infinity's where one is NaN."""
    most = np.int32(0)
    for row in range(begin, end):
        for place in range(rows.shape[1]):
            most = max(most, _bits(rows[row, place]) & ALL_BUT_SIGN)
    return most


@_compiled
def _ordered(bits: np.int32) -> np.int32:
    """Bits of a float as an integer that is ordered as the floats are; its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & ALL_BUT_SIGN)


@_compiled
def _ends(rows: NDArray[np.float32], begin: int, end: int) -> tuple[np.int32, np.int32]:
    """The smallest and the largest number of rows, as ``_ordered``."""
    least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for row in range(begin, end):
        for place in range(rows.shape[1]):
            key = _ordered(_bits(rows[row, place]))
            least, most = min(least, key), max(most, key)
    return least, most


@_compiled
def _write(
    rows: NDArray[np.float32],
    row: int,
    offset: np.float32,
    scale: np.float32,
    low: np.float32,
    top: np.float32,
    codes: NDArray[np.uint8],
    into: int,
) -> None:
    """The nearest levels of a row, ``low`` to ``top``, as bytes."""
    for place in range(rows.shape[1]):
        step = min(max((rows[row, place] - offset) / scale, low), top)
        codes[into, place] = np.uint8(_bits(step + ROUNDER))


@_compiled
def _pack(
    row: int, dim: int, shift: np.uint64, bytes_: NDArray[np.uint8], codes: NDArray[np.uint8]
) -> None:
    """Codes of a row, one a byte, as planar halves of bytes; ``shift`` is added to each."""
    half = codes.shape[1]
    for place in range(half):
        first = np.uint64(bytes_[0, place]) + shift
        second = np.uint64(bytes_[0, half + place]) + shift
        codes[row, place] = np.uint8((first & np.uint64(15)) | (second << np.uint64(4)))
    if dim % 2:
        codes[row, half - 1] = np.uint8(codes[row, half - 1] & np.uint8(15)) | np.uint8(0x80)


@_compiled
def _fit_symmetric(
    most: NDArray[np.int32],
    count: int,
    top: np.float32,
    small: bool,
    scales: NDArray[np.float32],
    words: NDArray[np.int32],
) -> bool:
    """``grid.symmetric_scale`` of some ranges, as floats and as stored; whether all have one."""
    bad = np.int32(0)
    for entry in range(count):
        scale = _float(most[entry]) / top
        bad |= np.int32(most[entry] >= INFINITE)
        if small:
            bad |= np.int32(scale > LARGEST_16)
            words[entry] = _scale_16(scale, top)
            scales[entry] = _from_16(words[entry])
        else:
            scales[entry] = max(scale, SMALLEST_32)
            words[entry] = _bits(scales[entry])
    return bool(bad == np.int32(0))


@_compiled
def _fit_asymmetric(
    least: NDArray[np.int32],
    most: NDArray[np.int32],
    count: int,
    top: np.float32,
    small: bool,
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32],
    words: NDArray[np.int32],
    offset_words: NDArray[np.int32],
) -> bool:
    """``grid.asymmetric_ends`` of some ranges, as floats and as stored; whether all have them."""
    bad = np.int32(0)
    for entry in range(count):
        low = _float(_ordered(least[entry])) + ZERO  # no -0
        bad |= np.int32(most[entry] >= INFINITE) | np.int32(_bits(abs(low)) >= INFINITE)
        if small:
            bad |= np.int32(abs(low) > LARGEST_16)
            offset_words[entry] = _below_16(low)
            offsets[entry] = _from_16(offset_words[entry])
        else:
            offsets[entry] = low
            offset_words[entry] = _bits(low)
        scale = max(_float(_ordered(most[entry])) - offsets[entry], ZERO) / top
        if small:
            bad |= np.int32(scale > LARGEST_16)
            words[entry] = _scale_16(scale, top)
            scales[entry] = _from_16(words[entry])
        else:
            bad |= np.int32(_bits(scale) >= INFINITE)
            scales[entry] = max(scale, SMALLEST_32)
            words[entry] = _bits(scales[entry])
    return bool(bad == np.int32(0))


TILE = 64
"""Ranges that are fitted together: a few kilobytes."""


@_compiled
def _min_max(
    rows: NDArray[np.float32],
    together: int,
    top: np.float32,
    symmetric: bool,
    planar: bool,
    codes: NDArray[np.uint8],
    scale_16: NDArray[np.uint16],
    scale_32: NDArray[np.uint32],
    offset_16: NDArray[np.uint16],
    offset_32: NDArray[np.uint32],
) -> int:
    """Encode ranges of rows; gives the first row of some that cannot all be stored, or -1."""
    count, dim = rows.shape
    small = scale_16.size > 0
    low = -top if symmetric else ZERO
    shift = np.uint64(8) if symmetric else np.uint64(0)
    bytes_ = np.zeros((1, dim + 1), np.uint8)
    least, most = np.zeros(TILE, np.int32), np.zeros(TILE, np.int32)
    words, offset_words = np.zeros(TILE, np.int32), np.zeros(TILE, np.int32)
    scales, offsets = np.zeros(TILE, np.float32), np.zeros(TILE, np.float32)
    for first in range(0, count, TILE * together):
        entry = first // together
        ranges = min(TILE, -(-(count - first) // together))
        for place in range(ranges):
            begin = first + place * together
            end = min(begin + together, count)
            if symmetric:
                most[place] = _largest(rows, begin, end)
            else:
                least[place], most[place] = _ends(rows, begin, end)
        if symmetric:
            good = _fit_symmetric(most, ranges, top, small, scales, words)
        else:
            good = _fit_asymmetric(
                least, most, ranges, top, small, scales, offsets, words, offset_words
            )
        if not good:
            return first
        for place in range(ranges):
            if small:
                scale_16[entry + place] = np.uint16(words[place])
                if not symmetric:
                    offset_16[entry + place] = np.uint16(offset_words[place])
            else:
                scale_32[entry + place] = np.uint32(words[place])
                if not symmetric:
                    offset_32[entry + place] = np.uint32(offset_words[place])
        for place in range(ranges):
            begin = first + place * together
            for row in range(begin, min(begin + together, count)):
                if planar:
                    _write(rows, row, offsets[place], scales[place], low, top, bytes_, 0)
                    _pack(row, dim, shift, bytes_, codes)
                else:
                    _write(rows, row, offsets[place], scales[place], low, top, codes, row)
    return -1


@_compiled
def _nearest(
    rows: NDArray[np.float32],
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32],
    together: int,
    top: np.float32,
    symmetric: bool,
    planar: bool,
    codes: NDArray[np.uint8],
) -> None:
    """Encode ranges of rows with scales and offsets that are known."""
    count, dim = rows.shape
    low = -top if symmetric else ZERO
    shift = np.uint64(8) if symmetric else np.uint64(0)
    bytes_ = np.zeros((1, dim + 1), np.uint8)
    for begin in range(0, count, together):
        scale, offset = scales[begin // together], offsets[begin // together]
        for row in range(begin, min(begin + together, count)):
            if planar:
                _write(rows, row, offset, scale, low, top, bytes_, 0)
                _pack(row, dim, shift, bytes_, codes)
            else:
                _write(rows, row, offset, scale, low, top, codes, row)
