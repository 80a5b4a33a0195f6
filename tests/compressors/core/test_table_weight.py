"""The weight of a compressed table: slices, products and their gradients, and tied output heads.

Networks in ``weight_readers`` use the weight of their item table as the output head, too.
``READERS`` has all of them. ``SELF_ATTENTIVE`` also reads a slice of the table ``position``, and
the head of ``RECURRENT`` is an ``nn.Linear``. ``TIED`` is the format of such a head in the plan: it
stores a bias, but no weight.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reason_codes import codes_of, require_reason
from torch import Tensor, nn
from torch.nn import functional as F
from weight_readers import ITEMS, LONGEST, READERS, RECURRENT, SELF_ATTENTIVE

from compressors.core.dry_run import dry_run
from compressors.core.modules.formats import PackedTable
from compressors.core.modules.observed_table import ObservedTable
from compressors.core.modules.table_weight import TIED, TableWeight, TiedHead, can_multiply
from compressors.core.skipping import run_or_skip
from compressors.core.steps.table_encoder import encode_table
from compressors.core.units import Unit, private_copy, stored_bytes, swap
from compressors.factorize.low_rank import LowRank
from compressors.prune.tables.merge_rows import MergeRows
from compressors.quantize.better_format import Float16Rows
from compressors.quantize.calibration.lookup_counts import lookup_counts
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.kernels import products
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

ROWS, DIM = 11, 6
# Formats that can be multiplied without decoding all rows, and formats that cannot.
STEPS = (
    RowwiseInt8(),
    RowwiseInt8(scale="float32"),
    RowwiseInt8(scale="float32", rows_per_scale=0),
    Float16Rows(),
)
UNSUPPORTED = (RowwiseInt8(symmetric=False), RowwiseInt8(rows_per_scale=4), RowwiseInt4())


def pack(step: Any, rows: int = ROWS, dim: int = DIM, seed: int = 0) -> PackedTable:
    """Return a table of random rows as the step stores it."""
    weight = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return encode_table(step, weight)


def decode(table: nn.Module) -> Tensor:
    return table(torch.arange(ROWS if not isinstance(table, PackedTable) else table.rows))


@given(
    step=st.sampled_from(STEPS),
    rows=st.integers(1, 9),
    dim=st.integers(1, 7),
    leading=st.lists(st.integers(0, 3), max_size=2),
    block=st.sampled_from((1, 10, 2**19)),
)
def test_product_equals_a_product_with_the_decoded_table(step, rows, dim, leading, block):
    table = pack(step, rows, dim)
    x = torch.randn(*leading, dim, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "BLOCK_VALUES", block)  # several blocks of rows
        result = table.multiply(x)
    expected = F.linear(x, decode(table))
    assert result.shape == (*leading, rows)
    # Sums of at most 7 products of numbers of about 1: differences are float32 rounding.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.kind}-{step.settings()}")
def test_gradients_of_a_product_are_those_of_the_decoded_table(step: Any) -> None:
    table = pack(step)
    # ``storage.learned`` has the names of the tensors that training may change.
    learned = [b for name, b in table.named_buffers() if name in table.storage.learned]
    for tensor in learned:
        tensor.requires_grad_(tensor.dtype == torch.float32)
    x = torch.randn(3, 2, DIM, generator=torch.Generator().manual_seed(1), requires_grad=True)
    upstream = torch.randn(3, 2, ROWS, generator=torch.Generator().manual_seed(2))
    leaves = [x, *(tensor for tensor in learned if tensor.requires_grad)]
    gradients = torch.autograd.grad((table.multiply(x) * upstream).sum(), leaves)
    through_rows = torch.autograd.grad((F.linear(x, decode(table)) * upstream).sum(), leaves)
    for gradient, expected in zip(gradients, through_rows, strict=True):
        # Sums of up to 66 terms of about 1 in another order.
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "slice": lambda w, x: w[:4],
    "slice from the end": lambda w, x: w[-3:],
    "slice beyond the end": lambda w, x: w[5:99],
    "empty slice": lambda w, x: w[5:2],
    "slice with a step": lambda w, x: w[::2],
    "slice of columns": lambda w, x: w[1:5, :2],
    "one row": lambda w, x: w[-1],
    "ids": lambda w, x: w[torch.tensor([[1, 2], [-1, 0]])],
    "mask": lambda w, x: w[torch.arange(ROWS) % 2 == 0],
    "new dimension": lambda w, x: w[None, :3],
    "transposed rows": lambda w, x: w.T[:2],
    "index_select": lambda w, x: torch.index_select(w, 0, torch.tensor([3, 1])),
    "embedding": lambda w, x: F.embedding(torch.tensor([[3], [1]]), w, padding_idx=1),
    "embedding with max_norm": lambda w, x: F.embedding(torch.tensor([3, 1]), w, None, 0.5),
    "linear": lambda w, x: F.linear(x, w, torch.arange(ROWS) * 1.0),
    "transposed": lambda w, x: x @ w.T,
    "t": lambda w, x: torch.matmul(x.unsqueeze(0), w.t()),
    "transpose": lambda w, x: torch.mm(x, w.transpose(0, 1)),
    "from the left": lambda w, x: w @ x.T,
    "vector": lambda w, x: torch.matmul(w, x[0]),
    "mixture of rows": lambda w, x: torch.softmax(x @ w.T, dim=1) @ w,
    "einsum": lambda w, x: torch.einsum("bd,nd->bn", x, w),
    "sum": lambda w, x: w + 1.0,
    "sum with a tensor": lambda w, x: x[:1] + w,
    "scaled": lambda w, x: 2.0 * w,
    "negated": lambda w, x: -w,
    "method": lambda w, x: w.unsqueeze(0).expand(2, -1, -1),
    "norm": lambda w, x: F.normalize(w, dim=1),
    "list": lambda w, x: torch.cat([w[:2], w]),
    "shape": lambda w, x: torch.tensor([*w.shape, *w.T.shape, len(w), w.size(1), w.dim()]),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_each_use_of_a_compressed_weight_gives_the_result_of_the_matrix(use: Any) -> None:
    table = pack(RowwiseInt8())
    x = torch.randn(4, DIM, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(use(table.weight, x), use(decode(table), x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("use", "decodes"),
    [
        *((use, False) for use in ("slice", "ids", "embedding", "linear", "t", "from the left")),
        *((use, True) for use in ("einsum", "mask", "sum")),
    ],
)
def test_only_unusual_uses_decode_all_rows(
    use: str, decodes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, read = pack(RowwiseInt8()), []
    look_up = TableWeight.look_up
    monkeypatch.setattr(
        TableWeight, "look_up", lambda self, ids: read.append(ids.numel()) or look_up(self, ids)
    )
    USES[use](table.weight, torch.ones(2, DIM))
    assert (max(read, default=0) == ROWS) == decodes


def test_a_row_out_of_range_raises_an_index_error() -> None:
    weight = pack(RowwiseInt8()).weight
    for row in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError):
            _ = weight[row]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.kind)
def test_formats_with_products_can_multiply(step: Any) -> None:
    assert can_multiply(pack(step))


@pytest.mark.parametrize("step", UNSUPPORTED, ids=lambda step: step.kind)
def test_formats_without_products_cannot_multiply_but_give_correct_products(step: Any) -> None:
    table, x = pack(step), torch.ones(2, DIM)
    assert not can_multiply(table)
    torch.testing.assert_close(x @ table.weight.T, x @ decode(table).T)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("step", [RowwiseInt8(), Float16()], ids=lambda step: step.kind)
def test_tables_read_by_weight_are_compressed_and_counted_once(
    name: str, step: Any, tmp_path: Path
) -> None:
    reference = READERS[name]
    source, bench = reference.model(), reference.bench(tmp_path / "data")
    model = run_or_skip(step, source, bench, tmp_path / "out")
    assert model.plan is not None
    item = model.plan.of("item")
    assert item is not None
    assert item.format == step.kind
    require_reason(item.reasons, "weight_multiplied")
    if (position := model.plan.of("position")) is not None:
        assert position.format == step.kind
        require_reason(position.reasons, "rows_read")
    assert sum(line.bytes_after for line in model.plan.lines) == stored_bytes(model.module)
    assert sum(line.bytes_before for line in model.plan.lines) == stored_bytes(source.module)
    assert dry_run(step, source, bench).plan == model.plan


def test_a_tied_head_multiplies_by_the_table_after_each_step_and_after_loading(
    tmp_path: Path,
) -> None:
    # ``run`` checks that the stored model gives the scores of the one in memory.
    source, bench = RECURRENT.model(), RECURRENT.bench(tmp_path / "data")
    low_rank = run_or_skip(LowRank(rank=0.5), source, bench, tmp_path / "low_rank")
    model = run_or_skip(RowwiseInt8(), low_rank, bench, tmp_path / "int8")
    for compressed in (low_rank, model):
        head = compressed.module.get_submodule("head")
        assert isinstance(head, TiedHead)
        assert head.table is compressed.module.get_submodule("item")
        assert [name for name, _ in head.named_parameters()] == ["bias"]
    assert model.plan is not None
    narrow, head_line = model.plan.of("item.narrow"), model.plan.of("head")
    assert narrow is not None and head_line is not None  # noqa: PT018 - for mypy
    assert narrow.format == "rowwise_int8"
    assert (head_line.format, head_line.bytes_after) == (TIED, 4 * ITEMS)  # bytes of the bias
    assert "head.weight" not in model.module.state_dict()


def test_bytes_of_a_shared_weight_count_for_the_table_if_its_head_is_registered_first() -> None:
    network = nn.Module()
    network.head, network.item = nn.Linear(4, 5), nn.Embedding(5, 4)
    network.head.weight = network.item.weight
    head, item = Unit.of(network)
    # In float32, the head has a bias of 5 numbers, and the table 5 rows of 4.
    assert (head.format, head.bytes, head.shared_with) == (TIED, 20, "item")
    assert (item.bytes, item.shared_with, item.shares_with_heads) == (80, "head", True)


def test_a_copy_of_a_network_with_a_tied_head_refers_to_its_own_table() -> None:
    network = nn.Module()
    network.item, network.head = nn.Embedding(5, 4), nn.Linear(4, 5)
    network.head.weight = network.item.weight
    swap(network, "item", pack(RowwiseInt8(), 5, 4))
    copy = private_copy(network)
    assert copy.head.table is copy.item is not network.item
    swap(copy, "item", pack(Float16Rows(), 5, 4, seed=3))
    x = torch.ones(2, 4)
    torch.testing.assert_close(copy.head(x), F.linear(x, decode(copy.item), copy.head.bias))
    torch.testing.assert_close(network.head(x), F.linear(x, decode(network.item), copy.head.bias))


def test_a_format_without_products_keeps_the_table_that_is_multiplied(tmp_path: Path) -> None:
    reference = SELF_ATTENTIVE
    source, bench = reference.model(), reference.bench(tmp_path / "data")
    for place, step in enumerate((RowwiseInt4(), RowwiseInt8(symmetric=False))):
        model = run_or_skip(step, source, bench, tmp_path / str(place))
        assert model.plan is not None
        item, position = model.plan.of("item"), model.plan.of("position")
        assert item is not None and position is not None  # noqa: PT018 - for mypy
        skipped = require_reason(item.reasons, "skipped", step=step.kind)
        assert codes_of([skipped.fields["why"]]) == ["not_multiplied"]
        assert (item.format, position.format) == ("float32", step.kind)
        assert dry_run(step, source, bench).plan == model.plan


def test_a_step_that_merges_rows_keeps_the_table_that_is_multiplied(tmp_path: Path) -> None:
    reference, step = SELF_ATTENTIVE, MergeRows(within=1e9)
    model = run_or_skip(step, reference.model(), reference.bench(tmp_path / "d"), tmp_path / "out")
    assert model.plan is not None
    item = model.plan.of("item")
    assert item is not None
    require_reason(item.reasons, "not_multiplied", format="merge_rows")
    assert item.format == "float32"


def test_reads_of_a_weight_are_counted_as_lookups(tmp_path: Path) -> None:
    model, bench = SELF_ATTENTIVE.model(), SELF_ATTENTIVE.bench(tmp_path / "data")
    assert bench.train is not None
    packed_model = run_or_skip(RowwiseInt8(), model, bench, tmp_path / "out")
    for counted in (model, packed_model):
        counts = lookup_counts(counted, bench, ["item", "position"])
        # One batch: its longest list selects the positions, and each row is multiplied once.
        assert counts["position"].tolist() == [1.0] * LONGEST
        assert counts["item"].min() >= bench.train.rows


def test_an_observed_table_gives_the_scores_of_its_table() -> None:
    """An observed table reports how the network reads the weight."""
    reads: list[str] = []
    table = pack(RowwiseInt8())
    observed = ObservedTable(table, lambda read, _: reads.append(read), hides_attributes=False)
    x = torch.ones(2, DIM)
    assert torch.equal(observed(torch.tensor([1])), table(torch.tensor([1])))
    assert torch.equal(x @ observed.weight.T, table.multiply(x))
    assert torch.equal(observed.weight[:2], table(torch.arange(2)))
    assert torch.equal(observed.weight.sum(), decode(table).sum())
    assert reads == ["multiplied", "looked_up", "decoded"]
    assert observed.rows == ROWS
    hidden = ObservedTable(table, lambda *_: None, hides_attributes=True)
    with pytest.raises(AttributeError):
        _ = hidden.rows
