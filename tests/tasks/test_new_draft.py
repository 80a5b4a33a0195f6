"""Drafts that are derived from networks and data, compared with drafts that are written by hand.

A draft written by hand gives the class, its arguments, the weights and the data. The new draft must
have the same signature, except where the difference is a choice of the user. A draft is the folder
of a bundle before it is packed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import field_draft
import multi_task_draft
import pandas as pd
import pytest
import retrieval_draft
import sequence_draft
from error_codes import TextMatching, raises_code
from shop_data import write_shop_data

from compressors.contracts import Signature
from compressors.errors.inspection import InspectionFailed
from infra.errors import BundleRefused, DraftRefused
from tasks.bundles.draft_request import DraftRequest, label_candidates, read_rows
from tasks.bundles.new_draft import new_draft
from tasks.bundles.packing import pack

MODELS = "new_draft_models"


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow the modules of the tests' networks."""
    modules = (MODELS, "sequence_network", "field_network", "multi_task_network")
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ",".join(modules))


@pytest.fixture(autouse=True)
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import ``MODELS`` again in each test, because constructors are recorded during an import."""
    monkeypatch.delitem(sys.modules, MODELS, raising=False)


def request(work_folder: Path, handwritten: Path, **options: Any) -> DraftRequest:
    """Return a request with the class, weights and data of a hand-written draft."""
    architecture = json.loads((handwritten / "model.json").read_text())["network"]["architecture"]
    return DraftRequest(
        folder=work_folder,
        model=architecture["path"],
        config=json.dumps(architecture["config"]),
        weights=handwritten / "model.safetensors",
        data=handwritten,
        **{"labels": {"click": "click"}, **options},
    )


def signature_of(work_folder: Path) -> dict[str, Any]:
    """Return the signature in ``model.json``."""
    signature: dict[str, Any] = json.loads((work_folder / "model.json").read_text())["signature"]
    return signature


def parsed(signature: dict[str, Any]) -> Signature:
    """Return a signature with the defaults of all fields."""
    return Signature.model_validate(signature)


def without_policies(item: dict[str, Any]) -> dict[str, Any]:
    """Return an input without what happens to ids out of range, which the user chooses."""
    fields = [without_policies(part) for part in item.get("fields", [])]
    result = {k: v for k, v in item.items() if k not in ("out_of_range", "default_row", "fields")}
    return {**result, "fields": fields} if fields else result


def test_draft_with_sequences_equals_the_hand_written_one(work_folder: Path) -> None:
    handwritten = sequence_draft.write_sequence_draft(work_folder / "written")
    inputs = {"category_count": ("lengths(categories)",)}
    new_draft(request(work_folder / "new", handwritten, inputs=inputs))
    expected = [without_policies(item) for item in signature_of(handwritten)["inputs"]]
    expected_signature = {**signature_of(handwritten), "inputs": expected}
    assert parsed(signature_of(work_folder / "new")) == parsed(expected_signature)
    assert pack(work_folder / "new").tables == pack(handwritten).tables


def test_draft_with_a_matrix_and_a_joined_table_equals_the_hand_written_one(
    work_folder: Path,
) -> None:
    """A joined table has the rows of several id columns; a matrix has several inputs as columns."""
    handwritten = field_draft.write_field_draft(work_folder / "written")
    inputs = {"ids": ("user", "item"), "matrix": ("brand", "tags", "price", "age")}
    new_draft(request(work_folder / "new", handwritten, inputs=inputs))
    expected = [without_policies(item) for item in signature_of(handwritten)["inputs"]]
    # Two tables read the input "ids"; either of them may be listed first.
    expected[0]["more_tables"], expected[0]["table"] = ["joined"], "wide"
    *ids_and_tags, _ = expected[1]["fields"]
    numbers = [{"kind": "dense", "name": name, "shape": [1]} for name in ("price", "age")]
    expected[1]["fields"] = [*ids_and_tags, *numbers]
    derived = signature_of(work_folder / "new")["inputs"]
    if derived[0]["table"] == "joined":
        expected[0]["more_tables"], expected[0]["table"] = ["wide"], "joined"
    assert derived == expected
    pack(work_folder / "new")


@pytest.mark.parametrize("returns", ["tuple", "mapping", "tensor"])
def test_draft_with_several_outputs_has_those_with_labels(work_folder: Path, returns: str) -> None:
    handwritten = multi_task_draft.write_multi_task_draft(work_folder / "written", returns=returns)
    labels = {"click": "click", "like": "liked", "buy": "bought"}
    inputs = {"price": ("price", "age")}
    if returns == "mapping":
        del labels["like"]
    new_draft(request(work_folder / "new", handwritten, labels=labels, inputs=inputs))
    # Not derived: the rows whose label counts (``label_where``), and the weight of the loss.
    expected = [
        {k: v for k, v in output.items() if k not in ("label_where", "loss_weight")}
        for output in signature_of(handwritten)["outputs"]
        if output["name"] in labels
    ]
    derived = signature_of(work_folder / "new")["outputs"]
    assert sorted(derived, key=str) == sorted(expected, key=str)


def towers_request(work_folder: Path, **options: Any) -> DraftRequest:
    """Return a request for a retrieval model, whose data has a catalogue (the split ``items``)."""
    handwritten = work_folder / "written"
    if not handwritten.exists():
        retrieval_draft.write_retrieval_draft(handwritten)
    towers = {"query_tower": "of_user", "item_tower": "of_item", "group": "user"}
    dense = {"dense": ("d*",)}
    return request(
        work_folder / "new", handwritten, **{"labels": {}, "inputs": dense, **towers, **options}
    )


def content_request(work_folder: Path, **options: Any) -> DraftRequest:
    """Return the same request for ``ContentTowers``, whose towers are methods."""
    changes = {"model": f"{MODELS}:content_towers", "weights": None, "inputs": {}, **options}
    return towers_request(work_folder).model_copy(update=changes)


def test_draft_with_towers_equals_the_hand_written_one(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "draft_network")
    created = new_draft(towers_request(work_folder))
    assert created.draft.signature == parsed(retrieval_draft.SIGNATURE)
    assert created.draft.data.keys() == {"train", "validation", "test", "items"}
    assert pack(work_folder / "new").rows["items"] == retrieval_draft.ITEMS


def test_item_of_a_tower_without_ids_is_identified_by_a_key(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key is an input that identifies the item and that no tower reads."""
    original = content_request(work_folder)
    signature = new_draft(original).draft.signature
    assert [(item.name, item.kind) for item in signature.inputs] == [
        ("user", "id"),
        ("tags", "padded_bag"),
        ("item", "key"),
    ]
    assert signature.item == "item"
    pack(work_folder / "new")


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("towers_incomplete", {"item_tower": None}),
        ("group_missing", {"group": None}),
        ("too_many_labels", {"labels": {"item": "item", "user": "user"}}),
        ("column_missing", {"item": "id"}),
    ],
)
def test_incomplete_options_of_towers_are_refused(
    work_folder: Path, code: str, options: dict[str, Any]
) -> None:
    with raises_code(DraftRefused, code):
        new_draft(towers_request(work_folder, **options))


