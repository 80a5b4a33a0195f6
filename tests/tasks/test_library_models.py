"""``recpress new`` makes bundles of models of torch-rechub, DeepCTR-Torch and RecBole.

A draft is the folder of a bundle before it is packed. Atomic files are RecBole's format of data.
"""

import shutil
import sys
from pathlib import Path

import pytest
from error_codes import raises_code
from library_data import write_interactions, write_rows

from compressors.contracts import Bench, Signature, Tower, Towers
from compressors.core.skipping import run_or_skip
from compressors.errors.inspection import InspectionFailed
from compressors.quantize.dense.float16 import Float16
from infra.errors import DraftRefused
from tasks.bundles.draft_request import DraftRequest
from tasks.bundles.loading import load_bundle
from tasks.bundles.new_draft import new_draft
from tasks.bundles.packing import Packed, pack

LIBRARIES = Path(sys.prefix) / "libraries"  # folder of the packages that the models import
MULTI_TASK = ("mmoe", "shared_bottom")
RECHUB = ("wide_deep", "deep_fm", "dcn", "dcn_v2", "dcn_v2_mixture", "auto_int", "din", *MULTI_TASK)
FAILS_FOR_ONE_ROW = ("dcn_v2_mixture", "deepctr_dcn_mixture")
DEEPCTR = tuple(
    f"deepctr_{name}"
    for name in (
        "ids",
        "deep_fm",
        "xdeep_fm",
        "dcn",
        "dcn_mixture",
        "auto_int",
        "wide_deep",
        "nfm",
        "pnn",
        "fibinet",
    )
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data that the models of ``tests/library_models.py`` read."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder)
    return folder


def derive(work_folder: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Signature:
    """Write a draft of a model, pack it, and return its signature."""
    return derive_and_pack(work_folder, data, name, monkeypatch)[0]


def derive_and_pack(
    work_folder: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Signature, Packed]:
    """Write a draft of a model, pack it, and return its signature and the bundle."""
    monkeypatch.syspath_prepend(str(LIBRARIES))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "library_models,torch_rechub,deepctr_torch")
    # Features are constructed while the module is imported, so it is imported again.
    monkeypatch.delitem(sys.modules, "library_models", raising=False)
    labels = ("click", "like") if name in MULTI_TASK else ("click",)
    request = DraftRequest(
        folder=work_folder / name,
        model=f"library_models:{name}",
        data=data,
        labels=dict(zip(labels, labels, strict=True)),
        library="deepctr-torch" if name in DEEPCTR else "torch-rechub",
    )
    written = new_draft(request)
    return written.draft.signature, pack(work_folder / name)


def test_model_of_another_library_than_the_named_one_is_refused(
    work_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(LIBRARIES))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "library_models,torch_rechub,deepctr_torch")
    monkeypatch.delitem(sys.modules, "library_models", raising=False)
    request = DraftRequest(
        folder=work_folder / "draft",
        model="library_models:deep_fm",
        data=data,
        labels={"click": "click"},
        library="deepctr-torch",
    )
    got = "torch_rechub.models.ranking.deepfm:DeepFM"
    with raises_code(DraftRefused, "library_differs", package="deepctr_torch", got=got):
        new_draft(request)
    assert not (work_folder / "draft").exists()


