"""Conversion of splits to tensors, and checks of ids and lists against their tables.

Prepared tensors that are not inputs have names that begin with "@": ``@label``, ``@group``,
``@time``, and for each jagged input ``@bounds/NAME``, which has the index of each row's first id,
and the number of all ids at its end.
"""

import datetime as dt
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from error_codes import TextMatching, raises_code
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file

from compressors.contracts import DenseInput, IdInput, JaggedBag, Output, PaddedBag, Signature
from infra.data.split_statistics import check_ids, split_statistics
from infra.data.splits import prepare
from infra.errors import DataRefused, StoreUnavailable

USER = IdInput(name="user", table="users")
PAIR = IdInput(name="pair", columns=("a", "b"), shape=(2,), dtype="int32", table="pairs")
DENSE = DenseInput(name="dense", columns=("x", "y"), shape=(2,))
VECTOR = DenseInput(name="vector", shape=(3,))
PADDED = PaddedBag(name="genres", shape=(3,), table="genres", padding_id=7)
JAGGED = JaggedBag(name="history", shape=(4,), table="items", dtype="int32")


def signature_of(*inputs, task="ctr", group="session", time="at"):
    """Return a signature with these inputs and the label ``click``."""
    output = "logit" if task == "ctr" else "score"
    return Signature(
        inputs=inputs,
        outputs=(
            Output(
                name="click",
                kind=task,
                form=output,
                label="click",
                metric="auc" if task == "ctr" else "ndcg@10",
            ),
        ),
        group=group,
        time=time,
    )


ALL = signature_of(USER, PAIR, DENSE, VECTOR, PADDED, JAGGED)
"""A signature with all of these inputs."""


def columns(**changes):
    """Return four valid rows of every column that ``ALL`` reads, with some columns replaced.

    A column that is replaced by None is omitted.
    """
    valid = {
        "user": pa.array([5, 0, 3, 5]),
        "a": pa.array([1, 2, 3, 4], pa.int16()),
        "b": pa.array([9, 8, 7, 6], pa.uint8()),
        "x": pa.array([0.5, -1.0, 2.0, 3.0]),
        "y": pa.array([1, 2, 3, 4]),
        "vector": pa.array([[1.0, 2.0, 3.0]] * 4, pa.list_(pa.float32())),
        "genres": pa.array([[1], [], [2, 3, 4], [5, 6]]),
        "history": pa.array([[], [1, 2], [], [3, 4, 5, 6]]),
        "click": pa.array([1, 0, 0, 1]),
        "session": pa.array(["b", "a", "b", "c"]),
        "at": pa.array([10, 20, 30, 40]),
    }
    column_values = {**valid, **changes}
    return {name: column for name, column in column_values.items() if column is not None}


@pytest.fixture
def split(tmp_path):
    """A function that writes ``columns(**changes)`` as a parquet file and returns its path."""

    def write(**changes):
        path = tmp_path / "split.parquet"
        pq.write_table(pa.table(columns(**changes)), path)
        return path

    return write


@pytest.fixture
def tensors(tmp_path):
    """A function that prepares a parquet file and returns the tensors."""

    def prepare_and_load(path, signature=ALL):
        prepare(path, signature, tmp_path / "out")
        return load_file(tmp_path / "out" / "data.safetensors")

    return prepare_and_load


@pytest.fixture
def refusal_message(tmp_path, split):
    """A function that prepares ``columns(**changes)`` and returns the message of the error."""

    def prepare_and_fail(signature=ALL, **changes):
        with pytest.raises(DataRefused) as caught:
            prepare(split(**changes), signature, tmp_path / "refused")
        assert not (tmp_path / "refused" / "data.safetensors").exists()
        return str(caught.value)

    return prepare_and_fail


