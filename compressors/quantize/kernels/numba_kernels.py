"""Compiled loops over table rows: ``min_max``, ``least_squares`` and ``nearest``.

``row_encoding.py`` calls them. Their results equal those of ``levels.py``, ``clipping.py`` and
``least_squares.py`` bit for bit. numba compiles the loops at the first call, which takes some
seconds. All loops are in one file, because numba detects changes in the file of a function, but not
in the files of the functions that it calls.

numba caches the machine code as pickles in ``__pycache__`` next to this file, where Python caches
bytecode. A process that can write to that folder can change the code anyway, so the pickles add no
risk. If the folder is not writable, each process compiles again. numba's alternative cache folders,
one per user, are not used, because a process that can write to them could run code here.

Arguments and variables of several loops:

- ``top`` is the highest multiple of the scale (see ``levels.py``), ``bottom`` the lowest.
- ``is_float16``: scales and offsets are stored as float16, otherwise as float32.
- ``planar``: codes have 4 bits and are packed (``bitpacking.py``).
- ``shift`` is added to the multiples of symmetric 4-bit formats, so that codes are not negative.
- ``scale_bits`` and ``offset_bits`` are the bits of stored numbers, as int32.
- ``scale_16`` and ``offset_16``, or ``scale_32`` and ``offset_32``, receive the bits of the stored
  numbers; the two arrays of the other dtype are empty. ``codes`` receives the codes.
- A *lane* is one of ``LANES`` ranges that are processed together.

Three techniques make the loops fast with bit-identical results:

- Floats are compared by their bits as integers, which have the same order for positive floats. The
  comparison of floats has a rule for NaN that prevents the compiler from comparing sixteen at once.
- A float below 2^22 is rounded to the nearest integer, ties to even, by adding 1.5 * 2^23: the sum
  has no bits for the fraction, and its lowest bits are the integer.
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

ROUNDER = np.float32(1.5 * 2**23)  # adding it rounds a float to an integer: see above
INFINITE = np.int32(0x7F800000)  # bits of infinity; NaN has larger ones
ALL_BUT_SIGN = np.int32(0x7FFFFFFF)  # mask of all bits except the sign
SMALLEST_16 = np.float32(2.0**-24)  # smallest positive float16, and smallest stored scale
SMALLEST_32 = np.float32(2.0**-126)
SMALLEST_NEGATIVE_16 = np.int32(0x8001)  # bits of -2^-24, the float16 below zero
LARGEST_16 = np.float32(65504)  # largest finite numbers of float16 and float32
LARGEST_32 = np.float32(np.finfo(np.float32).max)
HALF = np.float32(0.5)
ZERO = np.float32(0)
LANES = 64
"""Number of ranges that are fitted together: a loop over them is a few vector instructions."""


def _compile(function: Function) -> Function:
    """Return a function that numba compiles at its first call, and that releases the GIL."""
    bytecode = Path(inspect.getfile(function)).parent / "__pycache__"
    try:
        cached = numba.njit(function, nogil=True, cache=True, error_model="numpy")
        if Path(cached.stats.cache_path) == bytecode:
            return cast("Function", cached)
    except RuntimeError:  # numba finds no folder that it can write
        pass
    return cast("Function", numba.njit(function, nogil=True, error_model="numpy"))


def _create_bitcast(source: Any, result: Any, to: Any) -> Any:
    """Create a compiler intrinsic that reads the bits of one type as another."""

    def bitcast(context: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], to)

        return result(source), generate

    return intrinsic(bitcast)


_bits: Callable[[Any], np.int32] = _create_bitcast(types.float32, types.int32, ir.IntType(32))
"""Returns the bits of a float32 as int32."""
_float: Callable[[Any], np.float32] = _create_bitcast(types.int32, types.float32, ir.FloatType())
"""Returns the float32 with these bits."""


@_compile
def _to_float16_bits(number: np.float32) -> np.int32:
    """Round a float32 below 65520 in absolute value to float16 bits, ties to even."""
    bits = _bits(number)
    size = bits & ALL_BUT_SIGN
    normal = (size + np.int32(0xFFF) + ((size >> np.int32(13)) & np.int32(1))) >> np.int32(13)
    normal -= np.int32(112 << 10)  # the exponent biases of float32 and float16: 127 - 15
    # Below 2^-14 float16 is evenly spaced by 2^-24, as float32 is at 0.5: adding 0.5 rounds to it.
    subnormal = _bits(_float(size) + HALF) - _bits(HALF)
    sign = (bits >> np.int32(16)) & np.int32(0x8000)
    return (subnormal if size < np.int32(113 << 23) else normal) | sign


@_compile
def _to_float32(bits: np.int32) -> np.float32:
    """Convert finite float16 bits to float32."""
    size = bits & np.int32(0x7FFF)
    subnormal = np.float32(size) * SMALLEST_16
    normal = _float((size << np.int32(13)) + np.int32(112 << 23))
    number = subnormal if size < np.int32(0x400) else normal
    return -number if bits & np.int32(0x8000) else number


@_compile
def _scale_16(scale: np.float32, top: np.float32) -> np.int32:
    """Compute ``levels.stored_scale`` for float16, and return its bits."""
    bits = _to_float16_bits(max(scale, SMALLEST_16))
    clipped = scale * top > _to_float32(bits) * (top + HALF)
    return bits + np.int32(1) if clipped else bits


@_compile
def _round_down_16(low: np.float32) -> np.int32:
    """Round a float32 down to float16, and return its bits."""
    bits = _to_float16_bits(low)
    if _to_float32(bits) <= low:
        return bits
    if bits & np.int32(0x7FFF) == np.int32(0):
        return SMALLEST_NEGATIVE_16
    return bits + np.int32(1) if bits & np.int32(0x8000) else bits - np.int32(1)


@_compile
def _find_largest_bits(rows: NDArray[np.float32], begin: int, end: int) -> np.int32:
    """Return the bits of the largest absolute value in rows; for NaN, more than infinity's."""
    largest = np.int32(0)
    for row in range(begin, end):
        for index in range(rows.shape[1]):
            largest = max(largest, _bits(rows[row, index]) & ALL_BUT_SIGN)
    return largest


