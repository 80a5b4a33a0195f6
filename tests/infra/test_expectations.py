"""Data checks run by Great Expectations: valid data passes, and each violation fails its check.

A check compares one column of a split, or the whole split, with a rule; its result is a finding.
``intended`` is the number of planned checks and ``evaluated`` the number that could be carried out.
The split ``traffic`` has logged requests, without labels.
"""

import datetime as dt
import json
import logging
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from error_codes import TextMatching, raises_code, raises_value_error
from signatures import replace_output

from compressors.contracts import DenseInput, IdInput, JaggedBag, Output, PaddedBag, Signature
from infra.data import expectations
from infra.data.checks import ROWS, Check
from infra.data.expectations import Rules, refuse_failures, validate
from infra.data.splits import prepare
from infra.errors import DataRefused

INPUTS = (
    IdInput(name="user", table="users"),
    IdInput(name="seen", table="users", out_of_range="clamp"),
    DenseInput(name="dense", columns=("x", "y"), shape=(2,)),
    DenseInput(name="vector", shape=(2,)),
    PaddedBag(name="genres", shape=(3,), table="genres"),
    JaggedBag(name="history", shape=(4,), table="users", out_of_range="default_row"),
)
SIGNATURE = Signature(
    inputs=INPUTS,
    outputs=(Output(name="click", kind="ctr", form="logit", label="click", metric="gauc"),),
    group="session",
    time="at",
)


def signature_reading(column):
    """Return the signature with only the inputs that read ``column``, so that checks run faster.

    If no input reads it, the signature has only the first input.
    """
    inputs = tuple(item for item in INPUTS if column in item.columns) or INPUTS[:1]
    return SIGNATURE.model_copy(update={"inputs": inputs})


TABLES = {"users": 6, "genres": 8}
INVALID_ROW = 17  # row number of an invalid value
ROWS_PER_SPLIT = 120
FIRST_TIME = {"train": 0, "calibration": 60, "validation": 1_000, "test": 2_000}


def columns(split, rows=ROWS_PER_SPLIT):
    """Return valid columns of one split."""
    count = np.arange(rows)
    return {
        "user": pa.array(count % 6),
        "seen": pa.array(count % 6),
        "x": pa.array(count / 2),
        "y": pa.array(count),
        "vector": pa.array([[0.5, 1.5]] * rows),
        "genres": pa.array([list(range(i % 4)) for i in count]),
        "history": pa.array([[5] * (i % 5) for i in count], pa.list_(pa.int64())),
        "click": pa.array(count % 3 == 0),
        "session": pa.array([f"s{i // 10}" for i in count]),
        "at": pa.array(count + FIRST_TIME[split]),
    }


@pytest.fixture
def write(tmp_path):
    """A function that writes valid splits and returns their paths by split name.

    Its argument ``test={"user": column}`` replaces a column of one split; None omits the column.
    """

    def to_files(**changes):
        paths = {}
        for split in FIRST_TIME:
            split_columns = {**columns(split), **changes.get(split, {})}
            table = pa.table({k: v for k, v in split_columns.items() if v is not None})
            paths[split] = tmp_path / f"{split}.parquet"
            pq.write_table(table, paths[split], row_group_size=50)
        return paths

    return to_files


def with_invalid_value(name, value, row=INVALID_ROW, split="train"):
    """Return a valid column with one value replaced; the column's type is unchanged."""
    valid = columns(split)[name]
    values = valid.to_pylist()
    values[row] = value
    return {name: pa.array(values, valid.type)}


def failures(validation):
    """Return the findings that did not pass."""
    return [finding for finding in validation.findings if not finding.success]


def test_valid_data_passes_every_check(write):
    validation = validate(write(), SIGNATURE, TABLES)
    assert failures(validation) == []
    assert validation.success
    assert validation.evaluated == validation.intended == len(validation.findings)
    assert {finding.split for finding in validation.findings} == set(FIRST_TIME)
    refuse_failures(validation)


