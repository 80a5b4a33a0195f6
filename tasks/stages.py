"""What each step of a recipe was worth, in bytes and in quality."""

from pathlib import Path

import numpy as np
import torch
from prefect import task
from safetensors.torch import load_file

from compressors.batches import batches
from compressors.contracts import Artifact, Schema, Split
from infra.bundle import read
from infra.temporary import scratch_folder
from tasks.documents import STAGES, Scored, Stage, Stages
from tasks.loading import split_of
from tasks.policy import KEPT
from tasks.quality import ByQuery, Quality, by_row
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
        code: digest of the architecture's code and the attempt; part of the cache key.
    """
    manifests = [read(local(item.bundle)) for item in scored]
    schema = manifests[0].signature
    plans = [manifest.plan for manifest in manifests]
    sizes = [sum(line.bytes_after for line in plan.lines) for plan in plans if plan is not None]
    if plans[0] is None and plans[1] is not None:  # a bundle as trained has no plan of its own
        sizes.insert(0, sum(line.bytes_before for line in plans[1].lines))
    quality = quality_of(schema, scored, split_of(test, test_rows), seed)
    stages = []
    for place, item in enumerate(scored):
        pair = quality.paired(metric, str(max(place - 1, 0)), str(place))
        stages.append(
            Stage(
                step=item.step,
                bundle=item.bundle,
                bytes=sizes[place],
                quality=pair.candidate,
                change=pair.difference if place else None,
            )
        )
    with scratch_folder("stages") as scratch:
        (Path(scratch) / STAGES).write_bytes(Stages.dump_json(tuple(stages), indent=1))
        return store().put(Path(scratch))


def quality_of(schema: Schema, scored: tuple[Scored, ...], test: Split, seed: int) -> Quality:
    """Stages by their number, each with its answers to the same rows."""
    if schema.task == "retrieval":
        stored = [load_file(local(item.score) / "data.safetensors") for item in scored]
        values = {
            str(place): {metric: found.numpy() for metric, found in held.items()}
            for place, held in enumerate(stored)
        }
        return ByQuery(values, test.rows, seed)
    answers = {str(place): _answers(schema, item) for place, item in enumerate(scored)}
    return by_row(list(batches(test, schema, READING_ROWS)), answers, seed)


def _answers(schema: Schema, item: Scored) -> np.ndarray:
    """A stage's scores; log loss and entropy need probabilities, and order does not change."""
    output = load_file(local(item.score) / "data.safetensors")["score"]
    return (torch.sigmoid(output.double()) if schema.output == "logit" else output).numpy()
