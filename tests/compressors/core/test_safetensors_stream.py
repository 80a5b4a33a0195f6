"""The streaming writer writes the same bytes as the safetensors library, piece by piece.

A piece is a range of consecutive entries of one tensor, with its offset in the file. An entry is
one index of the first dimension, such as a row of a table.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressors.core.modules.formats import TensorSpec
from compressors.core.state.safetensors_stream import (
    DTYPES,
    StreamedFile,
    compute_size,
    write,
    write_piece,
)
from compressors.errors.compression import ContractBroken

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(
    lambda name: name != "__metadata__"
)
METADATA = st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=1)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    """Generate named tensors of any dtype and small shapes, with arbitrary bits."""
    names = draw(st.lists(NAMES, min_size=1, max_size=6, unique=True))
    tensors = {}
    for name in names:
        dtype, shape = draw(st.sampled_from(list(DTYPES.values()))), draw(SHAPES)
        count = math.prod(shape) * dtype.itemsize
        data = draw(st.binary(min_size=count, max_size=count))
        if dtype == torch.bool:
            data = bytes(byte & 1 for byte in data)
        flat = torch.tensor(list(data), dtype=torch.uint8).view(dtype) if count else torch.empty(0)
        tensors[name] = flat.to(dtype).reshape(shape)
    return tensors


def layout_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in tensors.items()}


@given(tensor_sets(), METADATA)
def test_write_creates_the_bytes_of_the_safetensors_library(tmp_path_factory, tensors, metadata):
    folder = tmp_path_factory.mktemp("files")
    write(folder / "ours", tensors, metadata)
    save_file(tensors, folder / "library", metadata)
    assert (folder / "ours").read_bytes() == (folder / "library").read_bytes()


@given(tensor_sets(), st.randoms(use_true_random=False), st.integers(1, 3))
def test_pieces_in_any_order_and_size_result_in_the_same_file(
    tmp_path_factory, tensors, rng: random.Random, size: int
):
    folder = tmp_path_factory.mktemp("files")
    file = StreamedFile(layout_of(tensors))
    pieces = []
    for name, tensor in tensors.items():
        if tensor.dim():
            pieces += [
                file.piece(name, tensor[first : first + size], first)
                for first in range(0, len(tensor), size)
            ]
        else:
            pieces.append(file.piece(name, tensor))
    rng.shuffle(pieces)
    with (folder / "ours").open("wb") as opened:
        opened.write(file.header)
        opened.truncate(file.bytes)
        opened.flush()
        for piece in pieces:
            write_piece(opened.fileno(), piece)
    save_file(tensors, folder / "library")
    assert (folder / "ours").read_bytes() == (folder / "library").read_bytes()


def test_tensor_that_is_not_contiguous_is_written_in_logical_order(tmp_path: Path):
    transposed = torch.arange(12.0).reshape(3, 4).T
    write(tmp_path / "file", {"transposed": transposed})
    assert torch.equal(load_file(tmp_path / "file")["transposed"], transposed)


def test_tensor_of_several_pieces_is_read_back_unchanged(tmp_path: Path):
    large = torch.arange(3 * 2**20, dtype=torch.int64).reshape(-1, 4)  # 24 MiB: three pieces
    write(tmp_path / "file", {"large": large, "small": torch.tensor(7)})
    tensors = load_file(tmp_path / "file")
    assert torch.equal(tensors["large"], large)
    assert tensors["small"].item() == 7


# Numbers of elements and bytes at which 32-bit arithmetic would overflow.
OVERFLOWS = (2**31, 2**32, 2**33)


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.int8, 1), (torch.int8, 64), (torch.float16, 1), (torch.float32, 24)]
)
def test_offsets_beyond_32_bits_are_exact(overflow: int, dtype: torch.dtype, width: int):
    rows = overflow // width + 3
    # Two tensors of the same shape; ``b`` is stored after ``a``.
    specs = {"a": TensorSpec((rows, width), dtype), "b": TensorSpec((rows, width), dtype)}
    file = StreamedFile(specs)
    header_bytes = len(file.header)
    entry_bytes = width * dtype.itemsize
    for entry in (overflow // width - 1, overflow // width, overflow // width + 1):
        assert file.find_offset("a", entry) == header_bytes + entry * entry_bytes
        assert file.find_offset("b", entry) == header_bytes + (rows + entry) * entry_bytes
    assert file.bytes == header_bytes + 2 * rows * entry_bytes
    # The first 8 bytes are the length of the JSON that follows.
    offsets = json.loads(file.header[8:])["b"]["data_offsets"]
    assert offsets == [rows * entry_bytes, 2 * rows * entry_bytes]


def test_rows_near_32_bit_offsets_are_read_back_by_the_library(tmp_path: Path):
    # A sparse file: it has 6 GiB but takes only a few blocks of the disk.
    width, rows = 32, 6 * 2**30 // 32
    file = StreamedFile({"codes": TensorSpec((rows, width), torch.int8)})
    at_2_31 = 2**31 // width
    written_rows = [0, at_2_31 - 1, at_2_31, at_2_31 + 1, 2 * at_2_31 - 1, 2 * at_2_31, rows - 1]
    path = tmp_path / "large"
    with path.open("wb") as opened:
        opened.write(file.header)
        opened.truncate(file.bytes)
        opened.flush()
        for number, row in enumerate(written_rows, start=1):
            values = torch.full((1, width), number, dtype=torch.int8)
            write_piece(opened.fileno(), file.piece("codes", values, row))
    assert path.stat().st_blocks * 512 < 2**20
    with safe_open(path, framework="pt") as opened:
        codes = opened.get_slice("codes")
        assert codes.get_shape() == [rows, width]
        for number, row in enumerate(written_rows, start=1):
            assert set(codes[row : row + 1].flatten().tolist()) == {number}
        assert not codes[at_2_31 + 2 : at_2_31 + 4].any()


LAYOUT = {"codes": TensorSpec((4, 2), torch.int8), "one": TensorSpec((), torch.float32)}


@pytest.mark.parametrize(
    ("name", "values", "entry", "code", "fields"),
    [
        ("other", torch.zeros(1, 2).to(torch.int8), 0, "tensor_not_laid_out", {"name": "other"}),
        ("codes", torch.zeros(1, 2), 0, "dtype_differs", {"got": "torch.float32"}),
        ("codes", torch.zeros(1, 3).to(torch.int8), 0, "shape_differs", {"got": (1, 3)}),
        ("codes", torch.zeros(2).to(torch.int8), 0, "shape_differs", {"got": (2,)}),
        ("codes", torch.zeros(2, 2).to(torch.int8), 3, "shape_differs", {"entry": 3}),
        ("codes", torch.zeros(1, 2).to(torch.int8), 5, "entry_outside", {"entry": 5}),
        ("codes", torch.zeros(1, 2).to(torch.int8), -1, "entry_outside", {"entry": -1}),
        ("one", torch.zeros(1), 0, "shape_differs", {"got": (1,), "expected": ()}),
        ("codes", torch.zeros(1, 2, dtype=torch.int8, device="meta"), 0, "values_missing", {}),
    ],
)
def test_piece_that_does_not_fit_the_layout_is_refused(name, values, entry, code, fields):
    with raises_code(ContractBroken, code, **fields):
        StreamedFile(LAYOUT).piece(name, values, entry)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("x", TensorSpec((2,), torch.complex128)),
        ("__metadata__", TensorSpec((2,), torch.int8)),
        ("x", TensorSpec((-2,), torch.int8)),
    ],
)
def test_layout_that_safetensors_cannot_store_is_refused(name, spec):
    with pytest.raises(ContractBroken):
        StreamedFile({name: spec})


def test_compute_size_returns_bytes():
    assert compute_size(TensorSpec((3, 5), torch.float16)) == 30
    assert compute_size(TensorSpec((), torch.float64)) == 8
    assert compute_size(TensorSpec((2**31, 4), torch.int64)) == 2**36