@pytest.mark.parametrize(
    ("code", "tower", "fields"),
    [
        ("tower_missing", "of_shop", {"architecture": "ContentTowers", "path": "of_shop"}),
        ("tower_vectors", "mean", {"path": "mean", "got": "(256,)"}),
        # takes one mapping; the item tower takes separate arguments
        ("tower_calls_differ", "of_mapping", {}),
    ],
)
def test_unusable_tower_is_refused(
    work_folder: Path,
    code: str,
    tower: str,
    fields: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with raises_code(InspectionFailed, code, **fields):
        new_draft(content_request(work_folder, query_tower=tower))


def test_towers_without_a_catalogue_are_refused(work_folder: Path) -> None:
    original = towers_request(work_folder)
    (work_folder / "written" / "items.parquet").unlink()
    with raises_code(DraftRefused, "catalogue_missing", folder=str(work_folder / "written")):
        new_draft(original)


def test_item_column_must_be_named_if_rows_and_catalogue_share_several(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "draft_network")
    original = towers_request(work_folder)
    path = work_folder / "written" / "items.parquet"
    items = pd.read_parquet(path)
    items.assign(user=items["item"]).to_parquet(path)
    with raises_code(DraftRefused, "item_unknown", columns=("user", "item")):
        new_draft(original)
    assert new_draft(towers_request(work_folder, item="item")).draft.signature.item == "item"


def shop_request(work_folder: Path, model: str = "shop", **options: Any) -> DraftRequest:
    """Return a request for a network of ``new_draft_models``."""
    data = (
        work_folder / "data"
        if (work_folder / "data").exists()
        else write_shop_data(work_folder / "data")
    )
    return DraftRequest(
        folder=work_folder / "new",
        model=f"{MODELS}:{model}",
        data=data,
        **{"labels": {"click": "click"}, **options},
    )


def test_network_with_objects_as_arguments_packs_and_loads(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = new_draft(shop_request(work_folder))
    assert [(item.kind, item.columns) for item in created.draft.signature.inputs] == [
        ("id", ("user",)),
        ("id", ("item",)),
        ("padded_bag", ("tags",)),
        ("dense", ("price",)),
        ("dense", ("age",)),
    ]
    assert created.draft.signature.call == "mapping"
    assert created.draft.signature.outputs[0].form == "probability"
    packed = pack(work_folder / "new")
    assert packed.tables == {"tables.user": 40, "tables.item": 30, "tags": 20}


def test_tied_tensor_is_stored_once(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created = new_draft(shop_request(work_folder, "tied"))
    assert created.draft.network.ties == {"again.weight": "item.weight"}
    pack(work_folder / "new")


def test_network_that_depends_on_more_than_its_arguments_is_refused(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises_code(DraftRefused, "rebuilt_differs", architecture=TextMatching("PatchedNet")):
        new_draft(shop_request(work_folder, "patched"))
    assert not (work_folder / "new").exists()


def test_class_of_a_module_that_is_not_allowed_is_refused_before_anything_is_written(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "examples")
    with raises_code(BundleRefused, "architecture_not_allowed", module=MODELS):
        new_draft(shop_request(work_folder))
    assert not (work_folder / "new").exists()


def test_input_that_the_network_does_not_read_is_refused(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises_code(InspectionFailed, "inputs_unknown", names=("users",)) as caught:
        new_draft(shop_request(work_folder, inputs={"users": ("user",)}))
    assert caught.value.fields["arguments"] == ("user", "item", "tags", "price", "age")


def test_folder_with_files_is_refused_and_unchanged(work_folder: Path) -> None:
    (work_folder / "new").mkdir()
    (work_folder / "new" / "mine.txt").write_text("mine")
    with raises_code(DraftRefused, "folder_not_empty", folder=str(work_folder / "new")):
        new_draft(shop_request(work_folder))
    assert [path.name for path in (work_folder / "new").iterdir()] == ["mine.txt"]


def test_request_without_labels_or_with_an_unknown_column_is_refused(work_folder: Path) -> None:
    with raises_code(DraftRefused, "label_missing"):
        new_draft(shop_request(work_folder, labels={}))
    with raises_code(DraftRefused, "column_missing", option="--label", column="clicks"):
        new_draft(shop_request(work_folder, labels={"clicks": "clicks"}))
    with raises_code(DraftRefused, "column_missing", option="--group", column="shopper"):
        new_draft(shop_request(work_folder, group="shopper"))


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("name_form", {"name": "Two Words"}),
        ("name_form", {"version": "1/2"}),
        ("output_name_form", {"labels": {"is click": "click"}}),
    ],
)
def test_names_that_model_json_cannot_have_are_refused(
    work_folder: Path, code: str, options: dict[str, Any]
) -> None:
    with raises_code(DraftRefused, code):
        new_draft(shop_request(work_folder, **options))


def test_data_without_a_test_split_is_refused(work_folder: Path) -> None:
    (write_shop_data(work_folder / "data") / "test.parquet").unlink()
    with raises_code(DraftRefused, "data_missing", got=("train.parquet",)):
        new_draft(shop_request(work_folder))


def test_weights_that_do_not_fit_are_refused(work_folder: Path) -> None:
    handwritten = multi_task_draft.write_multi_task_draft(work_folder / "written")
    fitting = request(work_folder / "new", handwritten, labels={"click": "click"})
    config = {**json.loads(fitting.config), "dim": 5}
    with raises_code(DraftRefused, "weights_unfit", problem=TextMatching("size mismatch")):
        new_draft(fitting.model_copy(update={"config": json.dumps(config)}))
    with raises_code(DraftRefused, "config_no_json"):
        new_draft(fitting.model_copy(update={"config": "{dim: 5}"}))


def test_label_candidates_have_columns_of_0_and_1_first(work_folder: Path) -> None:
    candidates = label_candidates(read_rows(write_shop_data(work_folder / "data")))
    assert candidates == ("click", "user", "item", "price", "age")
