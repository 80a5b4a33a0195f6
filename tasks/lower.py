"""One ONNX graph for one target: exported, compared with the module, audited."""

import logging
import tempfile
from pathlib import Path

import numpy as np
import torch
from prefect import task
from torch import Tensor

from compressors.batches import batches, edge_example
from compressors.contracts import Artifact, JaggedBag, Schema, Split, TargetKind
from compressors.errors import ParityLost
from compressors.lower.audit import audit
from compressors.lower.export import Lowered, lower
from compressors.lower.parity import FloatArray, Parity, compare
from compressors.lower.served import input_names
from compressors.step import rows_of_tables
from infra.errors import InfraError
from infra.onnxruntime import Session, optimized_graph
from infra.settings import load_settings
from tasks.documents import MODEL, GraphInput, Lowering
from tasks.loading import Loaded, load_bundle, split_of
from tasks.policy import KEPT
from tasks.stored import store

log = logging.getLogger(__name__)
PROBE_ROWS = 2048
SMALL_BATCHES = (1, 2)
EDGE_ROWS = 64


@task(task_run_name="lower {target}", **KEPT)
def lower_model(
    bundle: Artifact,
    target: TargetKind,
    probe: Artifact,
    probe_rows: int,
    most_rows: int,
    code: str,  # noqa: ARG001
) -> Artifact:
    """Write a bundle's model down for one target and store the graph with what was found.

    Both targets' graphs run in ONNX Runtime, so both are compared with the module here: on rows
    of data, and on made-up rows at the edges (ids out of range, empty and full lists).

    Args:
        bundle: the model.
        target: which target's form each storage format gets.
        probe: a prepared split to compare on.
        probe_rows: how many rows that split has.
        most_rows: the largest batch the graph must take.
        code: digest of the code that lowers; part of the cache key.

    Raises:
        NotLowerable, ParityLost, AuditFailed: what is wrong with the graph.
    """
    loaded = load_bundle(bundle)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / MODEL
        lowered = lower(loaded.model.module, loaded.manifest.signature, target, path, most_rows)
        lowering = _examine(loaded, lowered, target, path, probe, probe_rows)
        (Path(scratch) / "lowering.json").write_text(lowering.model_dump_json(indent=1))
        log.info(
            "%s: largest difference %.2g on %d rows",
            target,
            lowering.rows_parity.largest,
            lowering.rows_parity.rows,
        )
        return store().put(Path(scratch))


def _examine(
    loaded: Loaded,
    lowered: Lowered,
    target: TargetKind,
    path: Path,
    probe: Artifact,
    probe_rows: int,
) -> Lowering:
    schema, plan = loaded.manifest.signature, loaded.model.plan
    session = Session(path, load_settings().threads)
    split = split_of(probe, probe_rows)
    expected, found = _both(lowered, session, schema, _first(split, schema, PROBE_ROWS), target)
    rows_parity = compare(expected, found, plan, target)
    for few in SMALL_BATCHES:
        small = _both(lowered, session, schema, _first(split, schema, few), target)
        _same_alone(expected[:few], small, rows_parity, target)
    tables = rows_of_tables(loaded.model.module, schema)
    edge = edge_example(schema, tables, max(EDGE_ROWS, 2 * len(schema.inputs)))
    edge_parity = compare(*_both(lowered, session, schema, edge, target), plan, target)
    graph = None
    if target == "onnxruntime":
        graph = audit(optimized_graph(path), plan, lowered.tables)
    return Lowering(
        target=target,
        name=f"{loaded.manifest.name}@{loaded.manifest.version}",
        inputs=tuple(_inputs(edge, schema)),
        output="score",
        rows_parity=rows_parity,
        edge_parity=edge_parity,
        graph=graph,
        tables=lowered.tables,
        packed_bytes=_packed_bytes(loaded),
    )


def _first(split: Split, schema: Schema, rows: int) -> dict[str, Tensor]:
    return next(batches(split, schema, rows)).inputs


def _both(
    lowered: Lowered,
    session: Session,
    schema: Schema,
    inputs: dict[str, Tensor],
    target: TargetKind,
) -> tuple[FloatArray, FloatArray]:
    with torch.no_grad():
        expected = lowered.served(*(inputs[name] for name in input_names(schema)))
    try:
        found = session.scores({name: tensor.numpy() for name, tensor in inputs.items()})
    except InfraError as fault:
        rows = expected.shape[0]
        raise ParityLost(f"The {target} graph does not run on {rows} rows: {fault}") from fault
    return expected.numpy(), found


def _same_alone(
    together: FloatArray,
    alone: tuple[FloatArray, FloatArray],
    parity: Parity,
    target: TargetKind,
) -> None:
    """Refuse a model or graph whose answer for a row depends on the rows beside it.

    Raises:
        ParityLost: says which of the two, and by how much.
    """
    for what, scores in zip(("network", f"{target} graph"), alone, strict=True):
        gap = np.abs(scores - together)
        if scores.shape != together.shape or np.nanmax(gap, initial=0.0) > parity.largest_limit:
            raise ParityLost(
                f"The {what} scores {len(together)} row(s) alone differently than among others, by "
                f"up to {np.nanmax(gap, initial=0.0):.2g} (limit {parity.largest_limit:.2g}). A "
                f"served score must not depend on the batch: leave batch statistics and branches "
                f"on the batch size out of forward."
            )


def _inputs(example: dict[str, Tensor], schema: Schema) -> list[GraphInput]:
    longest = {item.name: item.shape[0] for item in schema.inputs if isinstance(item, JaggedBag)}
    return [
        GraphInput(
            name=name,
            dtype=str(example[name].dtype).removeprefix("torch."),
            shape=tuple(example[name].shape[1:]),
            longest=longest.get(name),
        )
        for name in input_names(schema)
    ]


def _packed_bytes(loaded: Loaded) -> int:
    """Bytes all weights take as planned; everything stored where there is no plan."""
    plan = loaded.model.plan
    if plan is not None:
        return sum(line.bytes_after for line in plan.lines)
    return sum(record.bytes for record in loaded.manifest.files.values())
