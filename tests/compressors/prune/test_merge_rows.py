"""``merge_rows``: rows within a distance of their group's leader are stored once, as their mean.

The leader of a group is its row with the largest weight (number of lookups). The largest allowed
distance is ``within`` times the root mean square of the norms of all rows. ``merge_similar_rows``
returns ``index``, the group of each row, and ``unique``, the mean row of each group. The table
``item`` of ``RANKER`` (``tests/models.py``) has 300 rows of 7 float32 values, ``user`` 40 rows.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER
from reason_codes import codes_of, require_reason

from compressors.core.model import Model
from compressors.core.runner import run
from compressors.prune.tables.merge_rows import MergeRows, merge_similar_rows


def draw_normal(seed: int, rows: int, dim: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10**6), distinct=st.integers(1, 20), rows=st.integers(1, 60))
def test_merging_within_zero_merges_exactly_the_equal_rows(seed, distinct, rows):
    choice = torch.randint(distinct, (rows,), generator=torch.Generator().manual_seed(seed))
    table = draw_normal(seed, distinct, 5)[choice]
    index, unique = merge_similar_rows(table, torch.ones(rows), within=0)
    assert len(unique) == len(choice.unique())
    # The float64 mean of equal float32 numbers is exact.
    assert torch.equal(unique[index], table)


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 80),
    within=st.floats(0.01, 2),
    dim=st.integers(1, 9),
)
def test_merged_rows_are_within_the_distance_of_their_leader_and_become_their_mean(
    seed, rows, within, dim
):
    table, weight = (
        draw_normal(seed, rows, dim),
        draw_normal(seed + 1, rows, 1).abs().squeeze(1) + 0.1,
    )
    index, unique = merge_similar_rows(table, weight, within)
    largest_distance = within * float(table.double().square().sum(dim=1).mean().sqrt())
    for number in range(len(unique)):
        members = (index == number).nonzero().squeeze(1)
        leader = members[weight[members].argmax()]
        distance = (table[members].double() - table[leader].double()).square().sum(dim=1).sqrt()
        assert float(distance.max()) <= largest_distance
        weights = weight[members].double().unsqueeze(1)
        mean = (weights * table[members].double()).sum(dim=0) / weights.sum()
        torch.testing.assert_close(unique[number].double(), mean, rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 10**6))
def test_merged_groups_do_not_depend_on_the_order_of_rows(seed):
    centres = draw_normal(seed, 5, 6) * 10
    noise = 0.01 * draw_normal(seed + 1, 40, 6)
    table = centres[torch.arange(40) % 5] + noise
    permutation = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    weight = torch.arange(40) + 1.0
    index, _ = merge_similar_rows(table, weight, within=0.01)
    shuffled, _ = merge_similar_rows(table[permutation], weight[permutation], within=0.01)
    expected = index[permutation].unsqueeze(0) == index[permutation].unsqueeze(1)
    assert torch.equal(shuffled.unsqueeze(0) == shuffled.unsqueeze(1), expected)


def test_rows_close_to_eight_centres_become_8_to_12_rows():
    centres = draw_normal(0, 8, 6) * 10
    table = centres[torch.arange(400) % 8] + 0.001 * draw_normal(1, 400, 6)
    _, unique = merge_similar_rows(table, torch.ones(400), within=0.01)
    # Only rows in the same cell of a grid are compared, so a group across a border may be cut.
    assert 8 <= len(unique) <= 12


def test_merged_rows_are_numbered_by_first_occurrence():
    table = torch.tensor([[3.0], [1.0], [3.0], [2.0]])
    index, unique = merge_similar_rows(table, torch.ones(4), within=0)
    assert index.tolist() == [0, 1, 0, 2]
    assert unique.squeeze(1).tolist() == [3, 1, 2]


def ranker_with_equal_rows() -> Model:
    """Return the ranker with an item table of 300 rows, of which 40 are different."""
    source = RANKER.model()
    with torch.no_grad():
        source.module.item.weight.copy_(source.module.item.weight[torch.arange(300) % 40])
    return source


def test_equal_rows_of_a_table_are_stored_once(tmp_path):
    source, bench = ranker_with_equal_rows(), RANKER.bench(tmp_path / "data")
    result = run(MergeRows(), source, bench, tmp_path / "out")
    line = result.plan.of("item")
    assert codes_of(line.reasons) == ["merged_equal", "merged_rows"]
    require_reason(line.reasons, "merged_rows", rows=300, unique=40)
    assert (line.format, line.bytes_after) == ("row_map", 300)
    assert result.plan.of("item.unique").bytes_after == 40 * 7 * 4
    ids = torch.arange(300)
    with torch.no_grad():
        assert torch.equal(result.module.item(ids), source.module.item(ids))
    unchanged = result.plan.of("user")
    assert (unchanged.format, unchanged.steps) == ("float32", ())
    assert codes_of(unchanged.reasons) == ["merged_equal", "nothing_better", "merged_rows"]
    require_reason(unchanged.reasons, "merged_rows", rows=40, unique=40)


def test_a_negative_distance_raises_a_value_error():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        MergeRows(within=-1)
