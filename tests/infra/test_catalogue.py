"""A retrieval model's files as tensors: the catalogue joined to interactions, or refused."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from error_codes import Text, raises_code
from retrieval_draft import SIGNATURE
from safetensors.numpy import load_file

from compressors.contracts import Output, Signature, Split
from compressors.core.batches import batches
from infra.data.catalogue import prepare, require_items
from infra.data.expectations import Rules, validate
from infra.data.splits import check_ids, split_statistics
from infra.errors import DataRefused

SCHEMA = Signature.model_validate(SIGNATURE)
TABLES = {"of_user.user": 9, "of_user.lately": 6, "of_item.item": 9, "of_item.tags": 6}
LISTS = pa.list_(pa.int64())


def interactions(**changes):
    return {
        "user": pa.array([3, 1, 3, 1]),
        "lately": pa.array([[5], [], [5], []], LISTS),
        "item": pa.array([8, 2, 2, 8]),
    } | changes


def items(**changes):
    return {
        "item": pa.array([8, 0, 2]),
        "tags": pa.array([[1, 2, 3], [], [4]], LISTS),
        "d0": pa.array([0.5, 1.5, 2.5]),
        "d1": pa.array([1, 2, 3]),
        "d2": pa.array([1.0, 1.0, 1.0]),
    } | changes


@pytest.fixture
def paths(tmp_path):
    def write(split="test", catalogue=None, **changes):
        found = {split: tmp_path / f"{split}.parquet", "items": tmp_path / "items.parquet"}
        pq.write_table(pa.table(interactions(**changes)), found[split])
        pq.write_table(pa.table(catalogue or items()), found["items"])
        return found

    return write


def test_interactions_get_what_the_catalogue_says_of_their_items(paths, tmp_path):
    found = prepare(paths(), "test", SCHEMA, tmp_path / "out")
    held = load_file(tmp_path / "out" / "data.safetensors")
    assert found.rows == 4
    assert set(found.tensors) == set(held)
    assert held["dense"].tolist() == [[0.5, 1, 1], [2.5, 3, 1], [2.5, 3, 1], [0.5, 1, 1]]
    assert held["@bounds/tags"].tolist() == [0, 3, 4, 5, 8]
    assert held["tags"].tolist() == [1, 2, 3, 4, 4, 1, 2, 3]
    assert held["@group"].tolist() == [3, 1, 3, 1]
    assert held["@label"].tolist() == [1, 1, 1, 1]  # the signature names no label
    # So a row is a whole input of the model, in batches as anywhere else.
    (batch,) = batches(Split(path=str(tmp_path / "out"), sha256="0" * 64, rows=4), SCHEMA, 9)
    assert batch.inputs["tags_offsets"].tolist() == [0, 3, 4, 5]


def test_the_catalogue_itself_has_the_item_towers_inputs_alone(paths, tmp_path):
    prepare(paths(), "items", SCHEMA, tmp_path / "out")
    held = load_file(tmp_path / "out" / "data.safetensors")
    assert set(held) == {"item", "tags", "@bounds/tags", "dense", "@label"}
    assert held["item"].tolist() == [8, 0, 2]


@pytest.mark.parametrize(
    ("split", "changes", "words"),
    [
        ("test", {"item": pa.array([8, 1, 2, 9])}, r"'item': an item that is not in 'items'.*1, 3"),
        (
            "items",
            {"catalogue": items(item=pa.array([8, 8, 2]))},
            r"'item': an item that stands in an earlier row too; 1 value.*row\(s\) 1",
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
        ("test", {"user": pa.array(["3", "1", "3", "1"])}, "Number the groups the same way"),
    ],
)
def test_what_a_ranking_cannot_be_made_of_is_refused_with_its_rows(
    split, changes, words, paths, tmp_path
):
    with raises_code(DataRefused, "schema_unfit", problems=Text(words)):
        prepare(paths(**changes), split, SCHEMA, tmp_path / "out")


def test_what_a_query_sends_may_change_over_the_training_rows(paths, tmp_path):
    """A history grows while a model learns; only a test query is one request."""
    found = paths("train", lately=pa.array([[5], [], [4], [1]], LISTS))
    assert prepare(found, "train", SCHEMA, tmp_path / "out").rows == 4


def test_a_catalogue_is_needed_by_retrieval_and_by_nothing_else():
    require_items(["test", "items"], SCHEMA, "it")
    with raises_code(DataRefused, "catalogue_missing", place="it", split="items"):
        require_items(["test"], SCHEMA, "it")
    clicks = Signature(
        inputs=SCHEMA.inputs[:1],
        outputs=(Output(name="click", kind="ctr", form="logit", label="click", metric="auc"),),
    )
    require_items(["test"], clicks, "it")
    with raises_code(DataRefused, "catalogue_unexpected", split="items"):
        require_items(["test", "items"], clicks, "it")


def test_ids_are_checked_in_the_file_that_has_them(paths):
    found = paths(catalogue=items(tags=pa.array([[1], [6], []], LISTS)))
    facts = {name: split_statistics(path, SCHEMA.of_split(name)) for name, path in found.items()}
    with raises_code(
        DataRefused,
        "ids_unfit",
        problems=Text("split 'items', input 'tags': id 6 is not in table"),
    ):
        check_ids(facts, SCHEMA, TABLES)


def test_every_file_is_validated_by_what_it_holds(paths):
    held = validate(paths(), SCHEMA, TABLES, Rules(min_rows=1))
    assert held.success, [item for item in held.findings if not item.success]
    looked_at = {(item.split, item.column) for item in held.findings}
    assert {("items", "d0"), ("test", "lately"), ("test", "item"), ("items", "item")} <= looked_at
    assert not {("test", "d0"), ("items", "user")} & looked_at

    twice = paths(catalogue=items(item=pa.array([8, 2, 2])))
    held = validate(twice, SCHEMA, TABLES, Rules(min_rows=1))
    (failed,) = [item for item in held.findings if not item.success]
    assert (failed.split, failed.column, failed.rule) == ("items", "item", "each item once")
