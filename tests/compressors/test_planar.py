"""Packed codes come back, in as many bytes as were promised."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressors.tables.planar import WIDTHS, pack, row_bytes, unpack, width_of

unhurried = settings(deadline=None)  # a busy machine is not a wrong answer


@unhurried
@given(data=st.data(), width=st.sampled_from(WIDTHS), shape=st.tuples(*[st.integers(1, 13)] * 2))
def test_packing_and_back_is_the_identity(data, width, shape):
    values = arrays.arrays(np.uint8, shape, elements=st.integers(0, 2**width - 1))
    codes = torch.from_numpy(data.draw(values))
    packed = pack(codes, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], row_bytes(shape[1], width))
    assert torch.equal(unpack(packed, shape[1], width), codes)
    assert torch.equal(unpack(packed[:, None], shape[1], width), codes[:, None])


@given(count=st.integers(1, 100), width=st.sampled_from(WIDTHS))
def test_a_row_wastes_less_than_a_byte(count, width):
    assert 0 <= row_bytes(count, width) * 8 - count * width < 8


@pytest.mark.parametrize(
    ("levels", "width"), [(1, 2), (2, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)]
)
def test_a_code_is_as_wide_as_its_levels_need(levels, width):
    assert width_of(levels) == width


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_two_bit_codes_are_halves_of_nibbles_that_are_halves_of_bytes(count):
    """The order that graphs unpack in, written out."""
    codes = torch.arange(count, dtype=torch.uint8).reshape(1, count) % 4
    packed, quarter = pack(codes, 2)[0], -(-count // 4)
    planes = [(packed >> shift) & 3 for shift in (0, 4, 2, 6)]
    laid = torch.cat(planes)
    assert torch.equal(laid[:count], codes[0])
    assert len(packed) == quarter
    assert not laid[count:].any()
