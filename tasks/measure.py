"""Quality, bytes and latency of what is really served, against the baseline in the same run."""

import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task

from compressors import intervals, judge
from compressors.batches import Batch, batches
from compressors.contracts import Artifact, Schema
from compressors.errors import CompressionError
from compressors.lower.served import forms
from infra.bundle import read
from infra.onnxruntime import Session, interleaved_ms, machine
from infra.settings import load_settings
from tasks.documents import Measurement, served_bytes
from tasks.loading import split_of
from tasks.policy import KEPT
from tasks.stored import local, store
from tasks.subject import LATENCY_BATCHES, quality_metrics

log = logging.getLogger(__name__)
Array = NDArray[Any]

QUANTILES = {"p50": 0.5, "p99": 0.99}
SCORING_ROWS = 4096
BUDGET_MS = 15_000.0  # of one batch size, all sessions together
MOST_ROUNDS = 1000


@task(task_run_name="measure onnxruntime", **KEPT)
def measure(
    bundle: Artifact,
    baseline: Artifact,
    candidate: Artifact,
    champion: Artifact | None,
    test: Artifact,
    test_rows: int,
    seed: int,
    code: str,  # noqa: ARG001
) -> Artifact:
    """Score the test rows with every served graph, time them in turn, store all numbers.

    Args:
        bundle: for the schema.
        baseline: the untouched model's graph.
        candidate: the compressed model's graph.
        champion: the graph production runs now, if there is one.
        test: the prepared test split.
        test_rows: its rows.
        seed: of the bootstrap.
        code: digest of the code that measures; part of the cache key.
    """
    schema = read(local(bundle)).signature
    threads = load_settings().threads
    graphs = {"baseline": baseline, "candidate": candidate}
    if champion is not None:
        graphs["champion"] = champion
    folders = {name: local(artifact) for name, artifact in graphs.items()}
    (form,) = forms(schema)
    sessions = {
        name: Session(folder / f"{form.name}.onnx", threads) for name, folder in folders.items()
    }
    _same_inputs(sessions)
    rows = list(batches(split_of(test, test_rows), schema, SCORING_ROWS))
    label = np.concatenate([batch.label.numpy() for batch in rows])
    group = _group(rows)
    scores = {name: _scores(name, session, rows) for name, session in sessions.items()}

    own: list[judge.Number] = []
    reference: list[judge.Number] = []
    resolves: dict[str, float] = {}
    for metric in quality_metrics(schema.task, grouped=group is not None):
        pair = intervals.paired(
            metric, label, scores["baseline"], scores["candidate"], group, seed=seed
        )
        rival = None
        if "champion" in scores:
            rival = intervals.paired(
                metric, label, scores["champion"], scores["candidate"], group, seed=seed
            )
        own += judge.quality_numbers(metric, pair, rival)
        reference.append(judge.Number(metric=metric, against="absolute", estimate=pair.baseline))
        resolves[metric] = pair.resolves
    sizes = {name: served_bytes(folder) for name, folder in folders.items()}
    own += judge.byte_numbers(sizes["candidate"], sizes["baseline"], sizes.get("champion"))
    reference.append(
        judge.Number(
            metric="bytes", against="absolute", estimate=judge.exact(float(sizes["baseline"]))
        )
    )
    for size in LATENCY_BATCHES:
        _time(size, sessions, schema, test, test_rows, seed, own, reference)
    measurement = Measurement(
        numbers=judge.Measured(numbers=tuple(own), has_champion=champion is not None),
        baseline=judge.Measured(numbers=tuple(reference)),
        resolves=resolves,
        rows=test_rows,
        machine=machine(threads),
    )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "measurement.json").write_text(measurement.model_dump_json(indent=1))
        return store().put(Path(scratch))


def _same_inputs(sessions: dict[str, Session]) -> None:
    wanted = set(sessions["candidate"].inputs)
    for name, session in sessions.items():
        if set(session.inputs) != wanted:
            raise CompressionError(
                f"The {name} takes the inputs {', '.join(session.inputs)}, the candidate "
                f"{', '.join(sorted(wanted))}: they cannot be compared on the same rows. Leave "
                f"limits against the champion out of this order."
            )


def _group(rows: list[Batch]) -> Array | None:
    parts = [batch.group.numpy() for batch in rows if batch.group is not None]
    return np.concatenate(parts) if parts else None


def _scores(name: str, session: Session, rows: list[Batch]) -> Array:
    parts = [session.scores(_arrays(batch)) for batch in rows]
    scores = np.concatenate(parts)
    refused = np.flatnonzero(~np.isfinite(scores))
    if refused.size:
        raise CompressionError(
            f"The {name} graph gives no score for {refused.size} test rows, the first is row "
            f"{refused[0]}: an id or a list outside what its inputs declare, or an overflow."
        )
    return scores


def _arrays(batch: Batch) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in batch.inputs.items()}


def _time(
    size: int,
    sessions: dict[str, Session],
    schema: Schema,
    test: Artifact,
    test_rows: int,
    seed: int,
    own: list[judge.Number],
    reference: list[judge.Number],
) -> None:
    """Add p50 and p99 at one batch size; a batch larger than the test data is left out."""
    if size > test_rows:
        log.warning("no latency at batch %d: there are %d test rows", size, test_rows)
        return
    inputs = _arrays(next(batches(split_of(test, test_rows), schema, size)))
    listed = list(sessions.values())
    trial = interleaved_ms(listed, inputs, rounds=5, warmup=5)
    once = sum(float(np.median(times)) for times in trial)
    needed = max(intervals.rounds_needed(quantile) for quantile in QUANTILES.values())
    rounds = max(needed, min(MOST_ROUNDS, math.ceil(BUDGET_MS / once)))
    times = dict(zip(sessions, interleaved_ms(listed, inputs, rounds), strict=True))
    for name, quantile in QUANTILES.items():
        metric = f"{name}_ms@{size}"
        ratio = intervals.latency_ratio(times["baseline"], times["candidate"], quantile, seed=seed)
        rival = None
        if "champion" in times:
            rival = intervals.latency_ratio(
                times["champion"], times["candidate"], quantile, seed=seed
            )
        candidate = intervals.latency(times["candidate"], quantile, seed=seed)
        baseline = intervals.latency(times["baseline"], quantile, seed=seed)
        own += judge.latency_numbers(metric, candidate, ratio, rival)
        reference.append(judge.Number(metric=metric, against="absolute", estimate=baseline))
