"""Packing and unpacking of codes, and the bytes of packed rows.

``width`` is the number of bits of a code. The codes of a row are cut into planes, 8 / ``width``
parts of equally many consecutive codes. Byte ``j`` contains code ``j`` of every plane.
"""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressors.lower.targets.tensorrt.types import codes_tensor
from compressors.quantize.kernels.bitpacking import pack, unpack
from compressors.quantize.tables.codebooks import WIDTHS, compute_code_width, row_bytes


@given(data=st.data(), width=st.sampled_from(WIDTHS), shape=st.tuples(*[st.integers(1, 13)] * 2))
def test_unpack_restores_packed_codes(data, width, shape):
    values = arrays.arrays(np.uint8, shape, elements=st.integers(0, 2**width - 1))
    codes = torch.from_numpy(data.draw(values))
    packed = pack(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], row_bytes(shape[1], width))
    assert torch.equal(unpack(packed, shape[1], width), codes)
    assert torch.equal(unpack(packed[:, None], shape[1], width), codes[:, None])


@given(count=st.integers(1, 100), width=st.sampled_from(WIDTHS))
def test_row_bytes_pads_by_less_than_a_byte(count, width):
    assert 0 <= row_bytes(count, width) * 8 - count * width < 8


@pytest.mark.parametrize(
    ("levels", "width"), [(1, 2), (2, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)]
)
def test_code_width_is_the_smallest_stored_width_for_the_levels(levels, width):
    assert compute_code_width(levels) == width


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_packed_planes_are_consecutive_codes_with_the_first_plane_in_the_lowest_bits(count, width):
    """Exported graphs unpack codes in this order."""
    codes = torch.arange(count, dtype=torch.uint8).reshape(1, count) % 4
    packed = pack(codes, width)[0]
    planes = [(packed >> shift) & ((1 << width) - 1) for shift in range(0, 8, width)]
    assert torch.equal(torch.cat(planes)[:count], codes[0])
    assert len(packed) == -(-count * width // 8)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("width", WIDTHS)
def test_tensorrt_codes_decode_to_the_packed_codes(count, width):
    codes = torch.randint(1 << width, (7, count), dtype=torch.uint8)
    tensor = codes_tensor(pack(codes, width).numpy(), width)
    result = tensor.numpy().astype(np.int64)
    if width == 2:  # TensorRT has no 2-bit type: an int4 contains two codes
        result += 8
        result = np.concatenate([result % 4, result // 4], axis=1)
    else:
        result += 128 if width == 8 else 8
    assert np.array_equal(result[:, :count], codes.numpy())
