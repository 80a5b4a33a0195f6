"""Compiled loops over table rows: ``min_max``, ``least_squares`` and ``nearest``.

``row_encoding.py`` calls them. numba compiles them at the first call, which takes some seconds. It
caches the machine code as pickles in ``__pycache__`` next to this file, where Python caches
bytecode: a process that can write there can change the code. If that folder is not writable, each
process compiles again: numba's alternative cache folders, one per user, are not used. All loops are
in one file, because numba detects changes in the file of a function but not in the files of the
functions that it calls.

Arguments of several loops: ``top`` is the highest level as a multiple of the scale, ``low`` the
lowest; ``small`` means that scales are float16; ``planar`` means codes of 4 bits, packed; ``words``
are the bits of stored scales.

Three techniques make the loops fast with bit-identical results:

- The bits of positive floats have the same order as the floats, and integer comparisons have no
  NaN rule that prevents the compiler from comparing sixteen at once.
- A float below 2^22 is rounded to the nearest integer, ties to even, by adding 1.5 * 2^23: the
  sum has no bits for the fraction, and its lowest bits are the integer.
- float16 is computed from the bits of a float32, because compilers for old processors have no
  float16 type.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from compressors.quantize.kernels.least_squares import SHARES

Function = TypeVar("Function", bound=Callable[..., Any])

ROUNDER = np.float32(1.5 * 2**23)
INFINITE = np.int32(0x7F800000)
ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
SMALLEST_16 = np.float32(2.0**-24)
SMALLEST_32 = np.float32(2.0**-126)
LARGEST_16 = np.float32(65504)
LARGEST_32 = np.float32(np.finfo(np.float32).max)
HALF = np.float32(0.5)
ZERO = np.float32(0)
LANES = 64
"""Number of ranges that are fitted together: a loop over them is a few vector instructions."""


def _compiled(function: Function) -> Function:
    """Compile a function at its first call; the compiled code releases the GIL."""
    bytecode = Path(inspect.getfile(function)).parent / "__pycache__"
    try:
        cached = numba.njit(function, nogil=True, cache=True, error_model="numpy")
        if Path(cached.stats.cache_path) == bytecode:
            return cast("Function", cached)
    except RuntimeError:  # numba finds no folder that it can write
        pass
    return cast("Function", numba.njit(function, nogil=True, error_model="numpy"))


def _bitcast(source: Any, result: Any, to: Any) -> Any:
    """Create a compiler intrinsic that reads the bits of one type as another."""

    def bitcast(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], to)

        return result(source), generate

    return intrinsic(bitcast)


_bits: Callable[[Any], np.int32] = _bitcast(types.float32, types.int32, ir.IntType(32))
"""Returns the bits of a float32 as int32."""
_float: Callable[[Any], np.float32] = _bitcast(types.int32, types.float32, ir.FloatType())
"""Returns the float32 with these bits."""


@_compiled
def _to_16(number: np.float32) -> np.int32:
    """Round a float32 below 65520 in absolute value to float16 bits, ties to even."""
    bits = _bits(number)
    size = bits & ALL_BUT_SIGN
    normal = (size + np.int32(0xFFF) + ((size >> np.int32(13)) & np.int32(1))) >> np.int32(13)
    normal -= np.int32(112 << 10)
    # Below 2^-14 float16 is evenly spaced by 2^-24, as float32 is at 0.5: adding 0.5 rounds to it.
    small = _bits(_float(size) + HALF) - _bits(HALF)
    sign = (bits >> np.int32(16)) & np.int32(0x8000)
    return (small if size < np.int32(113 << 23) else normal) | sign


@_compiled
def _from_16(bits: np.int32) -> np.float32:
    """Convert finite float16 bits to float32."""
    size = bits & np.int32(0x7FFF)
    small = np.float32(size) * SMALLEST_16
    normal = _float((size << np.int32(13)) + np.int32(112 << 23))
    number = small if size < np.int32(0x400) else normal
    return -number if bits & np.int32(0x8000) else number


@_compiled
def _scale_16(scale: np.float32, top: np.float32) -> np.int32:
    """Compute ``levels.stored_scale`` in float16, as bits."""
    bits = _to_16(max(scale, SMALLEST_16))
    clipped = scale * top > _from_16(bits) * (top + HALF)
    return bits + np.int32(1) if clipped else bits


@_compiled
def _below_16(low: np.float32) -> np.int32:
    """Round down to float16, as bits."""
    bits = _to_16(low)
    if _from_16(bits) <= low:
        return bits
    if bits & np.int32(0x7FFF) == np.int32(0):
        return np.int32(0x8001)
    return bits + np.int32(1) if bits & np.int32(0x8000) else bits - np.int32(1)


@_compiled
def _largest(rows: NDArray[np.float32], begin: int, end: int) -> np.int32:
    """Return the largest absolute value in rows, as bits; larger than infinity's for a NaN."""
    most = np.int32(0)
    for row in range(begin, end):
        for place in range(rows.shape[1]):
            most = max(most, _bits(rows[row, place]) & ALL_BUT_SIGN)
    return most


