"""Splits of a retrieval model: rows are joined with the features of their items, or refused.

The catalogue is the split ``items``, with one row per item. The input ``lately`` has the tags of a
user's recent purchases. Prepared tensors that are not inputs have names that begin with "@":
``@bounds/tags`` has the index of each row's first id in ``tags``, and the number of all ids at its
end.
"""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from error_codes import TextMatching, raises_code
from retrieval_draft import SIGNATURE as SIGNATURE_DOCUMENT
from safetensors.numpy import load_file

from compressors.contracts import Output, Signature, Split
from compressors.core.batches import batches
from infra.data.catalogue import prepare, require_items
from infra.data.expectations import Rules, validate
from infra.data.split_statistics import check_ids, split_statistics
from infra.errors import DataRefused

SIGNATURE = Signature.model_validate(SIGNATURE_DOCUMENT)
# Rows of each table.
TABLES = {"of_user.user": 9, "of_user.lately": 6, "of_item.item": 9, "of_item.tags": 6}
LISTS = pa.list_(pa.int64())


def interactions(**changes):
    """Return four rows of a split, with some columns replaced."""
    return {
        "user": pa.array([3, 1, 3, 1]),
        "lately": pa.array([[5], [], [5], []], LISTS),
        "item": pa.array([8, 2, 2, 8]),
    } | changes


def items(**changes):
    """Return a catalogue of three items, with some columns replaced."""
    return {
        "item": pa.array([8, 0, 2]),
        "tags": pa.array([[1, 2, 3], [], [4]], LISTS),
        "d0": pa.array([0.5, 1.5, 2.5]),
        "d1": pa.array([1, 2, 3]),
        "d2": pa.array([1.0, 1.0, 1.0]),
    } | changes


@pytest.fixture
def paths(tmp_path):
    """A function that writes one split and the catalogue, and returns their paths by split name."""

    def write(split="test", catalogue=None, **changes):
        splits = {split: tmp_path / f"{split}.parquet", "items": tmp_path / "items.parquet"}
        pq.write_table(pa.table(interactions(**changes)), splits[split])
        pq.write_table(pa.table(catalogue or items()), splits["items"])
        return splits

    return write


def test_prepare_adds_the_features_of_each_rows_item(paths, tmp_path):
    prepared = prepare(paths(), "test", SIGNATURE, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "data.safetensors")
    assert prepared.rows == 4
    assert set(prepared.tensors) == set(tensors)
    assert tensors["dense"].tolist() == [[0.5, 1, 1], [2.5, 3, 1], [2.5, 3, 1], [0.5, 1, 1]]
    assert tensors["@bounds/tags"].tolist() == [0, 3, 4, 5, 8]
    assert tensors["tags"].tolist() == [1, 2, 3, 4, 4, 1, 2, 3]
    assert tensors["@group"].tolist() == [3, 1, 3, 1]
    assert tensors["@label"].tolist() == [1, 1, 1, 1]  # the signature names no label
    # Each row is a complete input of the model, so batches are read as for any other task.
    split = Split(path=str(tmp_path / "out"), sha256="0" * 64, rows=4)
    (batch,) = batches(split, SIGNATURE, size=9)
    assert batch.inputs["tags_offsets"].tolist() == [0, 3, 4, 5]


def test_prepare_of_the_catalogue_writes_only_inputs_of_the_item_tower(paths, tmp_path):
    prepare(paths(), "items", SIGNATURE, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "data.safetensors")
    assert set(tensors) == {"item", "tags", "@bounds/tags", "dense", "@label"}
    assert tensors["item"].tolist() == [8, 0, 2]


@pytest.mark.parametrize(
    ("split", "changes", "message_pattern"),
    [
        ("test", {"item": pa.array([8, 1, 2, 9])}, r"'item': an item that is not in 'items'.*1, 3"),
        (
            "items",
            {"catalogue": items(item=pa.array([8, 8, 2]))},
            r"'item': an item that is in an earlier row too; 1 value.*row\(s\) 1",
        ),
        (
            "test",
            {"lately": pa.array([[5], [], [4], []], LISTS)},
            r"'lately': differs from the first row of the same user.*row\(s\) 2",
        ),
        (
            "test",
            {"lately": pa.array([[5], [], [5], [1]], LISTS)},
            r"'lately': differs from the first row of the same user.*row\(s\) 3",
        ),
        # Texts would be numbered separately in each split, so groups are integers.
        ("test", {"user": pa.array(["3", "1", "3", "1"])}, "Number the groups the same way"),
    ],
)
def test_unknown_or_repeated_items_and_inconsistent_queries_are_refused_with_their_rows(
    split, changes, message_pattern, paths, tmp_path
):
    with raises_code(DataRefused, "schema_unfit", problems=TextMatching(message_pattern)):
        prepare(paths(**changes), split, SIGNATURE, tmp_path / "out")


def test_training_rows_of_one_user_may_differ_in_query_inputs(paths, tmp_path):
    """The history of a user grows over the training rows; a test query is a single request."""
    splits = paths("train", lately=pa.array([[5], [], [4], [1]], LISTS))
    assert prepare(splits, "train", SIGNATURE, tmp_path / "out").rows == 4


def test_require_items_needs_a_catalogue_exactly_for_retrieval():
    # The last argument is how the error message names the bundle.
    require_items(["test", "items"], SIGNATURE, "it")
    with raises_code(DataRefused, "catalogue_missing", place="it", split="items"):
        require_items(["test"], SIGNATURE, "it")
    clicks = Signature(
        inputs=SIGNATURE.inputs[:1],
        outputs=(Output(name="click", kind="ctr", form="logit", label="click", metric="auc"),),
    )
    require_items(["test"], clicks, "it")
    with raises_code(DataRefused, "catalogue_unexpected", split="items"):
        require_items(["test", "items"], clicks, "it")


def test_check_ids_covers_the_catalogue(paths):
    splits = paths(catalogue=items(tags=pa.array([[1], [6], []], LISTS)))
    statistics = {
        name: split_statistics(path, SIGNATURE.of_split(name)) for name, path in splits.items()
    }
    with raises_code(
        DataRefused,
        "ids_unfit",
        problems=TextMatching("split 'items', input 'tags': id 6 is not in table"),
    ):
        check_ids(statistics, SIGNATURE, TABLES)


def test_validate_checks_each_column_in_the_split_that_contains_it(paths):
    validation = validate(paths(), SIGNATURE, TABLES, Rules(min_rows=1))
    assert validation.success, [item for item in validation.findings if not item.success]
    checked_columns = {(item.split, item.column) for item in validation.findings}
    assert {
        ("items", "d0"),
        ("test", "lately"),
        ("test", "item"),
        ("items", "item"),
    } <= checked_columns
    assert not {("test", "d0"), ("items", "user")} & checked_columns

    repeated_item = paths(catalogue=items(item=pa.array([8, 2, 2])))
    validation = validate(repeated_item, SIGNATURE, TABLES, Rules(min_rows=1))
    (failed,) = [item for item in validation.findings if not item.success]
    assert (failed.split, failed.column, failed.rule) == ("items", "item", "each item once")
