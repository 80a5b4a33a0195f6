"""Row-wise int8 and int4: what rounding may cost, and that nothing else is lost."""

from collections.abc import Callable
from typing import NamedTuple

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressors.errors import CompressionError
from compressors.tables import rowwise_int4, rowwise_int8

unhurried = settings(deadline=None)  # a busy machine is not a wrong answer

# A float32 quotient, its rounding and the product back each move by at most one part in 2^24.
SLACK = 4 * 2.0**-24


class Method(NamedTuple):
    """One format's maths under the same names."""

    encode: Callable[..., tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor, int], Tensor]
    lookup: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    op: object
    levels: int


INT8 = Method(
    rowwise_int8.encode,
    lambda codes, scale, _: rowwise_int8.decode(codes, scale),
    lambda codes, scale, ids, _: torch.ops.recpress.rowwise_int8(codes, scale, ids),
    torch.ops.recpress.rowwise_int8.default,
    127,
)
INT4 = Method(
    rowwise_int4.encode,
    rowwise_int4.decode,
    torch.ops.recpress.rowwise_int4,
    torch.ops.recpress.rowwise_int4.default,
    7,
)
both = pytest.mark.parametrize("method", [INT8, INT4], ids=["int8", "int4"])


def tables(largest: float = 1e5) -> st.SearchStrategy[Tensor]:
    """Float32 tables whose rows lie at very different scales, down to the smallest numbers."""

    def scaled(drawn: tuple[np.ndarray, float]) -> Tensor:
        table, power = drawn
        scales = np.float32(10.0) ** (power - 3 * np.arange(len(table), dtype=np.float32))
        return torch.from_numpy((table * scales[:, None]).astype(np.float32))

    shapes = st.tuples(st.integers(1, 5), st.integers(1, 9))
    unit = st.floats(-1, 1, width=32, allow_subnormal=False)
    values = arrays.arrays(np.float32, shapes, elements=unit)
    return st.tuples(values, st.floats(-8, np.log10(largest))).map(scaled)


def within_half_a_level(method: Method, table: Tensor, scale_type: str) -> None:
    stored, scale = method.encode(table, scale_type)
    error = (method.decode(stored, scale, table.shape[1]) - table).abs()
    slack = SLACK * table.abs().amax(dim=1, keepdim=True)
    assert torch.all(error <= scale.float() / 2 + slack)


@both
@unhurried
@given(table=tables(), scale_type=st.sampled_from(["float16", "float32"]))
def test_every_weight_returns_within_half_a_level_of_the_stored_scale(method, table, scale_type):
    within_half_a_level(method, table, scale_type)


@both
@pytest.mark.parametrize("largest", [1.4e-7, 1e-5, 1.1e-4, 6e-8 * 127.4])
def test_a_scale_among_the_smallest_float16_numbers_clips_nothing(method, largest):
    # Such scales are whole multiples of 2^-24: rounded down, they would clip the largest weights.
    within_half_a_level(method, torch.linspace(-1, 1, 33).reshape(3, 11) * largest, "float16")


@both
@unhurried
@given(table=tables())
def test_a_level_is_no_wider_than_the_rows_largest_weight_needs(method, table):
    _, scale = method.encode(table)
    needed = table.abs().amax(dim=1, keepdim=True) / method.levels
    # float16 rounds a scale by at most one part in 2^11, or by one of its smallest steps
    assert torch.all(scale.float() <= needed * (1 + 2.0**-11) + 2.0**-24)
    assert torch.all(scale > 0)


@both
@pytest.mark.parametrize("scale_type", ["float16", "float32"])
def test_rows_of_zeros_are_exact_and_keep_a_positive_scale(method, scale_type):
    table = torch.zeros(4, 5)
    table[2] = torch.tensor([0.5, -1.0, 0.0, 0.25, 1.0])
    stored, scale = method.encode(table, scale_type)
    decoded = method.decode(stored, scale, 5)
    assert torch.equal(decoded[[0, 1, 3]], table[[0, 1, 3]])
    assert torch.all(scale > 0)
    assert torch.isfinite(scale).all()
    assert scale.dtype == getattr(torch, scale_type)


@both
def test_weights_too_small_for_float16_become_zero_not_nonsense(method):
    table = torch.full((2, 4), 1e-12)
    stored, scale = method.encode(table)
    assert method.decode(stored, scale, 4).abs().max() == 0


@both
def test_a_scale_above_float16_is_refused_and_float32_takes_it(method):
    table = torch.full((2, 3), 65504.0 * method.levels * 1.01)
    with pytest.raises(CompressionError, match=r"scale above float16.*'float32'"):
        method.encode(table)
    within_half_a_level(method, table, "float32")


@both
def test_both_ends_of_a_row_are_kept_exactly_at_a_scale_float16_holds(method):
    table = torch.tensor([[-1.0, 1.0, 0.0]]) * method.levels * 2.0**-6
    stored, scale = method.encode(table)
    assert torch.equal(method.decode(stored, scale, 3), table)


