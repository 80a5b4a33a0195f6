"""Tables with codebooks: layout, bytes, lookups and gradients.

``num_codebooks`` is the number of codebooks, ``levels`` the entries of each, and ``width`` the bits
of a stored code. Codebooks take at most ``codebook_share`` of the table's float32 bytes.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from error_codes import HasReason, raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER, run
from reason_codes import require_reason
from table_codes import STEPS, compute_size, each_step, encode, pack_table, step_id, tables
from torch import Tensor

from compressors.contracts import Bench
from compressors.core.state.module_state import map_tensors
from compressors.core.steps.step import TableStep
from compressors.errors.compression import NothingToCompress
from compressors.quantize.kernels.bitpacking import unpack
from compressors.quantize.tables import product_codes
from compressors.quantize.tables.kmeans import KMeans
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.residual_codes import ResidualCodes

# --- bytes and layout --------------------------------------------------------------------------


@each_step
@given(table=tables())
def test_stored_tensors_have_the_shapes_and_dtypes_of_the_layout(step, table):
    layout = step.storage.layout(*table.shape, step.settings())
    tensors = encode(step, table)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in layout.items()
    }
    width = step.storage.width(*table.shape, step.settings())
    num_codebooks, codes_per_row = 1, table.shape[1]
    if step.kind != "kmeans":
        num_codebooks = codes_per_row = step.storage.shape(
            *table.shape, step.settings()
        ).num_codebooks
    codes = unpack(tensors["codes"], codes_per_row, width)
    assert int(codes.max()) < len(tensors["codebook"]) // num_codebooks


@pytest.mark.parametrize(
    ("step", "shape", "size"),
    [
        # rows x (bytes of codes and scale) + codebooks x entries x columns x bytes per number.
        # K-means has one code per column, and entries of one number.
        (KMeans(), (1000, 10), 1000 * (5 + 2) + 16 * 4),
        (KMeans(bits=2, scale="none"), (1000, 10), 1000 * 3 + 4 * 4),
        (KMeans(bits=8, scale="float32"), (1000, 10), 1000 * (10 + 4) + 256 * 4),
        (ProductCodes(), (10_000, 16), 10_000 * 4 + 256 * 16 * 4),
        # Ten columns in four parts; the widest part has three, so each codebook has three columns.
        (ProductCodes(codebook_type="float16"), (10_000, 10), 10_000 * 4 + 256 * 4 * 3 * 2),
        (ProductCodes(parts=5, bits=4), (10_000, 10), 10_000 * 3 + 16 * 10 * 4),
        (ResidualCodes(), (10_000, 16), 10_000 * 2 + 2 * 256 * 16 * 4),
        (ResidualCodes(codebooks=5, bits=2), (10_000, 16), 10_000 * 2 + 5 * 4 * 16 * 4),
        # The share of a tenth allows 40 entries of 8 numbers: 10 in each of 4 codebooks.
        (ResidualCodes(codebooks=4, codebook_share=0.1), (400, 8), 400 * 2 + 4 * 10 * 8 * 4),
    ],
    ids=lambda value: step_id(value) if hasattr(value, "kind") else str(value),
)
def test_stored_bytes_are_the_bytes_of_padded_codes_scales_and_codebooks(step, shape, size):
    assert compute_size(step, *shape) == size


@given(
    rows=st.integers(1, 10**9),
    dim=st.integers(1, 200),
    num_codebooks=st.integers(1, 16),
    bits=st.integers(1, 8),
    share=st.floats(0.01, 1),
)
def test_codebooks_take_no_more_than_their_share_unless_they_have_two_entries(
    rows, dim, num_codebooks, bits, share
):
    for step in (
        ProductCodes(parts=num_codebooks, bits=bits, codebook_share=share),
        ResidualCodes(codebooks=num_codebooks, bits=bits, codebook_share=share),
    ):
        shape = step.storage.shape(rows, dim, step.settings())
        size = shape.num_codebooks * shape.levels * shape.dim * 4
        assert size <= share * 4 * rows * dim or shape.levels == 2
        assert 2 <= shape.levels <= max(1 << bits, 2)
        assert shape.levels <= 1 << shape.width


@given(dim=st.integers(1, 60), parts=st.integers(1, 70))
def test_parts_differ_by_at_most_one_column_and_cover_every_column_once(dim, parts):
    widths = product_codes.part_widths(dim, parts)  # columns of each part
    assert sum(widths) == dim
    assert len(widths) == min(parts, dim)
    assert max(widths) - min(widths) <= 1
    assert list(widths) == sorted(widths, reverse=True)
    # The index of each column after all parts are padded to the widest; None if none is padded.
    columns = product_codes.padded_columns(dim, parts)
    assert (columns is None) == (max(widths) == min(widths))
    if columns is not None:
        assert len(set(columns)) == dim
        assert max(columns) < len(widths) * widths[0]


@each_step
@pytest.mark.parametrize("block_rows", [1, 7, 100])
def test_codes_of_a_row_do_not_depend_on_its_block(step, block_rows):
    table = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    table[100:200] = table[:100]
    params = step.fit(table)
    at_once = step.encode(table, params)
    parts = [step.encode(block, params) for block in table.split(block_rows)]
    for name, tensor in at_once.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name


@each_step
def test_encoded_tensors_do_not_depend_on_the_global_random_state(step):
    table = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = encode(step, table)
    torch.manual_seed(2)
    torch.testing.assert_close(encode(step, table), first, rtol=0, atol=0)


# --- tables whose codes would take more bytes --------------------------------------------------


def test_a_table_that_would_not_shrink_is_skipped_and_the_plan_gives_both_sizes(tmp_path):
    step = ResidualCodes(codebooks=8)
    plan = run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path).plan
    line = plan.of("city")  # 9 x 6
    assert line.format == "float32"
    size = compute_size(step, 9, 6)
    require_reason(line.reasons, "not_smaller", step=step.kind, bytes=size, present=216)
    assert size >= 216
    assert all(line.bytes_after < line.bytes_before for line in plan.lines if line.steps)
    assert plan.of("item").format == step.kind
    stored_names = {name for name in map_tensors(tmp_path) if name.startswith("city.")}
    assert stored_names == {"city.weight"}


def test_a_step_that_shrinks_no_table_raises_nothing_to_compress(tmp_path):
    step = ResidualCodes(tables=("city",), codebooks=8)
    with raises_code(NothingToCompress, "units_missing", step="residual_codes") as caught:
        run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    assert caught.value.fields["reasons"]["city"] == HasReason("not_smaller", step="residual_codes")


# --- the ops -----------------------------------------------------------------------------------


@each_step
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_lookup_returns_the_same_rows_for_ids_of_any_shape(step, shape, dtype):
    table = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    module = pack_table(step, table)
    ids = torch.randint(40, shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    rows = module(ids)
    assert rows.dtype == torch.float32
    assert rows.shape == (*shape, 5)
    assert torch.equal(rows, module(torch.arange(40))[ids.long()])


def op_and_arguments(step: TableStep, table: Tensor, ids: Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The op that looks up rows in the step's format, and its arguments for the stored table."""
    module = pack_table(step, table)
    tensors = {
        name: tensor.requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in module.named_buffers()
    }
    rows, dim = table.shape
    width = step.storage.width(rows, dim, step.settings())
    ops = torch.ops.recpress
    if step.kind == "kmeans":
        scale = tensors.get("scale")
        return ops.kmeans_table, (tensors["codes"], tensors["codebook"], scale, ids, dim, width)
    num_codebooks = step.storage.shape(rows, dim, step.settings()).num_codebooks
    common_arguments = (tensors["codes"], tensors["codebook"], ids)
    if step.kind == "product_codes":
        return ops.product_codes, (*common_arguments, dim, num_codebooks, width)
    return ops.residual_codes, (*common_arguments, num_codebooks, width)


