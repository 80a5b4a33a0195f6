"""``Bag`` equals ``torch.nn.EmbeddingBag`` for every mode, layout, padding and weighting."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import METHODS
from torch import Tensor, nn

from compressors.core.modules.formats import Bag, PackedTable, gather_padded, pad_positions
from compressors.core.registries import TABLE_FORMATS
from compressors.core.steps.table_encoder import encode_table
from compressors.core.units import Unit, pack_table
from compressors.quantize.dense import float16

ROWS, DIM = 9, 3
MODES = ("sum", "mean", "max")
# torch adds the rows of a bag in another order than ``Bag`` does, so float32 sums differ.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

bags = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=6), max_size=5)


def build_torch_bag(
    mode: str, padding_idx: int | None, include_last_offset: bool = False
) -> nn.EmbeddingBag:
    """Build torch's module with the same random weight in each call."""
    torch.manual_seed(0)
    return nn.EmbeddingBag(
        ROWS, DIM, mode=mode, padding_idx=padding_idx, include_last_offset=include_last_offset
    ).eval()


def convert_bag(old: nn.EmbeddingBag) -> Bag:
    """Build a ``Bag`` that shares the weight of torch's module.

    ``pack_table`` returns the module that replaces a table: for an ``EmbeddingBag``, a ``Bag`` with
    the same mode and padding that looks up its rows in ``table``.
    """
    table = nn.Embedding(ROWS, DIM)
    table.weight = old.weight
    bag = pack_table(old, table)
    assert isinstance(bag, Bag)
    return bag


def jagged(lists: list[list[int]], *, include_last_offset: bool) -> tuple[Tensor, Tensor]:
    """Return the ids of all lists, concatenated, and the offset at which each list begins."""
    values = torch.tensor([i for ids in lists for i in ids], dtype=torch.int64)
    bounds = torch.tensor([0, *(len(ids) for ids in lists)]).cumsum(0)
    return values, bounds if include_last_offset else bounds[:-1]


def assert_close(pooled: Tensor, expected: Tensor) -> None:
    assert pooled.shape == expected.shape
    torch.testing.assert_close(pooled, expected, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("include_last_offset", [False, True])
@given(lists=bags, padding_idx=st.sampled_from([None, 0, 4]))
@example(lists=[[]], padding_idx=None)
@example(lists=[[], [], []], padding_idx=0)
@example(lists=[[4, 4], [], [4]], padding_idx=4)
def test_jagged_bags_equal_torchs_embedding_bag(mode, include_last_offset, lists, padding_idx):
    if include_last_offset and not lists:
        lists = [[]]  # torch refuses offsets with only the last offset
    old = build_torch_bag(mode, padding_idx, include_last_offset)
    values, offsets = jagged(lists, include_last_offset=include_last_offset)
    with torch.no_grad():
        assert_close(convert_bag(old)(values, offsets), old(values, offsets))


@pytest.mark.parametrize("mode", MODES)
@given(
    rows=st.integers(0, 4),
    length=st.integers(1, 6),
    padding_idx=st.sampled_from([None, 0, 4]),
    seed=st.integers(0, 9),
)
def test_padded_bags_equal_torchs_embedding_bag(mode, rows, length, padding_idx, seed):
    old = build_torch_bag(mode, padding_idx)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(ROWS, (rows, length), generator=generator)
    if rows and padding_idx is not None:
        ids[0] = padding_idx  # the first bag contains only padding
    with torch.no_grad():
        assert_close(convert_bag(old)(ids), old(ids))


@given(lists=bags, padding_idx=st.sampled_from([None, 0, 4]), seed=st.integers(0, 9))
def test_jagged_bags_with_weights_per_id_equal_torchs_embedding_bag(lists, padding_idx, seed):
    old = build_torch_bag("sum", padding_idx)
    values, offsets = jagged(lists, include_last_offset=False)
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        pooled = convert_bag(old)(values, offsets, per_sample_weights=weights)
        assert_close(pooled, old(values, offsets, per_sample_weights=weights))


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_padded_bags_with_weights_per_id_equal_torchs_embedding_bag(padding_idx):
    old = build_torch_bag("sum", padding_idx)
    ids, weights = torch.randint(ROWS, (4, 5)), torch.randn(4, 5)
    with torch.no_grad():
        pooled = convert_bag(old)(ids, per_sample_weights=weights)
        assert_close(pooled, old(ids, per_sample_weights=weights))


@pytest.mark.parametrize("mode", MODES)
def test_table_gradients_equal_the_gradients_of_torchs_embedding_bag(mode):
    values, offsets = jagged([[1, 2, 2], [], [5], [0, 4]], include_last_offset=False)
    old = build_torch_bag(mode, 0)
    old(values, offsets).square().sum().backward()
    expected, old.weight.grad = old.weight.grad, None
    convert_bag(old)(values, offsets).square().sum().backward()
    torch.testing.assert_close(old.weight.grad, expected, **CLOSE)


def encode_table_for_bag(name: str, weight: Tensor) -> PackedTable:
    """Encode a table, float ``(rows, dim)``, in the format ``name``."""
    if name == "float16":  # its step has no method ``encode`` for blocks of rows
        stored = {"weight": float16.to_float16(weight)}
        return PackedTable(float16.TABLE_FORMAT, ROWS, DIM, {}, stored)
    (method,) = (
        candidate for candidate in METHODS if candidate.model_fields["kind"].default == name
    )
    return encode_table(method(), weight)


@pytest.mark.parametrize("name", sorted(TABLE_FORMATS))
@pytest.mark.parametrize("mode", MODES)
def test_bag_of_a_compressed_table_equals_torchs_bag_of_the_decoded_table(name, mode):
    old = build_torch_bag(mode, 4)
    table = encode_table_for_bag(name, old.weight.detach())
    with torch.no_grad():
        old.weight.copy_(table(torch.arange(ROWS)))
        for lists in ([[1, 4, 8], [], [4]], [[], []]):
            values, offsets = jagged(lists, include_last_offset=False)
            assert_close(pack_table(old, table)(values, offsets), old(values, offsets))


@given(lists=bags.filter(bool), extra_columns=st.integers(0, 2))
def test_padding_a_jagged_bag_keeps_the_order_of_ids_and_appends_zeros(lists, extra_columns):
    values, bounds = jagged(lists, include_last_offset=True)
    longest = max(len(ids) for ids in lists) + extra_columns
    is_id, position = pad_positions(bounds[:-1], bounds[1:], len(values), longest)
    padded_ids = gather_padded(values, position)
    for row, ids in enumerate(lists):
        assert padded_ids[row].tolist() == ids + [0] * (longest - len(ids))
        assert is_id[row].tolist() == [index < len(ids) for index in range(longest)]


def test_units_of_two_bags_with_the_same_weight_are_shared_with_each_other():
    sums = nn.EmbeddingBag(10, 4, mode="sum")
    tied, alone = nn.Embedding(10, 4), nn.Embedding(10, 4)
    again = nn.Embedding(10, 4)
    again.weight = tied.weight
    bags = {
        "first": pack_table(sums, tied),
        "second": pack_table(sums, again),
        "third": pack_table(sums, alone),
    }
    units = Unit.of(nn.ModuleDict(bags))
    assert {unit.name: unit.shared_with for unit in units} == {
        "first": "second",
        "second": "first",
        "third": None,
    }
