"""Batches of prepared data, random inputs, and edge inputs with out-of-range ids.

The networks are those of ``models.py``. ``RANKER`` has six inputs with ids: ``user``, ``item`` and
``city``, the padded bag ``genres``, and the jagged bags ``history`` (with offsets) and ``tags``
(with lengths). A jagged bag is the ids of all rows, concatenated.
"""

import pytest
import torch
from models import ATTENTION, BENCH_ROWS, RANKER, REFERENCES, write_split

from compressors.contracts import (
    DenseInput,
    IdInput,
    JaggedBag,
    PaddedBag,
    SequenceInput,
    tensor_names,
)
from compressors.core.batches import (
    MAX_SEQUENCE_IDS,
    Batch,
    batches,
    build_jagged_arguments,
    rows_per_batch,
)
from compressors.core.random_inputs import generate_edge_inputs, generate_inputs
from compressors.lower.serving_wrapper import input_names
from tasks.evaluation.single_rows import take_row

ROWS = RANKER.rows_of_tables()
JAGGED = {item.name: item for item in RANKER.signature.inputs if isinstance(item, JaggedBag)}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return write_split(RANKER.signature, ROWS, tmp_path_factory.mktemp("data"))


def bags(item: JaggedBag, batch: Batch) -> list[list[int]]:
    """Return the ids of each row of a jagged input."""
    values, bounds = (batch.inputs[name] for name in tensor_names(item))
    lengths = (
        bounds
        if item.layout == "lengths"
        else torch.cat([bounds, torch.tensor([len(values)])]).diff()
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


def test_limit_of_batches_counts_rows(split):
    parts = list(batches(split, RANKER.signature, 20, limit=50))
    assert [len(part.label) for part in parts] == [20, 20, 10]
    assert sum(len(part.label) for part in batches(split, RANKER.signature, 20, limit=10**6)) == (
        BENCH_ROWS
    )


@pytest.mark.parametrize(("longest", "rows"), [(50, 8192), (10_000, MAX_SEQUENCE_IDS // 20_000)])
def test_batches_of_two_long_sequences_have_at_most_the_largest_number_of_ids(longest, rows):
    sequences = tuple(
        SequenceInput(name=name, shape=(longest,), table="item", mask=f"{name}_mask")
        for name in ("history", "recent")
    )
    signature = RANKER.signature.model_copy(update={"inputs": sequences})
    assert rows_per_batch(signature, 8192) == rows


def test_a_batch_has_the_keyword_arguments_of_the_model(split):
    for part in batches(split, RANKER.signature, 13):
        assert set(part.inputs) == set(input_names(RANKER.signature))
        assert part.group is None
        assert RANKER.model().module(**part.inputs).shape == (len(part.label), 1)


def test_batches_have_groups_if_the_signature_names_a_group_column(tmp_path):
    split = write_split(ATTENTION.signature, ATTENTION.rows_of_tables(), tmp_path)
    groups = [part.group for part in batches(split, ATTENTION.signature, 20)]
    # ``write_split`` writes groups of eight rows.
    assert torch.equal(torch.cat(groups), torch.arange(BENCH_ROWS) // 8)


def test_jagged_arguments_have_the_bounds_as_offsets_or_lengths():
    values, bounds = torch.arange(5), torch.tensor([0, 2, 2, 5])
    history, tags = JAGGED["history"], JAGGED["tags"]
    assert build_jagged_arguments(history, values, bounds)["history_offsets"].tolist() == [0, 2, 2]
    assert build_jagged_arguments(tags, values, bounds)["tags_lengths"].tolist() == [2, 0, 3]


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda item: item.network.__name__)
@pytest.mark.parametrize("rows", [1, 57])
def test_generated_inputs_have_the_shapes_dtypes_and_id_ranges_of_the_signature(reference, rows):
    tables = reference.rows_of_tables()
    inputs = generate_inputs(reference.signature, tables, rows)
    assert set(inputs) == set(input_names(reference.signature))
    for item in reference.signature.inputs:
        tensor = inputs[item.name]
        assert tensor.dtype == getattr(torch, item.dtype)
        if isinstance(item, IdInput | PaddedBag | DenseInput):
            assert tensor.shape == (rows, *item.shape)
        if not isinstance(item, DenseInput):
            assert tensor.numel() == 0 or 0 <= tensor.min() <= tensor.max() < tables[item.table]


def test_generated_bags_have_every_length_from_zero_to_the_maximum():
    inputs = generate_inputs(RANKER.signature, ROWS, 200)
    batch = Batch(inputs, torch.zeros(200), None)
    for item in JAGGED.values():
        lengths = {len(ids) for ids in bags(item, batch)}
        assert lengths == set(range(item.shape[0] + 1))
    genres = (inputs["genres"] != 0).sum(dim=1)  # a bag padded with id 0 to four ids
    assert genres.min() == 0
    assert genres.max() == 4


def test_generated_inputs_depend_on_the_seed_only():
    first, second = (generate_inputs(RANKER.signature, ROWS, 20, seed=4) for _ in range(2))
    other = generate_inputs(RANKER.signature, ROWS, 20, seed=5)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["user"], other["user"])


def test_each_input_with_ids_has_out_of_range_ids_in_two_separate_edge_rows():
    edges = generate_edge_inputs(RANKER.signature, ROWS, 30, seed=4)
    # The same rows with valid ids. The last two edge rows have empty and full lists instead.
    valid = generate_inputs(RANKER.signature, ROWS, 28, seed=4)
    id_inputs = [item for item in RANKER.signature.inputs if not isinstance(item, DenseInput)]
    for index, item in enumerate(id_inputs):
        if isinstance(item, JaggedBag):
            rows = [[*map(str, ids)] for ids in bags(item, Batch(edges, torch.zeros(30), None))]
            before = [[*map(str, ids)] for ids in bags(item, Batch(valid, torch.zeros(28), None))]
        else:
            rows, before = edges[item.name].tolist(), valid[item.name].tolist()
        changed = {row for row in range(28) if rows[row] != before[row]}
        expected = {2 * index, 2 * index + 1}
        if isinstance(item, JaggedBag):  # an empty list has no id to replace
            expected = {row for row in expected if before[row]}
        assert changed == expected, item.name
        ids = edges[item.name]
        assert set(ids[(ids < 0) | (ids >= ROWS[item.table])].tolist()) <= {-1, ROWS[item.table]}


def test_the_last_two_edge_rows_have_empty_and_full_lists():
    inputs = generate_edge_inputs(RANKER.signature, ROWS, 30, seed=4)
    empty, full = (take_row(inputs, RANKER.signature, row) for row in (28, 29))
    assert empty["genres"].tolist() == [[0, 0, 0, 0]]
    assert (len(empty["history"]), len(empty["tags"])) == (0, 0)
    longest = {item.name: item.shape[0] for item in RANKER.signature.inputs if item.name == "tags"}
    assert len(full["tags"]) == longest["tags"]
    assert int(full["tags_lengths"][0]) == longest["tags"]
    assert len(inputs["user"]) == 30


def test_fewer_than_two_edge_rows_per_input_raise_a_value_error():
    with pytest.raises(ValueError, match="6 inputs need 12 rows; found 11"):
        generate_edge_inputs(RANKER.signature, ROWS, 11)
