"""Row-wise int8, int4 and int2: stored tensors, lookups, gradients, tables of earlier versions.

The codes of a row are cut into planes, 8 / bits parts of consecutive codes. Byte ``j`` contains
code ``j`` of every plane. With ``rows_per_scale`` 0, the whole table has one scale.
"""

import hashlib

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairwise import parametrize_pairwise
from pydantic import ValidationError
from random_tables import draw_normal
from rowwise_reference import StoredRows, decode_rows, encode_rows, pack_planes, unpack_planes
from torch import Tensor

from compressors.core.modules.formats import PackedTable
from compressors.core.steps.table_encoder import encode_table
from compressors.quantize.kernels import bitpacking
from compressors.quantize.tables import rowwise_int4, rowwise_int8
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

Rowwise = RowwiseInt8 | RowwiseInt4 | RowwiseInt2
BITS = {"rowwise_int8": 8, "rowwise_int4": 4, "rowwise_int2": 2}

STEPS = {
    f"{method.__name__}-{'symmetric' if symmetric else 'offset'}-{rows_per_scale}": method(
        symmetric=symmetric, clipping="min_max", rows_per_scale=rows_per_scale
    )
    for method in (RowwiseInt8, RowwiseInt4, RowwiseInt2)
    for symmetric in (True, False)
    for rows_per_scale in (0, 1, 4)
}


