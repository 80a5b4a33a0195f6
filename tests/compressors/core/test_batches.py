"""Prepared data as batches, and the made-up rows contracts are checked on."""

import pytest
import torch
from models import ATTENTION, BENCH_ROWS, RANKER, REFERENCES, prepared

from compressors.contracts import DenseInput, IdInput, JaggedBag, PaddedBag, tensor_names
from compressors.core.batches import Batch, batches, edge_example, example, jagged, row_of
from compressors.lower.serving_wrapper import input_names

ROWS = RANKER.rows_of_tables()
JAGGED = {item.name: item for item in RANKER.signature.inputs if isinstance(item, JaggedBag)}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return prepared(RANKER.signature, ROWS, tmp_path_factory.mktemp("data"))


def bags(item: JaggedBag, batch: Batch) -> list[list[int]]:
    values, second = (batch.inputs[name] for name in tensor_names(item))
    lengths = (
        second
        if item.layout == "lengths"
        else torch.cat([second, torch.tensor([len(values)])]).diff()
    )
    return [part.tolist() for part in values.split(lengths.tolist())]


@pytest.mark.parametrize("size", [1, 7, 32, BENCH_ROWS, 1000])
def test_batches_hold_all_rows_in_order_for_every_batch_size(split, size):
    (whole,) = batches(split, RANKER.signature, BENCH_ROWS)
    parts = list(batches(split, RANKER.signature, size))
    assert [len(part.label) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert torch.equal(torch.cat([part.label for part in parts]), whole.label)
    for item in RANKER.signature.inputs:
        if isinstance(item, JaggedBag):
            lists = [ids for part in parts for ids in bags(item, part)]
            assert lists == bags(item, whole)
        else:
            joined = torch.cat([part.inputs[item.name] for part in parts])
            assert torch.equal(joined, whole.inputs[item.name])


def test_the_limit_counts_rows_not_batches(split):
    parts = list(batches(split, RANKER.signature, 20, limit=50))
    assert [len(part.label) for part in parts] == [20, 20, 10]
    assert sum(len(part.label) for part in batches(split, RANKER.signature, 20, limit=10**6)) == (
        BENCH_ROWS
    )


def test_a_batch_is_what_the_model_is_called_with(split):
    for part in batches(split, RANKER.signature, 13):
        assert set(part.inputs) == set(input_names(RANKER.signature))
        assert part.group is None
        assert RANKER.model().module(**part.inputs).shape == (len(part.label), 1)


def test_groups_come_along_where_the_schema_names_them(tmp_path):
    split = prepared(ATTENTION.signature, ATTENTION.rows_of_tables(), tmp_path)
    groups = [part.group for part in batches(split, ATTENTION.signature, 20)]
    assert torch.equal(torch.cat(groups), torch.arange(BENCH_ROWS) // 8)


def test_offsets_and_lengths_are_two_forms_of_the_same_bounds():
    values, bounds = torch.arange(5), torch.tensor([0, 2, 2, 5])
    history, tags = JAGGED["history"], JAGGED["tags"]
    assert jagged(history, values, bounds)["history_offsets"].tolist() == [0, 2, 2]
    assert jagged(tags, values, bounds)["tags_lengths"].tolist() == [2, 0, 3]


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda item: item.network.__name__)
@pytest.mark.parametrize("rows", [1, 57])
def test_made_up_rows_keep_the_schema(reference, rows):
    tables = reference.rows_of_tables()
    made = example(reference.signature, tables, rows)
    assert set(made) == set(input_names(reference.signature))
    for item in reference.signature.inputs:
        tensor = made[item.name]
        assert tensor.dtype == getattr(torch, item.dtype)
        if isinstance(item, IdInput | PaddedBag | DenseInput):
            assert tensor.shape == (rows, *item.shape)
        if not isinstance(item, DenseInput):
            assert tensor.numel() == 0 or 0 <= tensor.min() <= tensor.max() < tables[item.table]


def test_made_up_bags_run_from_empty_to_their_longest():
    made = example(RANKER.signature, ROWS, 200)
    batch = Batch(made, torch.zeros(200), None)
    for item in JAGGED.values():
        lengths = {len(ids) for ids in bags(item, batch)}
        assert lengths == set(range(item.shape[0] + 1))
    padded = (made["genres"] != 0).sum(dim=1)
    assert padded.min() == 0
    assert padded.max() == 4


def test_the_same_seed_makes_the_same_rows_and_another_seed_others():
    first, again = (example(RANKER.signature, ROWS, 20, seed=4) for _ in range(2))
    other = example(RANKER.signature, ROWS, 20, seed=5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["user"], other["user"])


def test_edge_rows_give_every_input_bad_ids_in_rows_of_its_own():
    made, good = edge_example(RANKER.signature, ROWS, 30, 4), example(RANKER.signature, ROWS, 28, 4)
    named = [item for item in RANKER.signature.inputs if not isinstance(item, DenseInput)]
    for place, item in enumerate(named):
        if isinstance(item, JaggedBag):
            rows = [[*map(str, ids)] for ids in bags(item, Batch(made, torch.zeros(30), None))]
            before = [[*map(str, ids)] for ids in bags(item, Batch(good, torch.zeros(28), None))]
        else:
            rows, before = (made[item.name].tolist() for made in (made, good))
        changed = {row for row in range(28) if rows[row] != before[row]}
        expected = {2 * place, 2 * place + 1}
        if isinstance(item, JaggedBag):  # an empty list has no place for one
            expected = {row for row in expected if before[row]}
        assert changed == expected, item.name
        ids = made[item.name]
        assert set(ids[(ids < 0) | (ids >= ROWS[item.table])].tolist()) <= {-1, ROWS[item.table]}


def test_the_last_edge_rows_have_empty_and_full_lists():
    made = edge_example(RANKER.signature, ROWS, 30, 4)
    empty, full = (row_of(made, RANKER.signature, row) for row in (28, 29))
    assert empty["genres"].tolist() == [[0, 0, 0, 0]]
    assert (len(empty["history"]), len(empty["tags"])) == (0, 0)
    longest = {item.name: item.shape[0] for item in RANKER.signature.inputs if item.name == "tags"}
    assert len(full["tags"]) == longest["tags"]
    assert int(full["tags_lengths"][0]) == longest["tags"]
    assert len(made["user"]) == 30


def test_edge_rows_need_two_rows_an_input():
    with pytest.raises(ValueError, match="6 inputs need 12 rows; found 11"):
        edge_example(RANKER.signature, ROWS, 11)
