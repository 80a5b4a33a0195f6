"""The order of ``recpress demo``: a click model that is trained on MovieLens 100K and packed.

The training writes a draft (a folder with the model and its data). To pack is to check a draft and
to store it as a bundle.
"""

import json
import subprocess
import sys
from pathlib import Path

from compressors.contracts import Limit, digest
from flows.cli.console import print_progress
from flows.server.prefect_access import require_access
from flows.terms import Targets, Terms
from infra.errors import ArtifactMissing, ChildFailed, CommandRefused, RecordRefused
from infra.store.temporary import scratch_folder
from tasks.bundles.bundle_ref import resolve
from tasks.orchestration.workspace import store

BUNDLE = "ml100k-dcnv2"
TRAINER = "examples.movielens"

# Compared with the untouched model, AUC may fall by at most 0.002, and the bytes must be at most
# half. The confidence interval of the 20,000 test rows is narrow enough to decide the AUC limit.
LIMITS = (
    Limit(metric="auc", against="baseline", at_least=-0.002),
    Limit(metric="bytes", against="baseline", at_most=0.5),
)


def demo_order() -> Terms:
    """Train and pack the demo's model unless it is already stored, and return its order.

    Raises:
        CommandRefused: this installation does not include the folder ``examples``.
        ChildFailed: training failed.
        ServiceFailed: the configured Prefect server does not respond.
    """
    root = Path(__file__).parents[2]
    sources = sorted((root / "examples").glob("*.py"))
    if not sources:
        raise CommandRefused("examples_missing")
    version = digest([path.read_text() for path in sources])[:12]
    model = f"{BUNDLE}@{version}"
    if not _is_packed(model):
        _train_and_pack(root, version)
    return Terms(
        model=model,
        preset="small",
        limits=LIMITS,
        targets=Targets(onnxruntime="required", tensorrt_rtx="required"),
    )


def _is_packed(model: str) -> bool:
    try:
        store().manifest(resolve(model))
    except (ArtifactMissing, RecordRefused):  # packing it again repairs a damaged record
        return False
    return True


def _train_and_pack(root: Path, version: str) -> None:
    """Train the model in a child process, and pack it under a version.

    Raises:
        ChildFailed: training failed.
        ServiceFailed: the configured Prefect server does not respond.
    """
    require_access()  # fails before the training, not after it
    with scratch_folder("demo") as scratch:
        draft = scratch / "draft"
        print_progress("Training a DCN-v2 click model on MovieLens 100K ...")
        trained = subprocess.run(
            [sys.executable, "-m", TRAINER, str(draft)],
            cwd=root,
            stdout=sys.stderr,
            check=False,
        )
        if trained.returncode:
            raise ChildFailed("trainer_failed", trainer=TRAINER, exit_code=trained.returncode)
        description = json.loads((draft / "model.json").read_text())
        description["version"] = version
        (draft / "model.json").write_text(json.dumps(description, indent=1))
        from tasks.bundles.packing import pack  # loads torch, which takes seconds

        print_progress("Packing it into the object store ...")
        pack(draft)
