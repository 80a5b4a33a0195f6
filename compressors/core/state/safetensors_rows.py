"""Rows of a stored tensor, read into one buffer a thread instead of mapped.

A mapped file's pages count as the process's memory until the system takes them back; a buffer
that is read into again and again stays as small as a block, and stays in a core's cache.
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

    ``start`` is where its first byte lies in the file, ``file`` an open descriptor of ``path``.
    """

    path: Path
    file: int
    name: str
    start: int
    spec: TensorSpec

    def read(self, begin: int, end: int) -> Tensor:
        """Entries ``begin`` to ``end`` of the first dimension, or all of a tensor of none.

        They lie in this thread's buffer: its next call of ``read`` overwrites them.

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
        """All of it, memory-mapped to be read only: who writes to it ends the process.

        The library's own mapping may be written to, so the system counts all of it as memory that
        this process could come to need, and refuses it where that is limited.
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
    """A tensor as its file's header describes it.

    Raises:
        ModelRefused: torch has no type for it.
    """
    if dtype not in DTYPES:
        raise ModelRefused("dtype_unknown", name=name, dtype=dtype, dtypes=tuple(DTYPES))
    return TensorSpec(shape, DTYPES[dtype])


_own = threading.local()


def _buffer(size: int) -> Tensor:
    """This thread's buffer, of at least ``size`` bytes."""
    buffer: Tensor | None = getattr(_own, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _own.buffer = None  # freed before the larger one is taken
        buffer = torch.empty(size, dtype=torch.uint8)
        _own.buffer = buffer
    return buffer