INVALID_VALUES = [
    # split, column, value, rule, shown value
    ("train", "user", 6, "id in table 'users' (0 to 5)", "6"),
    ("train", "user", -1, "id in table 'users' (0 to 5)", "-1"),
    ("test", "user", 6, "id in table 'users' (0 to 5)", "6"),
    ("train", "user", None, "no null or NaN", "null or NaN"),
    ("train", "seen", 6, "id in table 'users' (0 to 5)", "6"),
    ("calibration", "seen", -1, "id in table 'users' (0 to 5)", "-1"),
    ("test", "seen", 2**31, "id fits int32 (outside the table: clamp)", "2147483648"),
    ("train", "x", float("nan"), "no null or NaN", "null or NaN"),
    ("train", "x", float("inf"), "finite in float32", "inf"),
    ("train", "x", -1e39, "finite in float32", "-1e+39"),
    ("validation", "y", None, "no null or NaN", "null or NaN"),
    ("train", "vector", None, "no null list", "null or NaN"),
    ("train", "vector", [0.5], "lists of 2 value(s)", "1"),
    ("train", "vector", [0.5] * 3, "lists of 2 value(s)", "3"),
    ("train", "vector", [0.5, None], "no null or NaN in a list", "null or NaN"),
    ("train", "vector", [np.inf, 0.5], "finite in float32", "inf"),
    ("train", "genres", None, "no null list", "null or NaN"),
    ("test", "genres", [0] * 4, "lists of at most 3 id(s)", "4"),
    ("train", "genres", [1, None], "no null or NaN in a list", "null or NaN"),
    ("train", "genres", [1, 8], "id in table 'genres' (0 to 7)", "8"),
    ("train", "history", [6], "id in table 'users' (0 to 5)", "6"),
    ("test", "history", [1] * 5, "lists of at most 4 id(s)", "5"),
    ("train", "click", None, "no null or NaN", "null or NaN"),
    ("train", "session", None, "no null or NaN", "null or NaN"),
    ("train", "at", None, "no null or NaN", "null or NaN"),
]


@pytest.mark.parametrize(
    ("split", "column", "value", "rule", "shown_value"),
    INVALID_VALUES,
    ids=[f"{case[0]}-{case[1]}-{case[3]}" for case in INVALID_VALUES],
)
def test_one_invalid_value_fails_exactly_its_rule(write, split, column, value, rule, shown_value):
    paths = write(**{split: with_invalid_value(column, value, split=split)})
    validation = validate({split: paths[split]}, signature_reading(column), TABLES)
    assert [(f.column, f.rule) for f in failures(validation)] == [(column, rule)]
    (failed,) = failures(validation)
    assert (failed.failing_rows, failed.failing_values) == ((INVALID_ROW,), (shown_value,))
    assert failed.failing_count == 1
    assert validation.evaluated == validation.intended
    assert not validation.success
    message = f"split '{split}', column '{column}': needs {rule}; found 1 of "
    with raises_code(DataRefused, "checks_failed") as caught:
        refuse_failures(validation)
    (problem,) = caught.value.fields["problems"]
    assert message in problem
    assert f"row(s) {INVALID_ROW} ({shown_value})." in problem


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("column", ["seen", "history"])
def test_ids_outside_the_table_pass_in_validation_and_test_with_a_policy(write, split, column):
    """``out_of_range`` is what happens to such ids when the model is served; training has none."""
    paths = write(
        **{split: with_invalid_value(column, 999 if column == "seen" else [999], split=split)}
    )
    assert validate({split: paths[split]}, signature_reading(column), TABLES).success


