"""Measure quality, bytes and latency of a target's graphs or engines.

The compressed model is the candidate. It is compared with the untouched model (the baseline) and
with the champion, which are measured in the same run and on the same machine.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import task

from compressors.contracts import (
    Artifact,
    Signature,
    Split,
    metric,
)
from compressors.contracts.metrics.serving import BYTES
from compressors.contracts.output_metrics import (
    default_batch_sizes_of_outputs,
    quality_metrics_of_outputs,
)
from compressors.contracts.targets.runtime import Session
from compressors.core.batches import Batch, Rows, batches
from compressors.errors.metrics import MetricRefused
from compressors.lower.serving_wrapper import served_graphs
from compressors.metrics.full_ranking import RankedVectors, ranking_metrics
from compressors.metrics.measured import (
    Measured,
    Number,
    byte_numbers,
    exact_estimate,
    quality_numbers,
)
from infra.bundle.bundle_folder import read
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import SCORING_ROWS, fetch_split
from tasks.evaluation.graph_sessions import open_graph, require_same_tokenizers
from tasks.evaluation.latency import measure_latency
from tasks.evaluation.quality import (
    Quality,
    QueryQuality,
    queries_of,
    row_quality,
)
from tasks.orchestration.documents import Measurement, Ranking
from tasks.orchestration.graph_documents import served_bytes
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import local, store
from tasks.retrieval.encode_items import read_item_vectors
from tasks.retrieval.towers import encode_queries, graph_tower
from tasks.target_adapters import machine_of

log = logging.getLogger(__name__)
Array = NDArray[Any]


@task(task_run_name="measure {target}", **TASK_OPTIONS)
def measure(
    target: str,
    bundle: Artifact,
    baseline: Artifact,
    candidate: Artifact,
    champion: Artifact | None,
    test: Artifact,
    test_rows: int,
    ranking: Ranking | None,
    item_vectors: dict[str, Artifact],
    metrics: tuple[str, ...],
    seed: int,
) -> Artifact:
    """Score the test rows in a target's runtime, time the models in turn, and store all numbers.

    Of a retrieval model only the query tower is timed: a request waits only for this tower, since
    the items' vectors are computed in advance.

    Args:
        target: a target with a runtime.
        bundle: the bundle with the signature.
        baseline: the untouched model's graphs or engines for this target.
        candidate: the compressed model's graphs or engines.
        champion: the graphs or engines that serve now; None if there are none.
        test: the prepared test split, whose columns are stored as tensors.
        test_rows: number of rows of the test split.
        ranking: the catalogue and the earlier interactions of a retrieval model; None for other
            tasks.
        item_vectors: for a retrieval model, the vectors of all items that ``encode_items`` stored
            for each model: ``baseline``, ``candidate`` and ``champion``, if there is one.
        metrics: metrics that the limits name, in addition to those measured for every model.
        seed: seed of the bootstrap.

    Returns:
        The artifact of ``measurement.json``.

    Raises:
        MetricRefused: the models have different graphs, inputs or tokenizers, or a score is not
            finite.
    """
    signature = read(local(bundle)).signature
    outputs = signature.outputs
    graphs = {"baseline": baseline, "candidate": candidate}
    if champion is not None:
        graphs["champion"] = champion
    folders = {name: local(artifact) for name, artifact in graphs.items()}
    request_graph = served_graphs(signature)[0]
    sessions = {
        name: open_graph(target, folder, signature, request_graph)
        for name, folder in folders.items()
    }
    _require_same_inputs(sessions)
    require_same_tokenizers(folders)
    names = quality_metrics_of_outputs(
        outputs, grouped=signature.group is not None, additional=metrics
    )
    quality = _evaluate(
        signature, sessions, fetch_split(test, test_rows), ranking, item_vectors, names, seed
    )

    candidate_numbers: list[Number] = []
    baseline_numbers: list[Number] = []
    resolves: dict[str, float] = {}  # by metric, the smallest change that these rows can detect
    for name in names:
        pair = quality.paired(name, "baseline", "candidate")
        with_champion = (
            quality.paired(name, "champion", "candidate") if champion is not None else None
        )
        candidate_numbers += quality_numbers(name, pair, with_champion)
        baseline_numbers.append(
            # "absolute": the model's number, not a comparison with another model.
            Number(metric=name, against="absolute", estimate=pair.baseline)
        )
        resolves[name] = pair.resolves
    for name, estimate in quality.score_change("baseline", "candidate").items():
        candidate_numbers.append(Number(metric=name, against="absolute", estimate=estimate))
    bytes_of = {name: served_bytes(folder) for name, folder in folders.items()}
    candidate_numbers += byte_numbers(
        bytes_of["candidate"], bytes_of["baseline"], bytes_of.get("champion")
    )
    baseline_numbers.append(
        Number(
            metric=BYTES.name,
            against="absolute",
            estimate=exact_estimate(float(bytes_of["baseline"])),
        )
    )
    limited_sizes = {size for name in metrics if (size := metric(name).batch) is not None}
    not_timed: dict[str, float] = {}
    for size in sorted({*default_batch_sizes_of_outputs(outputs), *limited_sizes}):
        if size > test_rows:
            log.warning(
                "Latency at batch %d is not measured: there are only %d test rows", size, test_rows
            )
            continue
        split = fetch_split(test, test_rows)
        # A request is a query: if one graph has both towers, its inputs are those of the query.
        request_rows = Rows(split, request_graph.signature)
        inputs = _to_arrays(request_rows.take(torch.arange(size)))
        timed = measure_latency(sessions, inputs, size, metrics, seed)
        candidate_numbers += timed.candidate
        baseline_numbers += timed.baseline
        not_timed |= timed.not_timed
    units = {output.name: output.task_kind.score_unit for output in outputs}
    measurement = Measurement(
        numbers=Measured(
            numbers=tuple(candidate_numbers),
            has_champion=champion is not None,
            score_unit=None if len(units) > 1 else units[outputs[0].name],
            units_of_outputs=units if len(units) > 1 else {},
        ),
        baseline=Measured(numbers=tuple(baseline_numbers)),
        resolves=resolves,
        not_timed=not_timed,
        rows=test_rows,
        machine=machine_of(target),
    )
    with scratch_folder("measure") as scratch:
        (Path(scratch) / "measurement.json").write_text(measurement.model_dump_json(indent=1))
        return store().put(Path(scratch))


def _require_same_inputs(sessions: Mapping[str, Session]) -> None:
    """Raise if the graph of one model has other inputs than the candidate's graph."""
    expected = set(sessions["candidate"].inputs)
    for name, session in sessions.items():
        if set(session.inputs) != expected:
            raise MetricRefused(
                "inputs_differ",
                model=name,
                got=tuple(session.inputs),
                expected=tuple(sorted(expected)),
            )


