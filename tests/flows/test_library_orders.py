"""Orders for models of libraries: every preset, on the drafts that ``recpress new`` writes.

A home is the folder with everything that recpress stores (``RECPRESS_HOME``). A draft is the folder
of a bundle before it is packed.
"""

import sys
from pathlib import Path

import pytest
from orders import run_without_prefect

from compressors.contracts import Limit
from flows.order import Order
from tasks.bundles.draft_request import DraftRequest
from tasks.bundles.new_draft import new_draft
from tasks.bundles.packing import pack

LIBRARIES = Path(sys.prefix) / "libraries"
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


@pytest.fixture
def libraries(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, in a working directory where the libraries' modules can be imported."""
    monkeypatch.syspath_prepend(str(LIBRARIES))
    allowed = "recbole_models,recbole,library_models,torch_rechub"
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", allowed)
    monkeypatch.chdir(empty_home)
    return empty_home


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
    new_draft(request)
    pack(libraries / "draft")
    result = run_without_prefect(Order(model="model", preset=preset, limits=LIMITS))
    finished = result.finished.report
    assert finished.outcome == "accepted", finished.targets[0].verdict.reason