@pytest.mark.parametrize(
    ("value", "split"), [(2, "train"), (-1, "test"), (1, "train")], ids=["2", "-1", "good"]
)
def test_label_other_than_0_or_1_fails(write, value, split):
    labels = [0, 1] * (ROWS_PER_SPLIT // 2)
    labels[INVALID_ROW] = value
    failed = failures(
        validate(
            {split: write(**{split: {"click": pa.array(labels)}})[split]},
            signature_reading("click"),
            TABLES,
        )
    )
    assert [(f.rule, f.failing_rows) for f in failed] == (
        [] if value == 1 else [("0 or 1", (INVALID_ROW,))]
    )


@pytest.mark.parametrize("label", [0, 1])
def test_split_with_labels_of_one_class_fails(write, label):
    paths = write(train={"click": pa.array([label] * ROWS_PER_SPLIT)})
    (failed,) = failures(validate({"train": paths["train"]}, signature_reading("click"), TABLES))
    assert (failed.rule, failed.observed) == ("label rate strictly between 0 and 1", str(label))
    assert failed.failing_rows == ()


def test_label_rate_outside_the_given_bounds_fails(write):
    paths = {"train": write()["train"]}  # one third are clicks
    assert validate(paths, signature_reading("click"), TABLES, Rules(label_rate=(0.3, 0.4))).success
    (failed,) = failures(
        validate(paths, signature_reading("click"), TABLES, Rules(label_rate=(0.4, 0.5)))
    )
    assert (failed.rule, failed.observed) == ("label rate from 0.4 to 0.5", "0.333333")


def test_ranking_labels_that_are_negative_or_all_zero_fail(write):
    ranking = replace_output(signature_reading("click"), kind="ranking", form="score")

    def rules(labels):
        path = write(train={"click": pa.array(labels)})["train"]
        return [f.rule for f in failures(validate({"train": path}, ranking, TABLES))]

    assert rules([0, 1, 2, 4] * (ROWS_PER_SPLIT // 4)) == []
    assert rules([0, -1, 2, 4] * (ROWS_PER_SPLIT // 4)) == ["at least 0, finite in float32"]
    assert rules([0] * ROWS_PER_SPLIT) == ["some label is above 0"]


def test_split_with_too_few_rows_fails(write, tmp_path):
    short_file = tmp_path / "few.parquet"
    pq.write_table(pa.table(columns("test", rows=99)), short_file)
    (failed,) = failures(validate({"test": short_file}, signature_reading("user"), TABLES))
    assert (failed.column, failed.rule, failed.observed) == (None, "at least 100 row(s)", "99")
    # By default only the test split needs 100 rows.
    assert validate({"train": short_file}, signature_reading("user"), TABLES).success
    assert validate(
        {"test": short_file}, signature_reading("user"), TABLES, Rules(min_rows={"test": 99})
    ).success
    assert not validate(
        {"train": short_file}, signature_reading("user"), TABLES, Rules(min_rows=100)
    ).success


def test_empty_file_fails_and_checks_that_need_rows_are_not_evaluated(tmp_path):
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.table(columns("train")).slice(0, 0), path)
    validation = validate({"train": path}, SIGNATURE, TABLES)
    rows = next(f for f in validation.findings if f.rule == "at least 1 row(s)")
    assert (rows.success, rows.evaluated, rows.observed) == (False, True, "0")
    assert validation.evaluated < validation.intended


def test_missing_column_fails_and_its_other_checks_are_not_evaluated(write):
    validation = validate({"train": write(train={"y": None})["train"]}, SIGNATURE, TABLES)
    failed = failures(validation)
    assert {f.column for f in failed} == {"y"}
    assert [(f.rule, f.observed) for f in failed if f.evaluated] == [
        ("column is there", "no such column")
    ]
    assert validation.intended - validation.evaluated == 3  # of its type, of nulls, of finiteness
    assert {f.observed for f in failed if not f.evaluated} == {
        "not evaluated: the column is missing"
    }


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        (
            "user",
            [1.0] * ROWS_PER_SPLIT,
            "float. Encode it to row numbers of the table and store it as int64",
        ),
        ("user", ["u"] * ROWS_PER_SPLIT, "string. Encode it"),
        ("genres", [1] * ROWS_PER_SPLIT, "integer. Encode it"),
        ("vector", [1.0] * ROWS_PER_SPLIT, "float. Store it as float32"),
        ("at", ["today"] * ROWS_PER_SPLIT, "string. Store a timestamp or a number"),
        ("session", [[1]] * ROWS_PER_SPLIT, "list of integer. Store one plain value a row"),
    ],
)
def test_column_of_a_wrong_type_fails_its_type_check(write, column, values, expected):
    path = write(train={column: pa.array(values)})["train"]
    failed = failures(validate({"train": path}, signature_reading(column), TABLES))
    (type_finding,) = [f for f in failed if f.evaluated]
    assert type_finding.rule.startswith("type is ")
    assert type_finding.observed.startswith(expected)
    assert {f.column for f in failed} == {column}


def test_repeated_column_fails_its_type_check(tmp_path):
    valid = columns("train")
    table = pa.Table.from_arrays([*valid.values(), valid["x"]], [*valid, "x"])
    pq.write_table(table, tmp_path / "twice.parquet")
    failed = failures(validate({"train": tmp_path / "twice.parquet"}, SIGNATURE, TABLES))
    assert failed[0].observed.startswith("there more than once")


def times(split, first):
    """Return the argument of ``write`` that makes the times of a split begin at ``first``."""
    return {split: {"at": pa.array(np.arange(ROWS_PER_SPLIT) + first)}}


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("train", "validation"),
        ("train", "test"),
        ("validation", "test"),
        ("calibration", "test"),
    ],
)
def test_rows_after_the_start_of_a_later_split_fail(write, earlier, later):
    # The last time is one greater than the first time of the later split.
    paths = write(**times(earlier, FIRST_TIME[later] - ROWS_PER_SPLIT + 2))
    validation = validate({k: paths[k] for k in (earlier, later)}, signature_reading("at"), TABLES)
    (failed,) = failures(validation)
    assert (failed.split, failed.column) == (earlier, "at")
    assert failed.rule == f"not later than the start of {later}"
    assert (failed.failing_rows, failed.failing_values) == (
        (ROWS_PER_SPLIT - 1,),
        (str(FIRST_TIME[later] + 1),),
    )