def _evaluate(
    signature: Signature,
    sessions: Mapping[str, Session],
    test: Split,
    ranking: Ranking | None,
    item_vectors: Mapping[str, Artifact],
    names: tuple[str, ...],
    seed: int,
) -> Quality:
    """Evaluate every model on the test rows: one score per row, or one ranking per query."""
    if ranking is None:
        rows = list(batches(test, signature, SCORING_ROWS))
        scores = {name: _score_rows(name, session, rows) for name, session in sessions.items()}
        return row_quality(signature, test, scores, seed)
    queries = queries_of(signature, test, ranking)
    vectors = {
        name: RankedVectors(
            encode_queries(graph_tower(session, signature, "query"), signature, test, queries.row),
            read_item_vectors(item_vectors[name]),
            queries,
        )
        for name, session in sessions.items()
    }
    values = {name: ranking_metrics(ranked, names) for name, ranked in vectors.items()}
    return QueryQuality(values, test.rows, seed, vectors)


def _score_rows(name: str, session: Session, rows: list[Batch]) -> Array:
    """Return the scores ``(rows,)`` or ``(rows, outputs)`` of one model.

    Raises:
        MetricRefused: a score is not finite.
    """
    parts = [session.scores(_to_arrays(batch)) for batch in rows]
    scores = np.concatenate(parts)
    is_finite = np.isfinite(scores).reshape(len(scores), -1).all(axis=1)
    not_finite = np.flatnonzero(~is_finite)
    if not_finite.size:
        raise MetricRefused(
            "graph_scores_not_finite", model=name, count=not_finite.size, row=int(not_finite[0])
        )
    return scores


def _to_arrays(batch: Batch) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in batch.inputs.items()}