@_compile
def _to_ordered_bits(bits: np.int32) -> np.int32:
    """Map float bits to an integer with the order of the floats; the map is its own inverse."""
    return bits ^ ((bits >> np.int32(31)) & ALL_BUT_SIGN)


@_compile
def _find_bounds(rows: NDArray[np.float32], begin: int, end: int) -> tuple[np.int32, np.int32]:
    """Return the smallest and the largest number in rows, as ``_to_ordered_bits`` maps them."""
    smallest, largest = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for row in range(begin, end):
        for index in range(rows.shape[1]):
            key = _to_ordered_bits(_bits(rows[row, index]))
            smallest, largest = min(smallest, key), max(largest, key)
    return smallest, largest


@_compile
def _write(
    rows: NDArray[np.float32],
    row: int,
    offset: np.float32,
    scale: np.float32,
    bottom: np.float32,
    top: np.float32,
    codes: NDArray[np.uint8],
    target_row: int,
) -> None:
    """Write the nearest levels of a row, one byte each, to ``codes[target_row]``."""
    for index in range(rows.shape[1]):
        multiple = min(max((rows[row, index] - offset) / scale, bottom), top)
        codes[target_row, index] = np.uint8(_bits(multiple + ROUNDER))


@_compile
def _pack(
    row: int, dim: int, shift: np.uint64, row_codes: NDArray[np.uint8], codes: NDArray[np.uint8]
) -> None:
    """Add ``shift`` to the codes of a row, one per byte, and pack them into planar half bytes."""
    half = codes.shape[1]
    for index in range(half):
        first = np.uint64(row_codes[0, index]) + shift
        second = np.uint64(row_codes[0, half + index]) + shift
        codes[row, index] = np.uint8((first & np.uint64(15)) | (second << np.uint64(4)))
    if dim % 2:  # the last half byte is padding: 8, as in ``bitpacking.pack``
        codes[row, half - 1] = np.uint8(codes[row, half - 1] & np.uint8(15)) | np.uint8(0x80)


@_compile
def _fit_symmetric(
    largest: NDArray[np.int32],
    count: int,
    top: np.float32,
    is_float16: bool,
    scales: NDArray[np.float32],
    scale_bits: NDArray[np.int32],
) -> bool:
    """Compute ``levels.symmetric_scale`` as floats and bits; return whether all can be stored."""
    failed = np.int32(0)
    for lane in range(count):
        scale = _float(largest[lane]) / top
        failed |= np.int32(largest[lane] >= INFINITE)
        if is_float16:
            failed |= np.int32(scale > LARGEST_16)
            scale_bits[lane] = _scale_16(scale, top)
            scales[lane] = _to_float32(scale_bits[lane])
        else:
            scales[lane] = max(scale, SMALLEST_32)
            scale_bits[lane] = _bits(scales[lane])
    return bool(failed == np.int32(0))


