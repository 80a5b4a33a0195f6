"""Maps of rows: every row is found where it was put."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from compressors.prune.tables.kept_rows import BLOCK, kept_order, most, share
from compressors.prune.tables.row_map import byte_planes, bytes_needed


@given(
    kept=st.lists(st.booleans(), min_size=1, max_size=4 * BLOCK),
    repeats=st.integers(1, 3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_each_row_finds_its_place_among_its_own_kind(kept, repeats, dtype):
    chosen = torch.tensor(kept * repeats)
    within, before = kept_order(chosen)
    ids = torch.arange(len(chosen), dtype=dtype)
    place = torch.ops.recpress.kept_place(within, before, ids)
    assert torch.equal(place[chosen], torch.arange(int(chosen.sum())))
    assert torch.equal(-1 - place[~chosen], torch.arange(int((~chosen).sum())))
    assert within.nbytes + before.nbytes == len(chosen) + 4 * -(-len(chosen) // BLOCK)


def test_blocks_of_one_kind_only_use_the_whole_byte():
    for kind in (True, False):
        within, _ = kept_order(torch.full((2 * BLOCK,), kind))
        ends = (0, 127) if kind else (-128, -1)
        assert (int(within.min()), int(within.max())) == ends


@given(
    places=st.sampled_from([1, 2, 255, 256, 257, 65_536, 65_537, 2**24, 2**24 + 1, 2**31]),
    seed=st.integers(0, 10**6),
)
def test_any_place_survives_its_bytes(places, seed):
    drawn = torch.randint(places, (50,), generator=torch.Generator().manual_seed(seed))
    edges = torch.tensor([0, places - 1, places // 2])
    wanted = torch.cat([edges, drawn])
    planes = byte_planes(wanted, places)
    ids = torch.arange(len(wanted)).reshape(1, -1)
    assert torch.equal(torch.ops.recpress.planned_place(planes, ids)[0], wanted)
    assert planes.shape[1] == bytes_needed(places)


def test_bytes_are_as_few_as_hold_every_place():
    few = {1: 1, 256: 1, 257: 2, 65_536: 2, 65_537: 3, 2**24: 3, 2**24 + 1: 4}
    assert {places: bytes_needed(places) for places in few} == few


def test_the_ops_are_what_they_say_they_are():
    """Schema, fake kernel and real kernel agree, so an export traces what runs."""
    within, before = kept_order(torch.tensor([True, False, True] * 50))
    ids = torch.tensor([[0, 149], [7, 128]])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.recpress.kept_place, (within, before, ids), test_utils=tests)
    planes = byte_planes(torch.arange(300), 300)
    torch.library.opcheck(torch.ops.recpress.planned_place, (planes, ids), test_utils=tests)


def test_of_equal_scores_the_first_rows_are_chosen():
    score = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0])
    assert most(score, 3).tolist() == [True, True, False, True, False]


def test_a_share_of_no_lookups_is_none():
    assert share(torch.zeros(4), torch.tensor([True, False, True, False])) == 0
    assert share(torch.tensor([3.0, 1.0]), torch.tensor([True, False])) == 0.75
