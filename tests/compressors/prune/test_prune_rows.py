"""``prune_rows`` and ``tiers``: rows that are kept, replaced, or moved to another table.

``prune_rows`` keeps the important rows and gives all others a replacement row. ``tiers`` keeps all
rows, in a table of often looked-up ("hot") rows and one of the others ("cold"). A row map has the
position of each original row in the smaller table or tables. The importance ``lookups`` is the
number of lookups of a row in the training data.

The tables ``item`` (300 rows of 7 float32 values) and ``city`` (9 rows of 6) are those of
``RANKER`` (``tests/models.py``).
"""

import pytest
import torch
from error_codes import raises_code, raises_value_error
from models import RANKER
from reason_codes import require_reason

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.prune.tables.cluster_rows import ClusterRows
from compressors.prune.tables.prune_rows import PruneRows
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.calibration.lookup_counts import lookup_counts, squared_gradients
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4

ROWS = 300  # of the table ``item``


def prune_item_table(tmp_path, **settings):
    """Prune the ranker's table ``item``; return the result and the table's rows ``(rows, dim)``."""
    step = PruneRows(tables=("item",), **settings)
    result = run(step, RANKER.model(), RANKER.bench(tmp_path / "data"), tmp_path / "out")
    with torch.no_grad():
        return result, result.module.item(torch.arange(ROWS))


def importance_of_rows(tmp_path, importance: str) -> torch.Tensor:
    """Return the importance of each row of the table ``item``, ``(rows,)``."""
    model, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    weight = model.module.item.weight.detach()
    match importance:
        case "lookups":
            return lookup_counts(model, bench, ["item"])["item"]
        case "norm":
            return weight.double().square().sum(dim=1)
    return (squared_gradients(model, bench, ["item"])["item"] * weight.square()).double().sum(dim=1)


@pytest.mark.parametrize("importance", ["lookups", "norm", "gradient"])
@pytest.mark.parametrize("replacement", ["shared", "zero", "nearest"])
def test_the_most_important_rows_are_kept_bit_for_bit(importance, replacement, tmp_path):
    result, rows = prune_item_table(tmp_path, keep=0.2, importance=importance, pruned=replacement)
    weight = RANKER.model().module.item.weight.detach()
    is_kept = (rows == weight).all(dim=1)
    assert int(is_kept.sum()) == 60
    scores = importance_of_rows(tmp_path, importance)
    assert scores[is_kept].min() >= scores[~is_kept].max()
    reasons = result.plan.of("item").reasons
    require_reason(reasons, "kept_rows", kept=60, rows=300, importance=importance)


def test_the_plan_has_the_share_of_lookups_of_pruned_rows(tmp_path):
    result, rows = prune_item_table(tmp_path, keep=0.1, pruned="shared")
    counts = lookup_counts(RANKER.model(), RANKER.bench(tmp_path / "data"), ["item"])["item"]
    is_pruned = ~(rows == RANKER.model().module.item.weight).all(dim=1)
    expected = float(counts[is_pruned].sum() / counts.sum())
    reasons = result.plan.of("item").reasons
    require_reason(reasons, "pruned_lookups", share=pytest.approx(expected))
    assert expected > 0


def test_pruned_rows_share_their_mean_weighted_by_lookups(tmp_path):
    _, rows = prune_item_table(tmp_path, keep=0.2, pruned="shared")
    weight = RANKER.model().module.item.weight.detach()
    is_pruned = ~(rows == weight).all(dim=1)
    counts = lookup_counts(RANKER.model(), RANKER.bench(tmp_path / "data"), ["item"])["item"]
    # The weight of a row is its lookup count plus 0.5, so that rows without lookups count too.
    normalized_weight = (counts[is_pruned] + 0.5) / (counts[is_pruned] + 0.5).sum()
    expected = (normalized_weight.unsqueeze(1) * weight[is_pruned].double()).sum(dim=0).float()
    torch.testing.assert_close(rows[is_pruned], expected.expand(240, -1))


def test_rows_pruned_to_zero_are_zero_after_int4(tmp_path):
    result, rows = prune_item_table(tmp_path, keep=0.2, pruned="zero")
    is_pruned = (rows == 0).all(dim=1)
    assert int(is_pruned.sum()) == 240
    packed = run(RowwiseInt4(), result, RANKER.bench(tmp_path / "data"), tmp_path / "packed")
    with torch.no_grad():
        assert not packed.module.item(torch.arange(ROWS))[is_pruned].any()


def test_pruned_rows_are_replaced_by_the_nearest_kept_row(tmp_path):
    _, rows = prune_item_table(tmp_path, keep=0.2, importance="norm", pruned="nearest")
    weight = RANKER.model().module.item.weight.detach()
    is_kept = (rows == weight).all(dim=1)
    nearest_distance = torch.cdist(weight.double(), weight[is_kept].double()).amin(dim=1)
    # The default tolerances allow for float32 rounding.
    torch.testing.assert_close(
        (rows - weight).double().square().sum(dim=1).sqrt(), nearest_distance
    )