def pack(step: Rowwise, table: Tensor) -> PackedTable:
    """A table as the step stores it, in blocks of eight rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressors.core.steps.table_encoder.BLOCK_ROWS", 8)
        return encode_table(step, table)


def reference(step: Rowwise, table: Tensor) -> StoredRows:
    """The stored table, computed with numpy from the documented formulas."""
    return encode_rows(
        table.numpy(),
        BITS[step.kind],
        symmetric=step.symmetric,
        rows_per_scale=step.rows_per_scale,
        scale_type=step.scale,
    )


def reference_weights(step: Rowwise, table: Tensor) -> Tensor:
    """The decoded weights according to the numpy reference."""
    stored, dim = reference(step, table), table.shape[1]
    return torch.from_numpy(decode_rows(stored, BITS[step.kind], dim, step.rows_per_scale))


def varied_rows(rows: int, dim: int) -> Tensor:
    """Normal weights, and one row each: zeros, equal values, tiny, positive, with an outlier."""
    table = draw_normal(rows, dim)
    table[1 % rows] = 0.0
    table[2 % rows] = -0.37
    table[3 % rows] *= 2.0**-20
    table[4 % rows] = table[4 % rows].abs() + 3.0
    table[5 % rows, 0] = 40.0
    return table


@parametrize_pairwise(step=STEPS, dim=[1, 2, 5, 8], scale=["float16", "float32"])
def test_stored_codes_scales_and_offsets_equal_the_numpy_reference(step, dim, scale):
    step = step.model_copy(update={"scale": scale})
    table = varied_rows(11, dim)
    stored, expected_rows = pack(step, table), reference(step, table)
    assert np.array_equal(stored.codes.view(torch.uint8).numpy(), expected_rows.codes)
    assert np.array_equal(stored.scale.numpy(), expected_rows.scale)
    if expected_rows.offset is None:
        assert "offset" not in dict(stored.named_buffers())
    else:
        assert np.array_equal(stored.offset.numpy(), expected_rows.offset)


@parametrize_pairwise(step=STEPS)
def test_weights_halfway_between_two_levels_are_rounded_as_documented(step):
    """The range gives a scale of 1 or 2, so many weights are halfway between two levels."""
    top = (127 if step.symmetric else 255) if step.kind == "rowwise_int8" else 3
    halves = torch.arange(-2 * top if step.symmetric else 0, 2 * top + 1).float() / 2
    if step.kind == "rowwise_int4":
        halves = torch.cat([halves, torch.tensor([7.0 if step.symmetric else 15.0])])
    table = halves.repeat(4, 1)
    assert torch.equal(pack(step, table)(torch.arange(4)), reference_weights(step, table))


@parametrize_pairwise(
    step=STEPS,
    dim=[1, 2, 5, 8],
    shape=[(), (7,), (3, 4), (0,), (2, 0)],
    dtype=[torch.int64, torch.int32],
)
def test_lookup_returns_the_reference_weights_for_ids_of_any_shape(step, dim, shape, dtype):
    table = draw_normal(11, dim)
    ids = torch.randint(11, shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rows = pack(step, table)(ids)
    assert rows.dtype == torch.float32
    assert rows.shape == (*shape, dim)
    assert torch.equal(rows, reference_weights(step, table)[ids.long()])


@parametrize_pairwise(step=STEPS, rows=[1, 8, 11], scale=["float16", "float32"])
def test_stored_bytes_are_the_bytes_of_codes_scales_and_offsets(step, rows, scale):
    step = step.model_copy(update={"scale": scale})
    dim, bits = 10, BITS[step.kind]
    table = pack(step, draw_normal(rows, dim))
    ranges = -(-rows // step.rows_per_scale) if step.rows_per_scale else 1
    numbers = ranges * (1 if step.symmetric else 2)
    size = {"float16": 2, "float32": 4}[scale]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in table.buffers())
    assert stored == rows * -(-dim * bits // 8) + numbers * size


def gradients(
    step: Rowwise, table: PackedTable, ids: Tensor, output_gradient: Tensor, *, with_op: bool
) -> dict[str, Tensor]:
    """Gradients of the tensors that the format can train, by the op or by torch operators."""
    stored = {name: tensor.clone() for name, tensor in table.named_buffers()}
    learned_tensors = [name for name in step.storage.learned if name in stored]
    for name in learned_tensors:
        stored[name].requires_grad_()
    if with_op:
        rows = step.storage.lookup(stored, ids, table.dim, step.settings())
    else:
        with torch.no_grad():
            bits = BITS[step.kind]
            levels = unpack_planes(stored["codes"].view(torch.uint8).numpy(), table.dim, bits)
            if bits == 8 and step.symmetric:
                levels = levels.view(np.int8)
            # Symmetric 2-bit codes 0 to 3 are -1.5 to 1.5 times the scale.
            code_of_zero = {8: 0, 4: 8, 2: 1.5}[bits] * step.symmetric
            multiples = torch.from_numpy(levels).float()[ids] - code_of_zero
        scale_indices = ids // (step.rows_per_scale or table.rows)
        rows = multiples * stored["scale"].float()[scale_indices]
        if "offset" in stored:
            rows = rows + stored["offset"].float()[scale_indices]
    (rows * output_gradient).sum().backward()
    return {name: stored[name].grad for name in learned_tensors}


@parametrize_pairwise(step=STEPS, dim=[2, 5], scale=["float16", "float32"])
def test_gradients_of_scales_and_offsets_equal_plain_torch(step, dim, scale):
    step = step.model_copy(update={"scale": scale})
    table = pack(step, draw_normal(11, dim))
    ids = torch.tensor([[0, 5, 5], [2, 1, 0]])  # repeated ids add up, rows 8 to 10 are never read
    output_gradient = draw_normal(6, dim).reshape(2, 3, dim)
    with_op = gradients(step, table, ids, output_gradient, with_op=True)
    with_torch = gradients(step, table, ids, output_gradient, with_op=False)
    assert set(with_op) == ({"scale"} if step.symmetric else {"scale", "offset"})
    # The same sums in another order; in float16 torch also adds repeated ids in float16.
    tolerance = 1e-5 if scale == "float32" else 5e-3
    torch.testing.assert_close(with_op, with_torch, rtol=tolerance, atol=tolerance)
    for gradient in with_op.values():
        assert gradient.abs().sum() > 0
        if step.rows_per_scale:
            assert gradient[-1].item() == 0


@pytest.mark.parametrize(
    ("step", "scale"),
    # Each op is checked with both types of scales. One case with offsets and one without, for each
    # op, are not marked ``nightly``.
    [
        pytest.param(
            step,
            ("float16", "float32")[index % 2],
            id=name,
            marks=() if index in (0, 5, 7, 10, 14, 15) else pytest.mark.nightly,
        )
        for index, (name, step) in enumerate(STEPS.items())
    ],
)
def test_op_passes_opcheck(step, scale):
    step = step.model_copy(update={"scale": scale})
    table = dict(pack(step, draw_normal(6, 5)).named_buffers())
    ids = torch.tensor([[0, 5, 5], [2, 1, 0]])
    offset = table.get("offset")
    learned_tensors = (
        table["scale"].requires_grad_(),
        offset if offset is None else offset.requires_grad_(),
    )
    dim = () if step.kind == "rowwise_int8" else (5,)
    op = getattr(torch.ops.recpress, step.kind).default
    torch.library.opcheck(op, (table["codes"], *learned_tensors, ids, *dim, step.rows_per_scale))


# --- packing ---------------------------------------------------------------------------------


@given(
    codes=arrays.arrays(
        np.uint8, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(0, 15)
    ),
    bits=st.sampled_from([2, 4]),
)
def test_packed_codes_equal_the_numpy_reference_and_unpack_to_the_codes(codes, bits):
    codes = codes % 2**bits
    stored = bitpacking.pack(torch.from_numpy(codes), bits)
    assert stored.dtype == torch.uint8
    assert np.array_equal(stored.numpy(), pack_planes(codes, bits))
    assert np.array_equal(bitpacking.unpack(stored, codes.shape[1], bits).numpy(), codes)


# --- tables stored by earlier versions -------------------------------------------------------


def deterministic_weights(rows: int = 300, dim: int = 11) -> Tensor:
    """Weights computed from integers, so they have the same bits on every machine."""
    integers = torch.arange(rows * dim, dtype=torch.int64)
    values = (integers * 2_654_435_761 % 2001 - 1000).to(torch.float32).reshape(rows, dim) / 1000
    return values * (1 + torch.arange(rows).unsqueeze(1) % 7) * 2.0**-7


@pytest.mark.parametrize(
    ("step", "digest"),
    [
        (RowwiseInt8(), "68a06e2f17c19eb1"),
        (RowwiseInt8(scale="float32"), "4de72887cf979078"),
        (RowwiseInt4(), "6e15b02a2656a51b"),
        (RowwiseInt4(scale="float32"), "98e099e823878c3e"),
        (RowwiseInt4(clipping="mse"), "5e26bcd6df2a3ccf"),
        (RowwiseInt4(scale="float32", clipping="mse"), "71fc3cf97fb8b2e3"),
    ],
)
def test_symmetric_tables_have_the_bytes_of_the_version_without_offsets(step, digest):
    """The expected digests are those of commit e06a5ae for the same table."""
    table = pack(step, deterministic_weights())
    data = b"".join(tensor.numpy().tobytes() for tensor in (table.codes, table.scale))
    assert hashlib.sha256(data).hexdigest()[:16] == digest


@pytest.mark.parametrize("form", [rowwise_int8.FORMAT, rowwise_int4.FORMAT])
def test_a_record_without_offset_settings_loads_as_symmetric_with_a_scale_per_row(form):
    layout = form.layout(9, 6, {"scale": "float16"})
    assert set(layout) == {"codes", "scale"}
    assert layout["scale"].shape == (9, 1)
    table = pack(
        {"rowwise_int8": RowwiseInt8, "rowwise_int4": RowwiseInt4}[form.name](),
        deterministic_weights(),
    )
    old = PackedTable(form, 300, 11, {"scale": "float16"}, dict(table.named_buffers()))
    ids = torch.tensor([0, 299, 7])
    assert torch.equal(old(ids), table(ids))


# --- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [RowwiseInt8, RowwiseInt4, RowwiseInt2])
@pytest.mark.parametrize("rows", [3, -1, 131_072])
def test_rows_per_scale_must_be_an_allowed_power_of_two(method, rows):
    with pytest.raises(ValidationError, match="rows_per_scale"):
        method(rows_per_scale=rows)
