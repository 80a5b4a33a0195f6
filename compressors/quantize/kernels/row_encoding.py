"""Encode row blocks with compiled loops.

The results equal those of the plain torch code in ``levels.py`` and ``clipping.py`` bit for bit.
The loops are faster, because they read a row once for all operations, while torch reads and writes
the whole block for each operation. The loops are in ``numba_kernels.py``; this file allocates
memory and runs threads.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressors.errors.steps import ValueNotStorable
from compressors.quantize.kernels import numba_kernels
from compressors.quantize.kernels.least_squares import ROUNDS
from compressors.quantize.kernels.levels import FittedRange, Grid, scale_error

THREAD_VALUES = 2**18
"""Smallest number of values per thread: with fewer, starting threads would take too long."""


def encode(rows: Tensor, grid: Grid, bits: int) -> tuple[Tensor, FittedRange]:
    """Encode rows: fit ranges by ``min_max`` or ``least_squares`` and find the nearest codes.

    Args:
        rows: float, ``(rows, dim)``; the first row begins a group of rows with one scale.
        grid: the grid of levels. ``rows_per_scale`` is 1 with ``least_squares``, and not 0 with
            ``min_max``.
        bits: 8 for one byte per code, or 4 for the planar layout of ``bitpacking``.

    Returns:
        The codes, uint8 ``(rows, dim)`` or ``(rows, ceil(dim / 2))``, and the stored scales and
        offsets, as ``clipping.fit`` returns them. In a symmetric grid, codes of 8 bits are in two's
        complement, and codes of 4 bits have 8 added, so that they are not negative.

    Raises:
        ValueNotStorable: a weight is not finite, or a scale or offset is too large for its type.
    """
    count, dim = rows.shape
    rows_per_scale = grid.rows_per_scale
    values, codes = _to_float32(rows), _allocate_codes(rows, bits)
    scale = torch.empty(-(-count // rows_per_scale), 1, dtype=grid.dtype)
    offset = None if grid.symmetric else torch.empty_like(scale)
    top = np.float32(grid.max_multiple if grid.symmetric else grid.levels - 1)
    # Without offsets the loops do not write to the last arrays, so any arrays are passed.
    stored_scale, stored_offset = (
        _view_as_words(scale),
        _view_as_words(scale if offset is None else offset),
    )

    def encode_rows(begin: int, end: int) -> int:
        scale_slice = slice(begin // rows_per_scale, -(-end // rows_per_scale))
        part_codes = codes.numpy()[begin:end]
        words = [array[scale_slice] for array in (*stored_scale, *stored_offset)]
        refits = grid.clipping == "least_squares"
        loop: Callable[..., int] = numba_kernels.least_squares if refits else numba_kernels.min_max
        bad_row = loop(
            values[begin:end],
            ROUNDS if refits else rows_per_scale,
            top,
            grid.symmetric,
            bits == 4,
            part_codes,
            *words,
        )
        return -1 if bad_row < 0 else begin + bad_row

    bad_row = _encode_in_threads(encode_rows, count, dim, rows_per_scale)
    if bad_row >= 0:
        # The loops check ``LANES`` groups of rows together and report the first row of them.
        bad_rows = rows[bad_row : bad_row + numba_kernels.LANES * rows_per_scale]
        raise _build_error(bad_rows, bad_row, grid)
    return codes, FittedRange(scale, offset)


def encode_with_scales(rows: Tensor, fitted: FittedRange, grid: Grid, bits: int) -> Tensor:
    """Encode rows to their nearest levels with given scales and offsets.

    Args:
        rows: finite, float, ``(rows, dim)``; the first row begins a group of rows with one scale.
        fitted: scales and offsets of these rows, or those of the table if it has one scale.
        grid: the grid of levels, with any ``rows_per_scale``.
        bits: 8 for one byte per code, or 4 for the planar layout of ``bitpacking``.

    Returns:
        Codes as in ``encode``.
    """
    count, dim = rows.shape
    values, codes = _to_float32(rows), _allocate_codes(rows, bits)
    top = np.float32(grid.max_multiple if grid.symmetric else grid.levels - 1)
    scales = _to_float32(fitted.scale)[:, 0]
    offsets = np.zeros_like(scales) if fitted.offset is None else _to_float32(fitted.offset)[:, 0]
    group_rows = grid.rows_per_scale or max(count, 1)

    def encode_rows(begin: int, end: int) -> int:
        scale_slice = slice(begin // group_rows, -(-end // group_rows))
        if not grid.rows_per_scale:  # the table has one scale
            scale_slice = slice(1)
        part_codes = codes.numpy()[begin:end]
        is_planar = bits == 4
        numba_kernels.nearest(
            values[begin:end], scales[scale_slice], offsets[scale_slice], group_rows, top,
            grid.symmetric, is_planar, part_codes,
        )  # fmt: skip
        return -1

    _encode_in_threads(encode_rows, count, dim, grid.rows_per_scale or 1)
    return codes


def _to_float32(values: Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", values.detach().cpu().float().contiguous().numpy())


def _allocate_codes(rows: Tensor, bits: int) -> Tensor:
    """Allocate memory for the codes of these rows."""
    count, dim = rows.shape
    # numpy puts large arrays in huge pages, which are allocated several times faster.
    return torch.from_numpy(np.empty((count, dim if bits == 8 else -(-dim // 2)), np.uint8))


def _view_as_words(stored: Tensor) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """Return the bits of float16 or float32 numbers as 16-bit or 32-bit words.

    The array of the other size is empty.
    """
    flat = stored.view(-1).numpy()
    if stored.dtype == torch.float16:
        return flat.view(np.uint16), np.empty(0, np.uint32)
    return np.empty(0, np.uint16), flat.view(np.uint32)


def _encode_in_threads(
    encode_rows: Callable[[int, int], int], rows: int, dim: int, rows_per_scale: int
) -> int:
    """Process all rows with torch's number of threads; return the first row that fails, or -1.

    Each thread gets whole groups of ``rows_per_scale`` rows.
    """
    threads = min(torch.get_num_threads(), max(rows * dim // THREAD_VALUES, 1))
    if threads == 1:
        return encode_rows(0, rows)
    size = -(-rows // (threads * rows_per_scale)) * rows_per_scale  # rows per thread
    submitted = [
        _get_thread_pool(os.getpid(), threads - 1).submit(
            encode_rows, begin, min(begin + size, rows)
        )
        for begin in range(size, rows, size)
    ]
    results = [encode_rows(0, min(size, rows)), *(future.result() for future in submitted)]
    return next((bad_row for bad_row in results if bad_row >= 0), -1)


@functools.cache
def _get_thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Return this process's pool of threads; ``process`` is its id.

    The id is part of the cache key, because a forked process cannot use the threads of its parent.
    """
    return ThreadPoolExecutor(threads, thread_name_prefix="encode-rows")


def _build_error(rows: Tensor, begin: int, grid: Grid) -> ValueNotStorable:
    """Build the error for rows of which at least one cannot be stored.

    ``begin`` is the number of the first of these rows in the block.
    """
    not_finite = (~torch.isfinite(rows)).any(dim=1)
    if bool(not_finite.any()):
        row = begin + int(not_finite.to(torch.uint8).argmax())
        return ValueNotStorable("row_not_finite", row=row)
    return scale_error("scale or offset", float(rows.abs().max()), grid)
