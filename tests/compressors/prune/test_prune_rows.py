"""Row pruning: the right rows are kept bit for bit, and the others get their replacement."""

import pytest
import torch
from error_codes import raises_code, raises_value_error
from models import RANKER
from reason_codes import with_code

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.prune.tables.cluster_rows import ClusterRows
from compressors.prune.tables.prune_rows import PruneRows
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.calibration.lookup_counts import lookup_counts, squared_gradients
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4

ROWS = 300  # of table item


def pruned(tmp_path, **settings):
    step = PruneRows(tables=("item",), **settings)
    result = run(step, RANKER.model(), RANKER.bench(tmp_path / "data"), tmp_path / "out")
    with torch.no_grad():
        return result, result.module.item(torch.arange(ROWS))


def score(tmp_path, importance: str) -> torch.Tensor:
    model, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    weight = model.module.item.weight.detach()
    match importance:
        case "traffic":
            return lookup_counts(model, bench, ["item"])["item"]
        case "norm":
            return weight.double().square().sum(dim=1)
    return (squared_gradients(model, bench, ["item"])["item"] * weight.square()).double().sum(dim=1)


@pytest.mark.parametrize("importance", ["traffic", "norm", "gradient"])
@pytest.mark.parametrize("answer", ["shared", "zero", "nearest"])
def test_the_most_important_rows_stay_bit_for_bit(importance, answer, tmp_path):
    result, found = pruned(tmp_path, keep=0.2, importance=importance, pruned=answer)
    weight = RANKER.model().module.item.weight.detach()
    same = (found == weight).all(dim=1)
    assert int(same.sum()) == 60
    scores = score(tmp_path, importance)
    assert scores[same].min() >= scores[~same].max()
    reasons = result.plan.of("item").reasons
    with_code(reasons, "kept_rows", kept=60, rows=300, importance=importance)


def test_the_reason_says_what_share_of_lookups_is_touched(tmp_path):
    result, found = pruned(tmp_path, keep=0.1, pruned="shared")
    counts = lookup_counts(RANKER.model(), RANKER.bench(tmp_path / "data"), ["item"])["item"]
    touched = ~(found == RANKER.model().module.item.weight).all(dim=1)
    wanted = float(counts[touched].sum() / counts.sum())
    reasons = result.plan.of("item").reasons
    with_code(reasons, "pruned_lookups", share=pytest.approx(wanted))
    assert wanted > 0


def test_pruned_ids_share_the_mean_weighted_by_lookups(tmp_path):
    _, found = pruned(tmp_path, keep=0.2, pruned="shared")
    weight = RANKER.model().module.item.weight.detach()
    gone = ~(found == weight).all(dim=1)
    counts = lookup_counts(RANKER.model(), RANKER.bench(tmp_path / "data"), ["item"])["item"]
    share = (counts[gone] + 0.5) / (counts[gone] + 0.5).sum()
    wanted = (share.unsqueeze(1) * weight[gone].double()).sum(dim=0).float()
    torch.testing.assert_close(found[gone], wanted.expand(240, -1))


def test_rows_pruned_to_zero_stay_zero_after_int4(tmp_path):
    result, found = pruned(tmp_path, keep=0.2, pruned="zero")
    gone = (found == 0).all(dim=1)
    assert int(gone.sum()) == 240
    packed = run(RowwiseInt4(), result, RANKER.bench(tmp_path / "data"), tmp_path / "packed")
    with torch.no_grad():
        assert not packed.module.item(torch.arange(ROWS))[gone].any()


def test_pruned_rows_are_replaced_by_the_nearest_kept_row(tmp_path):
    _, found = pruned(tmp_path, keep=0.2, importance="norm", pruned="nearest")
    weight = RANKER.model().module.item.weight.detach()
    kept = (found == weight).all(dim=1)
    best = torch.cdist(weight.double(), weight[kept].double()).amin(dim=1)
    # float32 sums of seven squares
    torch.testing.assert_close((found - weight).double().square().sum(dim=1).sqrt(), best)


def test_bytes_are_a_map_and_the_rows_that_stay(tmp_path):
    plan = pruned(tmp_path, keep=0.2, pruned="shared")[0].plan
    assert plan.of("item").bytes_after == 300 + 4 * 3  # a byte a row, four a block of 128
    assert plan.of("item.kept").bytes_after == 61 * 7 * 4
    plan = pruned(tmp_path, keep=0.2, pruned="nearest")[0].plan
    assert plan.of("item").bytes_after == 300  # 60 places: one byte each
    assert plan.of("item.unique").bytes_after == 60 * 7 * 4


