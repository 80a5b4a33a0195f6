"""Input kinds: their shapes and columns, their valid integers, and settings that are refused.

The fields of a matrix are the inputs that it contains. A field of an id input (``IdField``) is the
part of the table that one of its columns looks up. A key identifies items and enters no tower.
"""

import pytest
from error_codes import raises_value_error

from compressors.contracts import (
    DenseInput,
    IdField,
    IdInput,
    IntegerInput,
    JaggedBag,
    KeyInput,
    MatrixInput,
    Output,
    PaddedBag,
    Signature,
    ValueRange,
    all_tables,
    value_ranges,
)

ROWS = {"user": 40, "item": 30, "small": 5}
USER = IdInput(name="user", table="user")
POSITION = IntegerInput(name="position", low=1, high=10)
PRICES = DenseInput(name="prices", columns=("price", "discount"), shape=(2,))
TAGS = PaddedBag(name="tags", table="small", shape=(3,))
MATRIX = MatrixInput(name="x", fields=(USER, TAGS, PRICES, POSITION))
CLICK = Output(name="click", kind="ctr", form="logit", label="click", metric="auc")


def test_matrix_has_the_columns_width_and_tables_of_its_fields():
    assert MATRIX.columns == ("user", "tags", "price", "discount", "position")
    assert MATRIX.shape == (1 + 3 + 2 + 1,)
    assert all_tables(MATRIX) == ("user", "small")


def test_signature_lists_the_fields_of_a_matrix_as_inputs_of_the_data():
    signature = Signature(inputs=(IdInput(name="item", table="item"), MATRIX), outputs=(CLICK,))
    assert [item.name for item in signature.inputs] == ["item", "x"]
    assert [item.name for item in signature.data_inputs] == [
        "item",
        "user",
        "tags",
        "prices",
        "position",
    ]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (USER, (ValueRange(0, 39, 0),)),
        (IdInput(name="a", table="user", default_row=3), (ValueRange(0, 39, 3),)),
        # An id that is looked up in two tables must be a row of the smaller.
        (IdInput(name="a", table="user", more_tables=("small",)), (ValueRange(0, 4, 0),)),
        (JaggedBag(name="a", table="item", shape=(9,)), (ValueRange(0, 29, 0),)),
        (POSITION, (ValueRange(1, 10),)),
        (
            IdInput(
                name="a",
                table="user",
                columns=("b", "c"),
                shape=(2,),
                fields=(IdField(rows=8), IdField(rows=32, first=8, default_row=9)),
            ),
            (ValueRange(0, 7, 0), ValueRange(8, 39, 9)),
        ),
    ],
)
def test_valid_integers_are_the_rows_of_the_table_or_field_or_the_declared_bounds(item, expected):
    assert value_ranges(item, ROWS) == expected


def test_id_input_with_another_number_of_fields_than_columns_is_refused():
    with raises_value_error("id_fields_count", name="a", columns=2, fields=1):
        IdInput(name="a", columns=("b", "c"), shape=(2,), table="t", fields=(IdField(rows=3),))


def test_integer_input_with_low_above_high_is_refused():
    with raises_value_error("integer_bounds", low=3, high=2):
        IntegerInput(name="a", low=3, high=2)


def test_matrix_of_integers_with_a_field_of_floats_is_refused():
    with raises_value_error("matrix_floats", fields=("prices",)):
        MatrixInput(name="x", dtype="int64", fields=(USER, PRICES))


def test_field_of_a_matrix_with_the_name_of_another_input_is_refused():
    with raises_value_error("inputs_repeated", names=("user",)):
        Signature(inputs=(USER, MATRIX), outputs=(CLICK,))


def test_key_is_refused_for_a_task_without_a_catalogue():
    with raises_value_error("keys_unexpected", keys=("sku",), task="ctr"):
        Signature(inputs=(USER, KeyInput(name="sku")), outputs=(CLICK,))


TOWERS = {
    "query": {"module": "query", "inputs": ["user"]},
    "item": {"module": "item", "inputs": ["prices"]},
}
RECALL = {"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}


def retrieval_signature(item, *keys):
    """Return a retrieval signature with these keys, whose item input is named ``item``."""
    return Signature.model_validate(
        {
            "inputs": (USER, PRICES, *keys),
            "outputs": (RECALL,),
            "group": "user",
            "item": item,
            "towers": TOWERS,
        }
    )


def test_key_identifies_items_and_is_in_the_data_of_every_split_but_no_model_input():
    signature = retrieval_signature("sku", KeyInput(name="sku"))
    assert [item.name for item in signature.model_inputs] == ["user", "prices"]
    assert [item.name for item in signature.of_split("items").inputs] == ["prices", "sku"]
    assert [item.name for item in signature.of_split("test").inputs] == ["user", "sku"]


def test_key_that_is_not_the_item_is_refused():
    with raises_value_error("keys_unused", keys=("sku", "ean"), item="sku"):
        retrieval_signature("sku", KeyInput(name="sku"), KeyInput(name="ean"))
    with raises_value_error("item_not_in_tower", item="user"):
        retrieval_signature("user")