@pytest.mark.parametrize("name", RECHUB)
def test_model_of_torch_rechub_becomes_a_bundle(
    work_folder: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = derive(work_folder, data, name, monkeypatch)
    assert signature.call == "mapping"
    kinds = {item.name: item.kind for item in signature.inputs}
    assert {kinds["user"], kinds["item"], kinds["genre"]} == {"id"}
    expected = {"history": "padded_bag"} if name == "din" else {"price": "dense", "age": "dense"}
    if name == "wide_deep":
        expected["recent"] = "padded_bag"
    assert kinds.items() >= expected.items()
    assert signature.repeat_single_row == (name in FAILS_FOR_ONE_ROW)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with interactions of members with products, and the catalogue of products."""
    folder = tmp_path_factory.mktemp("interactions")
    write_interactions(folder)
    return folder


@pytest.mark.parametrize("name", ["dssm", "senet_dssm", "youtube_dnn"])
def test_model_of_torch_rechub_with_two_towers_becomes_a_bundle(
    work_folder: Path, catalogue: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(LIBRARIES))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "library_models,torch_rechub")
    monkeypatch.delitem(sys.modules, "library_models", raising=False)
    request = DraftRequest(
        folder=work_folder / name,
        model=f"library_models:{name}",
        data=catalogue,
        labels={},
        query_tower="user_tower",
        item_tower="item_tower",
        group="member",
    )
    signature = new_draft(request).draft.signature
    assert signature.towers is not None
    query = Tower(method="user_tower", inputs=("member", "lately"))
    item = Tower(method="item_tower", inputs=("product", "kind"))
    if name == "senet_dssm":
        query = Tower(method="user_tower", inputs=("member",))
    if name == "youtube_dnn":
        item = Tower(method="item_tower", attributes={"mode": "item"}, inputs=("product",))
    assert signature.towers == Towers(query=query, item=item)
    assert signature.scored_by == ("towers" if name == "youtube_dnn" else "method")
    assert signature.item == "product"
    pack(work_folder / name)


@pytest.mark.parametrize("name", DEEPCTR)
def test_model_of_deepctr_torch_becomes_a_bundle(
    work_folder: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = derive(work_folder, data, name, monkeypatch)
    (matrix,) = signature.inputs
    assert matrix.kind == "matrix"
    kinds = {part.name: part.kind for part in signature.data_inputs}
    expected = {"user": "id", "item": "id", "genre": "id"}
    if name != "deepctr_ids":
        expected |= {"price": "dense", "age": "dense"}
    if name == "deepctr_deep_fm":
        expected["recent"] = "padded_bag"
    assert (kinds, matrix.dtype) == (expected, "float32")
    assert signature.repeat_single_row == (name in FAILS_FOR_ONE_ROW)


RECBOLE = {
    "bpr": "predict",
    "neu_mf": "predict",
    "deep_fm": "forward",
    "dcn": "forward",
    "auto_int": "forward",
    "xdeep_fm": "forward",
    "sas_rec": "predict",
    "gru4rec": "predict",
}
SEQUENTIAL = ("sas_rec", "gru4rec")


@pytest.fixture
def recbole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the rows for RecBole's models, next to its atomic files."""
    monkeypatch.syspath_prepend(str(LIBRARIES))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "recbole_models,recbole")
    import recbole_models

    monkeypatch.chdir(tmp_path)
    recbole_models.write_atomic_files(tmp_path)
    data = tmp_path / "rows"
    data.mkdir()
    recbole_models.write_rows(data)
    return data


def recbole_request(work_folder: Path, data: Path, name: str, method: str) -> DraftRequest:
    """Return a request for a model of ``recbole_models``."""
    return DraftRequest(
        folder=work_folder / name,
        model=f"recbole_models:{name}",
        method=method,
        data=data,
        labels={"click": "label"},
        library="recbole",
    )


@pytest.mark.parametrize(("name", "method"), RECBOLE.items())
def test_model_of_recbole_becomes_a_bundle_that_needs_no_atomic_files(
    work_folder: Path, recbole: Path, name: str, method: str
) -> None:
    signature = new_draft(recbole_request(work_folder, recbole, name, method)).draft.signature
    assert (signature.call, signature.method) == ("mapping", method)
    kinds = {item.name: item.kind for item in signature.inputs}
    if name in SEQUENTIAL:
        assert kinds == {"item_id": "id", "item_id_list": "sequence"}
        assert signature.inputs[1].model_dump()["lengths"] == "item_length"
    else:
        features = {"age", "kind"} if method == "forward" else set()
        assert kinds == dict.fromkeys(("user_id", "item_id", *features), "id")
    shutil.rmtree(recbole.parent / "shop")
    pack(work_folder / name)


def test_model_of_recbole_that_reads_a_matrix_is_refused(work_folder: Path, recbole: Path) -> None:
    # The constructor reads a tuple of matrices from the data set; a draft stores only plain values.
    place = "DMF(dataset).history_user_matrix()"
    with raises_code(DraftRefused, "read_not_stored", place=place, kind="tuple"):
        new_draft(recbole_request(work_folder, recbole, "dmf", "predict"))


def test_model_of_recbole_that_padding_changes_is_refused(work_folder: Path, recbole: Path) -> None:
    with raises_code(InspectionFailed, "padding_matters", column="item_id_list"):
        new_draft(recbole_request(work_folder, recbole, "stamp", "predict"))


def test_interaction_network_of_xdeepfm_is_compressed_as_dense_layers(
    work_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature, packed = derive_and_pack(work_folder, data, "deepctr_xdeep_fm", monkeypatch)
    model = load_bundle(packed.artifact).model
    result = run_or_skip(Float16(), model, Bench(signature=signature), tmp_path)
    assert result.plan is not None
    # The model has one convolution with kernel size 1, which is stored as a dense layer.
    convolutions = [line for line in result.plan.lines if line.module.startswith("cin.conv1ds.")]
    assert [line.module for line in convolutions] == ["cin.conv1ds.0.linear"]
    assert {line.format for line in convolutions} == {"float16"}
