"""``cluster_rows``: the most looked-up ("hot") rows are kept, the others share centroids.

``cluster_rare_rows`` receives the number of hot rows and returns the stored rows ``unique``, hot
rows first, and ``index``, the position of each table row in them. In the step ``ClusterRows``,
``hot`` is the share of hot rows. The table ``item`` of ``RANKER`` (``tests/models.py``) has 300
rows of 7 float32 values.
"""

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER
from reason_codes import codes_of, require_reason

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.prune.tables.cluster_rows import ClusterRows, cluster_rare_rows
from compressors.quantize.calibration.lookup_counts import lookup_counts


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 60),
    hot=st.integers(0, 20),
    clusters=st.integers(1, 8),
)
def test_hot_rows_are_kept_and_other_rows_get_the_nearest_centroid(seed, rows, hot, clusters):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, 4, generator=generator)
    counts = torch.randint(50, (rows,), generator=generator).double()
    hot = min(hot, rows - 1)
    clusters = min(clusters, rows - hot)
    index, unique = cluster_rare_rows(table, counts, hot, clusters)
    assert unique.shape == (hot + clusters, 4)
    is_hot = index < hot
    assert int(is_hot.sum()) == hot
    assert torch.equal(unique[index[is_hot]], table[is_hot])
    if hot:
        assert counts[is_hot].min() >= counts[~is_hot].max()
    squared_error = (unique[index].double() - table.double())[~is_hot].square().sum(dim=1)
    smallest_error = (
        torch.cdist(table[~is_hot].double(), unique[hot:].double()).amin(dim=1).square()
    )
    # Both are float64 sums of four squares, but in different orders.
    torch.testing.assert_close(squared_error, smallest_error, rtol=1e-9, atol=1e-9)


def test_as_many_clusters_as_rows_keep_all_rows_exactly():
    table = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    index, unique = cluster_rare_rows(table, torch.arange(12).double(), hot=4, clusters=8)
    assert torch.equal(unique[index], table)


def test_centroids_are_means_weighted_by_lookups():
    table = torch.tensor([[9.0], [0.0], [1.0]])
    counts = torch.tensor([1000.0, 99.5, 0.0])
    _, unique = cluster_rare_rows(table, counts, hot=1, clusters=1)
    # The weight of a row is its lookup count plus 0.5: 100 and 0.5 for the rows 1 and 2.
    torch.testing.assert_close(unique[1], torch.tensor([0.5 / 100.5]))


def test_the_plan_has_the_share_of_lookups_of_clustered_rows(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    step = ClusterRows(tables=("item",), hot=0.2, clusters=12)
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    counts = lookup_counts(RANKER.model(), bench, ["item"])["item"]
    clustered_share = 1 - float(counts.sort(descending=True).values[:60].sum() / counts.sum())
    reasons = result.plan.of("item").reasons
    assert codes_of(reasons) == ["composed", "shared_lookups"]
    require_reason(reasons, "clustered_rows", hot=60, rows=300, clusters=12)
    require_reason(reasons, "shared_lookups", share=pytest.approx(clustered_share))
    # 60 hot rows and 12 centroids: an index below 72 has one byte.
    assert result.plan.of("item").bytes_after == 300
    assert result.plan.of("item.unique").bytes_after == 72 * 7 * 4


def test_clustering_without_training_rows_raises_nothing_to_compress(tmp_path):
    with raises_code(NothingToCompress, "rows_missing", missing=("train",)):
        run(ClusterRows(), RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
