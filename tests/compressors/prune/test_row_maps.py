"""Row maps of pruned tables: encoded positions of rows, and the ops that decode them.

The map of ``build_kept_map`` has the rank of each row among the kept, or the pruned, rows of its
block of 128 rows, and the number of kept rows before each block. The map of ``byte_planes`` has the
position of each row, in as many bytes as the largest position needs.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from compressors.prune.tables.kept_rows import BLOCK, build_kept_map, lookup_share, select_highest
from compressors.prune.tables.row_map import byte_planes, bytes_needed


@given(
    kept=st.lists(st.booleans(), min_size=1, max_size=4 * BLOCK),
    repeats=st.integers(1, 3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_kept_row_index_counts_kept_rows_from_0_and_pruned_rows_from_minus_1(kept, repeats, dtype):
    is_kept = torch.tensor(kept * repeats)
    rank_in_block, before = build_kept_map(is_kept)
    ids = torch.arange(len(is_kept), dtype=dtype)
    position = torch.ops.recpress.kept_row_index(rank_in_block, before, ids)
    assert torch.equal(position[is_kept], torch.arange(int(is_kept.sum())))
    assert torch.equal(-1 - position[~is_kept], torch.arange(int((~is_kept).sum())))
    assert rank_in_block.nbytes + before.nbytes == len(is_kept) + 4 * -(-len(is_kept) // BLOCK)


def test_ranks_of_blocks_of_only_kept_or_pruned_rows_fit_in_a_byte():
    for is_kept in (True, False):
        rank_in_block, _ = build_kept_map(torch.full((2 * BLOCK,), is_kept))
        expected = (0, 127) if is_kept else (-128, -1)
        assert (int(rank_in_block.min()), int(rank_in_block.max())) == expected


@given(
    count=st.sampled_from([1, 2, 255, 256, 257, 65_536, 65_537, 2**24, 2**24 + 1, 2**31]),
    seed=st.integers(0, 10**6),
)
def test_byte_planes_decode_to_the_encoded_positions(count, seed):
    random_positions = torch.randint(count, (50,), generator=torch.Generator().manual_seed(seed))
    first_and_last = torch.tensor([0, count - 1, count // 2])
    expected = torch.cat([first_and_last, random_positions])
    planes = byte_planes(expected, count)
    ids = torch.arange(len(expected)).reshape(1, -1)
    assert torch.equal(torch.ops.recpress.unique_row_index(planes, ids)[0], expected)
    assert planes.shape[1] == bytes_needed(count)


def test_bytes_needed_is_the_smallest_number_for_every_position():
    expected = {1: 1, 256: 1, 257: 2, 65_536: 2, 65_537: 3, 2**24: 3, 2**24 + 1: 4}
    assert {count: bytes_needed(count) for count in expected} == expected


def test_row_map_ops_pass_opcheck():
    """Schema, fake kernel and real kernel agree, as an export requires."""
    rank_in_block, before = build_kept_map(torch.tensor([True, False, True] * 50))
    ids = torch.tensor([[0, 149], [7, 128]])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.recpress.kept_row_index, (rank_in_block, before, ids), test_utils=tests
    )
    planes = byte_planes(torch.arange(300), 300)
    torch.library.opcheck(torch.ops.recpress.unique_row_index, (planes, ids), test_utils=tests)


def test_select_highest_selects_the_first_of_equal_scores():
    score = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0])
    assert select_highest(score, 3).tolist() == [True, True, False, True, False]


def test_lookup_share_of_no_lookups_is_zero():
    assert lookup_share(torch.zeros(4), torch.tensor([True, False, True, False])) == 0
    assert lookup_share(torch.tensor([3.0, 1.0]), torch.tensor([True, False])) == 0.75
