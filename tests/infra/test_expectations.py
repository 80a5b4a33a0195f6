import datetime as dt
import json
import logging
import socket
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from error_codes import Text, raises_code, raises_value_error
from signatures import with_output

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
SCHEMA = Signature(
    inputs=INPUTS,
    outputs=(Output(name="click", kind="ctr", form="logit", label="click", metric="gauc"),),
    group="session",
    time="at",
)


def narrow(column):
    """The signature with the inputs that read one column, or the first: suites run faster."""
    kept = tuple(item for item in INPUTS if column in item.columns) or INPUTS[:1]
    return SCHEMA.model_copy(update={"inputs": kept})


TABLES = {"users": 6, "genres": 8}
ROW = 17  # where violations are planted
N = 120
BEGIN = {"train": 0, "calibration": 60, "validation": 1_000, "test": 2_000}


def columns(split, rows=N):
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
        "at": pa.array(count + BEGIN[split]),
    }


@pytest.fixture
def write(tmp_path):
    def to_files(**changes):
        """Good splits; ``test={"user": column}`` replaces a column of one of them."""
        paths = {}
        for split in BEGIN:
            made = {**columns(split), **changes.get(split, {})}
            table = pa.table({k: v for k, v in made.items() if v is not None})
            paths[split] = tmp_path / f"{split}.parquet"
            pq.write_table(table, paths[split], row_group_size=50)
        return paths

    return to_files


def planted(name, value, row=ROW, split="train"):
    """A good column with one other value; its type follows the good values."""
    good = columns(split)[name]
    values = good.to_pylist()
    values[row] = value
    return {name: pa.array(values, good.type)}


def failures(validation):
    return [found for found in validation.findings if not found.success]


def test_good_data_passes_every_check(write):
    validation = validate(write(), SCHEMA, TABLES)
    assert failures(validation) == []
    assert validation.success
    assert validation.evaluated == validation.intended == len(validation.findings)
    assert {found.split for found in validation.findings} == set(BEGIN)
    refuse_failures(validation)


PLANTED = [
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
    ("split", "column", "value", "rule", "shown"),
    PLANTED,
    ids=[f"{case[0]}-{case[1]}-{case[3]}" for case in PLANTED],
)
def test_a_planted_violation_fails_its_rule_and_no_other(write, split, column, value, rule, shown):
    paths = write(**{split: planted(column, value, split=split)})
    validation = validate({split: paths[split]}, narrow(column), TABLES)
    assert [(f.column, f.rule) for f in failures(validation)] == [(column, rule)]
    (failed,) = failures(validation)
    assert (failed.failing_rows, failed.failing_values) == ((ROW,), (shown,))
    assert failed.failing_count == 1
    assert validation.evaluated == validation.intended
    assert not validation.success
    message = f"split '{split}', column '{column}': needs {rule}; found 1 of "
    with raises_code(DataRefused, "checks_failed") as caught:
        refuse_failures(validation)
    (problem,) = caught.value.fields["problems"]
    assert message in problem
    assert f"row(s) {ROW} ({shown})." in problem


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("column", ["seen", "history"])
def test_unseen_ids_pass_where_the_policy_covers_them(write, split, column):
    paths = write(**{split: planted(column, 999 if column == "seen" else [999], split=split)})
    assert validate({split: paths[split]}, narrow(column), TABLES).success


