"""Orders for models of libraries, on the drafts that ``recpress new`` writes.

A home is the folder with everything that recpress stores (``RECPRESS_HOME``). A draft is the folder
of a bundle before it is packed.
"""

import sys
from pathlib import Path

import pytest
from library_data import write_interactions, write_rows
from orders import run_without_prefect

from compressors.contracts import Limit
from flows.order import Order
from tasks.bundles.draft_request import DraftRequest
from tasks.bundles.new_draft import new_draft
from tasks.bundles.packing import pack

# The folder in which ``make .venv`` installs the libraries.
LIBRARIES = Path(sys.prefix) / "libraries"
# Model of RecBole in ``tests/recbole_models.py`` -> the method that returns its scores.
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
# The weights are random, so the AUC is about 0.5 before and after: the test is that every step, the
# export, the parity check and the audit accept the model. Graphs of such small models may be larger
# than before, because quantized operators are described in the graph.
LIMITS = (Limit.parse("auc vs baseline >= -0.1"),)

# Models of torch-rechub and DeepCTR-Torch in ``tests/library_models.py``: with two outputs, with
# scores, and with two towers.
MULTI_TASK = ("mmoe", "shared_bottom", "deepctr_ple")
SCORING = (
    *("wide_deep", "deep_fm", "dcn", "dcn_v2", "dcn_v2_mixture", "auto_int", "din"),
    *("deepctr_deep_fm", "deepctr_ids", "deepctr_xdeep_fm", "deepctr_dcn", "deepctr_dcn_mixture"),
    *("deepctr_auto_int", "deepctr_nfm", "deepctr_pnn", "deepctr_fibinet"),
    *MULTI_TASK,
)
MATCHING = ("dssm", "senet_dssm", "youtube_dnn")


@pytest.fixture
def libraries(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, in a working directory where the libraries' modules can be imported."""
    monkeypatch.syspath_prepend(str(LIBRARIES))
    allowed = "recbole_models,recbole,library_models,torch_rechub,deepctr_torch"
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", allowed)
    monkeypatch.chdir(work_folder)
    return work_folder


def compress(request: DraftRequest, preset: str, limits: tuple[Limit, ...]) -> None:
    """Write the draft of a network, pack it and compress it; the result must be accepted."""
    new_draft(request)
    pack(request.folder)
    result = run_without_prefect(Order(model="model", preset=preset, limits=limits))
    finished = result.finished.report
    assert finished.outcome == "accepted", finished.targets[0].verdict.reason


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "small"])
@pytest.mark.parametrize(("name", "method"), RECBOLE.items())
def test_model_of_recbole_is_compressed_and_accepted(
    libraries: Path, name: str, method: str, preset: str
) -> None:
    import recbole_models

    recbole_models.write_atomic_files(libraries)
    (libraries / "rows").mkdir()
    recbole_models.write_rows(libraries / "rows")
    request = DraftRequest(
        folder=libraries / "draft",
        model=f"recbole_models:{name}",
        method=method,
        data=libraries / "rows",
        labels={"click": "label"},
        name="model",
    )
    compress(request, preset, LIMITS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        *((name, "small") for name in SCORING),  # also applies the steps of "fast" to dense layers
        *((name, "fast") for name in ("dcn_v2_mixture", "deepctr_ids", *MULTI_TASK)),
    ],
)
def test_model_of_torch_rechub_or_deepctr_torch_is_compressed_and_accepted(
    libraries: Path, name: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "library_models", raising=False)
    write_rows(libraries / "rows")
    labels = ("click", "like") if name in MULTI_TASK else ("click",)
    request = DraftRequest(
        folder=libraries / "draft",
        model=f"library_models:{name}",
        data=libraries / "rows",
        labels=dict(zip(labels, labels, strict=True)),
        name="model",
    )
    metrics = [f"auc[{label}]" for label in labels] if len(labels) > 1 else ["auc"]
    compress(request, preset, tuple(Limit.parse(f"{m} vs baseline >= -0.1") for m in metrics))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["fast", "small"])
@pytest.mark.parametrize("name", MATCHING)
def test_model_of_torch_rechub_with_two_towers_is_compressed_and_accepted(
    libraries: Path, name: str, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "library_models", raising=False)
    write_interactions(libraries / "rows")
    request = DraftRequest(
        folder=libraries / "draft",
        model=f"library_models:{name}",
        data=libraries / "rows",
        labels={},
        query_tower="user_tower",
        item_tower="item_tower",
        group="member",
        name="model",
    )
    compress(request, preset, (Limit.parse("recall@20 vs baseline >= -0.3"),))
