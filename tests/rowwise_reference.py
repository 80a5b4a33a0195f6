"""Row-wise int8, int4, int2 and 8-bit floats in numpy, from the formulas: an oracle for tests.

Written from the docstrings of ``levels.py`` and ``bitpacking.py`` in
``compressors/quantize/kernels`` and from ``docs/methods/rowwise.md``, without any code of the
package. Ranges end at the smallest and the
largest weight (``min_max``). All arithmetic is IEEE float32, which rounds the same way in numpy and
torch, so results are compared bit by bit.

- symmetric: ``scale = largest / half`` with ``half`` = 127, 7 or 1.5; a level is ``-half .. half``.
  Levels are stored as two's complement in 8 bits, plus 8 in 4 bits and plus 1.5 in 2 bits.
- with an offset: ``offset`` is the smallest weight rounded down to the stored type, ``scale`` =
  ``(largest - offset) / (2**bits - 1)``, and a level is ``0 .. 2**bits - 1``.
- 8-bit floats: ``scale = largest / 448``, and a weight is the nearest of the E4M3 numbers times the
  scale.
- Ties between levels go to the even one. Four levels around zero have no level at zero: -1.5, -0.5,
  0.5 and 1.5; a tie goes up.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SMALLEST = {np.float16: np.float32(2.0**-24), np.float32: np.finfo(np.float32).tiny}


@dataclass(frozen=True)
class StoredRows:
    """A table as it is stored.

    ``codes`` uint8 ``(rows, bytes)``; ``scale`` ``(ranges, 1)`` in the stored type; ``offset``
    likewise, or None.
    """

    codes: Bytes
    scale: NDArray[np.floating]
    offset: NDArray[np.floating] | None


def encode_rows(
    table: Floats, bits: int, *, symmetric: bool, rows_per_scale: int, scale_type: str
) -> StoredRows:
    """Encode a table float32 ``(rows, dim)``; ``rows_per_scale`` 0 is one scale for the table."""
    number = {"float16": np.float16, "float32": np.float32}[scale_type]
    together = rows_per_scale or len(table)
    codes, scales, offsets = [], [], []
    for begin in range(0, len(table), together):
        rows = table[begin : begin + together]
        if symmetric:
            half = (2**bits - 1) // 2 if bits > 2 else 1.5
            scale = _stored_scale(np.abs(rows).max() / np.float32(half), half, number)
            ratio = rows / np.float32(scale)
            levels = np.rint(ratio) if bits > 2 else np.floor(ratio) + np.float32(0.5)
            levels = np.clip(levels, -half, half)
            added = {8: 0, 4: 8, 2: 1.5}[bits]
            codes.append((levels + np.float32(added)).astype(np.int16).astype(np.uint8))
        else:
            top = 2**bits - 1
            offset = _rounded_down(rows.min() + np.float32(0), number)
            scale = _stored_scale((rows.max() - np.float32(offset)) / np.float32(top), top, number)
            ratio = (rows - np.float32(offset)) / np.float32(scale)
            codes.append(np.clip(np.rint(ratio), 0, top).astype(np.uint8))
            offsets.append([offset])
        scales.append([scale])
    return StoredRows(
        pack_planes(np.concatenate(codes), bits),
        np.array(scales, number),
        None if symmetric else np.array(offsets, number),
    )


def decode_rows(stored: StoredRows, bits: int, dim: int, rows_per_scale: int) -> Floats:
    """The float32 weights ``(rows, dim)`` of a stored table: ``level * scale + offset``."""
    codes = unpack_planes(stored.codes, dim, bits)
    weights = np.empty(codes.shape, np.float32)
    for row, own in enumerate(codes):
        place = row // rows_per_scale if rows_per_scale else 0
        if stored.offset is not None:
            levels, offset = own.astype(np.float32), np.float32(stored.offset[place, 0])
        else:
            zero = np.float32({8: 0, 4: 8, 2: 1.5}[bits])
            levels = (own.view(np.int8) if bits == 8 else own).astype(np.float32) - zero
            offset = np.float32(0)
        weights[row] = levels * np.float32(stored.scale[place, 0]) + offset
    return weights


def pack_planes(codes: Bytes, bits: int) -> Bytes:
    """Codes ``(rows, dim)`` as bytes: byte ``j`` of a row holds code ``j`` of every plane.

    The first plane, the first ``ceil(dim * bits / 8)`` codes of a row, is in the lowest bits.
    Places beyond ``dim`` hold the middle code, ``2**(bits - 1)``.
    """
    planes = 8 // bits
    width = -(-codes.shape[1] // planes)
    packed = np.zeros((len(codes), width), np.uint8)
    for row, own in enumerate(codes.tolist()):
        own += [2 ** (bits - 1)] * (planes * width - len(own))
        for place, code in enumerate(own):
            plane, byte = divmod(place, width)
            packed[row, byte] += code * 2 ** (bits * plane)
    return packed


def unpack_planes(packed: Bytes, dim: int, bits: int) -> Bytes:
    """The codes ``(rows, dim)`` of packed bytes."""
    width = packed.shape[1]
    codes = np.empty((len(packed), dim), np.uint8)
    for place in range(dim):
        plane, byte = divmod(place, width)
        codes[:, place] = packed[:, byte] >> (bits * plane) & (2**bits - 1)
    return codes


def float8_numbers() -> Floats:
    """What the bytes 0 to 126 stand for in E4M3: the numbers from 0 to 448, rising."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    return np.where(
        exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9
    ).astype(np.float32)


def encode_float8_rows(table: Floats, rows_per_scale: int, scale_type: str) -> StoredRows:
    """Encode a table float32 ``(rows, dim)`` as E4M3 bytes, the sign in the highest bit."""
    number = {"float16": np.float16, "float32": np.float32}[scale_type]
    together, numbers = rows_per_scale or len(table), float8_numbers()
    codes, scales = [], []
    for begin in range(0, len(table), together):
        rows = table[begin : begin + together]
        scale = _stored_scale(np.abs(rows).max() / np.float32(448), 448, number)
        size = np.minimum(np.abs(rows / np.float32(scale)), numbers[-1])
        above = np.searchsorted(numbers, size).clip(1)
        middle = (numbers[above - 1] + numbers[above]) / 2  # exact: neighbours share a step
        odd = above % 2 == 1  # of two neighbours the even byte has the even mantissa
        nearest = np.where((size > middle) | ((size == middle) & ~odd), above, above - 1)
        codes.append(nearest.astype(np.uint8) | np.where(np.signbit(rows), 128, 0).astype(np.uint8))
        scales.append([scale])
    return StoredRows(np.concatenate(codes), np.array(scales, number), None)


def _stored_scale(scale: np.float32, top: float, number: type) -> np.floating:
    """A scale as stored: positive, and rounded up where rounding down would clip half a level."""
    smallest = SMALLEST[number]
    stored = number(max(scale, smallest))
    if scale * np.float32(top) > np.float32(stored) * np.float32(top + 0.5):
        stored = number(stored + number(smallest))
    return stored


def _rounded_down(low: np.float32, number: type) -> np.floating:
    """The largest stored number that is not above ``low``."""
    stored = number(low)
    return np.nextafter(stored, number(-np.inf)) if np.float32(stored) > low else stored