def test_prepare_writes_every_kind_of_input_in_its_layout(split, tensors):
    out = tensors(split())
    np.testing.assert_array_equal(out["user"], np.array([5, 0, 3, 5], np.int64))
    np.testing.assert_array_equal(out["pair"], np.int32([[1, 9], [2, 8], [3, 7], [4, 6]]))
    np.testing.assert_array_equal(out["dense"], np.float32([[0.5, 1], [-1, 2], [2, 3], [3, 4]]))
    np.testing.assert_array_equal(out["vector"], np.float32([[1, 2, 3]] * 4))
    np.testing.assert_array_equal(out["genres"], [[1, 7, 7], [7, 7, 7], [2, 3, 4], [5, 6, 7]])
    np.testing.assert_array_equal(out["history"], np.int32([1, 2, 3, 4, 5, 6]))
    np.testing.assert_array_equal(out["@bounds/history"], [0, 0, 2, 2, 6])
    np.testing.assert_array_equal(out["@label"], np.float32([1, 0, 0, 1]))
    np.testing.assert_array_equal(out["@group"], [0, 1, 0, 2])
    np.testing.assert_array_equal(out["@time"], [10, 20, 30, 40])
    dtypes = {name: str(tensor.dtype) for name, tensor in out.items()}
    assert dtypes == {
        "user": "int64",
        "pair": "int32",
        "dense": "float32",
        "vector": "float32",
        "genres": "int64",
        "history": "int32",
        "@bounds/history": "int64",
        "@label": "float32",
        "@group": "int64",
        "@time": "int64",
    }


def test_prepare_returns_rows_tensors_and_size_of_the_file(split, tmp_path):
    prepared = prepare(
        split(), signature_of(USER, group=None, time=None), tmp_path / "deep" / "out"
    )
    tensors_file = tmp_path / "deep" / "out" / "data.safetensors"
    assert prepared.rows == 4
    assert prepared.tensors == ("user", "@label")
    assert prepared.bytes == tensors_file.stat().st_size
    assert list(tensors_file.parent.iterdir()) == [tensors_file]


def test_prepare_on_a_full_disk_leaves_no_file(split, tmp_path, monkeypatch):
    def write_half_and_fail(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("infra.data.splits.save_file", write_half_and_fail)
    with raises_code(StoreUnavailable, "disk_full", path=TextMatching(r"data\.safetensors")):
        prepare(split(), ALL, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_column_of_empty_lists_becomes_an_empty_tensor(split, tensors):
    out = tensors(split(history=pa.array([[]] * 4, pa.list_(pa.int64()))))
    assert out["history"].shape == (0,)
    np.testing.assert_array_equal(out["@bounds/history"], [0] * 5)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([[1, 2, 3]] * 4, pa.list_(pa.int64(), 3)),
        pa.array([[1, 2, 3]] * 4, pa.large_list(pa.uint64())),
    ],
    ids=["fixed size", "large"],
)
def test_every_arrow_list_type_is_read_as_a_bag(column, split, tensors):
    np.testing.assert_array_equal(tensors(split(genres=column))["genres"], [[1, 2, 3]] * 4)


def test_boolean_and_dictionary_columns_are_read_as_their_values(split, tensors):
    path = split(
        click=pa.array([True, False, False, True]),
        x=pa.array([True, False, True, True]),
        user=pa.array([5, 0, 3, 5]).dictionary_encode(),
        session=pa.array(["b", "a", "b", "c"]).dictionary_encode(),
    )
    out = tensors(path)
    np.testing.assert_array_equal(out["@label"], [1, 0, 0, 1])
    np.testing.assert_array_equal(out["dense"][:, 0], [1, 0, 1, 1])
    np.testing.assert_array_equal(out["user"], [5, 0, 3, 5])
    np.testing.assert_array_equal(out["@group"], [0, 1, 0, 2])


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_timestamps_of_any_unit_are_read_as_microseconds(unit, zone, split, tensors):
    moments = pa.array([0, 1, 2, 3], pa.int64()).cast(pa.timestamp("s"))
    out = tensors(split(at=moments.cast(pa.timestamp(unit)).cast(pa.timestamp(unit, zone))))
    np.testing.assert_array_equal(out["@time"], [0, 1_000_000, 2_000_000, 3_000_000])


def test_dates_and_fractional_seconds_are_read_as_times(split, tensors):
    days = pa.array([dt.date(1970, 1, day) for day in (1, 2, 3, 4)])
    np.testing.assert_array_equal(tensors(split(at=days))["@time"][1], 86_400_000_000)
    seconds = tensors(split(at=pa.array([0.5, 1.5, 2.5, 3.5])))["@time"]
    np.testing.assert_array_equal(seconds, np.float64([0.5, 1.5, 2.5, 3.5]))