@unhurried
@given(
    codes=arrays.arrays(
        np.int8, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(-8, 7)
    )
)
def test_packing_nibbles_and_back_is_the_identity(codes):
    given_codes = torch.from_numpy(codes)
    packed = rowwise_int4.pack(given_codes)
    assert packed.shape == (codes.shape[0], (codes.shape[1] + 1) // 2)
    assert packed.dtype == torch.uint8
    assert torch.equal(rowwise_int4.unpack(packed, codes.shape[1]), given_codes)


@pytest.mark.parametrize("dim", [1, 2, 3, 8])
def test_nibbles_lie_in_two_planes_low_first(dim):
    codes = torch.arange(dim, dtype=torch.int8).reshape(1, dim) - 4
    packed, half = rowwise_int4.pack(codes)[0], (dim + 1) // 2
    low, high = (packed & 15).to(torch.int8) - 8, (packed >> 4).to(torch.int8) - 8
    assert torch.equal(low, codes[0, :half])
    assert torch.equal(high[: dim - half], codes[0, half:])
    assert not high[dim - half :].any()  # the padding of an odd width decodes to zero


@both
@pytest.mark.parametrize("dim", [1, 2, 5])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_lookup_gives_the_decoded_rows_for_ids_of_any_shape(method, dim, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    stored, scale = method.encode(torch.randn(11, dim, generator=generator))
    ids = torch.randint(11, shape, generator=generator, dtype=dtype)
    rows = method.lookup(stored, scale, ids, dim)
    assert rows.dtype == torch.float32
    assert rows.shape == (*shape, dim)
    assert torch.equal(rows, method.decode(stored, scale, dim)[ids.long()])


@both
@pytest.mark.parametrize("dim", [1, 4, 5])
@pytest.mark.parametrize("scale_type", ["float16", "float32"])
def test_the_op_keeps_torchs_rules_for_custom_ops(method, dim, scale_type):
    stored, scale = method.encode(torch.randn(6, dim), scale_type)
    ids = torch.tensor([[0, 5, 5], [2, 1, 0]])
    extra = (dim,) if method is INT4 else ()
    torch.library.opcheck(method.op, (stored, scale.requires_grad_(), ids, *extra))


@both
@pytest.mark.parametrize("dim", [1, 4, 5])
@pytest.mark.parametrize("scale_type", ["float16", "float32"])
def test_the_scales_gradient_is_that_of_plain_torch(method, dim, scale_type):
    generator = torch.Generator().manual_seed(1)
    stored, scale = method.encode(torch.randn(6, dim, generator=generator), scale_type)
    ids = torch.tensor([[0, 5, 5], [2, 1, 0]])  # repeated ids add up, row 3 is never read
    weight = torch.randn(2, 3, dim, generator=generator)
    ours = scale.clone().requires_grad_()
    (method.lookup(stored, ours, ids, dim) * weight).sum().backward()
    plain = scale.clone().requires_grad_()
    codes = stored.float() if method is INT8 else rowwise_int4.unpack(stored, dim).float()
    (codes[ids] * plain.float()[ids] * weight).sum().backward()
    # The same sums in another order; in float16 torch also adds repeated ids in float16.
    tolerance = 1e-6 if scale_type == "float32" else 2e-3
    torch.testing.assert_close(ours.grad, plain.grad, rtol=tolerance, atol=tolerance)
    assert ours.grad[3].item() == 0
    assert ours.grad.abs().sum() > 0


# --- clipping --------------------------------------------------------------------------------


def squared_error(table: Tensor, clipping: str, scale_type: str) -> Tensor:
    stored, scale = rowwise_int4.encode(table, scale_type, clipping)
    return (rowwise_int4.decode(stored, scale, table.shape[1]) - table).double().square().sum(dim=1)


@unhurried
@given(table=tables(), scale_type=st.sampled_from(["float16", "float32"]))
def test_clipping_by_squared_error_makes_no_row_worse(table, scale_type):
    plain = squared_error(table, "min_max", scale_type)
    assert torch.all(squared_error(table, "mse", scale_type) <= plain * (1 + 1e-5))


def test_clipping_finds_the_best_share_of_every_row():
    """Against a search that encodes the whole table once for every share."""
    table = torch.randn(200, 24, generator=torch.Generator().manual_seed(3))
    _, widest = rowwise_int4.encode(table, "float32")
    tried = []
    for share in (1.0, *rowwise_int4.SHARES):
        scale = (widest * share).double()
        codes = (table.double() / scale).round().clamp(-7, 7)
        tried.append((codes * scale - table.double()).square().sum(dim=1))
    least = torch.stack(tried).amin(dim=0)
    found = squared_error(table, "mse", "float32")
    torch.testing.assert_close(found, least, rtol=1e-4, atol=0)
    # A normal row of 24 loses a tenth of its error and more where its largest weight stands out.
    assert found.sum() < 0.95 * squared_error(table, "min_max", "float32").sum()


def test_one_large_weight_is_clipped_for_the_many_small_ones():
    table = torch.full((1, 64), 0.5)
    table[0, 0] = 1.0
    _, plain = rowwise_int4.encode(table, "float32")
    _, clipped = rowwise_int4.encode(table, "float32", "mse")
    assert float(plain) == pytest.approx(1 / 7)
    assert float(clipped) < float(plain)


@pytest.mark.parametrize("value", [0.0, 1e-9, 6e-8, 1e-5])
def test_rows_near_nothing_keep_a_positive_scale(value):
    stored, scale = rowwise_int4.encode(torch.full((3, 5), value), "float16", "mse")
    assert bool((scale > 0).all())
    assert rowwise_int4.decode(stored, scale, 5).isfinite().all()
