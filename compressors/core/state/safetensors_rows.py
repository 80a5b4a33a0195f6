"""Read rows of a stored tensor into one buffer per thread, instead of memory-mapping the file.

A mapped file's pages count as the process's memory until the system reclaims them. A reused buffer
is as small as one block and remains in a core's cache.
"""

import math
import mmap
import os
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compressors.core.modules.formats import TensorSpec
from compressors.core.state.safetensors_stream import DTYPES
from compressors.errors.compression import ModelRefused


class StoredRows(NamedTuple):
    """One tensor of an open safetensors file.

    ``start`` is the offset of its first byte in the file, ``file`` an open descriptor of ``path``.
    """

    path: Path
    file: int
    name: str
    start: int
    spec: TensorSpec

    def read(self, begin: int, end: int) -> Tensor:
        """Read entries ``begin`` to ``end`` of the first dimension, or a whole 0-d tensor.

        The result is in this thread's buffer: its next call of ``read`` overwrites it.

        Raises:
            ModelRefused: the file is shorter than its header says.
        """
        inner = self.spec.shape[1:]
        shape = (end - begin, *inner) if self.spec.shape else ()
        each = math.prod(inner) * self.spec.dtype.itemsize
        at, size = self.start + begin * each, math.prod(shape) * self.spec.dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=self.spec.dtype)
        buffer = _buffer(size)
        view, done = memoryview(buffer.numpy())[:size], 0  # type: ignore[arg-type]
        while done < size:
            count = os.preadv(self.file, [view[done:]], at + done)  # at most 2 GiB a call
            if not count:
                raise ModelRefused(
                    "file_truncated", path=str(self.path), name=self.name, byte=at + done
                )
            done += count
        return buffer[:size].view(self.spec.dtype).reshape(shape)

    def mapped(self) -> Tensor:
        """Memory-map the whole tensor read-only: a write to it ends the process.

        The safetensors library's mapping is writable, so the system counts all of it as memory that
        this process may need, and refuses it if that is limited.
        """
        count = math.prod(self.spec.shape)
        if not count:
            return torch.empty(self.spec.shape, dtype=self.spec.dtype)
        pages = mmap.mmap(self.file, 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(pages, dtype=self.spec.dtype, count=count, offset=self.start)
        return flat.reshape(self.spec.shape)


def spec_of(dtype: str, shape: tuple[int, ...], name: str) -> TensorSpec:
    """Return shape and dtype of a tensor from its entry in a file's header.

    Raises:
        ModelRefused: the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise ModelRefused("dtype_unknown", name=name, dtype=dtype, dtypes=tuple(DTYPES))
    return TensorSpec(shape, DTYPES[dtype])


_thread = threading.local()


def _buffer(size: int) -> Tensor:
    """Return this thread's buffer, of at least ``size`` bytes."""
    buffer: Tensor | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _thread.buffer = None  # freed before the larger one is allocated
        buffer = torch.empty(size, dtype=torch.uint8)
        _thread.buffer = buffer
    return buffer
