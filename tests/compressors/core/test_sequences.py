"""Sequences: padding to the longest list, masks, lengths, positions, and random sequences.

``SEQUENCES`` is the signature of ``sequence_draft.py``. Its sequences ``history`` and
``categories`` are declared to have the same length, and ``category_count`` is that length.
"""

import pytest
import torch
from error_codes import raises_value_error
from hypothesis import given
from hypothesis import strategies as st
from models import write_split
from sequence_draft import CONFIG, TABLES, signature

from compressors.contracts import IdInput, Output, SequenceInput, Signature
from compressors.core.batches import JoinedRows, Rows, batches, concatenate_inputs, pad_sequence
from compressors.core.random_inputs import edge_rows, generate_edge_inputs, generate_inputs
from compressors.task_kinds.loss import shuffled_rows

SEQUENCES = Signature.model_validate(signature())
CLICK = Output(name="click", kind="ctr", form="logit", label="click", metric="auc")


def sequence(**changes):
    """Return a sequence ``h`` of at most 5 ids with all its tensors, and with changed fields."""
    fields = {
        "name": "h",
        "table": "t",
        "shape": (5,),
        "padding_id": 9,
        "mask": "m",
        "mask_dtype": "bool",
        "lengths": "n",
        "positions": "p",
        "first_position": 1,
    }
    return SequenceInput(**fields | changes)


LISTS = ([4, 5, 6], [7], [])
VALUES, BOUNDS = torch.tensor([4, 5, 6, 7]), torch.tensor([0, 3, 4, 4])


def test_sequence_is_padded_on_the_right_to_the_longest_list():
    tensors = pad_sequence(sequence(min_length=0), VALUES, BOUNDS)
    assert tensors["h"].tolist() == [[4, 5, 6], [7, 9, 9], [9, 9, 9]]
    assert tensors["m"].tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert tensors["n"].tolist() == [3, 1, 0]
    assert tensors["p"].tolist() == [[1, 2, 3], [1, 0, 0], [0, 0, 0]]


def test_sequence_is_padded_on_the_left_with_positions_from_the_first_id():
    tensors = pad_sequence(sequence(padding="left", min_length=0), VALUES, BOUNDS)
    assert tensors["h"].tolist() == [[4, 5, 6], [9, 9, 7], [9, 9, 9]]
    assert tensors["m"].tolist() == [[True] * 3, [False, False, True], [False] * 3]
    assert tensors["p"].tolist() == [[1, 2, 3], [0, 0, 1], [0, 0, 0]]


def test_empty_lists_have_one_padded_position():
    tensors = pad_sequence(sequence(min_length=0), torch.tensor([], dtype=torch.int64),
                              torch.tensor([0, 0, 0]))  # fmt: skip
    assert tensors["h"].tolist() == [[9], [9]]


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    padding=st.sampled_from(["left", "right"]),
    data=st.data(),
)
def test_ids_under_the_mask_are_the_lists_in_order(lengths, padding, data):
    lists = [data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n)) for n in lengths]
    values = torch.tensor([number for ids in lists for number in ids], dtype=torch.int64)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tensors = pad_sequence(sequence(padding=padding, min_length=0), values, bounds)
    rows = [row[mask].tolist() for row, mask in zip(tensors["h"], tensors["m"], strict=True)]
    assert rows == lists
    assert tensors["n"].tolist() == lengths
    assert tensors["h"].shape[1] == max(1, *lengths)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_concatenated_batches_are_padded_like_one_batch(padding):
    item = sequence(padding=padding, min_length=0)
    with_item = Signature(inputs=(item,), outputs=(CLICK,))
    parts = [
        pad_sequence(item, VALUES[:3], BOUNDS[:2]),
        pad_sequence(item, VALUES[3:], BOUNDS[1:] - 3),
    ]
    joined, expected = concatenate_inputs(parts, with_item), pad_sequence(item, VALUES, BOUNDS)
    assert joined.keys() == expected.keys()
    assert all(joined[name].equal(tensor) for name, tensor in expected.items())


