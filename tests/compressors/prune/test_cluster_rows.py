"""Clustered rows: hot ones untouched, the others nearest to what they share."""

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER
from reason_codes import codes_of, with_code

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.prune.tables.cluster_rows import ClusterRows, clustered
from compressors.quantize.calibration.lookup_counts import lookup_counts


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 60),
    hot=st.integers(0, 20),
    clusters=st.integers(1, 8),
)
def test_hot_rows_stay_and_the_rest_get_their_nearest(seed, rows, hot, clusters):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, 4, generator=generator)
    counts = torch.randint(50, (rows,), generator=generator).double()
    hot = min(hot, rows - 1)
    clusters = min(clusters, rows - hot)
    place, unique = clustered(table, counts, hot, clusters)
    assert unique.shape == (hot + clusters, 4)
    stays = place < hot
    assert int(stays.sum()) == hot
    assert torch.equal(unique[place[stays]], table[stays])
    if hot:
        assert counts[stays].min() >= counts[~stays].max()
    gap = (unique[place].double() - table.double())[~stays].square().sum(dim=1)
    best = torch.cdist(table[~stays].double(), unique[hot:].double()).amin(dim=1).square()
    # float64 sums of four squares of float32 numbers, in two orders
    torch.testing.assert_close(gap, best, rtol=1e-9, atol=1e-9)


def test_as_many_clusters_as_rows_lose_nothing():
    table = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    place, unique = clustered(table, torch.arange(12).double(), 4, 8)
    assert torch.equal(unique[place], table)


def test_busy_rows_pull_their_cluster():
    table = torch.tensor([[9.0], [0.0], [1.0]])
    _, unique = clustered(table, torch.tensor([1000.0, 99.5, 0.0]), 1, 1)
    # weights 100 and 0.5 of rows 0 and 1
    torch.testing.assert_close(unique[1], torch.tensor([0.5 / 100.5]))


def test_the_plan_says_what_share_of_lookups_is_touched(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    step = ClusterRows(tables=("item",), hot=0.2, clusters=12)
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    counts = lookup_counts(RANKER.model(), bench, ["item"])["item"]
    touched = 1 - float(counts.sort(descending=True).values[:60].sum() / counts.sum())
    reasons = result.plan.of("item").reasons
    assert codes_of(reasons) == ["composed", "shared_lookups"]
    with_code(reasons, "clustered_rows", hot=60, rows=300, clusters=12)
    with_code(reasons, "shared_lookups", share=pytest.approx(touched))
    assert result.plan.of("item").bytes_after == 300  # 72 places: a byte each
    assert result.plan.of("item.unique").bytes_after == 72 * 7 * 4


def test_without_training_rows_nothing_is_clustered(tmp_path):
    with raises_code(NothingToCompress, "rows_missing", missing=("train",)):
        run(ClusterRows(), RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