@_compile
def _fit_asymmetric(
    smallest: NDArray[np.int32],
    largest: NDArray[np.int32],
    count: int,
    top: np.float32,
    is_float16: bool,
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32],
    scale_bits: NDArray[np.int32],
    offset_bits: NDArray[np.int32],
) -> bool:
    """Compute ``levels.asymmetric_range`` as floats and bits; return whether all can be stored."""
    failed = np.int32(0)
    for lane in range(count):
        low = _float(_to_ordered_bits(smallest[lane])) + ZERO  # no -0
        failed |= np.int32(largest[lane] >= INFINITE) | np.int32(_bits(abs(low)) >= INFINITE)
        if is_float16:
            failed |= np.int32(abs(low) > LARGEST_16)
            offset_bits[lane] = _round_down_16(low)
            offsets[lane] = _to_float32(offset_bits[lane])
        else:
            offsets[lane] = low
            offset_bits[lane] = _bits(low)
        scale = max(_float(_to_ordered_bits(largest[lane])) - offsets[lane], ZERO) / top
        if is_float16:
            failed |= np.int32(scale > LARGEST_16)
            scale_bits[lane] = _scale_16(scale, top)
            scales[lane] = _to_float32(scale_bits[lane])
        else:
            failed |= np.int32(_bits(scale) >= INFINITE)
            scales[lane] = max(scale, SMALLEST_32)
            scale_bits[lane] = _bits(scales[lane])
    return bool(failed == np.int32(0))