def test_last_time_of_a_split_may_equal_the_first_of_a_later_one(write):
    paths = write(**times("train", 1_000 - ROWS_PER_SPLIT + 1), **times("validation", 1_000))
    two_splits = {"train": paths["train"], "validation": paths["validation"]}
    assert validate(two_splits, signature_reading("at"), TABLES).success


def write_traffic(write, tmp_path, first, **changes):
    """Write valid splits train and test, and a split ``traffic`` without labels."""
    split_columns = {
        **columns("train"),
        "at": pa.array(np.arange(ROWS_PER_SPLIT) + first),
        **changes,
    }
    split_columns.pop("click")
    pq.write_table(pa.table(split_columns), tmp_path / "traffic.parquet")
    valid = write()
    return {
        "train": valid["train"],
        "test": valid["test"],
        "traffic": tmp_path / "traffic.parquet",
    }


def test_split_traffic_is_checked_like_train_except_for_its_label(write, tmp_path):
    validation = validate(write_traffic(write, tmp_path, 1_500), SIGNATURE, TABLES)
    assert validation.success
    checked_columns = {item.column for item in validation.findings if item.split == "traffic"}
    assert checked_columns == {
        item.column for item in validation.findings if item.split == "train"
    } - {"click"}
    invalid = write_traffic(write, tmp_path, 1_500, **with_invalid_value("user", 6))
    (failed,) = failures(validate(invalid, signature_reading("user"), TABLES))
    assert (failed.split, failed.column, failed.failing_rows) == ("traffic", "user", (INVALID_ROW,))


def test_split_traffic_after_the_start_of_test_fails(write, tmp_path):
    paths = write_traffic(write, tmp_path, FIRST_TIME["test"] - ROWS_PER_SPLIT + 2)
    (failed,) = failures(validate(paths, signature_reading("at"), TABLES))
    assert (failed.split, failed.rule) == ("traffic", "not later than the start of test")


