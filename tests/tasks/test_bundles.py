"""Packing, finding and checking bundles.

A draft is a folder from which a bundle is packed: ``model.json``, the weights and parquet files.
``write_draft`` writes the model ``clicks``, whose tables have 3,000 users, 1,500 items and 300 tags
with 16 weights each (``tests/drafts.py``).
"""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drafts import ALLOWED, DENSE, ROWS, write_draft
from error_codes import TextMatching, raises_code
from retrieval_draft import ITEMS, SIGNATURE, write_retrieval_draft
from signatures import as_version_1

from compressors.errors.compression import ModelRefused
from infra.errors import (
    AlreadyThere,
    ArtifactDamaged,
    ArtifactMissing,
    BundleRefused,
    DataRefused,
    StoreRefused,
)
from tasks.bundles.bundle_ref import find_bundle, resolve
from tasks.bundles.loading import data_path, load_bundle
from tasks.bundles.packing import check, pack, show
from tasks.orchestration.workspace import local, store


@pytest.fixture
def draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    return write_draft(tmp_path / "draft")


def change_draft(draft: Path, **fields: object) -> None:
    """Replace fields of a draft's ``model.json``."""
    path = draft / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def bundle_keys() -> tuple[str, ...]:
    """Return the keys of all bundle records in the store."""
    return store().keys("bundles")


def test_packed_bundle_has_the_weights_and_data_of_the_draft(draft: Path) -> None:
    packed = pack(draft)
    assert (packed.name, packed.version, packed.rows) == ("clicks", "1", ROWS)
    assert packed.tables == {"user": 3000, "item": 1500, "tags": 300}
    manifest = show("clicks@1")
    assert set(manifest.files) == {"model.safetensors"}
    for split, reference in manifest.data.items():
        stored = local(reference.artifact) / reference.file
        assert stored.read_bytes() == (draft / f"{split}.parquet").read_bytes()
    model = load_bundle(packed.artifact).model.module
    # The tables alone have 4,800 rows of 16 weights.
    assert sum(value.numel() for value in model.state_dict().values()) > 70_000


def test_packing_again_changes_nothing_and_other_contents_are_refused(
    draft: Path, tmp_path: Path
) -> None:
    packed = pack(draft)
    keys = store().keys("")
    assert pack(draft) == packed
    assert store().keys("") == keys
    other = write_draft(tmp_path / "other", seed=1)
    with raises_code(AlreadyThere, "version_packed", name="clicks", version="1"):
        pack(other)
    assert resolve("clicks@1") == packed.artifact
    check("clicks@1")


def test_draft_of_schema_version_1_and_its_version_2_are_the_same_bundle(draft: Path) -> None:
    path = draft / "model.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(as_version_1(document)))
    packed = pack(draft)
    # In version 1 the output has no name; reading it as version 2 names it "score".
    document["signature"]["outputs"][0]["name"] = "score"
    path.write_text(json.dumps(document))
    assert pack(draft).artifact == packed.artifact
    manifest = json.loads((local(packed.artifact) / "model.json").read_text())
    assert (manifest["schema_version"], manifest["signature"]["outputs"]) == (
        2,
        document["signature"]["outputs"],
    )
    document["signature"]["outputs"][0]["name"] = "click"
    path.write_text(json.dumps(document))
    with raises_code(AlreadyThere, "version_packed"):
        pack(draft)


def test_changed_draft_is_refused_if_the_files_of_its_version_are_missing(
    draft: Path,
) -> None:
    packed = pack(draft)
    shutil.rmtree(draft.parent / "recpress" / "store" / "artifacts" / packed.artifact.sha256)
    document = json.loads((draft / "model.json").read_text())
    document["signature"]["outputs"][0]["name"] = "click"
    (draft / "model.json").write_text(json.dumps(document))
    with raises_code(AlreadyThere, "version_files_missing", sha256=packed.artifact.sha256):
        pack(draft)


def test_packing_does_not_change_the_draft(draft: Path) -> None:
    before = {path.name: path.read_bytes() for path in draft.iterdir()}
    pack(draft)
    assert {path.name: path.read_bytes() for path in draft.iterdir()} == before
    for path in draft.iterdir():
        path.write_bytes(path.read_bytes())  # the files are still writable
    check("clicks@1")


