"""Data of matrices, bounded integers and fields of joined tables: tensors and checks.

A matrix input has several inputs, its fields, as columns of one tensor. A joined table has the rows
of several id columns; the ``offset`` of a column is added to its ids. The policy of an input
(``out_of_range``) says what replaces ids out of range.

The signature is that of ``tests/field_draft.py``: ``joined`` has the rows of 900 users and 600
items, ``brand`` has 50 rows, and positions are 1 to 10.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from error_codes import raises_code
from field_draft import CONFIG, SIGNATURE, TABLES, draw_columns
from safetensors.numpy import load_file

from compressors.contracts import Signature
from infra.data.expectations import validate
from infra.data.split_statistics import check_ids, split_statistics
from infra.data.splits import FILE, prepare
from infra.errors import DataRefused

FIELDS = Signature.model_validate(SIGNATURE)
ROWS = 120  # validation requires at least 100 test rows


@pytest.fixture
def split(tmp_path):
    """A function that writes valid rows with some columns replaced, and returns the file."""

    def write(**replaced):
        rng = np.random.default_rng(0)
        clicks = {"click": pa.array(np.arange(ROWS) % 2)}
        table = pa.table(draw_columns(ROWS, rng) | clicks | replaced)
        pq.write_table(table, tmp_path / "split.parquet")
        return tmp_path / "split.parquet"

    return write


def with_first(value, dtype=np.int64):
    """Return a column that has ``value`` in its first row and 1 in the others."""
    column = np.ones(ROWS, dtype)
    column[0] = value
    return pa.array(column)


def test_fields_of_a_matrix_are_stored_as_inputs_of_their_kind(split, tmp_path):
    parquet = split()
    prepare(parquet, FIELDS, tmp_path / "out")
    tensors, columns = load_file(tmp_path / "out" / FILE), pq.read_table(parquet)
    assert set(tensors) == {"ids", "brand", "tags", "numbers", "position", "@label"}
    assert tensors["ids"].tolist() == list(
        map(list, zip(columns["user"].to_pylist(), columns["item"].to_pylist(), strict=True))
    )
    assert tensors["brand"].dtype == np.int64
    assert tensors["tags"].shape == (ROWS, CONFIG["longest"])
    assert tensors["numbers"].dtype == np.float32
    assert tensors["position"].tolist() == columns["position"].to_pylist()


def test_check_ids_accepts_valid_integers(split):
    check_ids({"train": split_statistics(split(), FIELDS)}, FIELDS, TABLES)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        # Ids of items are 0 to 599; a check against all rows of the joined table would accept 600.
        ("item", 600, "column 'item': id 600 is not in table 'joined' of 1500 rows (0 to 599)"),
        ("user", -1, "column 'user': id -1 is not in table 'joined' of 1500 rows (0 to 899)"),
        ("position", 11, "input 'position': value 11 is not from 1 to 10"),
        ("brand", 50, "input 'brand': id 50 is not in table 'brand' of 50 rows (0 to 49)"),
    ],
)
def test_integer_out_of_range_in_training_data_is_refused(split, column, value, expected):
    parquet = split(**{column: with_first(value)})
    statistics = {"train": split_statistics(parquet, FIELDS)}
    with raises_code(DataRefused, "ids_unfit") as caught:
        check_ids(statistics, FIELDS, TABLES)
    (problem,) = caught.value.fields["problems"]
    assert expected in problem
    validation = validate({"train": parquet}, FIELDS, TABLES)
    failed = [finding for finding in validation.findings if not finding.success]
    assert [(finding.column, finding.failing_rows) for finding in failed] == [(column, (0,))]


def test_test_data_may_have_integers_out_of_range_if_the_policy_replaces_them(split):
    parquet = split(item=with_first(600))  # the policy of "ids" is default_row
    check_ids({"test": split_statistics(parquet, FIELDS)}, FIELDS, TABLES)
    assert validate({"test": parquet}, FIELDS, TABLES).success


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"rows": 600, "offset": 901}, "rows 901 to 1500 are not in table 'joined' of 1500 rows"),
        ({"rows": 600, "offset": -1}, "rows -1 to 598 are not in table"),
        ({"rows": 600, "first": 1, "default_row": 0}, "default_row 0 is not one of its ids"),
    ],
)
def test_field_outside_its_table_is_refused(field, expected):
    document = json.loads(json.dumps(SIGNATURE))
    document["inputs"][0]["fields"][1] = field  # that of the items
    with raises_code(DataRefused, "ids_unfit") as caught:
        check_ids({}, Signature.model_validate(document), TABLES)
    assert any(expected in problem for problem in caught.value.fields["problems"])


def test_float_matrix_with_ids_that_float32_cannot_represent_is_refused():
    big = 2**24 + 2
    with raises_code(DataRefused, "ids_unfit") as caught:
        check_ids({}, FIELDS, TABLES | {"brand": big})
    (problem,) = caught.value.fields["problems"]
    assert f"matrix 'matrix', field 'brand': id {big - 1} is not exact in float32" in problem