def test_integer_groups_are_unchanged(split, tensors):
    out = tensors(split(session=pa.array([40, -3, 40, 9])))
    np.testing.assert_array_equal(out["@group"], [40, -3, 40, 9])


@given(
    rows=st.lists(
        st.tuples(
            st.integers(-(2**31), 2**31 - 1),
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.lists(st.integers(0, 99), max_size=3),
            st.lists(st.integers(0, 99), max_size=4),
            st.booleans(),
            st.text(max_size=3),
        ),
        min_size=1,
        max_size=40,
    ),
    row_group=st.integers(1, 15),
    batch=st.integers(1, 9),
)
def test_random_tables_in_any_row_groups_and_batches_are_read_exactly(
    rows, row_group, batch, tmp_path_factory
):
    """The values are equal, not only close, for any cut into row groups and batches."""
    folder = tmp_path_factory.mktemp("round")
    ids, numbers, padded, jagged, labels, groups = map(list, zip(*rows, strict=True))
    list_type = pa.list_(pa.int64())
    table = pa.table(
        {
            "user": ids,
            "vector": pa.array([[number] for number in numbers]),
            "genres": pa.array(padded, list_type),
            "history": pa.array(jagged, list_type),
            "click": labels,
            "session": groups,
        }
    )
    pq.write_table(table, folder / "s.parquet", row_group_size=row_group)
    vector_input = DenseInput(name="vector", shape=(1,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infra.data.parquet.BATCH_ROWS", batch)
        prepare(
            folder / "s.parquet",
            signature_of(USER, vector_input, PADDED, JAGGED, time=None),
            folder,
        )
    out = load_file(folder / "data.safetensors")
    assert out["user"].tolist() == ids
    assert out["vector"].ravel().tolist() == numbers
    # PADDED has three columns and the padding id 7.
    assert out["genres"].tolist() == [row + [7] * (3 - len(row)) for row in padded]
    bounds = out["@bounds/history"]
    lists = [out["history"][bounds[i] : bounds[i + 1]].tolist() for i in range(len(rows))]
    assert lists == jagged
    assert out["@label"].tolist() == [float(label) for label in labels]
    distinct_groups = list(dict.fromkeys(groups))  # in the order in which they occur
    assert out["@group"].tolist() == [distinct_groups.index(group) for group in groups]


def test_part_files_are_read_in_the_order_of_their_names(tmp_path, tensors):
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, ids in (("part-1", [3, 4]), ("part-0", [1, 2])):
        frame = pd.DataFrame({"user": ids, "click": [0, 1], "session": ["x", name]})
        frame.to_parquet(folder / f"{name}.parquet")
    (folder / "_SUCCESS").touch()
    out = tensors(folder, signature_of(USER, time=None))
    assert out["user"].tolist() == [1, 2, 3, 4]
    assert out["@group"].tolist() == [0, 1, 0, 2]


def test_row_numbers_in_errors_continue_through_all_files_of_a_split(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for part, labels in enumerate(([0, 1], [0, 3])):
        frame = pd.DataFrame({"user": [1, 2], "click": labels})
        frame.to_parquet(folder / f"{part}.parquet")
    with raises_code(DataRefused, "schema_unfit", problems=TextMatching(r"first in row\(s\) 3\.")):
        prepare(folder, signature_of(USER, group=None, time=None), tmp_path)


def test_parts_of_different_types_are_refused(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    pd.DataFrame({"user": [1]}).to_parquet(folder / "0.parquet")
    pd.DataFrame({"user": [1.5]}).to_parquet(folder / "1.parquet")
    with raises_code(
        DataRefused,
        "schema_unfit",
        problems=TextMatching(r"'user' is float in 1\.parquet, but integer in 0"),
    ):
        prepare(folder, ALL, tmp_path)


def test_partitioned_folder_is_refused(tmp_path):
    (tmp_path / "day=1").mkdir()
    pd.DataFrame({"user": [1]}).to_parquet(tmp_path / "day=1" / "0.parquet")
    with raises_code(
        DataRefused, "parquet_in_subfolders", path=str(tmp_path), file="day=1/0.parquet"
    ):
        prepare(tmp_path, ALL, tmp_path)


def test_missing_damaged_and_empty_files_are_refused(tmp_path, refusal_message):
    with raises_code(DataRefused, "parquet_missing", path=str(tmp_path / "nowhere")):
        prepare(tmp_path / "nowhere", ALL, tmp_path)
    with raises_code(DataRefused, "parquet_absent", path=str(tmp_path)):
        prepare(tmp_path, ALL, tmp_path)
    (tmp_path / "odd.parquet").write_bytes(b"PAR1 and nothing else")
    with raises_code(DataRefused, "unreadable", file=str(tmp_path / "odd.parquet")):
        prepare(tmp_path / "odd.parquet", ALL, tmp_path)
    nothing = {name: column.slice(0, 0) for name, column in columns().items()}
    assert "it has no rows" in refusal_message(**nothing)


def test_file_with_damaged_pages_is_refused(split, tmp_path):
    path = split()
    raw = bytearray(path.read_bytes())
    raw[4:400] = b"\xff" * 396  # after the four bytes with which a parquet file begins
    path.write_bytes(raw)
    with raises_code(DataRefused, "unreadable", problem=TextMatching("page header")):
        prepare(path, ALL, tmp_path)


# Name of the case, changes of the columns, pattern of the message.
INVALID_DATA = [
    ("missing", {"b": None}, r"column 'b' is missing; input 'pair' reads it"),
    (
        "strings as ids",
        {"user": pa.array(["u1", "u2", "u3", "u4"])},
        r"column 'user': input 'user' needs integer, found string in all 4 row\(s\)\. Encode it",
    ),
    (
        "whole numbers as floats",
        {"user": pa.array([1.0, 2.0, 3.0, 4.0])},
        r"column 'user': .* found float in all 4 row\(s\)\. Cast it to int64\.",
    ),
    (
        "fractions as ids",
        {"user": pa.array([1.0, 2.5, 3.0, 0.5])},
        r"found float .* 2 value\(s\) are a fraction, first in row\(s\) 1, 3\. Cast it to int64",
    ),
    (
        "gaps as NaN",
        {"user": pa.array([1.0, None, float("nan"), 4.0])},
        r"2 value\(s\) are a null or NaN, first in row\(s\) 1, 2\. Cast it .* when they are gone",
    ),
    (
        "fractions in a bag",
        {"genres": pa.array([[1.0], [], [2.5], [3.0]])},
        r"needs list of integer, found list of float .* a fraction, first in row\(s\) 2",
    ),
    ("ids where a bag is", {"genres": pa.array([1, 2, 3, 4])}, "needs list of integer, found int"),
    ("a bag where ids are", {"user": pa.array([[1]] * 4)}, "needs integer, found list of integer"),
    ("text as dense", {"x": pa.array(["1"] * 4)}, "'x': input 'dense' needs integer or float or"),
    ("a label as text", {"click": pa.array(["1"] * 4)}, "'click': the label needs .* string"),
    ("a group as list", {"session": pa.array([[1]] * 4)}, "the group needs .* Store one plain"),
    ("a time as text", {"at": pa.array(["now"] * 4)}, "the time needs .* found string"),
    ("null id", {"user": pa.array([1, None, 3, None])}, r"'user': null; 2 .*row\(s\) 1, 3"),
    (
        "an id past int32",
        {"user": pa.array([1, 2**31, 3, -(2**31) - 1])},
        r"'user': id does not fit int32; 2 value\(s\), first in row\(s\) 1, 3",
    ),
    ("an id past int64", {"user": pa.array([2**64 - 1] * 4, pa.uint64())}, "fit int32; 4 value"),
    ("null number", {"y": pa.array([1, 2, 3, None])}, r"'y': null; 1 .*row\(s\) 3"),
    ("NaN", {"x": pa.array([1.0, float("nan"), 0.0, 0.0])}, r"'x': NaN; 1 .*row\(s\) 1"),
    ("inf", {"x": pa.array([1.0, 0.0, -np.inf, 0.0])}, r"'x': infinite or beyond.*row\(s\) 2"),
    ("too big", {"x": pa.array([1.0, 0.0, 1e300, 0.0])}, r"infinite or beyond.*row\(s\) 2"),
    ("null list", {"genres": pa.array([[1], None, [2], [3]])}, r"'genres': null list.*row\(s\) 1"),
    (
        "null in a list",
        {"genres": pa.array([[1], [2, None], [None, None], [3]])},
        r"'genres': null; 3 value\(s\), first in row\(s\) 1, 2\.",
    ),
    (
        "a padded list too long",
        {"genres": pa.array([[1], [2], [1, 2, 3, 4], [3]])},
        r"'genres': a list has 4 ids, input 'genres' takes at most 3; 1 .*row\(s\) 2",
    ),
    (
        "a jagged list too long",
        {"history": pa.array([[1] * 5, [], [1], [2] * 9])},
        r"'history': a list has 5 ids, input 'history' takes at most 4; 2 .*row\(s\) 0, 3",
    ),
    (
        "a vector of another width",
        {"vector": pa.array([[1.0] * 3, [1.0] * 2, [1.0] * 3, [1.0] * 3])},
        r"'vector': a list has 2 value\(s\), input 'vector' has 3; 1 .*row\(s\) 1",
    ),
    ("a label of two", {"click": pa.array([0, 1, 2, 0])}, r"a ctr label is 0 or 1; 1 .*row\(s\) 2"),
    ("half a label", {"click": pa.array([0, 1, 0.5, 0])}, r"a ctr label is 0 or 1; 1"),
    ("null label", {"click": pa.array([0, None, 1, 0])}, r"'click': null; 1 .*row\(s\) 1"),
    ("NaN label", {"click": pa.array([0.0, np.nan, 1, 0])}, r"'click': NaN; 1 .*row\(s\) 1"),
    ("null group", {"session": pa.array(["a", None, "b", "c"])}, r"'session': null; 1"),
    ("NaN group", {"session": pa.array([0.0, np.nan, 1, 0])}, r"'session': NaN; 1"),
    ("group too big", {"session": pa.array([2**64 - 1] * 4, pa.uint64())}, "fit int64; 4"),
    ("null time", {"at": pa.array([1, None, 2, 3])}, r"'at': null; 1 .*row\(s\) 1"),
    ("endless time", {"at": pa.array([1.0, np.inf, 2, 3])}, r"'at': NaN or infinite; 1"),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [case[1:] for case in INVALID_DATA],
    ids=[case[0] for case in INVALID_DATA],
)
def test_refusal_of_invalid_data_contains_column_rule_and_rows(changes, message, refusal_message):
    text = refusal_message(**changes)
    assert re.search(message, text)
    assert len(text.splitlines()) == 2, "the error contains only this violation"


def test_ranking_labels_must_be_at_least_zero(refusal_message, split, tensors):
    grades = signature_of(USER, task="ranking")
    assert tensors(split(click=pa.array([0, 4, 2, 1])), grades)["@label"].tolist() == [0, 4, 2, 1]
    text = refusal_message(grades, click=pa.array([0, -1, 2, 1]))
    assert "a ranking label is at least 0; 1 value(s), first in row(s) 1." in text


def test_refusal_contains_all_violated_rules(refusal_message):
    text = refusal_message(user=pa.array([1, None, 2, 3]), click=pa.array([0, 1, 2, 0]))
    assert "'user': null" in text
    assert "'click': a ctr label" in text


def test_refusal_contains_the_first_twenty_rows_and_the_number_of_all(split, tmp_path):
    rows = 1000
    table = pa.table({"user": pa.array([None] * rows, pa.int64()), "click": [0] * rows})
    pq.write_table(table, tmp_path / "n.parquet")
    with raises_code(
        DataRefused, "schema_unfit", problems=TextMatching(r"null; 1000 value\(s\), .* 18, 19\.$")
    ):
        prepare(tmp_path / "n.parquet", signature_of(USER, group=None, time=None), tmp_path)


def test_repeated_column_is_refused(tmp_path):
    table = pa.Table.from_arrays(
        [pa.array([1]), pa.array([2]), pa.array([0])], ["user"] * 2 + ["click"]
    )
    pq.write_table(table, tmp_path / "twice.parquet")
    with raises_code(
        DataRefused, "schema_unfit", problems=TextMatching("'user' is there more than once")
    ):
        prepare(tmp_path / "twice.parquet", signature_of(USER, group=None, time=None), tmp_path)


def test_input_name_that_begins_with_an_at_sign_is_refused(refusal_message):
    reserved = IdInput(name="@label", columns=("user",), table="users")
    assert "names that begin with '@' are reserved" in refusal_message(signature_of(reserved))


def test_column_name_may_contain_a_dot(split, tensors):
    dotted_input = JaggedBag(name="history", columns=("user.items",), shape=(4,), table="items")
    plain_input = IdInput(name="user", table="users")
    path = split(**{"user.items": columns()["history"]})
    assert tensors(path, signature_of(plain_input, dotted_input))["history"].tolist() == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_split_statistics_of_valid_data(split):
    statistics = split_statistics(split(), ALL)
    assert statistics.rows == 4
    assert (statistics.time_min, statistics.time_max) == (10, 40)
    user, pair = statistics.inputs["user"], statistics.inputs["pair"]
    assert (user.min_id, user.max_id, user.longest, user.nulls) == (0, 5, 0, 0)
    assert (pair.min_id, pair.max_id) == (1, 9)
    genres, history = statistics.inputs["genres"], statistics.inputs["history"]
    assert (genres.min_id, genres.max_id, genres.longest) == (1, 6, 3)
    assert (history.min_id, history.max_id, history.longest) == (1, 6, 4)
    assert "dense" not in statistics.inputs


def test_split_statistics_of_columns_with_nulls_or_without_ids(split):
    path = split(
        user=pa.array([None] * 4, pa.int64()),
        genres=pa.array([None, [1, None], [], [2]]),
        history=pa.array([[]] * 4, pa.list_(pa.int64())),
    )
    statistics = split_statistics(path, ALL)
    assert (statistics.inputs["user"].min_id, statistics.inputs["user"].nulls) == (None, 4)
    assert statistics.inputs["genres"].nulls == 2
    assert (statistics.inputs["history"].max_id, statistics.inputs["history"].longest) == (None, 0)


TABLES = {"users": 6, "pairs": 10, "genres": 8, "items": 7}


def test_check_ids_accepts_ids_inside_their_tables(split):
    check_ids({"train": split_statistics(split(), ALL)}, ALL, TABLES)


@pytest.mark.parametrize(
    ("name", "policy", "refused"),
    [
        # A policy for ids outside the table applies only in validation and test.
        ("train", "error", True),
        ("train", "clamp", True),
        ("calibration", "default_row", True),
        ("validation", "error", True),
        ("test", "error", True),
        ("validation", "clamp", False),
        ("test", "default_row", False),
    ],
)
@pytest.mark.parametrize("invalid_id", [6, -1])
def test_check_ids_refuses_ids_outside_their_table_unless_a_policy_applies(
    name, policy, refused, invalid_id, split
):
    signature = signature_of(USER.model_copy(update={"out_of_range": policy}))
    statistics = {name: split_statistics(split(user=pa.array([0, invalid_id, 3, 5])), signature)}
    if not refused:
        check_ids(statistics, signature, TABLES)
        return
    message = rf"split '{name}', input 'user': id {invalid_id} is not in table 'users' of 6 rows"
    with raises_code(DataRefused, "ids_unfit", problems=TextMatching(message)):
        check_ids(statistics, signature, TABLES)


def test_check_ids_refuses_too_long_lists_of_clamped_ids(split):
    signature_with_short_lists = signature_of(
        PADDED.model_copy(update={"shape": (2,), "out_of_range": "clamp"})
    )
    with raises_code(
        DataRefused, "ids_unfit", problems=TextMatching("'test', input 'genres': a list has 3 ids")
    ):
        check_ids(
            {"test": split_statistics(split(), signature_with_short_lists)},
            signature_with_short_lists,
            TABLES,
        )


@pytest.mark.parametrize("setting", ["default_row", "padding_id"])
def test_check_ids_refuses_a_default_row_or_padding_id_outside_the_table(setting):
    signature = signature_of(PADDED.model_copy(update={setting: 8}))
    with raises_code(
        DataRefused,
        "ids_unfit",
        problems=TextMatching(f"{setting} 8 is not in table 'genres' of 8 rows"),
    ):
        check_ids({}, signature, TABLES)


def test_check_ids_refuses_an_input_with_an_unknown_table():
    with raises_code(
        DataRefused,
        "ids_unfit",
        problems=TextMatching("input 'user' reads table 'users'; there is items"),
    ):
        check_ids({}, signature_of(USER), {"items": 3})
