"""Reference implementation in numpy of row-wise int8, int4, int2 and 8-bit floats.

Written from ``docs/methods/rowwise.md`` and the docstrings of ``levels.py`` and ``bitpacking.py``
in ``compressors/quantize/kernels``, without code of the package.
Ranges end at the smallest and the largest weight (``min_max``). All arithmetic is IEEE float32,
which rounds the same way in numpy and torch, so results are compared bit by bit.

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

# Smallest positive scale by stored type.
SMALLEST = {np.float16: np.float32(2.0**-24), np.float32: np.finfo(np.float32).tiny}


@dataclass(frozen=True)
class StoredRows:
    """The stored tensors of a table.

    ``codes`` uint8 ``(rows, bytes)``; ``scale`` ``(scales, 1)`` in the stored type, one for each
    group of ``rows_per_scale`` rows; ``offset`` likewise, or None.
    """

    codes: Bytes
    scale: NDArray[np.floating]
    offset: NDArray[np.floating] | None


def encode_rows(
    table: Floats, bits: int, *, symmetric: bool, rows_per_scale: int, scale_type: str
) -> StoredRows:
    """Encode a table float32 ``(rows, dim)``; ``rows_per_scale`` 0 is one scale for the table."""
    stored_type = {"float16": np.float16, "float32": np.float32}[scale_type]
    rows_of_scale = rows_per_scale or len(table)
    codes, scales, offsets = [], [], []
    for first in range(0, len(table), rows_of_scale):
        rows = table[first : first + rows_of_scale]
        if symmetric:
            half = (2**bits - 1) // 2 if bits > 2 else 1.5
            scale = _stored_scale(np.abs(rows).max() / np.float32(half), half, stored_type)
            ratio = rows / np.float32(scale)
            levels = np.rint(ratio) if bits > 2 else np.floor(ratio) + np.float32(0.5)
            levels = np.clip(levels, -half, half)
            code_offset = {8: 0, 4: 8, 2: 1.5}[bits]
            codes.append((levels + np.float32(code_offset)).astype(np.int16).astype(np.uint8))
        else:
            top = 2**bits - 1
            offset = _rounded_down(rows.min() + np.float32(0), stored_type)  # -0.0 becomes 0.0
            scale = _stored_scale(
                (rows.max() - np.float32(offset)) / np.float32(top), top, stored_type
            )
            ratio = (rows - np.float32(offset)) / np.float32(scale)
            codes.append(np.clip(np.rint(ratio), 0, top).astype(np.uint8))
            offsets.append([offset])
        scales.append([scale])
    return StoredRows(
        pack_planes(np.concatenate(codes), bits),
        np.array(scales, stored_type),
        None if symmetric else np.array(offsets, stored_type),
    )


def decode_rows(stored: StoredRows, bits: int, dim: int, rows_per_scale: int) -> Floats:
    """Return the float32 weights ``(rows, dim)`` of a stored table: ``level * scale + offset``."""
    codes = unpack_planes(stored.codes, dim, bits)
    weights = np.empty(codes.shape, np.float32)
    for row, codes_of_row in enumerate(codes):
        index = row // rows_per_scale if rows_per_scale else 0
        if stored.offset is not None:
            levels, offset = codes_of_row.astype(np.float32), np.float32(stored.offset[index, 0])
        else:
            zero = np.float32({8: 0, 4: 8, 2: 1.5}[bits])
            levels = (codes_of_row.view(np.int8) if bits == 8 else codes_of_row).astype(
                np.float32
            ) - zero
            offset = np.float32(0)
        weights[row] = levels * np.float32(stored.scale[index, 0]) + offset
    return weights


def pack_planes(codes: Bytes, bits: int) -> Bytes:
    """Return codes ``(rows, dim)`` as bytes: byte ``j`` of a row holds code ``j`` of every plane.

    The first plane, the first ``ceil(dim * bits / 8)`` codes of a row, is in the lowest bits.
    Positions after ``dim`` have the middle code, ``2**(bits - 1)``.
    """
    planes = 8 // bits
    width = -(-codes.shape[1] // planes)
    packed = np.zeros((len(codes), width), np.uint8)
    for row, codes_of_row in enumerate(codes.tolist()):
        codes_of_row += [2 ** (bits - 1)] * (planes * width - len(codes_of_row))
        for index, code in enumerate(codes_of_row):
            plane, byte = divmod(index, width)
            packed[row, byte] += code * 2 ** (bits * plane)
    return packed


def unpack_planes(packed: Bytes, dim: int, bits: int) -> Bytes:
    """Return the codes ``(rows, dim)`` of packed bytes."""
    width = packed.shape[1]
    codes = np.empty((len(packed), dim), np.uint8)
    for index in range(dim):
        plane, byte = divmod(index, width)
        codes[:, index] = packed[:, byte] >> (bits * plane) & (2**bits - 1)
    return codes


def float8_numbers() -> Floats:
    """Return the E4M3 numbers of the bytes 0 to 126: from 0 to 448, ascending."""
    exponent, mantissa = np.divmod(np.arange(127), 8)
    return np.where(
        exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9
    ).astype(np.float32)


def encode_float8_rows(table: Floats, rows_per_scale: int, scale_type: str) -> StoredRows:
    """Encode a table float32 ``(rows, dim)`` as E4M3 bytes, the sign in the highest bit."""
    stored_type = {"float16": np.float16, "float32": np.float32}[scale_type]
    rows_of_scale, numbers = rows_per_scale or len(table), float8_numbers()
    codes, scales = [], []
    for first in range(0, len(table), rows_of_scale):
        rows = table[first : first + rows_of_scale]
        scale = _stored_scale(np.abs(rows).max() / np.float32(448), 448, stored_type)
        magnitude = np.minimum(np.abs(rows / np.float32(scale)), numbers[-1])
        upper = np.searchsorted(numbers, magnitude).clip(1)
        middle = (numbers[upper - 1] + numbers[upper]) / 2  # exact in float32
        odd = upper % 2 == 1  # of two neighbours the even byte has the even mantissa
        nearest = np.where((magnitude > middle) | ((magnitude == middle) & ~odd), upper, upper - 1)
        codes.append(nearest.astype(np.uint8) | np.where(np.signbit(rows), 128, 0).astype(np.uint8))
        scales.append([scale])
    return StoredRows(np.concatenate(codes), np.array(scales, stored_type), None)


def _stored_scale(scale: np.float32, top: float, stored_type: type) -> np.floating:
    """Round a scale to the stored type: positive, and up if rounding down would clip.

    ``top`` is the largest level. A weight is clipped if it is more than half a level above it.
    """
    smallest = SMALLEST[stored_type]
    stored = stored_type(max(scale, smallest))
    if scale * np.float32(top) > np.float32(stored) * np.float32(top + 0.5):
        stored = stored_type(stored + stored_type(smallest))
    return stored


def _rounded_down(low: np.float32, stored_type: type) -> np.floating:
    """Return the largest number of the stored type that is not above ``low``."""
    stored = stored_type(low)
    return np.nextafter(stored, stored_type(-np.inf)) if np.float32(stored) > low else stored
