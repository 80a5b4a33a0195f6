"""Compiled loops over table rows.

Compiled by numba when they are first called and kept beside this file (or, where that cannot be
written, in numba's own cache), so that takes its seconds once. All of them are in one file: numba
looks for changes in the file of a function, not in those of what it calls.

Three devices make the loops fast without changing a bit:

- The bits of positive floats are ordered as the floats are, and integers have no rule about NaN
  that would keep a compiler from looking at sixteen at once.
- A float below 2^22 is rounded to the nearest integer, ties to even, by adding 1.5 * 2^23: the
  sum has no place for the rest, and its lowest bits are the integer.
- float16 is made from the bits of a float32, since compilers for old processors have no such type.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])

ROUNDER = np.float32(1.5 * 2**23)
INFINITE = np.int32(0x7F800000)
ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
SMALLEST_16 = np.float32(2.0**-24)
SMALLEST_32 = np.float32(2.0**-126)
LARGEST_16 = np.float32(65504)
HALF = np.float32(0.5)
ZERO = np.float32(0)


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
def min_max(
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
def nearest(
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
