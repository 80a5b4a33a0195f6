"""Write a safetensors file piece by piece, in any order, without a whole tensor in memory.

A format's ``layout`` gives the size of every tensor before any value exists. So the header is built
first, and each piece has a known position in the file. The file is byte-identical to the output of
the safetensors library's ``save_file``, which sorts tensors by dtype (in the reverse order of
``DTYPES``), then by name, and pads the header to a multiple of eight bytes.

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compressors.core.modules.formats import TensorSpec
from compressors.errors.compression import ContractBroken

PIECE_BYTES = 2**23
"""Size of the pieces in which ``write`` writes a tensor."""

# The library's names of dtypes, in its ascending order; tensors are stored in descending order.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


class Piece(NamedTuple):
    """Bytes and their offset ``at`` in the file."""

    at: int
    data: memoryview


class StreamedFile:
    """The layout of one safetensors file: its header and the offset of every tensor.

    Args:
        layout: shape and dtype of every tensor, by name.
        metadata: text entries for the header's ``__metadata__``.

    Raises:
        ContractBroken: safetensors does not support a dtype, or a tensor's name or shape is not
            allowed.
    """

    def __init__(
        self, layout: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        for name, spec in layout.items():
            if spec.dtype not in _RANK:
                raise ContractBroken(
                    "dtype_not_storable",
                    name=name,
                    dtype=str(spec.dtype),
                    dtypes=tuple(map(str, _RANK)),
                )
            if name == "__metadata__" or any(size < 0 for size in spec.shape):
                raise ContractBroken("tensor_not_storable", name=name, shape=tuple(spec.shape))
        self.layout = dict(layout)
        self._starts: dict[str, int] = {}
        entries_of_header: dict[str, object] = (
            {} if metadata is None else {"__metadata__": dict(metadata)}
        )
        end = 0  # a Python integer: no file size overflows it
        for name in sorted(layout, key=lambda name: (-_RANK[layout[name].dtype], name)):
            spec, begin = layout[name], end
            end += compute_size(spec)
            self._starts[name] = begin
            entries_of_header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(entries_of_header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        """First bytes of the file."""
        self.bytes = len(self.header) + end
        """Size of the whole file in bytes."""

    def find_offset(self, name: str, entry: int = 0) -> int:
        """Return the byte offset, in the file, of an entry of a tensor's first dimension.

        Raises:
            ContractBroken: there is no such tensor, or no such entry.
        """
        if name not in self.layout:
            raise ContractBroken("tensor_not_laid_out", name=name, names=tuple(self.layout))
        spec = self.layout[name]
        entries = spec.shape[0] if spec.shape else 0
        if not 0 <= entry <= entries:
            raise ContractBroken("entry_outside", name=name, entries=entries, entry=entry)
        return len(self.header) + self._starts[name] + entry * _compute_entry_bytes(spec)

    def piece(self, name: str, values: Tensor, entry: int = 0) -> Piece:
        """Return entries of a tensor's first dimension as bytes with their offset in the file.

        Args:
            name: name of the tensor.
            values: the entries, ``(entries, ...)``, with the tensor's other dimensions and dtype;
                or a whole 0-d tensor.
            entry: index of the first entry.

        Raises:
            ContractBroken: the name, dtype or shape does not fit the layout, or there are too many
                entries.
        """
        at = self.find_offset(name, entry)
        spec = self.layout[name]
        if values.dtype != spec.dtype:
            raise ContractBroken(
                "dtype_differs", name=name, got=str(values.dtype), expected=str(spec.dtype)
            )
        shape = tuple(values.shape)
        is_expected_shape = shape[1:] == spec.shape[1:] and len(shape) == len(spec.shape)
        if not is_expected_shape or (shape and entry + shape[0] > spec.shape[0]):
            raise ContractBroken(
                "shape_differs", name=name, got=shape, expected=tuple(spec.shape), entry=entry
            )
        return Piece(at, raw_bytes(values))


def compute_size(spec: TensorSpec) -> int:
    """Return the size of a stored tensor in bytes."""
    return math.prod(spec.shape) * spec.dtype.itemsize


def raw_bytes(values: Tensor) -> memoryview:
    """Return a tensor's bytes in file order; a view of its memory if it is contiguous.

    Raises:
        ContractBroken: the tensor is on the meta device.
    """
    if values.is_meta:
        raise ContractBroken("values_missing")
    flat = values.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type] # an array is a buffer


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write whole tensors to one file, a few megabytes at a time.

    The file equals that of ``safetensors.torch.save_file``, but no tensor is copied in memory.

    Raises:
        ContractBroken: safetensors cannot store one of the tensors.
    """
    file = StreamedFile(
        {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
        metadata,
    )
    with path.open("wb", buffering=0) as opened:
        write_piece(opened.fileno(), Piece(0, memoryview(file.header)))
        for name, tensor in tensors.items():
            for piece in _iterate_pieces(file, name, tensor):
                write_piece(opened.fileno(), piece)


def write_piece(file: int, piece: Piece) -> None:
    """Write a whole piece at its offset in an open file."""
    at, data = piece
    while len(data):
        bytes_written = os.pwrite(file, data, at)  # writes at most 2 GiB
        at, data = at + bytes_written, data[bytes_written:]


def _iterate_pieces(file: StreamedFile, name: str, tensor: Tensor) -> Iterator[Piece]:
    """Yield a tensor in pieces of about ``PIECE_BYTES``."""
    if not tensor.dim():
        yield file.piece(name, tensor)
        return
    entries_per_piece = max(PIECE_BYTES // max(_compute_entry_bytes(file.layout[name]), 1), 1)
    for begin in range(0, len(tensor), entries_per_piece):
        yield file.piece(name, tensor[begin : begin + entries_per_piece], begin)


def _compute_entry_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape[1:]) * spec.dtype.itemsize
