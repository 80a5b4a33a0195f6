"""What each step of a recipe was worth, in bytes and in quality."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from prefect import task
from safetensors.torch import load_file

from compressors import intervals
from compressors.batches import batches
from compressors.contracts import Artifact, Schema
from infra.bundle import read
from tasks.documents import STAGES, Scored, Stage, Stages
from tasks.loading import split_of
from tasks.policy import KEPT
from tasks.stored import local, store

READING_ROWS = 65_536


@task(task_run_name="weigh the stages", **KEPT)
def weigh(
    scored: tuple[Scored, ...],
    metric: str,
    test: Artifact,
    test_rows: int,
    seed: int,
    code: str,  # noqa: ARG001
) -> Artifact:
    """Compare every stage with the one before it, on the same rows.

    Args:
        scored: the stages in order, the untouched model first.
        metric: the schema's own.
        test: the prepared test split, for labels and groups.
        test_rows: its rows.
        seed: of the bootstrap.
        code: digest of the code that compares; part of the cache key.
    """
    manifests = [read(local(item.bundle)) for item in scored]
    schema = manifests[0].signature
    plans = [manifest.plan for manifest in manifests[1:] if manifest.plan is not None]
    sizes = [sum(line.bytes_before for line in plans[0].lines)]
    sizes += [sum(line.bytes_after for line in plan.lines) for plan in plans]
    rows = list(batches(split_of(test, test_rows), schema, READING_ROWS))
    label = np.concatenate([batch.label.numpy() for batch in rows])
    groups = [batch.group.numpy() for batch in rows if batch.group is not None]
    group = np.concatenate(groups) if groups else None
    answers = [_answers(schema, item) for item in scored]
    stages = []
    for place, item in enumerate(scored):
        before = answers[max(place - 1, 0)]
        pair = intervals.paired(metric, label, before, answers[place], group, seed=seed)
        stages.append(
            Stage(
                step=item.step,
                bundle=item.bundle,
                bytes=sizes[place],
                quality=pair.candidate,
                change=pair.difference if place else None,
            )
        )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / STAGES).write_bytes(Stages.dump_json(tuple(stages), indent=1))
        return store().put(Path(scratch))


def _answers(schema: Schema, item: Scored) -> np.ndarray:
    """A stage's scores; log loss and entropy need probabilities, and order does not change."""
    output = load_file(local(item.score) / "data.safetensors")["score"]
    return (torch.sigmoid(output.double()) if schema.output == "logit" else output).numpy()