def test_a_table_whose_map_would_cost_more_stays(tmp_path):
    step = PruneRows(tables=("city",), keep=0.99, pruned="shared")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(step, RANKER.model(), RANKER.bench(tmp_path / "data"), tmp_path / "out")
    assert caught.value.fields["reasons"]["city"] == (
        Reason("not_smaller_composed", rows=9, dim=6, before=216, after=229),
    )


def test_the_only_row_of_a_table_stays(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    one = run(
        ClusterRows(tables=("city",), hot=0, clusters=1), RANKER.model(), bench, tmp_path / "one"
    )
    result = run(PruneRows(), one, bench, tmp_path / "out")
    with_code(result.plan.of("city.unique").reasons, "too_few_rows", rows=1, min_rows=2)
    assert torch.equal(result.module.city.unique.weight, one.module.city.unique.weight)


def test_without_training_rows_nothing_is_pruned(tmp_path):
    with raises_code(NothingToCompress, "rows_missing", missing=("train",)):
        run(PruneRows(), RANKER.model(), Bench(signature=RANKER.signature), tmp_path / "out")


# --- tiers -----------------------------------------------------------------------------------


def test_tiers_keep_every_row_and_put_the_most_looked_up_apart(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    result = run(Tiers(tables=("item",)), RANKER.model(), bench, tmp_path / "out")
    weight = RANKER.model().module.item.weight.detach()
    with torch.no_grad():
        assert torch.equal(result.module.item(torch.arange(ROWS)), weight)
    hot = result.module.item.hot.weight
    counts = lookup_counts(RANKER.model(), bench, ["item"])["item"]
    chosen = torch.tensor([bool((row == hot).all(dim=1).any()) for row in weight])
    assert len(hot) == int(chosen.sum()) == 30
    assert counts[chosen].min() >= counts[~chosen].max()
    wanted = float(counts[chosen].sum() / counts.sum())
    with_code(result.plan.of("item").reasons, "hot_lookups", share=pytest.approx(wanted))


def test_each_tier_is_packed_in_its_own_format(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    parted = run(Tiers(tables=("item",), hot=0.5), RANKER.model(), bench, tmp_path / "parted")
    packed = run(RowwiseInt4(tables=("*.cold",)), parted, bench, tmp_path / "packed")
    assert packed.plan.of("item.cold").format == "rowwise_int4"
    assert packed.plan.of("item.hot").format == "float32"
    weight = RANKER.model().module.item.weight.detach()
    with torch.no_grad():
        same = (packed.module.item(torch.arange(ROWS)) == weight).all(dim=1)
    assert int(same.sum()) == 150


# --- a number of lookups instead of a share ----------------------------------------------------


@pytest.mark.parametrize("fewest", [1, 2])
def test_rows_stay_that_training_looks_up_so_often(fewest, tmp_path):
    source, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    counts = lookup_counts(source, bench, ["item"])["item"]
    step = PruneRows(tables=("item",), min_lookups=fewest, pruned="shared")
    result = run(step, source, bench, tmp_path / "out")
    kept = counts >= fewest
    reasons = result.plan.of("item").reasons
    with_code(reasons, "kept_rows_by_lookups", kept=int(kept.sum()), rows=300, min_lookups=fewest)
    ids = torch.arange(300)
    with torch.no_grad():
        before, after = source.module.item(ids), result.module.item(ids)
    torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0)
    if bool((~kept).any()):
        assert len(torch.unique(after[~kept], dim=0)) == 1


def test_a_table_stays_whose_map_would_cost_more_than_pruning_saves(tmp_path):
    source, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    result = run(PruneRows(min_lookups=1, pruned="shared"), source, bench, tmp_path / "out")
    line = result.plan.of("city")  # 9 rows, all of which training looks up
    assert line.format == "float32"
    with_code(line.reasons, "row_map_too_large")


def test_lookups_need_importance_by_traffic():
    with raises_value_error("min_lookups_without_traffic", importance="norm"):
        PruneRows(min_lookups=2, importance="norm")