def test_editing_the_draft_in_place_does_not_change_the_packed_bundle(
    draft: Path,
) -> None:
    """Packing uses hard links as temporary files; the store must not have them."""
    pack(draft)
    with (draft / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)  # the last four bytes of the weights
        file.write(b"\1\2\3\4")
    check("clicks@1")


def test_name_resolves_to_the_bundle_packed_last(draft: Path, tmp_path: Path) -> None:
    first = pack(draft)
    second = pack(write_draft(tmp_path / "second", version="0.9", seed=1))
    assert resolve("clicks") == second.artifact
    assert resolve("clicks@1") == first.artifact
    assert resolve(first.artifact.uri) == first.artifact


def test_prefix_of_a_name_or_version_does_not_resolve(draft: Path, tmp_path: Path) -> None:
    pack(write_draft(tmp_path / "second", version="1.1", seed=1))
    with raises_code(ArtifactMissing, "bundle_missing", known=("clicks@1.1",)):
        resolve("clicks@1")
    with raises_code(ArtifactMissing, "bundle_missing", reference="click"):
        resolve("click")


def test_unknown_bundle_is_refused_with_the_known_bundles(draft: Path) -> None:
    with raises_code(ArtifactMissing, "bundle_missing", known=("none yet",)):
        resolve("clicks")
    pack(draft)
    with raises_code(ArtifactMissing, "bundle_missing", reference="views", known=("clicks@1",)):
        resolve("views")
    with raises_code(StoreRefused, "artifact_uri_form", got=TextMatching("/artifacts/short$")):
        resolve(f"{store().root}/artifacts/short")


# --- refused drafts, for which no record is written ------------------------------------------


def test_draft_without_test_data_is_refused(draft: Path) -> None:
    change_draft(draft, data={"train": "train.parquet"})
    with raises_code(BundleRefused, "test_data_missing", folder=str(draft)):
        pack(draft)
    assert bundle_keys() == ()


def test_architecture_outside_the_allow_list_is_refused(
    draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "examples")
    # The error's field ``setting`` is the value of this variable that would allow the module.
    with raises_code(BundleRefused, "architecture_not_allowed", setting="examples,draft_network"):
        pack(draft)
    assert bundle_keys() == ()


def test_id_outside_its_table_is_refused_with_split_input_and_id(draft: Path) -> None:
    table = pq.read_table(draft / "test.parquet")
    users = table["user"].to_pylist()
    users[17] = 3_000  # ids are 0 to 2,999
    column = table.column_names.index("user")
    pq.write_table(table.set_column(column, "user", pa.array(users)), draft / "test.parquet")
    with raises_code(
        DataRefused, "ids_unfit", problems=TextMatching("'test', input 'user': id 3000 .*3000 rows")
    ):
        pack(draft)
    assert bundle_keys() == ()


def test_data_without_a_column_of_the_signature_is_refused(draft: Path) -> None:
    table = pq.read_table(draft / "test.parquet").drop_columns([f"d{DENSE - 1}"])
    pq.write_table(table, draft / "test.parquet")
    with raises_code(DataRefused, "schema_unfit", problems=TextMatching(f"d{DENSE - 1}")):
        pack(draft)
    assert bundle_keys() == ()


def test_weights_with_other_shapes_than_the_architecture_are_refused(draft: Path) -> None:
    document = json.loads((draft / "model.json").read_text())
    document["network"]["architecture"]["config"]["dim"] = 8
    (draft / "model.json").write_text(json.dumps(document))
    with raises_code(ModelRefused, "shape_differs"):
        pack(draft)
    assert bundle_keys() == ()


# --- check ----------------------------------------------------------------------------------


