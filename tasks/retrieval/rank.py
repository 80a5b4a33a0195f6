"""Rank the catalogue with a stored retrieval model for every query of test or validation rows."""

from pathlib import Path

import torch
from prefect import task

from compressors.contracts import Artifact
from compressors.contracts.output_metrics import quality_metrics_of_outputs
from compressors.core.state.safetensors_stream import write
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import fetch_split, load_bundle
from tasks.evaluation.quality import query_quality
from tasks.orchestration.documents import PreparedRows, Ranking
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import store
from tasks.retrieval.towers import torch_tower


@task(task_run_name="rank", **TASK_OPTIONS)
def rank(bundle: Artifact, test: PreparedRows, ranking: Ranking) -> Artifact:
    """Rank the catalogue for every query of some rows with the torch module's two towers.

    The metrics of test rows show the effect of each step of a recipe. They do not affect the
    verdict, which is based on rankings by the served graphs in the target's runtime. The metrics of
    validation rows are compared with the quality budget.

    Args:
        bundle: the model.
        test: the prepared test or validation rows, whose columns are stored as tensors.
        ranking: the catalogue, and the earlier interactions whose items are not ranked again.

    Returns:
        The artifact of ``data.safetensors`` with each metric of the task, float64 ``(queries,)``.

    Raises:
        CompressionError: a vector is not finite, or all relevant items are earlier interactions.
    """
    loaded = load_bundle(bundle)
    signature = loaded.manifest.signature
    towers = {name: torch_tower(loaded.model.module, signature, name) for name in ("query", "item")}
    names = quality_metrics_of_outputs(signature.outputs, grouped=True)
    split = fetch_split(test.artifact, test.rows)
    metrics = query_quality(towers, signature, split, ranking, names)
    tensors = {metric: torch.from_numpy(values) for metric, values in metrics.items()}
    with scratch_folder("rank") as scratch:
        write(Path(scratch) / "data.safetensors", tensors)
        return store().put(Path(scratch))
