"""Lookups are counted where a network makes them."""

import pytest
import torch
from models import BENCH_ROWS, RANKER, TIED

from compressors.batches import batches
from compressors.contracts import Bench
from compressors.errors import CompressionError
from compressors.step import run
from compressors.tables.low_rank import LowRank
from compressors.tables.rowwise_int8 import RowwiseInt8
from compressors.traffic import lookups
from compressors.units import table_rows

NAMES = ("user", "item", "city", "genres", "history", "tags")


def expected(bench: Bench, name: str, table_size: int) -> torch.Tensor:
    """Counted from the data itself."""
    (rows,) = batches(bench.train, bench.signature, BENCH_ROWS)
    ids = rows.inputs[name].reshape(-1).long()
    if name == "genres":
        ids = ids[ids != 0]  # its padding
    return torch.bincount(ids, minlength=table_size).double()


@pytest.mark.parametrize("first", [None, RowwiseInt8(), LowRank()], ids=lambda s: s and s.kind)
def test_every_lookup_counts_once_whatever_the_table_is_made_of(first, tmp_path):
    bench, model = RANKER.bench(tmp_path / "data"), RANKER.model()
    if first is not None:
        model = run(first, model, bench, tmp_path / "first")
    counts = lookups(model, bench, NAMES)
    assert set(counts) == set(NAMES)
    for name in NAMES:
        assert torch.equal(counts[name], expected(bench, name, table_rows(model.module)[name]))


def test_a_part_is_counted_where_it_is_read(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    model = run(LowRank(), RANKER.model(), bench, tmp_path / "out")
    counts = lookups(model, bench, ["item", "item.narrow"])
    assert torch.equal(counts["item"], counts["item.narrow"])


def test_a_table_in_two_places_counts_both(tmp_path):
    bench = TIED.bench(tmp_path / "data")
    (rows,) = batches(bench.train, bench.signature, BENCH_ROWS)
    ids = torch.cat([rows.inputs["user"], rows.inputs["friend"]])
    counts = lookups(TIED.model(), bench, ["user"])
    assert torch.equal(counts["user"], torch.bincount(ids, minlength=20).double())


def test_the_model_is_left_without_hooks(tmp_path):
    model = RANKER.model()
    lookups(model, RANKER.bench(tmp_path / "data"), ["user"])
    assert not model.module.user._forward_pre_hooks


def test_without_training_rows_it_is_refused():
    with pytest.raises(CompressionError, match="train rows"):
        lookups(RANKER.model(), Bench(signature=RANKER.schema), ["user"])
