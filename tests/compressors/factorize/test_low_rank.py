"""``low_rank``: no factors of the same rank have a smaller error, also with weighted rows.

A ``Bench`` is the data that a step may use.
"""

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER
from reason_codes import require_reason

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.factorize.low_rank import LowRank, factorize
from compressors.quantize.calibration.lookup_counts import lookup_counts


def draw_normal(seed: int, rows: int, dim: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def error(table: torch.Tensor, rank: int, weight: torch.Tensor) -> float:
    """Return the squared error of the factors, summed with the weights of the rows."""
    reduced, projection, mean = factorize(table, rank, weight)
    difference = reduced @ projection + mean - table
    return float((weight * difference.square().sum(dim=1)).sum())


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 30), dim=st.integers(1, 9))
def test_factors_of_full_rank_reproduce_the_table(seed, rows, dim):
    table = draw_normal(seed, rows, dim)
    reduced, projection, mean = factorize(table, dim, torch.ones(rows))
    # tolerance: float32 sums of up to nine products of numbers near 1
    torch.testing.assert_close(reduced @ projection + mean, table, atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 10**6), rows=st.integers(5, 30), rank=st.integers(1, 5))
def test_error_of_factors_equals_the_energy_of_the_discarded_singular_values(seed, rows, rank):
    """The reference is torch's singular values of the rows minus their mean."""
    table = draw_normal(seed, rows, 6)
    discarded_energy = (
        torch.linalg.svdvals((table - table.mean(dim=0)).double())[rank:].square().sum()
    )
    assert error(table, rank, torch.ones(rows)) == pytest.approx(
        float(discarded_energy), rel=1e-4, abs=1e-5
    )


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
def test_weighted_factors_have_no_larger_weighted_error_than_unweighted_factors(seed, rank):
    table, weight = (
        draw_normal(seed, 25, 6),
        draw_normal(seed + 1, 25, 1).abs().squeeze(1) + 0.01,
    )
    weighted_error = error(table, rank, weight)
    reduced, projection, mean = factorize(table, rank, torch.ones(25))
    unweighted_error = (weight * (reduced @ projection + mean - table).square().sum(dim=1)).sum()
    assert weighted_error <= float(unweighted_error) * (1 + 1e-5)


def test_weights_of_rows_decide_which_direction_is_kept():
    table = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    for weight, expected_column in (((1.0, 1.0, 1.0, 1.0), 1), ((9.0, 9.0, 1.0, 1.0), 0)):
        _, projection, _ = factorize(table, 1, torch.tensor(weight))
        assert projection.abs().argmax() == expected_column


def test_rank_is_a_share_of_the_dimension_or_a_number(tmp_path):
    bench = Bench(signature=RANKER.signature)
    # ``narrow`` is the table of the reduced rows.
    for setting, rank in ((0.5, 3), (2, 2), (0.01, 1)):
        result = run(LowRank(rank=setting), RANKER.model(), bench, tmp_path / str(setting))
        assert result.module.user.narrow.embedding_dim == rank
        require_reason(result.plan.of("user").reasons, "narrower_rows", dim=6, rank=rank)


def test_low_rank_skips_a_table_that_would_grow(tmp_path):
    result = run(LowRank(rank=5), RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    # Bytes of 9 x 6 float32 numbers, and of the factors 9 x 5 and 5 x 6 and the mean of 6 columns.
    require_reason(result.plan.of("city").reasons, "not_smaller_composed", before=216, after=324)
    assert result.plan.of("city").format == "float32"


def test_weighted_low_rank_without_training_rows_raises_nothing_to_compress(tmp_path):
    with raises_code(NothingToCompress, "rows_missing", missing=("train",)):
        run(LowRank(weighted=True), RANKER.model(), Bench(signature=RANKER.signature), tmp_path)


def test_weighted_low_rank_has_a_smaller_error_on_looked_up_rows(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    source = RANKER.model()
    counts = lookup_counts(source, bench, ["item"])["item"]
    errors = {}
    for weighted in (False, True):
        step = LowRank(tables=("item",), rank=2, weighted=weighted)
        table = run(step, source, bench, tmp_path / str(weighted)).module.item
        with torch.no_grad():
            difference = (table(torch.arange(300)) - source.module.item.weight).square().sum(dim=1)
        errors[weighted] = float((difference * counts).sum())
    assert errors[True] < errors[False]