@pytest.mark.parametrize(
    ("value", "split"), [(2, "train"), (-1, "test"), (1, "train")], ids=["2", "-1", "good"]
)
def test_a_click_is_zero_or_one(write, value, split):
    labels = [0, 1] * (N // 2)
    labels[ROW] = value
    found = failures(
        validate(
            {split: write(**{split: {"click": pa.array(labels)}})[split]}, narrow("click"), TABLES
        )
    )
    assert [(f.rule, f.failing_rows) for f in found] == ([] if value == 1 else [("0 or 1", (ROW,))])


@pytest.mark.parametrize("label", [0, 1])
def test_a_split_of_one_class_fails(write, label):
    paths = write(train={"click": pa.array([label] * N)})
    (failed,) = failures(validate({"train": paths["train"]}, narrow("click"), TABLES))
    assert (failed.rule, failed.observed) == ("label rate strictly between 0 and 1", str(label))
    assert failed.failing_rows == ()


def test_the_label_rate_keeps_to_given_bounds(write):
    paths = {"train": write()["train"]}  # one third are clicks
    assert validate(paths, narrow("click"), TABLES, Rules(label_rate=(0.3, 0.4))).success
    (failed,) = failures(validate(paths, narrow("click"), TABLES, Rules(label_rate=(0.4, 0.5))))
    assert (failed.rule, failed.observed) == ("label rate from 0.4 to 0.5", "0.333333")


def test_ranking_labels_are_grades_and_not_all_zero(write):
    ranking = with_output(narrow("click"), kind="ranking", form="score")

    def rules(labels):
        path = write(train={"click": pa.array(labels)})["train"]
        return [f.rule for f in failures(validate({"train": path}, ranking, TABLES))]

    assert rules([0, 1, 2, 4] * (N // 4)) == []
    assert rules([0, -1, 2, 4] * (N // 4)) == ["at least 0, finite in float32"]
    assert rules([0] * N) == ["some label is above 0"]


def test_too_few_rows_fail(write, tmp_path):
    few = tmp_path / "few.parquet"
    pq.write_table(pa.table(columns("test", rows=99)), few)
    (failed,) = failures(validate({"test": few}, narrow("user"), TABLES))
    assert (failed.column, failed.rule, failed.observed) == (None, "at least 100 row(s)", "99")
    assert validate({"train": few}, narrow("user"), TABLES).success
    assert validate({"test": few}, narrow("user"), TABLES, Rules(min_rows={"test": 99})).success
    assert not validate({"train": few}, narrow("user"), TABLES, Rules(min_rows=100)).success


def test_an_empty_file_fails_and_what_needs_rows_is_not_evaluated(tmp_path):
    path = tmp_path / "empty.parquet"
    pq.write_table(pa.table(columns("train")).slice(0, 0), path)
    validation = validate({"train": path}, SCHEMA, TABLES)
    rows = next(f for f in validation.findings if f.rule == "at least 1 row(s)")
    assert (rows.success, rows.evaluated, rows.observed) == (False, True, "0")
    assert validation.evaluated < validation.intended


def test_a_missing_column_is_named_and_its_other_checks_did_not_pass(write):
    validation = validate({"train": write(train={"y": None})["train"]}, SCHEMA, TABLES)
    failed = failures(validation)
    assert {f.column for f in failed} == {"y"}
    assert [(f.rule, f.observed) for f in failed if f.evaluated] == [
        ("column is there", "no such column")
    ]
    assert validation.intended - validation.evaluated == 3
    assert {f.observed for f in failed if not f.evaluated} == {
        "not evaluated: the column is missing"
    }


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("user", [1.0] * N, "float. Encode it to row numbers of the table and store it as int64"),
        ("user", ["u"] * N, "string. Encode it"),
        ("genres", [1] * N, "integer. Encode it"),
        ("vector", [1.0] * N, "float. Store it as float32"),
        ("at", ["today"] * N, "string. Store a timestamp or a number"),
        ("session", [[1]] * N, "list of integer. Store one plain value a row"),
    ],
)
def test_a_wrong_type_fails_its_type_check(write, column, values, expected):
    path = write(train={column: pa.array(values)})["train"]
    failed = failures(validate({"train": path}, narrow(column), TABLES))
    (typed,) = [f for f in failed if f.evaluated]
    assert typed.rule.startswith("type is ")
    assert typed.observed.startswith(expected)
    assert {f.column for f in failed} == {column}


def test_a_column_twice_fails_its_type_check(tmp_path):
    good = columns("train")
    table = pa.Table.from_arrays([*good.values(), good["x"]], [*good, "x"])
    pq.write_table(table, tmp_path / "twice.parquet")
    failed = failures(validate({"train": tmp_path / "twice.parquet"}, SCHEMA, TABLES))
    assert failed[0].observed.startswith("there more than once")


def times(split, first):
    return {split: {"at": pa.array(np.arange(N) + first)}}


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
    paths = write(**times(earlier, BEGIN[later] - N + 2))  # reaches one moment too far
    validation = validate({k: paths[k] for k in (earlier, later)}, narrow("at"), TABLES)
    (failed,) = failures(validation)
    assert (failed.split, failed.column) == (earlier, "at")
    assert failed.rule == f"not later than the start of {later}"
    assert (failed.failing_rows, failed.failing_values) == ((N - 1,), (str(BEGIN[later] + 1),))


def test_the_boundary_moment_may_be_shared(write):
    paths = write(**times("train", 1_000 - N + 1), **times("validation", 1_000))
    pair = {"train": paths["train"], "validation": paths["validation"]}
    assert validate(pair, narrow("at"), TABLES).success


def traffic(write, tmp_path, first, **changes):
    """Good training and test rows, and rows of traffic without the column of labels."""
    made = {**columns("train"), "at": pa.array(np.arange(N) + first), **changes}
    made.pop("click")
    pq.write_table(pa.table(made), tmp_path / "traffic.parquet")
    good = write()
    return {
        "train": good["train"],
        "test": good["test"],
        "traffic": tmp_path / "traffic.parquet",
    }


def test_traffic_needs_no_label_and_all_else(write, tmp_path):
    found = validate(traffic(write, tmp_path, 1_500), SCHEMA, TABLES)
    assert found.success
    looked_at = {one.column for one in found.findings if one.split == "traffic"}
    assert looked_at == {one.column for one in found.findings if one.split == "train"} - {"click"}
    bad = traffic(write, tmp_path, 1_500, **planted("user", 6))
    (failed,) = failures(validate(bad, narrow("user"), TABLES))
    assert (failed.split, failed.column, failed.failing_rows) == ("traffic", "user", (ROW,))


def test_traffic_ends_before_the_test_rows_begin(write, tmp_path):
    paths = traffic(write, tmp_path, BEGIN["test"] - N + 2)
    (failed,) = failures(validate(paths, narrow("at"), TABLES))
    assert (failed.split, failed.rule) == ("traffic", "not later than the start of test")


def test_calibration_may_lie_inside_validation(write):
    paths = write(**times("calibration", 1_500))
    pair = {"calibration": paths["calibration"], "validation": paths["validation"]}
    assert validate(pair, narrow("at"), TABLES).success


def test_nanoseconds_are_compared_exactly(write):
    """2**60 + 1 is no float64: bounds that went through floats would call it a leak or miss it."""
    start = 2**60 + 1
    paths = write(**times("train", start - N + 1), **times("test", start))
    pair = {"train": paths["train"], "test": paths["test"]}
    assert validate(pair, narrow("at"), TABLES).success
    paths = write(**times("train", start - N + 2), **times("test", start))
    (failed,) = failures(validate(pair, narrow("at"), TABLES))
    assert (failed.failing_rows, failed.failing_values) == ((N - 1,), (str(start + 1),))


def test_moments_are_shown_as_people_write_them(write):
    def at(first):
        return {"at": pa.array([first + dt.timedelta(minutes=i) for i in range(N)])}

    day = dt.datetime(2024, 5, 1)
    paths = write(train=at(day), test=at(day + dt.timedelta(minutes=N - 2)))
    pair = {"train": paths["train"], "test": paths["test"]}
    (failed,) = failures(validate(pair, narrow("at"), TABLES))
    assert failed.failing_values == ("2024-05-01 01:59:00",)


def test_splits_that_keep_time_in_different_types_cannot_be_compared(write):
    moments = pa.array(np.arange(N), pa.int64()).cast(pa.timestamp("s"))
    paths = write(train={"at": moments})
    pair = {"train": paths["train"], "test": paths["test"]}
    validation = validate(pair, narrow("at"), TABLES)
    failed = failures(validation)
    (typed,) = [f for f in failed if f.rule.startswith("type")]
    assert (typed.split, typed.rule) == ("train", "type is integer, as in test")
    assert typed.observed.startswith("timestamp.")


def test_many_failing_rows_are_counted_and_twenty_are_named(write):
    ids = [0] * N
    ids[10:60] = [77] * 50
    paths = {"train": write(train={"user": pa.array(ids)})["train"]}
    validation = validate(paths, narrow("user"), TABLES)
    (failed,) = failures(validation)
    assert failed.failing_count == 50
    assert failed.failing_rows == tuple(range(10, 30))
    assert failed.failing_values == ("77",) * 20
    shown = r"50 of 120 value\(s\) failing, row\(s\) 10 \(77\), .* 19 \(77\) and more\.$"
    with raises_code(DataRefused, "checks_failed", problems=Text(shown)):
        refuse_failures(validation)


def test_bag_failures_name_parquet_rows_once(write):
    lists = columns("train")["genres"].to_pylist()
    lists[40], lists[90] = [9, 1, 9], [9]
    path = write(train={"genres": pa.array(lists)})["train"]
    (failed,) = failures(validate({"train": path}, narrow("genres"), TABLES))
    assert failed.failing_rows == (40, 90)
    assert failed.failing_count == 3


def test_part_files_are_counted_through(write, tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    pq.write_table(pa.table(columns("train")), folder / "0.parquet")
    second = {**columns("train"), **planted("user", 6)}
    pq.write_table(pa.table(second), folder / "1.parquet")
    (failed,) = failures(validate({"train": folder}, narrow("user"), TABLES))
    assert failed.failing_rows == (N + ROW,)


def test_an_expectation_that_raises_is_not_evaluated_and_refused(write, monkeypatch):
    """Comparing text with numbers raises inside Great Expectations."""
    broken = Check(
        "train", "session", "between", ROWS, "ExpectColumnValuesToBeBetween", {"max_value": 3}
    )
    real = expectations.plan
    monkeypatch.setattr(expectations, "plan", lambda *given: [*real(*given), broken])
    validation = validate({"train": write()["train"]}, narrow("user"), TABLES)
    assert validation.evaluated == validation.intended - 1
    assert not validation.success
    (failed,) = failures(validation)
    assert not failed.evaluated
    assert "raised inside Great Expectations: Column values, min_value" in failed.observed
    with raises_code(DataRefused, "checks_failed", problems=Text("not evaluated did not pass")):
        refuse_failures(validation)


def test_nothing_intended_is_refused():
    validation = validate({}, SCHEMA, TABLES)
    assert (validation.success, validation.intended) == (False, 0)
    with raises_code(DataRefused, "checks_missing"):
        refuse_failures(validation)


def test_fewer_evaluated_than_intended_is_refused_even_if_none_failed(write):
    good = validate({"train": write()["train"]}, narrow("user"), TABLES)
    with raises_code(DataRefused, "checks_failed", problems=Text(r"Only \d+ of \d+ intended")):
        refuse_failures(good.model_copy(update={"evaluated": good.intended - 1}))


def test_an_unknown_table_is_refused(write):
    with raises_code(DataRefused, "table_unknown", table="genres", tables=("users",)):
        validate({"train": write()["train"]}, SCHEMA, {"users": 6})


def test_an_unreadable_file_is_refused(tmp_path):
    with raises_code(DataRefused, "parquet_missing", path=str(tmp_path / "nowhere")):
        validate({"train": tmp_path / "nowhere"}, SCHEMA, TABLES)


@pytest.mark.parametrize(
    ("wrong", "code", "fields"),
    [
        ({"min_rows": 0}, "min_rows_not_positive", {}),
        ({"label_rate": (0.6, 0.4)}, "label_rate_order", {"got": (0.6, 0.4)}),
    ],
)
def test_rules_with_invalid_bounds_are_refused(wrong, code, fields):
    with raises_value_error(code, **fields):
        Rules(**wrong)


def test_column_names_may_hold_anything(write):
    odd = "<script>alert('a.b')</script>"
    signature = SCHEMA.model_copy(
        update={"inputs": (IdInput(name="user", columns=(odd,), table="users"),)}
    )
    path = write(train={odd: pa.array([0] * (N - 1) + [7])})["train"]
    (failed,) = failures(validate({"train": path}, signature, TABLES))
    assert (failed.column, failed.failing_rows) == (odd, (N - 1,))


def test_it_is_quiet_and_reaches_for_no_network(write, capfd, caplog, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with caplog.at_level(logging.DEBUG):
        validate({"train": write(train=planted("user", 6))["train"]}, SCHEMA, TABLES)
    assert capfd.readouterr() == ("", "")
    assert [r for r in caplog.records if r.name.startswith("great_expectations")] == []


def test_the_example_in_the_docs_passes_as_it_stands(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    program, described = (
        text.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "json")
    )
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "docs/data.md", "exec"), {})  # noqa: S102
    draft = json.loads(described)
    signature = Signature.model_validate(draft["signature"])
    splits = {split: tmp_path / file for split, file in draft["data"].items()}
    validation = validate(splits, signature, {"tables.user": 50, "tables.genre": 4})
    refuse_failures(validation)
    assert prepare(splits["test"], signature, tmp_path).rows == 100