def test_stored_bytes_are_the_bytes_of_the_row_map_and_the_kept_rows(tmp_path):
    plan = prune_item_table(tmp_path, keep=0.2, pruned="shared")[0].plan
    # One byte per row, and four bytes per block of 128 rows.
    assert plan.of("item").bytes_after == 300 + 4 * 3
    assert plan.of("item.kept").bytes_after == 61 * 7 * 4  # 60 kept rows and the shared one
    plan = prune_item_table(tmp_path, keep=0.2, pruned="nearest")[0].plan
    assert plan.of("item").bytes_after == 300  # an index below 60 has one byte
    assert plan.of("item.unique").bytes_after == 60 * 7 * 4


def test_a_table_that_its_row_map_would_enlarge_raises_nothing_to_compress(tmp_path):
    step = PruneRows(tables=("city",), keep=0.99, pruned="shared")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(step, RANKER.model(), RANKER.bench(tmp_path / "data"), tmp_path / "out")
    # After: 8 kept rows and the shared one, 9 bytes of the map, and 4 for its only block.
    assert caught.value.fields["reasons"]["city"] == (
        Reason("not_smaller_composed", rows=9, dim=6, before=216, after=229),
    )


def test_a_table_of_one_row_is_skipped_with_a_reason(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    one_row = run(
        ClusterRows(tables=("city",), hot=0, clusters=1), RANKER.model(), bench, tmp_path / "one"
    )
    result = run(PruneRows(), one_row, bench, tmp_path / "out")
    require_reason(result.plan.of("city.unique").reasons, "too_few_rows", rows=1, min_rows=2)
    assert torch.equal(result.module.city.unique.weight, one_row.module.city.unique.weight)


def test_prune_rows_without_training_rows_raises_nothing_to_compress(tmp_path):
    with raises_code(NothingToCompress, "rows_missing", missing=("train",)):
        run(PruneRows(), RANKER.model(), Bench(signature=RANKER.signature), tmp_path / "out")


# --- tiers -----------------------------------------------------------------------------------


def test_tiers_keep_all_rows_and_store_the_most_looked_up_in_the_hot_table(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    result = run(Tiers(tables=("item",)), RANKER.model(), bench, tmp_path / "out")
    weight = RANKER.model().module.item.weight.detach()
    with torch.no_grad():
        assert torch.equal(result.module.item(torch.arange(ROWS)), weight)
    hot = result.module.item.hot.weight
    counts = lookup_counts(RANKER.model(), bench, ["item"])["item"]
    is_hot = torch.tensor([bool((row == hot).all(dim=1).any()) for row in weight])
    assert len(hot) == int(is_hot.sum()) == 30  # by default, a tenth of the rows is hot
    assert counts[is_hot].min() >= counts[~is_hot].max()
    expected = float(counts[is_hot].sum() / counts.sum())
    require_reason(result.plan.of("item").reasons, "hot_lookups", share=pytest.approx(expected))


def test_a_pattern_compresses_one_tier_and_keeps_the_other(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    tiered = run(Tiers(tables=("item",), hot=0.5), RANKER.model(), bench, tmp_path / "parted")
    packed = run(RowwiseInt4(tables=("*.cold",)), tiered, bench, tmp_path / "packed")
    assert packed.plan.of("item.cold").format == "rowwise_int4"
    assert packed.plan.of("item.hot").format == "float32"
    weight = RANKER.model().module.item.weight.detach()
    with torch.no_grad():
        is_kept = (packed.module.item(torch.arange(ROWS)) == weight).all(dim=1)
    assert int(is_kept.sum()) == 150


# --- min_lookups: rows kept by their number of lookups -----------------------------------------


@pytest.mark.parametrize("min_lookups", [1, 2])
def test_min_lookups_keeps_rows_with_at_least_as_many_lookups_in_training(min_lookups, tmp_path):
    source, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    counts = lookup_counts(source, bench, ["item"])["item"]
    step = PruneRows(tables=("item",), min_lookups=min_lookups, pruned="shared")
    result = run(step, source, bench, tmp_path / "out")
    is_kept = counts >= min_lookups
    reasons = result.plan.of("item").reasons
    require_reason(
        reasons, "kept_rows_by_lookups", kept=int(is_kept.sum()), rows=300, min_lookups=min_lookups
    )
    ids = torch.arange(300)
    with torch.no_grad():
        before, after = source.module.item(ids), result.module.item(ids)
    torch.testing.assert_close(after[is_kept], before[is_kept], rtol=0, atol=0)
    if bool((~is_kept).any()):
        assert len(torch.unique(after[~is_kept], dim=0)) == 1


def test_a_table_whose_row_map_costs_more_than_pruning_saves_is_skipped(tmp_path):
    source, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    result = run(PruneRows(min_lookups=1, pruned="shared"), source, bench, tmp_path / "out")
    line = result.plan.of("city")  # 9 rows, all of which training looks up
    assert line.format == "float32"
    require_reason(line.reasons, "row_map_too_large")


def test_min_lookups_without_importance_lookups_raises_a_value_error():
    with raises_value_error("min_lookups_without_importance", importance="norm"):
        PruneRows(min_lookups=2, importance="norm")
