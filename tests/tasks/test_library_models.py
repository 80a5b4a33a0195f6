"""Models of torch-rechub and DeepCTR-Torch become bundles without code for them."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from compressors.contracts import Bench, Signature
from compressors.core.skipping import run_or_skip
from compressors.quantize.dense.float16 import Float16
from tasks.bundles.loading import load_bundle
from tasks.bundles.new_draft import DraftRequest, new_draft
from tasks.bundles.packing import Packed, pack

LIBRARIES = Path(sys.prefix) / "libraries"
USERS, ITEMS, GENRES, LONGEST = 50, 80, 18, 6
RECHUB = ("wide_deep", "deep_fm", "dcn", "dcn_v2", "auto_int", "din", "mmoe", "shared_bottom")
DEEPCTR = tuple(
    f"deepctr_{name}"
    for name in ("deep_fm", "xdeep_fm", "dcn", "auto_int", "wide_deep", "nfm", "pnn", "fibinet")
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data that the models of ``library_models.py`` read."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, rows in {"train": 400, "test": 600}.items():
        lengths = random.integers(1, LONGEST + 1, rows)
        click = random.integers(0, 2, rows)
        columns = {
            "user": random.integers(0, USERS, rows),
            "item": random.integers(1, ITEMS, rows),
            "genre": random.integers(0, GENRES, rows),
            "price": random.random(rows, np.float32),
            "age": random.integers(18, 80, rows),
            # torch-rechub trains on lists that are padded in the data.
            "history": list(random.integers(1, ITEMS, (rows, LONGEST))),
            "recent": [random.integers(1, ITEMS, length) for length in lengths],
            "click": click,
            "like": click * random.integers(0, 2, rows),
        }
        pd.DataFrame(columns).to_parquet(folder / f"{split}.parquet")
    return folder


def derive(home: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Signature:
    """Write a draft of a model, pack it, and return its signature."""
    return derive_and_pack(home, data, name, monkeypatch)[0]


def derive_and_pack(
    home: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Signature, Packed]:
    """Write a draft of a model, pack it, and return its signature and the bundle."""
    monkeypatch.syspath_prepend(str(LIBRARIES))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "library_models,torch_rechub,deepctr_torch")
    # Features are constructed while the module is imported.
    monkeypatch.delitem(sys.modules, "library_models", raising=False)
    labels = ("click", "like") if name in ("mmoe", "shared_bottom") else ("click",)
    request = DraftRequest(
        folder=home / name,
        model=f"library_models:{name}",
        data=data,
        labels=dict(zip(labels, labels, strict=True)),
    )
    written = new_draft(request)
    return written.draft.signature, pack(home / name)


@pytest.mark.parametrize("name", RECHUB)
def test_model_of_torch_rechub_becomes_a_bundle(
    home: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = derive(home, data, name, monkeypatch)
    assert signature.call == "mapping"
    kinds = {item.name: item.kind for item in signature.inputs}
    assert {kinds["user"], kinds["item"], kinds["genre"]} == {"id"}
    expected = {"history": "padded_bag"} if name == "din" else {"price": "dense", "age": "dense"}
    if name == "wide_deep":
        expected["recent"] = "padded_bag"
    assert kinds.items() >= expected.items()


@pytest.mark.parametrize("name", DEEPCTR)
def test_model_of_deepctr_torch_becomes_a_bundle(
    home: Path, data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature = derive(home, data, name, monkeypatch)
    (matrix,) = signature.inputs
    assert matrix.kind == "matrix"
    kinds = {part.name: part.kind for part in signature.data_inputs}
    expected = {"user": "id", "item": "id", "genre": "id", "price": "dense", "age": "dense"}
    if name == "deepctr_deep_fm":
        expected["recent"] = "padded_bag"
    assert kinds == expected


def test_interaction_network_of_xdeepfm_is_compressed_as_dense_layers(
    home: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signature, packed = derive_and_pack(home, data, "deepctr_xdeep_fm", monkeypatch)
    model = load_bundle(packed.artifact).model
    result = run_or_skip(Float16(), model, Bench(signature=signature), tmp_path)
    assert result.plan is not None
    convolutions = [line for line in result.plan.lines if line.module.startswith("cin.conv1ds.")]
    assert [line.module for line in convolutions] == ["cin.conv1ds.0.linear"]
    assert {line.format for line in convolutions} == {"float16"}
