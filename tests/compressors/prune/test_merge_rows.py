"""Merged rows are within the stated distance, and equal rows are found in any order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER
from reason_codes import codes_of, with_code

from compressors.core.model import Model
from compressors.core.runner import run
from compressors.prune.tables.merge_rows import MergeRows, merged


def drawn(seed: int, rows: int, dim: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 10**6), different=st.integers(1, 20), rows=st.integers(1, 60))
def test_equal_rows_become_one_and_no_others(seed, different, rows):
    choice = torch.randint(different, (rows,), generator=torch.Generator().manual_seed(seed))
    table = drawn(seed, different, 5)[choice]
    place, unique = merged(table, torch.ones(rows), 0)
    assert len(unique) == len(choice.unique())
    # A mean of equal float32 numbers, taken in float64, is that number.
    assert torch.equal(unique[place], table)


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 80),
    within=st.floats(0.01, 2),
    dim=st.integers(1, 9),
)
def test_no_row_is_merged_with_a_leader_beyond_reach(seed, rows, within, dim):
    table, weight = drawn(seed, rows, dim), drawn(seed + 1, rows, 1).abs().squeeze(1) + 0.1
    place, unique = merged(table, weight, within)
    reach = within * float(table.double().square().sum(dim=1).mean().sqrt())
    for number in range(len(unique)):
        members = (place == number).nonzero().squeeze(1)
        heaviest = members[weight[members].argmax()]
        gap = (table[members].double() - table[heaviest].double()).square().sum(dim=1).sqrt()
        assert float(gap.max()) <= reach
        share = weight[members].double().unsqueeze(1)
        mean = (share * table[members].double()).sum(dim=0) / share.sum()
        torch.testing.assert_close(unique[number].double(), mean, rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 10**6))
def test_the_order_of_rows_does_not_decide_what_is_merged(seed):
    centres = drawn(seed, 5, 6) * 10
    noise = 0.01 * drawn(seed + 1, 40, 6)
    table = centres[torch.arange(40) % 5] + noise
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    weight = torch.arange(40) + 1.0
    place, _ = merged(table, weight, 0.01)
    shuffled, _ = merged(table[order], weight[order], 0.01)
    same = place[order].unsqueeze(0) == place[order].unsqueeze(1)
    assert torch.equal(shuffled.unsqueeze(0) == shuffled.unsqueeze(1), same)


def test_rows_around_a_few_centres_become_about_so_many():
    centres = drawn(0, 8, 6) * 10
    table = centres[torch.arange(400) % 8] + 0.001 * drawn(1, 400, 6)
    _, unique = merged(table, torch.ones(400), 0.01)
    assert 8 <= len(unique) <= 12  # pairs at borders of cells may be missed


def test_places_are_in_the_order_of_their_first_rows():
    table = torch.tensor([[3.0], [1.0], [3.0], [2.0]])
    place, unique = merged(table, torch.ones(4), 0)
    assert place.tolist() == [0, 1, 0, 2]
    assert unique.squeeze(1).tolist() == [3, 1, 2]


def with_twins() -> Model:
    """The ranker with an item table of 40 different rows."""
    source = RANKER.model()
    with torch.no_grad():
        source.module.item.weight.copy_(source.module.item.weight[torch.arange(300) % 40])
    return source


def test_twins_of_a_table_are_stored_once(tmp_path):
    source, bench = with_twins(), RANKER.bench(tmp_path / "data")
    result = run(MergeRows(), source, bench, tmp_path / "out")
    line = result.plan.of("item")
    assert codes_of(line.reasons) == ["merged_equal", "merged_rows"]
    with_code(line.reasons, "merged_rows", rows=300, unique=40)
    assert (line.format, line.bytes_after) == ("row_map", 300)
    assert result.plan.of("item.unique").bytes_after == 40 * 7 * 4
    ids = torch.arange(300)
    with torch.no_grad():
        assert torch.equal(result.module.item(ids), source.module.item(ids))
    kept = result.plan.of("user")
    assert (kept.format, kept.steps) == ("float32", ())
    assert codes_of(kept.reasons) == ["merged_equal", "nothing_better", "merged_rows"]
    with_code(kept.reasons, "merged_rows", rows=40, unique=40)


def test_a_tolerance_below_zero_is_refused():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        MergeRows(within=-1)