def test_calibration_times_may_overlap_validation(write):
    paths = write(**times("calibration", 1_500))
    two_splits = {"calibration": paths["calibration"], "validation": paths["validation"]}
    assert validate(two_splits, signature_reading("at"), TABLES).success


def test_nanoseconds_are_compared_exactly(write):
    """2**60 + 1 cannot be represented in float64, so a comparison in float64 would be wrong."""
    start = 2**60 + 1
    paths = write(**times("train", start - ROWS_PER_SPLIT + 1), **times("test", start))
    two_splits = {"train": paths["train"], "test": paths["test"]}
    assert validate(two_splits, signature_reading("at"), TABLES).success
    paths = write(**times("train", start - ROWS_PER_SPLIT + 2), **times("test", start))
    (failed,) = failures(validate(two_splits, signature_reading("at"), TABLES))
    assert (failed.failing_rows, failed.failing_values) == (
        (ROWS_PER_SPLIT - 1,),
        (str(start + 1),),
    )


def test_failing_timestamps_are_formatted_as_date_and_time(write):
    def at(first):
        return {"at": pa.array([first + dt.timedelta(minutes=i) for i in range(ROWS_PER_SPLIT)])}

    day = dt.datetime(2024, 5, 1)
    paths = write(train=at(day), test=at(day + dt.timedelta(minutes=ROWS_PER_SPLIT - 2)))
    two_splits = {"train": paths["train"], "test": paths["test"]}
    (failed,) = failures(validate(two_splits, signature_reading("at"), TABLES))
    assert failed.failing_values == ("2024-05-01 01:59:00",)


def test_time_of_another_type_than_in_the_test_split_fails_its_type_check(write):
    timestamps = pa.array(np.arange(ROWS_PER_SPLIT), pa.int64()).cast(pa.timestamp("s"))
    paths = write(train={"at": timestamps})
    two_splits = {"train": paths["train"], "test": paths["test"]}
    validation = validate(two_splits, signature_reading("at"), TABLES)
    failed = failures(validation)
    (type_finding,) = [f for f in failed if f.rule.startswith("type")]
    assert (type_finding.split, type_finding.rule) == ("train", "type is integer, as in test")
    assert type_finding.observed.startswith("timestamp.")


def test_finding_counts_all_failing_rows_and_lists_twenty(write):
    ids = [0] * ROWS_PER_SPLIT
    ids[10:60] = [77] * 50
    paths = {"train": write(train={"user": pa.array(ids)})["train"]}
    validation = validate(paths, signature_reading("user"), TABLES)
    (failed,) = failures(validation)
    assert failed.failing_count == 50
    assert failed.failing_rows == tuple(range(10, 30))
    assert failed.failing_values == ("77",) * 20
    # The message lists the first ten.
    message = r"50 of 120 value\(s\) failing, row\(s\) 10 \(77\), .* 19 \(77\) and more\.$"
    with raises_code(DataRefused, "checks_failed", problems=TextMatching(message)):
        refuse_failures(validation)


def test_finding_lists_a_row_with_several_failing_ids_once(write):
    lists = columns("train")["genres"].to_pylist()
    lists[40], lists[90] = [9, 1, 9], [9]
    path = write(train={"genres": pa.array(lists)})["train"]
    (failed,) = failures(validate({"train": path}, signature_reading("genres"), TABLES))
    assert failed.failing_rows == (40, 90)
    assert failed.failing_count == 3