def test_check_detects_a_flipped_bit_in_weights_or_data(draft: Path) -> None:
    packed = pack(draft)
    manifest = show("clicks")
    for artifact, file in (
        (packed.artifact, "model.safetensors"),
        (manifest.data["test"].artifact, "test.parquet"),
    ):
        path = Path(store().uri_of(artifact).removeprefix("file://")) / "files" / file
        undamaged = path.read_bytes()
        damaged = bytearray(undamaged)
        damaged[len(damaged) // 2] ^= 1
        path.chmod(0o644)
        path.write_bytes(damaged)
        with raises_code(ArtifactDamaged, "chunk_differs", file=file):
            check("clicks")
        path.write_bytes(undamaged)
    check("clicks")


def test_check_of_the_folder_of_a_bundle_returns_its_manifest_and_refuses_a_draft(
    draft: Path,
) -> None:
    packed = pack(draft)
    manifest, tensor_records = check(str(local(packed.artifact)))
    assert manifest == show("clicks")
    assert tensor_records["user.weight"].shape == (3000, 16)
    for path in draft.glob("*.parquet"):
        path.unlink()
    with raises_code(BundleRefused, "is_draft", folder=str(draft)):
        check(str(draft))


def test_missing_split_is_refused_with_the_existing_splits(
    draft: Path,
) -> None:
    change_draft(draft, data={"train": "train.parquet", "test": "test.parquet"})
    pack(draft)
    with raises_code(BundleRefused, "split_missing", split="validation", splits=("train", "test")):
        data_path(show("clicks"), "validation")


# --- find_bundle -----------------------------------------------------------------------------


def test_find_bundle_returns_properties_and_a_digest_that_changes_with_the_architecture(
    draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (Path(__file__).parents[1] / "draft_network.py").read_text()
    module = tmp_path / "copied_draft_network.py"
    module.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", module.stem)
    network = json.loads((draft / "model.json").read_text())["network"]
    network["architecture"]["path"] = f"{module.stem}:ClickNet"
    change_draft(draft, network=network)
    pack(draft)
    bundle_ref = find_bundle("clicks")
    assert (bundle_ref.name, bundle_ref.version, bundle_ref.metrics) == ("clicks", "1", ("auc",))
    assert (bundle_ref.rows, bundle_ref.longest) == (ROWS, {"tags": 5})  # longest list of tags
    assert bundle_ref.calibration() == "calibration"
    module.write_text(source.replace("torch.relu", "torch.tanh"))
    edited = find_bundle("clicks")
    assert edited.architecture != bundle_ref.architecture
    assert edited.artifact == bundle_ref.artifact


# --- retrieval -------------------------------------------------------------------------------


@pytest.fixture
def towers(draft: Path, tmp_path: Path) -> Path:
    """The draft of a retrieval model with two towers and a catalogue, the split ``items``."""
    return write_retrieval_draft(tmp_path / "towers")


def test_retrieval_model_is_packed_with_its_catalogue(towers: Path) -> None:
    packed = pack(towers)
    assert packed.rows["items"] == ITEMS
    manifest, _ = check("finder@1")
    assert manifest.signature.item == "item"


def change_config(draft: Path, **config: object) -> None:
    """Replace arguments of the model's class."""
    network = json.loads((draft / "model.json").read_text())["network"]
    network["architecture"]["config"] |= config
    change_draft(draft, network=network)


def change_signature(draft: Path, **changes: object) -> None:
    """Replace fields of the signature."""
    change_draft(draft, signature=SIGNATURE | changes)


def test_score_other_than_the_dot_product_of_the_towers_is_refused(towers: Path) -> None:
    change_config(towers, bias=0.5)
    # The network adds the bias to the dot product; the gap is the largest difference.
    with raises_code(ModelRefused, "towers_not_the_score", gap=0.5):
        pack(towers)


# There is no module "of_unknown", and "of_item" does not accept the inputs of the query tower.
@pytest.mark.parametrize("query", ["of_unknown", "of_item"])
def test_tower_that_cannot_be_called_is_refused(query: str, towers: Path) -> None:
    changed = SIGNATURE["towers"] | {"query": {"module": query, "inputs": ["user", "lately"]}}
    change_signature(towers, towers=changed)
    with raises_code(ModelRefused, "tower_fails", tower="query", module=query) as caught:
        pack(towers)
    assert caught.value.fields["inputs"][:2] == ("user", "lately")


def test_tower_that_needs_other_inputs_is_refused(towers: Path) -> None:
    layer = {"module": "of_item.out"}  # a dense layer, which does not accept the tower's inputs
    changed = SIGNATURE["towers"] | {"item": SIGNATURE["towers"]["item"] | layer}
    change_signature(towers, towers=changed)
    with raises_code(ModelRefused, "tower_fails", tower="item", module="of_item.out"):
        pack(towers)


def test_retrieval_model_without_a_catalogue_is_refused(towers: Path) -> None:
    data = json.loads((towers / "model.json").read_text())["data"]
    del data["items"]
    change_draft(towers, data=data)
    with raises_code(DataRefused, "catalogue_missing", split="items"):
        pack(towers)
