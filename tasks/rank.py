"""Rank the catalogue with a stored retrieval model for every test query; cached."""

from pathlib import Path

import torch
from prefect import task

from compressors.contracts import Artifact, quality_metrics
from compressors.core.state.safetensors_stream import write
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import load_bundle, split_of
from tasks.evaluation.quality import query_quality, torch_towers
from tasks.orchestration.documents import PreparedRows, Ranking
from tasks.orchestration.policy import KEPT
from tasks.orchestration.workspace import store


@task(task_run_name="rank", **KEPT)
def rank(bundle: Artifact, test: PreparedRows, ranking: Ranking) -> Artifact:
    """Rank the catalogue for every test query with the torch module's towers.

    Used for the effect of each step of a recipe. It does not affect the verdict: served graphs are
    measured in their own runtime.

    Args:
        bundle: the model.
        test: the prepared test rows.
        ranking: the catalogue and the hidden items.

    Returns:
        Each metric of the task, float64 ``(queries,)``.

    Raises:
        CompressionError: a vector is not finite, or no query has a new item.
    """
    loaded = load_bundle(bundle)
    signature, output = loaded.manifest.signature, loaded.manifest.signature.single_output
    towers = torch_towers(loaded.model.module, signature)
    names = quality_metrics(output.kind, grouped=True, named=(output.metric,))
    found = query_quality(towers, signature, split_of(test.artifact, test.rows), ranking, names)
    tensors = {metric: torch.from_numpy(values) for metric, values in found.items()}
    with scratch_folder("rank") as scratch:
        write(Path(scratch) / "data.safetensors", tensors)
        return store().put(Path(scratch))