def test_row_numbers_of_findings_continue_through_all_files_of_a_split(write, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(pa.table(columns("train")), folder / "0.parquet")
    second = {**columns("train"), **with_invalid_value("user", 6)}
    pq.write_table(pa.table(second), folder / "1.parquet")
    (failed,) = failures(validate({"train": folder}, signature_reading("user"), TABLES))
    assert failed.failing_rows == (ROWS_PER_SPLIT + INVALID_ROW,)


def test_expectation_that_raises_is_not_evaluated_and_the_data_is_refused(write, monkeypatch):
    """Great Expectations raises when it compares text with numbers.

    The view of a check says which values it reads; ``ROWS``: the values of a column without lists.
    """
    broken = Check(
        "train", "session", "between", ROWS, "ExpectColumnValuesToBeBetween", {"max_value": 3}
    )
    planned = expectations.plan
    monkeypatch.setattr(expectations, "plan", lambda *arguments: [*planned(*arguments), broken])
    validation = validate({"train": write()["train"]}, signature_reading("user"), TABLES)
    assert validation.evaluated == validation.intended - 1
    assert not validation.success
    (failed,) = failures(validation)
    assert not failed.evaluated
    assert "raised inside Great Expectations: Column values, min_value" in failed.observed
    with raises_code(
        DataRefused, "checks_failed", problems=TextMatching("not evaluated did not pass")
    ):
        refuse_failures(validation)


def test_validation_without_checks_is_refused():
    validation = validate({}, SIGNATURE, TABLES)
    assert (validation.success, validation.intended) == (False, 0)
    with raises_code(DataRefused, "checks_missing"):
        refuse_failures(validation)


def test_validation_with_fewer_evaluated_than_planned_checks_is_refused(write):
    valid = validate({"train": write()["train"]}, signature_reading("user"), TABLES)
    with raises_code(
        DataRefused, "checks_failed", problems=TextMatching(r"Only \d+ of \d+ intended")
    ):
        refuse_failures(valid.model_copy(update={"evaluated": valid.intended - 1}))


def test_validate_refuses_an_input_with_an_unknown_table(write):
    with raises_code(DataRefused, "table_unknown", table="genres", tables=("users",)):
        validate({"train": write()["train"]}, SIGNATURE, {"users": 6})


def test_validate_refuses_a_missing_file(tmp_path):
    with raises_code(DataRefused, "parquet_missing", path=str(tmp_path / "nowhere")):
        validate({"train": tmp_path / "nowhere"}, SIGNATURE, TABLES)


@pytest.mark.parametrize(
    ("changes", "code", "fields"),
    [
        ({"min_rows": 0}, "min_rows_not_positive", {}),
        ({"label_rate": (0.6, 0.4)}, "label_rate_order", {"got": (0.6, 0.4)}),
    ],
)
def test_rules_with_invalid_bounds_are_refused(changes, code, fields):
    with raises_value_error(code, **fields):
        Rules(**changes)


def test_column_name_may_contain_any_character(write):
    unusual_name = "<script>alert('a.b')</script>"
    signature = SIGNATURE.model_copy(
        update={"inputs": (IdInput(name="user", columns=(unusual_name,), table="users"),)}
    )
    path = write(train={unusual_name: pa.array([0] * (ROWS_PER_SPLIT - 1) + [7])})["train"]
    (failed,) = failures(validate({"train": path}, signature, TABLES))
    assert (failed.column, failed.failing_rows) == (unusual_name, (ROWS_PER_SPLIT - 1,))


def test_validate_prints_nothing_and_uses_no_network(write, capfd, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with caplog.at_level(logging.DEBUG):
        validate({"train": write(train=with_invalid_value("user", 6))["train"]}, SIGNATURE, TABLES)
    assert capfd.readouterr() == ("", "")
    assert [r for r in caplog.records if r.name.startswith("great_expectations")] == []


def test_example_in_the_docs_passes_all_checks(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    code_block, json_block = (
        text.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "json")
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(code_block, "docs/data.md", "exec"), {})  # noqa: S102
    document = json.loads(json_block)
    signature = Signature.model_validate(document["signature"])
    splits = {split: tmp_path / file for split, file in document["data"].items()}
    validation = validate(splits, signature, {"tables.user": 50, "tables.genre": 4})
    refuse_failures(validation)
    assert prepare(splits["test"], signature, tmp_path).rows == 100
