"""Labels of several outputs, and labels with a condition: used only where a column is 1."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from compressors.contracts import IdInput, Output, Signature
from infra.data.expectations import validate
from infra.data.splits import prepare
from infra.errors import DataRefused

SIGNATURE = Signature(
    inputs=(IdInput(name="user", table="user"),),
    outputs=(
        Output(name="click", kind="ctr", form="logit", label="click", metric="auc"),
        Output(
            name="buy",
            kind="ctr",
            form="logit",
            label="bought",
            label_where="click",
            metric="auc",
        ),
        Output(name="stars", kind="ranking", form="score", label="stars", metric="ndcg@10"),
    ),
    group="user",
)
VALID = {
    "user": pa.array([0, 0, 1, 1, 2]),
    "click": pa.array([1, 0, 1, 1, 0]),
    "bought": pa.array([1, None, 0, 1, -1]),  # any value where click is 0
    "stars": pa.array([3.0, 0.0, 1.5, 4.0, 2.0]),
}


@pytest.fixture
def split(tmp_path):
    """A function that writes ``VALID`` with some columns replaced, and returns the file."""

    def write(**changes):
        path = tmp_path / "split.parquet"
        pq.write_table(pa.table({**VALID, **changes}), path)
        return path

    return write


def test_labels_are_columns_and_nan_where_they_are_not_used(split, tmp_path):
    prepare(split(), SIGNATURE, tmp_path / "out")
    label = load_file(tmp_path / "out" / "data.safetensors")["@label"]
    nan = np.nan
    expected = [[1, 1, 3], [0, nan, 0], [1, 0, 1.5], [1, 1, 4], [0, nan, 2]]
    np.testing.assert_array_equal(label, np.float32(expected))


def test_labels_of_one_output_with_a_condition_have_one_dimension(split, tmp_path):
    signature = SIGNATURE.model_copy(update={"outputs": SIGNATURE.outputs[1:2]})
    prepare(split(), signature, tmp_path / "out")
    label = load_file(tmp_path / "out" / "data.safetensors")["@label"]
    np.testing.assert_array_equal(label, np.float32([1, np.nan, 0, 1, np.nan]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bought": pa.array([1, None, None, 1, 0])}, "'bought': null; 1 value(s)"),
        ({"bought": pa.array([1, 0, 3, 1, 7])}, "a ctr label is 0 or 1; 1 value(s)"),
        ({"click": pa.array([1, 2, 1, 1, 0])}, "a condition is 0 or 1; 1 value(s)"),
        ({"click": pa.array([1, None, 1, 1, 0])}, "'click': null"),
        ({"stars": pa.array([3.0, -1.0, 1.5, 4.0, 2.0])}, "'stars': a ranking label is at least 0"),
        ({"bought": pa.array(list("10101"))}, "'bought': the label of 'buy' needs"),
    ],
)  # fmt: skip
def test_used_labels_and_conditions_must_be_valid(changes, message, split, tmp_path):
    with pytest.raises(DataRefused) as caught:
        prepare(split(**changes), SIGNATURE, tmp_path / "out")
    assert message in str(caught.value)


def failed_checks(path):
    """Return column and rule of each failed check; no check may be left out."""
    validation = validate({"train": path}, SIGNATURE, {"user": 3})  # a table of 3 rows
    assert validation.evaluated == validation.intended
    return {(item.column, item.rule) for item in validation.findings if not item.success}


def test_data_checks_read_only_labels_that_are_used(split):
    assert failed_checks(split()) == set()
    where = "(rows where 'click' is 1)"
    assert failed_checks(split(bought=pa.array([1, 0, None, 0, 0]))) == {
        ("bought", f"no null or NaN {where}")
    }
    assert failed_checks(split(bought=pa.array([1, 0, 2, 0, 0]))) >= {("bought", f"0 or 1 {where}")}
    # All labels in rows with a click are 1.
    assert failed_checks(split(bought=pa.array([1, 0, 1, 1, 0]))) == {
        ("bought", f"label rate strictly between 0 and 1 {where}")
    }


def test_data_check_without_the_condition_is_not_evaluated(split, tmp_path):
    table = pq.read_table(split()).drop_columns(["click"])
    pq.write_table(table, tmp_path / "split.parquet")
    validation = validate({"train": tmp_path / "split.parquet"}, SIGNATURE, {"user": 3})
    assert not validation.success
    observed = {item.observed for item in validation.findings if item.column == "bought"}
    assert any("column 'click' is missing" in text for text in observed)
