"""Measure quality, bytes and latency of the served graphs, and of the baseline in the same run."""

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prefect import task

from compressors.contracts import (
    Artifact,
    Signature,
    Split,
    metric,
    quality_metrics,
    usual_batches,
)
from compressors.contracts import target as declared_target
from compressors.contracts.metrics.serving import BYTES, QUANTILES, latency
from compressors.contracts.targets import Target
from compressors.contracts.targets.runtime import Runtime, Session
from compressors.core.batches import Batch, batches
from compressors.errors.metrics import MetricRefused
from compressors.lower.serving_wrapper import served_graphs
from compressors.metrics import intervals, judge
from compressors.metrics.full_ranking import ranking_metrics
from infra.bundle.bundle_folder import read
from infra.settings import load_settings
from infra.store.temporary import scratch_folder
from infra.timing import interleaved_ms, machine
from tasks.bundles.loading import SCORING_ROWS, split_of
from tasks.evaluation.quality import (
    ByQuery,
    Quality,
    Vectors,
    ranked_vectors,
    row_quality,
)
from tasks.orchestration.documents import Measurement, Ranking, lowering_of, served_bytes
from tasks.orchestration.policy import KEPT
from tasks.orchestration.workspace import local, store
from tasks.target_adapters import runtime_of

log = logging.getLogger(__name__)
Array = NDArray[Any]

BUDGET_MS = 15_000.0  # for one batch size, all sessions together
MOST_ROUNDS = 1000


@task(task_run_name="measure {target}", **KEPT)
def measure(
    target: str,
    bundle: Artifact,
    baseline: Artifact,
    candidate: Artifact,
    champion: Artifact | None,
    test: Artifact,
    test_rows: int,
    ranking: Ranking | None,
    metrics: tuple[str, ...],
    seed: int,
) -> Artifact:
    """Score the test rows in a target's runtime, time its graphs in turn, store all numbers.

    For a retrieval model the query tower is timed: a request waits only for it, since the items'
    vectors are computed in advance.

    Args:
        target: a target with a runtime.
        bundle: the bundle of the signature.
        baseline: the untouched model's graphs or engines for this target.
        candidate: the compressed model's graphs or engines.
        champion: what production runs now for this target, if anything.
        test: the prepared test split.
        test_rows: its number of rows.
        ranking: the catalogue and the hidden items of a retrieval model; None for other tasks.
        metrics: metrics of limits that are not measured for every model.
        seed: seed of the bootstrap.
    """
    signature = read(local(bundle)).signature
    output = signature.single_output
    threads = load_settings().threads
    graphs = {"baseline": baseline, "candidate": candidate}
    if champion is not None:
        graphs["champion"] = champion
    folders = {name: local(artifact) for name, artifact in graphs.items()}
    declared, runtime = declared_target(target), runtime_of(target)
    sessions = {
        name: _sessions(declared, runtime, folder, signature, threads)
        for name, folder in folders.items()
    }
    _same_inputs(sessions)
    names = quality_metrics(
        output.kind, grouped=signature.group is not None, named=(output.metric, *metrics)
    )
    quality = _quality(signature, sessions, split_of(test, test_rows), ranking, names, seed)

    own: list[judge.Number] = []
    reference: list[judge.Number] = []
    resolves: dict[str, float] = {}
    for name in names:
        pair = quality.paired(name, "baseline", "candidate")
        rival = quality.paired(name, "champion", "candidate") if champion is not None else None
        own += judge.quality_numbers(name, pair, rival)
        reference.append(judge.Number(metric=name, against="absolute", estimate=pair.baseline))
        resolves[name] = pair.resolves
    unit = output.task_kind.score_unit
    for name, estimate in quality.score_change("baseline", "candidate", unit).items():
        own.append(judge.Number(metric=name, against="absolute", estimate=estimate))
    sizes = {name: served_bytes(folder) for name, folder in folders.items()}
    own += judge.byte_numbers(sizes["candidate"], sizes["baseline"], sizes.get("champion"))
    reference.append(
        judge.Number(
            metric=BYTES.name, against="absolute", estimate=judge.exact(float(sizes["baseline"]))
        )
    )
    waited_for = served_graphs(signature)[0]
    timed = {name: held[waited_for.name] for name, held in sessions.items()}
    named = {batch for name in metrics if (batch := metric(name).batch) is not None}
    for size in sorted({*usual_batches(output.kind), *named}):
        _time(size, timed, waited_for.signature, test, test_rows, seed, own, reference)
    measurement = Measurement(
        numbers=judge.Measured(
            numbers=tuple(own), has_champion=champion is not None, score_unit=unit
        ),
        baseline=judge.Measured(numbers=tuple(reference)),
        resolves=resolves,
        rows=test_rows,
        machine=machine(declared.label, runtime.version(), threads),
    )
    with scratch_folder("measure") as scratch:
        (Path(scratch) / "measurement.json").write_text(measurement.model_dump_json(indent=1))
        return store().put(Path(scratch))