@_compile
def min_max(
    rows: NDArray[np.float32],
    rows_per_scale: int,
    top: np.float32,
    symmetric: bool,
    planar: bool,
    codes: NDArray[np.uint8],
    scale_16: NDArray[np.uint16],
    scale_32: NDArray[np.uint32],
    offset_16: NDArray[np.uint16],
    offset_32: NDArray[np.uint32],
) -> int:
    """Fit ranges of ``rows_per_scale`` rows without clipping, and encode the rows.

    Returns:
        -1, or, if a range cannot be stored, the first row of its group of ``LANES`` ranges.
    """
    count, dim = rows.shape
    is_float16 = scale_16.size > 0
    bottom = -top if symmetric else ZERO
    shift = np.uint64(8) if symmetric else np.uint64(0)
    row_codes = np.zeros((1, dim + 1), np.uint8)
    smallest, largest = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    scale_bits, offset_bits = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    scales, offsets = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for first in range(0, count, LANES * rows_per_scale):
        first_range = first // rows_per_scale
        ranges = min(LANES, -(-(count - first) // rows_per_scale))
        for index in range(ranges):
            begin = first + index * rows_per_scale
            end = min(begin + rows_per_scale, count)
            if symmetric:
                largest[index] = _find_largest_bits(rows, begin, end)
            else:
                smallest[index], largest[index] = _find_bounds(rows, begin, end)
        if symmetric:
            good = _fit_symmetric(largest, ranges, top, is_float16, scales, scale_bits)
        else:
            good = _fit_asymmetric(
                smallest, largest, ranges, top, is_float16, scales, offsets, scale_bits, offset_bits
            )
        if not good:
            return first
        for index in range(ranges):
            if is_float16:
                scale_16[first_range + index] = np.uint16(scale_bits[index])
                if not symmetric:
                    offset_16[first_range + index] = np.uint16(offset_bits[index])
            else:
                scale_32[first_range + index] = np.uint32(scale_bits[index])
                if not symmetric:
                    offset_32[first_range + index] = np.uint32(offset_bits[index])
        for index in range(ranges):
            begin = first + index * rows_per_scale
            for row in range(begin, min(begin + rows_per_scale, count)):
                if planar:
                    _write(rows, row, offsets[index], scales[index], bottom, top, row_codes, 0)
                    _pack(row, dim, shift, row_codes, codes)
                else:
                    _write(rows, row, offsets[index], scales[index], bottom, top, codes, row)
    return -1


@_compile
def nearest(
    rows: NDArray[np.float32],
    scales: NDArray[np.float32],
    offsets: NDArray[np.float32],
    rows_per_scale: int,
    top: np.float32,
    symmetric: bool,
    planar: bool,
    codes: NDArray[np.uint8],
) -> None:
    """Encode rows with given scales and offsets; ``rows_per_scale`` rows share one of each."""
    count, dim = rows.shape
    bottom = -top if symmetric else ZERO
    shift = np.uint64(8) if symmetric else np.uint64(0)
    row_codes = np.zeros((1, dim + 1), np.uint8)
    for begin in range(0, count, rows_per_scale):
        scale, offset = scales[begin // rows_per_scale], offsets[begin // rows_per_scale]
        for row in range(begin, min(begin + rows_per_scale, count)):
            if planar:
                _write(rows, row, offset, scale, bottom, top, row_codes, 0)
                _pack(row, dim, shift, row_codes, codes)
            else:
                _write(rows, row, offset, scale, bottom, top, codes, row)


# --- the rule of least_squares.py ------------------------------------------------------------

# One array, ``lanes``, contains all data of the lanes. An item, such as the lowest weight, is LANES
# consecutive numbers, and the constants are the positions of items. With one array the compiler can
# prove that items do not overlap; with separate arrays it would have to check this at run time.
LOW, HIGH, INVERSE = 0 * LANES, 1 * LANES, 2 * LANES  # INVERSE: 1 / scale
BEST, NEW = 3 * LANES, 5 * LANES  # scale and offset
BEST_SUMS, NEW_SUMS = 7 * LANES, 12 * LANES  # rr, q, qq, r, qr of ``least_squares.Residuals``
ITEMS = 17 * LANES
CUTS = np.array([0.0, *SHARES], np.float32)
"""Shares of a range that the compared candidates clip at each end."""
REMAINING = np.array([1.0, *(1 - share for share in SHARES)], np.float32)
"""1 minus each of these shares, the share of a symmetric range that remains."""


@_compile
def _compute_stored_scale(scale: np.float32, top: np.float32, is_float16: bool) -> np.float32:
    """Compute ``levels.stored_scale``, as a float32."""
    return _to_float32(_scale_16(scale, top)) if is_float16 else max(scale, SMALLEST_32)


@_compile
def _zero_if_not_finite(change: np.float32) -> np.float32:
    """Return the change, or zero if it is not finite."""
    return change if abs(change) <= LARGEST_32 else ZERO


@_compile
def _round_weight(
    value: np.float32,
    scale: np.float32,
    offset: np.float32,
    inverse: np.float32,
    bottom: np.float32,
    top: np.float32,
) -> tuple[np.float32, np.float32]:
    """Return the multiple of the nearest level of a weight, and the rounding residual."""
    q = (min(max((value - offset) * inverse, bottom), top) + ROUNDER) - ROUNDER
    return q, value - (q * scale + offset)


@_compile
def _transpose(rows: NDArray[np.float32], first: int, used: int, tile: NDArray[np.float32]) -> None:
    """Transpose rows, one to each lane, into ``tile`` ``(dim, LANES)``.

    Lanes without a row keep old values; their results are not used.
    """
    if used == LANES:  # a compile-time constant gives faster loops
        for index in range(tile.shape[0]):
            for lane in range(LANES):
                tile[index, lane] = rows[first + lane, index]
    else:
        for index in range(tile.shape[0]):
            for lane in range(used):
                tile[index, lane] = rows[first + lane, index]


@_compile
def _compute_errors(
    tile: NDArray[np.float32],
    lanes: NDArray[np.float32],
    fit: int,
    sums: int,
    bottom: np.float32,
    top: np.float32,
) -> None:
    """Compute the squared error of every lane, adding one number after another.

    An iteration adds four numbers. ``fit`` and ``sums`` are positions in ``lanes``: of scale and
    offset, and of the result.
    """
    for lane in range(LANES):
        lanes[INVERSE + lane] = np.float32(1) / lanes[fit + lane]
        lanes[sums + lane] = ZERO
    dim = tile.shape[0]
    for index in range(0, dim - 3, 4):
        for lane in range(LANES):
            scale, offset = lanes[fit + lane], lanes[fit + LANES + lane]
            inverse, rr = lanes[INVERSE + lane], lanes[sums + lane]
            _, r = _round_weight(tile[index, lane], scale, offset, inverse, bottom, top)
            rr += r * r
            _, r = _round_weight(tile[index + 1, lane], scale, offset, inverse, bottom, top)
            rr += r * r
            _, r = _round_weight(tile[index + 2, lane], scale, offset, inverse, bottom, top)
            rr += r * r
            _, r = _round_weight(tile[index + 3, lane], scale, offset, inverse, bottom, top)
            rr += r * r
            lanes[sums + lane] = rr
    for index in range(dim // 4 * 4, dim):
        for lane in range(LANES):
            scale, offset = lanes[fit + lane], lanes[fit + LANES + lane]
            _, r = _round_weight(
                tile[index, lane], scale, offset, lanes[INVERSE + lane], bottom, top
            )
            lanes[sums + lane] += r * r


@_compile
def _compute_residuals(
    tile: NDArray[np.float32],
    lanes: NDArray[np.float32],
    fit: int,
    sums: int,
    bottom: np.float32,
    top: np.float32,
) -> None:
    """Compute ``least_squares.residuals`` of every lane, summed in the same order."""
    for lane in range(LANES):
        lanes[INVERSE + lane] = np.float32(1) / lanes[fit + lane]
        lanes[sums + lane] = lanes[sums + LANES + lane] = lanes[sums + 2 * LANES + lane] = ZERO
        lanes[sums + 3 * LANES + lane] = lanes[sums + 4 * LANES + lane] = ZERO
    dim = tile.shape[0]
    for index in range(0, dim - 3, 4):
        for lane in range(LANES):
            scale, offset = lanes[fit + lane], lanes[fit + LANES + lane]
            inverse = lanes[INVERSE + lane]
            q0, r0 = _round_weight(tile[index, lane], scale, offset, inverse, bottom, top)
            q1, r1 = _round_weight(tile[index + 1, lane], scale, offset, inverse, bottom, top)
            q2, r2 = _round_weight(tile[index + 2, lane], scale, offset, inverse, bottom, top)
            q3, r3 = _round_weight(tile[index + 3, lane], scale, offset, inverse, bottom, top)
            item = sums + lane
            lanes[item] = (((lanes[item] + r0 * r0) + r1 * r1) + r2 * r2) + r3 * r3
            item += LANES
            lanes[item] = (((lanes[item] + q0) + q1) + q2) + q3
            item += LANES
            lanes[item] = (((lanes[item] + q0 * q0) + q1 * q1) + q2 * q2) + q3 * q3
            item += LANES
            lanes[item] = (((lanes[item] + r0) + r1) + r2) + r3
            item += LANES
            lanes[item] = (((lanes[item] + q0 * r0) + q1 * r1) + q2 * r2) + q3 * r3
    for index in range(dim // 4 * 4, dim):
        for lane in range(LANES):
            scale, offset = lanes[fit + lane], lanes[fit + LANES + lane]
            q, r = _round_weight(
                tile[index, lane], scale, offset, lanes[INVERSE + lane], bottom, top
            )
            lanes[sums + lane] += r * r
            lanes[sums + LANES + lane] += q
            lanes[sums + 2 * LANES + lane] += q * q
            lanes[sums + 3 * LANES + lane] += r
            lanes[sums + 4 * LANES + lane] += q * r


@_compile
def _keep_better(lanes: NDArray[np.float32], count: int) -> None:
    """In lanes whose error decreased, replace the best scale, offset and first ``count`` sums."""
    for lane in range(LANES):
        less = lanes[NEW_SUMS + lane] < lanes[BEST_SUMS + lane]
        for item in range(2):
            old = lanes[BEST + item * LANES + lane]
            lanes[BEST + item * LANES + lane] = lanes[NEW + item * LANES + lane] if less else old
        for item in range(count):
            old = lanes[BEST_SUMS + item * LANES + lane]
            new = lanes[NEW_SUMS + item * LANES + lane]
            lanes[BEST_SUMS + item * LANES + lane] = new if less else old


@_compile
def _clip(
    lanes: NDArray[np.float32],
    fit: int,
    cut: np.float32,
    remaining: np.float32,
    top: np.float32,
    symmetric: bool,
    is_float16: bool,
) -> bool:
    """Compute ``least_squares._clip_range`` of every lane; return whether all can be stored.

    ``fit`` is the position of the result in ``lanes``. An asymmetric range loses the share ``cut``
    at each end; of a symmetric one, the share ``remaining`` remains.
    """
    failed = np.int32(0)
    limit = LARGEST_16 if is_float16 else LARGEST_32
    for lane in range(LANES):
        smallest, largest = lanes[LOW + lane], lanes[HIGH + lane]
        if symmetric:
            scale = max(-smallest, largest) * remaining / top
            offset = ZERO
        else:
            removed = (largest - smallest) * cut
            low, high = (smallest + removed) + ZERO, largest - removed
            failed |= np.int32(abs(low) > limit)
            offset = _to_float32(_round_down_16(low)) if is_float16 else low
            scale = max(high - offset, ZERO) / top
        failed |= np.int32(scale > limit)
        lanes[fit + lane] = _compute_stored_scale(scale, top, is_float16)
        lanes[fit + LANES + lane] = offset
    return bool(failed == np.int32(0))


@_compile
def _refit(
    lanes: NDArray[np.float32],
    count: np.float32,
    top: np.float32,
    symmetric: bool,
    is_float16: bool,
) -> None:
    """Compute ``least_squares._refit`` of every lane."""
    limit = LARGEST_16 if is_float16 else LARGEST_32
    for lane in range(LANES):
        q, qq = lanes[BEST_SUMS + LANES + lane], lanes[BEST_SUMS + 2 * LANES + lane]
        r, qr = lanes[BEST_SUMS + 3 * LANES + lane], lanes[BEST_SUMS + 4 * LANES + lane]
        if symmetric:
            scale_change = _zero_if_not_finite(qr / qq)
            offset = ZERO
        else:
            scale_change = _zero_if_not_finite((qr * count - q * r) / (qq * count - q * q))
            offset_change = _zero_if_not_finite((r - scale_change * q) / count)
            offset = min(max(lanes[BEST + LANES + lane] + offset_change, -limit), limit) + ZERO
            offset = _to_float32(_to_float16_bits(offset)) if is_float16 else offset
        scale = min(max(lanes[BEST + lane] + scale_change, ZERO), limit)
        lanes[NEW + lane] = _compute_stored_scale(scale, top, is_float16)
        lanes[NEW + LANES + lane] = offset


@_compile
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
    is_float16 = scale_16.size > 0
    bottom = -top if symmetric else ZERO
    shift = np.uint64(8) if symmetric else np.uint64(0)
    row_codes = np.zeros((1, dim + 1), np.uint8)
    tile = np.zeros((dim, LANES), np.float32)
    lanes = np.zeros(ITEMS, np.float32)
    for first in range(0, count, LANES):
        used = min(LANES, count - first)
        for lane in range(used):  # row by row: fastest memory order
            smallest, largest = _find_bounds(rows, first + lane, first + lane + 1)
            if largest >= INFINITE or _to_ordered_bits(smallest) & ALL_BUT_SIGN >= INFINITE:
                return first
            lanes[LOW + lane], lanes[HIGH + lane] = (
                _float(_to_ordered_bits(smallest)),
                _float(_to_ordered_bits(largest)),
            )
        _transpose(rows, first, used, tile)
        if not _clip(lanes, BEST, CUTS[0], REMAINING[0], top, symmetric, is_float16):
            return first
        _compute_errors(tile, lanes, BEST, BEST_SUMS, bottom, top)
        for cut in range(1, CUTS.size):
            if not _clip(lanes, NEW, CUTS[cut], REMAINING[cut], top, symmetric, is_float16):
                return first
            _compute_errors(tile, lanes, NEW, NEW_SUMS, bottom, top)
            _keep_better(lanes, 1)  # only the squared error
        _compute_residuals(tile, lanes, BEST, BEST_SUMS, bottom, top)
        for _ in range(rounds):
            _refit(lanes, np.float32(dim), top, symmetric, is_float16)
            _compute_residuals(tile, lanes, NEW, NEW_SUMS, bottom, top)
            _keep_better(lanes, 5)  # all sums of ``Residuals``
        for lane in range(used):
            row = first + lane
            scale, offset = lanes[BEST + lane], lanes[BEST + LANES + lane]
            if is_float16:
                scale_16[row] = np.uint16(_to_float16_bits(scale))
                if not symmetric:
                    offset_16[row] = np.uint16(_to_float16_bits(offset))
            else:
                scale_32[row] = np.uint32(_bits(scale))
                if not symmetric:
                    offset_32[row] = np.uint32(_bits(offset))
            if planar:
                _write(rows, row, offset, scale, bottom, top, row_codes, 0)
                _pack(row, dim, shift, row_codes, codes)
            else:
                _write(rows, row, offset, scale, bottom, top, codes, row)
    return -1
