"""Read rows of a stored tensor into one buffer per thread, instead of memory-mapping the file.

The pages of a memory-mapped file count as the process's memory until the system reclaims them. A
reused buffer is only as large as one block of rows and remains in a core's cache. ``memory_map`` is
for tensors that are read as a whole.
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

    Attributes:
        path: path of the file.
        file: open descriptor of the file.
        name: name of the tensor.
        start: offset of the tensor's first byte in the file.
        spec: shape and dtype of the tensor.
    """

    path: Path
    file: int
    name: str
    start: int
    spec: TensorSpec

    def read(self, begin: int, end: int) -> Tensor:
        """Read entries ``begin`` to ``end - 1`` of the first dimension, or a whole 0-d tensor.

        The result is in this thread's buffer, which the thread's next call of ``read`` overwrites.

        Raises:
            ModelRefused: the file is shorter than its header says.
        """
        entry_shape = self.spec.shape[1:]
        shape = (end - begin, *entry_shape) if self.spec.shape else ()
        entry_bytes = math.prod(entry_shape) * self.spec.dtype.itemsize
        offset, size = self.start + begin * entry_bytes, math.prod(shape) * self.spec.dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=self.spec.dtype)
        buffer = _get_buffer(size)
        view, bytes_read = memoryview(buffer.numpy())[:size], 0  # type: ignore[arg-type]
        while bytes_read < size:
            count = os.preadv(
                self.file, [view[bytes_read:]], offset + bytes_read
            )  # reads at most 2 GiB
            if not count:
                raise ModelRefused(
                    "file_truncated", path=str(self.path), name=self.name, byte=offset + bytes_read
                )
            bytes_read += count
        return buffer[:size].view(self.spec.dtype).reshape(shape)

    def memory_map(self) -> Tensor:
        """Memory-map the whole tensor read-only; a write to it crashes the process.

        The safetensors library maps files as writable. Then the system reserves memory for the
        whole file, and refuses the mapping if memory is limited. A read-only mapping reserves none.
        """
        count = math.prod(self.spec.shape)
        if not count:
            return torch.empty(self.spec.shape, dtype=self.spec.dtype)
        mapping = mmap.mmap(self.file, 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(mapping, dtype=self.spec.dtype, count=count, offset=self.start)
        return flat.reshape(self.spec.shape)


def build_spec(dtype: str, shape: tuple[int, ...], name: str) -> TensorSpec:
    """Return the spec of a tensor from the dtype and shape in a file's header.

    Raises:
        ModelRefused: the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise ModelRefused("dtype_unknown", name=name, dtype=dtype, dtypes=tuple(DTYPES))
    return TensorSpec(shape, DTYPES[dtype])


_thread = threading.local()


def _get_buffer(size: int) -> Tensor:
    """Return this thread's buffer, of at least ``size`` bytes."""
    buffer: Tensor | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _thread.buffer = None  # freed before the larger one is allocated
        buffer = torch.empty(size, dtype=torch.uint8)
        _thread.buffer = buffer
    return buffer
