"""A Bag is torch's EmbeddingBag, in every form people use it."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from models import METHODS
from torch import Tensor, nn

from compressors.core.modules.formats import Bag, PackedTable, pad_positions, padded
from compressors.core.registries import TABLE_FORMATS
from compressors.core.steps.table_encoder import encode_table
from compressors.core.units import pack_table
from compressors.quantize.dense import float16

ROWS, DIM = 9, 3
MODES = ("sum", "mean", "max")
# torch adds the ids of a bag in another order than a masked product does: 24 numbers near 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

bags = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=6), max_size=5)


def torchs(mode: str, padding_idx: int | None, last: bool = False) -> nn.EmbeddingBag:
    torch.manual_seed(0)
    return nn.EmbeddingBag(
        ROWS, DIM, mode=mode, padding_idx=padding_idx, include_last_offset=last
    ).eval()


def ours(old: nn.EmbeddingBag) -> Bag:
    table = nn.Embedding(ROWS, DIM)
    table.weight = old.weight
    bag = pack_table(old, table)
    assert isinstance(bag, Bag)
    return bag


def jagged(lists: list[list[int]], *, last: bool) -> tuple[Tensor, Tensor]:
    values = torch.tensor([i for ids in lists for i in ids], dtype=torch.int64)
    bounds = torch.tensor([0, *(len(ids) for ids in lists)]).cumsum(0)
    return values, bounds if last else bounds[:-1]


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("last", [False, True])
@given(lists=bags, padding_idx=st.sampled_from([None, 0, 4]))
@example(lists=[[]], padding_idx=None)
@example(lists=[[], [], []], padding_idx=0)
@example(lists=[[4, 4], [], [4]], padding_idx=4)
def test_jagged_bags(mode, last, lists, padding_idx):
    if last and not lists:
        lists = [[]]  # torch refuses offsets that hold nothing but the last one
    old = torchs(mode, padding_idx, last)
    values, offsets = jagged(lists, last=last)
    with torch.no_grad():
        same(ours(old)(values, offsets), old(values, offsets))


@pytest.mark.parametrize("mode", MODES)
@given(
    rows=st.integers(0, 4),
    length=st.integers(1, 6),
    padding_idx=st.sampled_from([None, 0, 4]),
    seed=st.integers(0, 9),
)
def test_padded_bags(mode, rows, length, padding_idx, seed):
    old = torchs(mode, padding_idx)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(ROWS, (rows, length), generator=generator)
    if rows and padding_idx is not None:
        ids[0] = padding_idx  # nothing but padding
    with torch.no_grad():
        same(ours(old)(ids), old(ids))


@given(lists=bags, padding_idx=st.sampled_from([None, 0, 4]), seed=st.integers(0, 9))
def test_weights_per_id_of_jagged_bags(lists, padding_idx, seed):
    old = torchs("sum", padding_idx)
    values, offsets = jagged(lists, last=False)
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = ours(old)(values, offsets, per_sample_weights=weights)
        same(found, old(values, offsets, per_sample_weights=weights))


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_weights_per_id_of_padded_bags(padding_idx):
    old = torchs("sum", padding_idx)
    ids, weights = torch.randint(ROWS, (4, 5)), torch.randn(4, 5)
    with torch.no_grad():
        found = ours(old)(ids, per_sample_weights=weights)
        same(found, old(ids, per_sample_weights=weights))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_the_table_as_in_torchs_bag(mode):
    values, offsets = jagged([[1, 2, 2], [], [5], [0, 4]], last=False)
    old = torchs(mode, 0)
    old(values, offsets).square().sum().backward()
    expected, old.weight.grad = old.weight.grad, None
    ours(old)(values, offsets).square().sum().backward()
    torch.testing.assert_close(old.weight.grad, expected, **CLOSE)


def table_of(name: str, weight: Tensor) -> PackedTable:
    if name == "float16":
        stored = {"weight": float16.narrow(weight)}
        return PackedTable(float16.TABLE_FORMAT, ROWS, DIM, {}, stored)
    (method,) = (one for one in METHODS if one.model_fields["kind"].default == name)
    return encode_table(method(), weight)


@pytest.mark.parametrize("name", sorted(TABLE_FORMATS))
@pytest.mark.parametrize("mode", MODES)
def test_a_compressed_table_inside_is_torchs_bag_over_the_decoded_table(name, mode):
    old = torchs(mode, 4)
    inside = table_of(name, old.weight.detach())
    with torch.no_grad():
        old.weight.copy_(inside(torch.arange(ROWS)))
        for lists in ([[1, 4, 8], [], [4]], [[], []]):
            values, offsets = jagged(lists, last=False)
            same(pack_table(old, inside)(values, offsets), old(values, offsets))


@given(lists=bags.filter(bool), room=st.integers(0, 2))
def test_places_in_a_bag_hold_its_ids_in_order_and_zero_beyond(lists, room):
    values, bounds = jagged(lists, last=True)
    longest = max(len(ids) for ids in lists) + room
    inside, position = pad_positions(bounds[:-1], bounds[1:], len(values), longest)
    laid = padded(values, position)
    for row, ids in enumerate(lists):
        assert laid[row].tolist() == ids + [0] * (longest - len(ids))
        assert inside[row].tolist() == [place < len(ids) for place in range(longest)]
