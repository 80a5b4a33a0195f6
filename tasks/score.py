"""What a stored model answers to the rows of a split, computed once and kept."""

import tempfile
from pathlib import Path

import torch
from prefect import task

from compressors.batches import batches
from compressors.contracts import Artifact
from compressors.errors import CompressionError
from compressors.state import write_tensors
from tasks.loading import load_bundle, split_of
from tasks.policy import KEPT
from tasks.stored import store

SCORING_ROWS = 4096


@task(task_run_name="score", **KEPT)
def score(bundle: Artifact, split: Artifact, rows: int, code: str) -> Artifact:  # noqa: ARG001
    """Score every row of a prepared split with the torch module.

    Used as a teacher's soft labels, and to say what each step of a recipe was worth. The verdict
    never rests on it: what is served is measured in its own runtime.

    Args:
        bundle: the model.
        split: the prepared rows.
        rows: how many they are.
        code: digest of the code that scores; part of the cache key.

    Returns:
        ``score`` float32 ``(rows,)``, the network's output as it is (a logit stays a logit).

    Raises:
        CompressionError: a score is not a finite number.
    """
    loaded = load_bundle(bundle)
    schema = loaded.manifest.signature
    held = batches(split_of(split, rows), schema, SCORING_ROWS)
    with torch.no_grad():
        parts = [loaded.model.module(**batch.inputs).reshape(-1) for batch in held]
    scores = torch.cat(parts).to(torch.float32)
    if not bool(scores.isfinite().all()):
        raise CompressionError(
            f"{loaded.manifest.name} {loaded.manifest.version} gives no finite score for "
            f"{int((~scores.isfinite()).sum())} rows: an id outside its table, or an overflow."
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (path,) = write_tensors({"score": scores}, folder)
        path.rename(folder / "data.safetensors")
        return store().put(folder)