@pytest.mark.parametrize(
    "step",
    [
        # In the default tier: k-means without and with a scale, product codes and residual codes.
        pytest.param(
            step, id=step_id(step), marks=() if index in (1, 2, 4, 8) else pytest.mark.nightly
        )
        for index, step in enumerate(STEPS)
    ],
)
def test_op_passes_opcheck(step):
    ids = torch.tensor([[0, 5, 5], [2, 1, 39]])
    op, arguments = op_and_arguments(step, torch.randn(40, 5), ids)
    torch.library.opcheck(op.default, arguments)


def lookup_in_torch(
    step: TableStep, tensors: Mapping[str, Tensor], ids: Tensor, dim: int
) -> Tensor:
    """The lookup in torch operators, so that autograd computes the expected gradients."""
    rows = len(tensors["codes"])
    width = step.storage.width(rows, dim, step.settings())
    codebook = tensors["codebook"].float()
    if step.kind == "kmeans":
        result = codebook[unpack(tensors["codes"], dim, width)[ids].long()]
        return result * tensors["scale"].float()[ids] if "scale" in tensors else result
    shape = step.storage.shape(rows, dim, step.settings())
    codes = unpack(tensors["codes"], shape.num_codebooks, width)[ids].long()
    codebooks = codebook.reshape(shape.num_codebooks, shape.levels, shape.dim)
    entries = [codebooks[index][codes[..., index]] for index in range(shape.num_codebooks)]
    if step.kind == "residual_codes":
        return torch.stack(entries).sum(dim=0)
    widths = product_codes.part_widths(dim, step.parts)
    return torch.cat(
        [part[..., :columns] for part, columns in zip(entries, widths, strict=True)], dim=-1
    )


@each_step
@pytest.mark.parametrize("dim", [5, 8])
def test_gradients_equal_plain_torch(step, dim):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(40, dim, generator=generator)
    ids = torch.tensor([[0, 5, 5], [2, 1, 39]])  # gradients of a repeated id are added
    output_gradient = torch.randn(2, 3, dim, generator=generator)
    tensors = encode(step, table)

    def leaves() -> dict[str, Tensor]:
        return {
            name: t.clone().requires_grad_() if t.is_floating_point() else t
            for name, t in tensors.items()
        }

    with_op, with_torch = leaves(), leaves()
    rows = step.storage.lookup(with_op, ids, dim, step.settings())
    assert torch.equal(rows, lookup_in_torch(step, with_torch, ids, dim))
    (rows * output_gradient).sum().backward()
    (lookup_in_torch(step, with_torch, ids, dim) * output_gradient).sum().backward()
    for name in step.storage.learned:
        if name in with_op:
            # The same sums in another order; in float16 rounded once at the end.
            tolerance = 1e-5 if with_op[name].dtype == torch.float32 else 2e-3
            torch.testing.assert_close(
                with_op[name].grad, with_torch[name].grad, rtol=tolerance, atol=tolerance
            )
            assert with_op[name].grad.abs().sum() > 0