@_compiled
def _ordered(bits: np.int32) -> np.int32:
    """Map float bits to an integer in the same order as the floats; the map is its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & ALL_BUT_SIGN)


@_compiled
def _ends(rows: NDArray[np.float32], begin: int, end: int) -> tuple[np.int32, np.int32]:
    """Return the smallest and the largest number in rows, as integers of ``_ordered``."""
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
    """Write the nearest levels of a row, from ``low`` to ``top``, as bytes."""
    for place in range(rows.shape[1]):
        step = min(max((rows[row, place] - offset) / scale, low), top)
        codes[into, place] = np.uint8(_bits(step + ROUNDER))


@_compiled
def _pack(
    row: int, dim: int, shift: np.uint64, bytes_: NDArray[np.uint8], codes: NDArray[np.uint8]
) -> None:
    """Pack the codes of a row, one per byte, into planar half bytes; add ``shift`` to each."""
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
    """Compute ``levels.symmetric_scale`` of ranges, as floats and bits; True if all succeed."""
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
    """Compute ``levels.asymmetric_ends`` of ranges, as floats and bits; True if all succeed."""
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
    """Fit ranges of ``together`` rows without clipping, and encode the rows.

    Returns:
        -1, or, if a range cannot be stored, the first row of its group of ``LANES`` ranges.
    """
    count, dim = rows.shape
    small = scale_16.size > 0
    low = -top if symmetric else ZERO
    shift = np.uint64(8) if symmetric else np.uint64(0)
    bytes_ = np.zeros((1, dim + 1), np.uint8)
    least, most = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    words, offset_words = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    scales, offsets = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for first in range(0, count, LANES * together):
        entry = first // together
        ranges = min(LANES, -(-(count - first) // together))
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
    """Encode rows with given scales and offsets; ``together`` rows share one."""
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


# --- the rule of least_squares.py ------------------------------------------------------------

# One array, ``lanes``, holds the data of LANES ranges, each item LANES numbers long: the compiler
# can prove that items do not overlap; for separate arrays it would need checks at run time.
LOW, HIGH, INVERSE = 0 * LANES, 1 * LANES, 2 * LANES
BEST, TRIED = 3 * LANES, 5 * LANES  # scale and offset
SUMS, FOUND = 7 * LANES, 12 * LANES  # rr, q, qq, r and qr
ITEMS = 17 * LANES
CUTS = np.array([0.0, *SHARES], np.float32)
KEPT = np.array([1.0, *(1 - share for share in SHARES)], np.float32)


@_compiled
def _stored(scale: np.float32, top: np.float32, small: bool) -> np.float32:
    """Compute ``levels.stored_scale``, as a float32."""
    return _from_16(_scale_16(scale, top)) if small else max(scale, SMALLEST_32)


@_compiled
def _usable(change: np.float32) -> np.float32:
    return change if abs(change) <= LARGEST_32 else ZERO


@_compiled
def _miss(
    value: np.float32,
    scale: np.float32,
    offset: np.float32,
    inverse: np.float32,
    low: np.float32,
    top: np.float32,
) -> tuple[np.float32, np.float32]:
    """Return the nearest code of a weight, and the residual."""
    q = (min(max((value - offset) * inverse, low), top) + ROUNDER) - ROUNDER
    return q, value - (q * scale + offset)


@_compiled
def _turn(rows: NDArray[np.float32], first: int, used: int, tile: NDArray[np.float32]) -> None:
    """Transpose rows into lanes. Lanes without a row keep old values, whose results are unused."""
    if used == LANES:  # a compile-time constant gives faster loops
        for place in range(tile.shape[0]):
            for lane in range(LANES):
                tile[place, lane] = rows[first + lane, place]
    else:
        for place in range(tile.shape[0]):
            for lane in range(used):
                tile[place, lane] = rows[first + lane, place]


@_compiled
def _errors(
    tile: NDArray[np.float32],
    lanes: NDArray[np.float32],
    fit: int,
    sums: int,
    low: np.float32,
    top: np.float32,
) -> None:
    """Compute the squared error of every lane, one number after another, four per iteration."""
    for lane in range(LANES):
        lanes[INVERSE + lane] = np.float32(1) / lanes[fit + lane]
        lanes[sums + lane] = ZERO
    dim = tile.shape[0]
    for place in range(0, dim - 3, 4):
        for lane in range(LANES):
            scale, offset = lanes[fit + lane], lanes[fit + LANES + lane]
            inverse, rr = lanes[INVERSE + lane], lanes[sums + lane]
            _, r = _miss(tile[place, lane], scale, offset, inverse, low, top)
            rr += r * r
            _, r = _miss(tile[place + 1, lane], scale, offset, inverse, low, top)
            rr += r * r
            _, r = _miss(tile[place + 2, lane], scale, offset, inverse, low, top)
            rr += r * r
            _, r = _miss(tile[place + 3, lane], scale, offset, inverse, low, top)
            rr += r * r
            lanes[sums + lane] = rr
    for place in range(dim // 4 * 4, dim):
        for lane in range(LANES):
            scale, offset = lanes[fit + lane], lanes[fit + LANES + lane]
            _, r = _miss(tile[place, lane], scale, offset, lanes[INVERSE + lane], low, top)
            lanes[sums + lane] += r * r


@_compiled
def _residuals(
    tile: NDArray[np.float32],
    lanes: NDArray[np.float32],
    fit: int,
    sums: int,
    low: np.float32,
    top: np.float32,
) -> None:
    """Compute ``least_squares.residuals`` of every lane, summed in the same order."""
    for lane in range(LANES):
        lanes[INVERSE + lane] = np.float32(1) / lanes[fit + lane]
        lanes[sums + lane] = lanes[sums + LANES + lane] = lanes[sums + 2 * LANES + lane] = ZERO
        lanes[sums + 3 * LANES + lane] = lanes[sums + 4 * LANES + lane] = ZERO
    dim = tile.shape[0]
    for place in range(0, dim - 3, 4):
        for lane in range(LANES):
            scale, offset = lanes[fit + lane], lanes[fit + LANES + lane]
            inverse = lanes[INVERSE + lane]
            q0, r0 = _miss(tile[place, lane], scale, offset, inverse, low, top)
            q1, r1 = _miss(tile[place + 1, lane], scale, offset, inverse, low, top)
            q2, r2 = _miss(tile[place + 2, lane], scale, offset, inverse, low, top)
            q3, r3 = _miss(tile[place + 3, lane], scale, offset, inverse, low, top)
            at = sums + lane
            lanes[at] = (((lanes[at] + r0 * r0) + r1 * r1) + r2 * r2) + r3 * r3
            at += LANES
            lanes[at] = (((lanes[at] + q0) + q1) + q2) + q3
            at += LANES
            lanes[at] = (((lanes[at] + q0 * q0) + q1 * q1) + q2 * q2) + q3 * q3
            at += LANES
            lanes[at] = (((lanes[at] + r0) + r1) + r2) + r3
            at += LANES
            lanes[at] = (((lanes[at] + q0 * r0) + q1 * r1) + q2 * r2) + q3 * r3
    for place in range(dim // 4 * 4, dim):
        for lane in range(LANES):
            scale, offset = lanes[fit + lane], lanes[fit + LANES + lane]
            q, r = _miss(tile[place, lane], scale, offset, lanes[INVERSE + lane], low, top)
            lanes[sums + lane] += r * r
            lanes[sums + LANES + lane] += q
            lanes[sums + 2 * LANES + lane] += q * q
            lanes[sums + 3 * LANES + lane] += r
            lanes[sums + 4 * LANES + lane] += q * r


@_compiled
def _keep_better(lanes: NDArray[np.float32], sums: int) -> None:
    """Replace the best scale, offset and sums in the lanes whose error decreased."""
    for lane in range(LANES):
        less = lanes[FOUND + lane] < lanes[SUMS + lane]
        for item in range(2):
            old = lanes[BEST + item * LANES + lane]
            lanes[BEST + item * LANES + lane] = lanes[TRIED + item * LANES + lane] if less else old
        for item in range(sums):
            old = lanes[SUMS + item * LANES + lane]
            lanes[SUMS + item * LANES + lane] = lanes[FOUND + item * LANES + lane] if less else old


@_compiled
def _clip(
    lanes: NDArray[np.float32],
    fit: int,
    cut: np.float32,
    kept: np.float32,
    top: np.float32,
    symmetric: bool,
    small: bool,
) -> bool:
    """Compute ``least_squares._clipped`` of every lane; True if all can be stored."""
    bad = np.int32(0)
    limit = LARGEST_16 if small else LARGEST_32
    for lane in range(LANES):
        least, most = lanes[LOW + lane], lanes[HIGH + lane]
        if symmetric:
            scale = max(-least, most) * kept / top
            offset = ZERO
        else:
            removed = (most - least) * cut
            low, high = (least + removed) + ZERO, most - removed
            bad |= np.int32(abs(low) > limit)
            offset = _from_16(_below_16(low)) if small else low
            scale = max(high - offset, ZERO) / top
        bad |= np.int32(scale > limit)
        lanes[fit + lane] = _stored(scale, top, small)
        lanes[fit + LANES + lane] = offset
    return bool(bad == np.int32(0))


@_compiled
def _refit(
    lanes: NDArray[np.float32], count: np.float32, top: np.float32, symmetric: bool, small: bool
) -> None:
    """Compute ``least_squares._refitted`` of every lane."""
    limit = LARGEST_16 if small else LARGEST_32
    for lane in range(LANES):
        q, qq = lanes[SUMS + LANES + lane], lanes[SUMS + 2 * LANES + lane]
        r, qr = lanes[SUMS + 3 * LANES + lane], lanes[SUMS + 4 * LANES + lane]
        if symmetric:
            more = _usable(qr / qq)
            offset = ZERO
        else:
            more = _usable((qr * count - q * r) / (qq * count - q * q))
            shift = _usable((r - more * q) / count)
            offset = min(max(lanes[BEST + LANES + lane] + shift, -limit), limit) + ZERO
            offset = _from_16(_to_16(offset)) if small else offset
        scale = min(max(lanes[BEST + lane] + more, ZERO), limit)
        lanes[TRIED + lane] = _stored(scale, top, small)
        lanes[TRIED + LANES + lane] = offset


@_compiled
def least_squares(
    rows: NDArray[np.float32],
    rounds: int,
    top: np.float32,
    symmetric: bool,
    planar: bool,
    codes: NDArray[np.uint8],
    scale_16: NDArray[np.uint16],
    scale_32: NDArray[np.uint32],
    offset_16: NDArray[np.uint16],
    offset_32: NDArray[np.uint32],
) -> int:
    """Fit one range per row by the rule ``least_squares``, and encode the rows.

    Returns:
        -1, or, if a range cannot be stored, the first row of its group of ``LANES`` rows.
    """
    count, dim = rows.shape
    small = scale_16.size > 0
    low = -top if symmetric else ZERO
    shift = np.uint64(8) if symmetric else np.uint64(0)
    bytes_ = np.zeros((1, dim + 1), np.uint8)
    tile = np.zeros((dim, LANES), np.float32)
    lanes = np.zeros(ITEMS, np.float32)
    for first in range(0, count, LANES):
        used = min(LANES, count - first)
        for lane in range(used):  # row by row: fastest memory order
            least, most = _ends(rows, first + lane, first + lane + 1)
            if most >= INFINITE or _ordered(least) & ALL_BUT_SIGN >= INFINITE:
                return first
            lanes[LOW + lane], lanes[HIGH + lane] = _float(_ordered(least)), _float(_ordered(most))
        _turn(rows, first, used, tile)
        if not _clip(lanes, BEST, CUTS[0], KEPT[0], top, symmetric, small):
            return first
        _errors(tile, lanes, BEST, SUMS, low, top)
        for cut in range(1, CUTS.size):
            if not _clip(lanes, TRIED, CUTS[cut], KEPT[cut], top, symmetric, small):
                return first
            _errors(tile, lanes, TRIED, FOUND, low, top)
            _keep_better(lanes, 1)
        _residuals(tile, lanes, BEST, SUMS, low, top)
        for _ in range(rounds):
            _refit(lanes, np.float32(dim), top, symmetric, small)
            _residuals(tile, lanes, TRIED, FOUND, low, top)
            _keep_better(lanes, 5)
        for lane in range(used):
            row = first + lane
            scale, offset = lanes[BEST + lane], lanes[BEST + LANES + lane]
            if small:
                scale_16[row] = np.uint16(_to_16(scale))
                if not symmetric:
                    offset_16[row] = np.uint16(_to_16(offset))
            else:
                scale_32[row] = np.uint32(_bits(scale))
                if not symmetric:
                    offset_32[row] = np.uint32(_bits(offset))
            if planar:
                _write(rows, row, offset, scale, low, top, bytes_, 0)
                _pack(row, dim, shift, bytes_, codes)
            else:
                _write(rows, row, offset, scale, low, top, codes, row)
    return -1
