"""Encode row blocks with compiled loops; results equal ``levels`` and ``clipping`` bit for bit.

The loops read a row once for all operations, while plain torch reads and writes a block for each
operation. The loops are in ``numba_kernels.py``; this file allocates memory and runs threads.
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
from compressors.quantize.kernels.levels import FittedRange, Grid, beyond

THREAD_VALUES = 2**18
"""A thread is given no less than this many values: waking one takes as long as some of them."""


def encode(rows: Tensor, grid: Grid, bits: int) -> tuple[Tensor, FittedRange]:
    """Encode rows: fit ranges by ``min_max`` or ``least_squares`` and find the nearest codes.

    Args:
        rows: float, ``(rows, dim)``; the first row starts a range.
        grid: levels, type of the scales, and the number of rows that share one: 1 with
            ``least_squares``, else not 0.
        bits: 8 for one byte per code, or 4 for the planar layout of ``bitpacking``.

    Returns:
        Codes uint8 ``(rows, dim)`` or ``(rows, ceil(dim / 2))``: negative codes are in two's
        complement with 8 bits, and 8 is added to codes of 4 bits. And the result of
        ``clipping.fit`` for the rows.

    Raises:
        CompressionError: a weight is not finite, or too large for the type of the scales.
    """
    count, dim = rows.shape
    together = grid.rows_per_scale
    values, codes = _floats(rows), _empty_codes(rows, bits)
    scale = torch.empty(-(-count // together), 1, dtype=grid.dtype)
    offset = None if grid.symmetric else torch.empty_like(scale)
    top = np.float32(grid.half if grid.symmetric else grid.levels - 1)
    stored_scale, stored_offset = _words(scale), _words(scale if offset is None else offset)

    def part(begin: int, end: int) -> int:
        entries = slice(begin // together, -(-end // together))
        into = codes.numpy()[begin:end]
        words = [found[entries] for found in (*stored_scale, *stored_offset)]
        alone = grid.clipping == "least_squares"
        loop: Callable[..., int] = numba_kernels.least_squares if alone else numba_kernels.min_max
        worst = loop(
            values[begin:end],
            ROUNDS if alone else together,
            top,
            grid.symmetric,
            bits == 4,
            into,
            *words,
        )
        return -1 if worst < 0 else begin + worst

    bad = _in_threads(part, count, dim, together)
    if bad >= 0:
        raise _refused(rows[bad : bad + numba_kernels.LANES * together], bad, grid)
    return codes, FittedRange(scale, offset)


def encode_as(rows: Tensor, fitted: FittedRange, grid: Grid, bits: int) -> Tensor:
    """Encode rows to their nearest levels with given scales and offsets.

    Args:
        rows: finite, float, ``(rows, dim)``; the first row starts a range.
        fitted: scale and offset of these rows, or of the table if it has one range.
        grid: levels, and the number of rows that share a scale.
        bits: as in ``encode``.

    Returns:
        Codes as in ``encode``.
    """
    count, dim = rows.shape
    values, codes = _floats(rows), _empty_codes(rows, bits)
    top = np.float32(grid.half if grid.symmetric else grid.levels - 1)
    scales = _floats(fitted.scale)[:, 0]
    offsets = np.zeros_like(scales) if fitted.offset is None else _floats(fitted.offset)[:, 0]
    together = grid.rows_per_scale or max(count, 1)

    def part(begin: int, end: int) -> int:
        found = slice(begin // together, -(-end // together)) if grid.rows_per_scale else slice(1)
        into = codes.numpy()[begin:end]
        numba_kernels.nearest(
            values[begin:end], scales[found], offsets[found], together, top, grid.symmetric,
            bits == 4, into,
        )  # fmt: skip
        return -1

    _in_threads(part, count, dim, grid.rows_per_scale or 1)
    return codes


def _floats(values: Tensor) -> NDArray[np.float32]:
    return cast("NDArray[np.float32]", values.detach().cpu().float().contiguous().numpy())


def _empty_codes(rows: Tensor, bits: int) -> Tensor:
    """Allocate memory for the codes of some rows."""
    count, dim = rows.shape
    # numpy puts large arrays in huge pages, which are allocated several times faster.
    return torch.from_numpy(np.empty((count, dim if bits == 8 else -(-dim // 2)), np.uint8))


def _words(stored: Tensor) -> tuple[NDArray[np.uint16], NDArray[np.uint32]]:
    """The bits of stored numbers as 16-bit and as 32-bit words: one of the two is empty."""
    flat = stored.view(-1).numpy()
    if stored.dtype == torch.float16:
        return flat.view(np.uint16), np.empty(0, np.uint32)
    return np.empty(0, np.uint16), flat.view(np.uint32)


def _in_threads(part: Callable[[int, int], int], rows: int, dim: int, together: int) -> int:
    """Process all rows with torch's number of threads; return the first bad row, or -1."""
    threads = min(torch.get_num_threads(), max(rows * dim // THREAD_VALUES, 1))
    if threads == 1:
        return part(0, rows)
    each = -(-rows // (threads * together)) * together
    begun = [
        _thread_pool(os.getpid(), threads - 1).submit(part, begin, min(begin + each, rows))
        for begin in range(each, rows, each)
    ]
    results = [part(0, min(each, rows)), *(work.result() for work in begun)]
    return next((bad for bad in results if bad >= 0), -1)


@functools.cache
def _thread_pool(process: int, threads: int) -> ThreadPoolExecutor:
    """A pool of threads that is reused; a forked process needs its own pool."""
    return ThreadPoolExecutor(threads, thread_name_prefix="encode-rows")


def _refused(rows: Tensor, begin: int, grid: Grid) -> ValueNotStorable:
    """The error for the range that starts at a row."""
    bad = (~torch.isfinite(rows)).any(dim=1)
    if bool(bad.any()):
        row = begin + int(bad.to(torch.uint8).argmax())
        return ValueNotStorable("row_not_finite", row=row)
    return beyond("scale or offset", float(rows.abs().max()), grid)
