"""Low rank: the closest rows there are, of those that are looked up most if so ordered."""

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER
from reason_codes import with_code

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.factorize.low_rank import LowRank, factors
from compressors.quantize.calibration.lookup_counts import lookup_counts


def drawn(seed: int, rows: int, dim: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def error(table: torch.Tensor, rank: int, weight: torch.Tensor) -> float:
    narrow, projection, mean = factors(table, rank, weight)
    gap = narrow @ projection + mean - table
    return float((weight * gap.square().sum(dim=1)).sum())


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 30), dim=st.integers(1, 9))
def test_a_full_rank_gives_the_table_back(seed, rows, dim):
    table = drawn(seed, rows, dim)
    narrow, projection, mean = factors(table, dim, torch.ones(rows))
    # float32 sums of up to nine products of numbers of size one
    torch.testing.assert_close(narrow @ projection + mean, table, atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 10**6), rows=st.integers(5, 30), rank=st.integers(1, 5))
def test_no_other_rows_of_that_rank_are_closer(seed, rows, rank):
    """Against the library's own singular values, of the rows without their mean."""
    table = drawn(seed, rows, 6)
    left = torch.linalg.svdvals((table - table.mean(dim=0)).double())[rank:].square().sum()
    assert error(table, rank, torch.ones(rows)) == pytest.approx(float(left), rel=1e-4, abs=1e-5)


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
def test_weighted_rows_are_closest_under_their_weights(seed, rank):
    table, weight = drawn(seed, 25, 6), drawn(seed + 1, 25, 1).abs().squeeze(1) + 0.01
    best = error(table, rank, weight)
    narrow, projection, mean = factors(table, rank, torch.ones(25))
    plain = (weight * (narrow @ projection + mean - table).square().sum(dim=1)).sum()
    assert best <= float(plain) * (1 + 1e-5)


def test_weights_decide_which_direction_stays():
    table = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    for weight, kept in (((1.0, 1.0, 1.0, 1.0), 1), ((9.0, 9.0, 1.0, 1.0), 0)):
        _, projection, _ = factors(table, 1, torch.tensor(weight))
        assert projection.abs().argmax() == kept


def test_a_rank_is_a_share_or_a_number(tmp_path):
    bench = Bench(signature=RANKER.signature)
    for rank, width in ((0.5, 3), (2, 2), (0.01, 1)):
        result = run(LowRank(rank=rank), RANKER.model(), bench, tmp_path / str(rank))
        assert result.module.user.narrow.embedding_dim == width
        with_code(result.plan.of("user").reasons, "narrower_rows", dim=6, rank=width)


def test_a_table_that_would_grow_stays(tmp_path):
    result = run(LowRank(rank=5), RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    with_code(result.plan.of("city").reasons, "not_smaller_composed", before=216, after=324)
    assert result.plan.of("city").format == "float32"


def test_weighted_needs_training_rows(tmp_path):
    with raises_code(NothingToCompress, "rows_missing", missing=("train",)):
        run(LowRank(weighted=True), RANKER.model(), Bench(signature=RANKER.signature), tmp_path)


def test_weighted_keeps_the_rows_of_the_data_better(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    source = RANKER.model()
    seen = lookup_counts(source, bench, ["item"])["item"]
    gaps = {}
    for weighted in (False, True):
        step = LowRank(tables=("item",), rank=2, weighted=weighted)
        made = run(step, source, bench, tmp_path / str(weighted)).module.item
        with torch.no_grad():
            gap = (made(torch.arange(300)) - source.module.item.weight).square().sum(dim=1)
        gaps[weighted] = float((gap * seen).sum())
    assert gaps[True] < gaps[False]