Sessions = dict[str, Session]
"""The graphs of one model, by name."""


def _sessions(
    target: Target, runtime: Runtime, folder: Path, signature: Signature, threads: int
) -> Sessions:
    """Open sessions for every graph of a stored model that this signature requires.

    Raises:
        CompressionError: the model has other graphs.
    """
    wanted = [form.name for form in served_graphs(signature)]
    found = [graph.name for graph in lowering_of(folder).graphs]
    if sorted(found) != sorted(wanted):
        task_name = signature.single_output.kind
        raise MetricRefused(
            "graphs_differ", task=task_name, expected=tuple(wanted), got=tuple(found)
        )
    return {name: runtime.open(folder / target.served_file(name), threads) for name in wanted}


def _same_inputs(sessions: dict[str, Sessions]) -> None:
    for graph, candidate in sessions["candidate"].items():
        wanted = set(candidate.inputs)
        for name, held in sessions.items():
            if set(held[graph].inputs) != wanted:
                raise MetricRefused(
                    "inputs_differ",
                    model=name,
                    got=tuple(held[graph].inputs),
                    expected=tuple(sorted(wanted)),
                )


def _quality(
    signature: Signature,
    sessions: dict[str, Sessions],
    test: Split,
    ranking: Ranking | None,
    names: tuple[str, ...],
    seed: int,
) -> Quality:
    """Evaluate the served graphs: one score per row, or one ranking per query."""
    if ranking is not None:
        vectors = {
            name: ranked_vectors(_towers(held), signature, test, ranking)
            for name, held in sessions.items()
        }
        values = {name: ranking_metrics(of_model, names) for name, of_model in vectors.items()}
        return ByQuery(values, test.rows, seed, vectors)
    rows = list(batches(test, signature, SCORING_ROWS))
    (form,) = served_graphs(signature)
    scores = {name: _scores(name, held[form.name], rows) for name, held in sessions.items()}
    return row_quality(rows, scores, seed)


def _towers(sessions: Sessions) -> dict[str, Vectors]:
    def vectors(session: Session) -> Vectors:
        return lambda inputs: session.scores({name: t.numpy() for name, t in inputs.items()})

    return {name: vectors(session) for name, session in sessions.items()}


def _scores(name: str, session: Session, rows: list[Batch]) -> Array:
    parts = [session.scores(_arrays(batch)) for batch in rows]
    scores = np.concatenate(parts)
    refused = np.flatnonzero(~np.isfinite(scores))
    if refused.size:
        raise MetricRefused(
            "graph_scores_not_finite", model=name, count=refused.size, row=int(refused[0])
        )
    return scores


def _arrays(batch: Batch) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in batch.inputs.items()}


def _time(
    size: int,
    sessions: dict[str, Session],
    signature: Signature,
    test: Artifact,
    test_rows: int,
    seed: int,
    own: list[judge.Number],
    reference: list[judge.Number],
) -> None:
    """Add p50 and p99 at one batch size; a batch larger than the test data is skipped."""
    if size > test_rows:
        log.warning("no latency at batch %d: there are %d test rows", size, test_rows)
        return
    inputs = _arrays(next(batches(split_of(test, test_rows), signature, size)))
    listed = list(sessions.values())
    trial = interleaved_ms(listed, inputs, rounds=5, warmup=5)
    once = sum(float(np.median(times)) for times in trial)
    needed = max(intervals.rounds_needed(quantile) for quantile in QUANTILES.values())
    rounds = max(needed, min(MOST_ROUNDS, math.ceil(BUDGET_MS / once)))
    times = dict(zip(sessions, interleaved_ms(listed, inputs, rounds), strict=True))
    for name, quantile in QUANTILES.items():
        timed = latency(name, size).name
        ratio = intervals.latency_ratio(times["baseline"], times["candidate"], quantile, seed=seed)
        rival = None
        if "champion" in times:
            rival = intervals.latency_ratio(
                times["champion"], times["candidate"], quantile, seed=seed
            )
        candidate = intervals.latency(times["candidate"], quantile, seed=seed)
        baseline = intervals.latency(times["baseline"], quantile, seed=seed)
        own += judge.latency_numbers(timed, candidate, ratio, rival)
        reference.append(judge.Number(metric=timed, against="absolute", estimate=baseline))