def test_batches_of_a_split_are_padded_to_their_longest_list(tmp_path):
    split = write_split(SEQUENCES, TABLES, tmp_path, rows=60)
    rows = Rows(split, SEQUENCES)
    lengths = torch.cat(
        [batch.inputs["category_count"] for batch in batches(split, SEQUENCES, size=7)]
    )
    assert lengths.min() < lengths.max()
    for batch in batches(split, SEQUENCES, size=7):
        assert batch.inputs["history"].shape[1] == batch.inputs["category_count"].max()
        assert batch.inputs["history"].shape == batch.inputs["categories"].shape
    chosen = torch.tensor([50, 3, 7])
    assert rows.take(chosen).inputs["category_count"].equal(lengths[chosen])


def test_random_sequences_have_the_declared_equal_lengths_and_a_list_of_the_largest_length():
    inputs = generate_inputs(SEQUENCES, TABLES, rows=20)
    assert inputs["history_mask"].sum(dim=1).equal(inputs["category_count"].to(torch.float32))
    assert inputs["history"].shape[1] == CONFIG["longest"]
    assert inputs["category_count"].min() >= 1


def test_edge_inputs_have_the_shortest_and_the_longest_list():
    """Edge inputs also have ids out of range: -1, and the number of rows of the table."""
    inputs = generate_edge_inputs(SEQUENCES, TABLES, edge_rows(SEQUENCES))
    assert inputs["category_count"][-2:].tolist() == [1, CONFIG["longest"]]
    assert (inputs["history"] == -1).any()
    assert (inputs["history"] == TABLES["item"]).any()


def test_sequence_with_a_smallest_length_above_the_longest_is_refused():
    with raises_value_error("sequence_lengths", low=6, high=5):
        sequence(min_length=6)


@pytest.mark.parametrize(
    ("other", "code"),
    [
        ({"name": "c", "same_length_as": "x"}, "sequence_not_there"),
        ({"name": "c", "same_length_as": "c"}, "sequence_not_there"),
        ({"name": "c", "same_length_as": "h", "shape": (4,)}, "sequences_differ"),
        ({"name": "c", "same_length_as": "h", "padding": "left"}, "sequences_differ"),
    ],
)
def test_same_length_needs_another_sequence_of_equal_shape_and_padding(other, code):
    second = SequenceInput(**{"table": "t", "shape": (5,)} | other)
    with raises_value_error(code, name="c"):
        Signature(inputs=(sequence(), second), outputs=(CLICK,))


def test_name_of_a_mask_that_another_input_has_is_refused():
    second = SequenceInput(name="c", table="t", shape=(5,), mask="m")
    with raises_value_error("inputs_repeated", names=("m",)):
        Signature(inputs=(sequence(), second), outputs=(CLICK,))


# --- batches for training ------------------------------------------------------------------------


def padding_share(rows, batches_of_rows):
    """Return the share of positions in the batches that are padding."""
    lengths = rows.lengths()
    ids = sum(int(lengths[numbers].sum()) for numbers in batches_of_rows)
    positions = sum(len(numbers) * int(lengths[numbers].max()) for numbers in batches_of_rows)
    return 1 - ids / positions


def test_training_batches_have_rows_of_similar_lengths(tmp_path):
    one = SequenceInput(name="h", table="t", shape=(200,))
    model = Signature(inputs=(one,), outputs=(CLICK,))
    rows = Rows(write_split(model, {"t": 9}, tmp_path, rows=4_000), model)
    batches_of_rows = list(shuffled_rows(rows, model, 32, seed=1))
    assert sorted(torch.cat(batches_of_rows).tolist()) == list(range(4_000))
    assert torch.cat(batches_of_rows).tolist() != list(range(4_000))
    random = torch.split(torch.randperm(4_000), 32)
    # Lengths are uniform, so random batches of 32 rows are padded to nearly twice their mean.
    assert padding_share(rows, random) > 0.4
    assert padding_share(rows, batches_of_rows) < 0.1
    # Short and long batches alternate: the first ten are not sorted by length.
    means = [float(rows.lengths()[numbers].float().mean()) for numbers in batches_of_rows[:10]]
    assert means != sorted(means)
    assert all(map(torch.equal, batches_of_rows, shuffled_rows(rows, model, 32, seed=1)))
    joined = JoinedRows(rows, rows)
    assert torch.equal(joined.lengths(), torch.cat([rows.lengths(), rows.lengths()]))


def test_rows_without_sequences_have_no_lengths(tmp_path):
    model = Signature(inputs=(IdInput(name="u", table="t"),), outputs=(CLICK,))
    rows = Rows(write_split(model, {"t": 9}, tmp_path), model)
    assert rows.lengths() is None
    assert JoinedRows(rows, rows).lengths() is None
