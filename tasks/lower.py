"""Lower a model to ONNX graphs for one target: export, compare with the module, audit."""

import logging
from pathlib import Path

from prefect import task
from torch import Tensor

from compressors.contracts import Artifact, JaggedBag, Plan, Signature, Split
from compressors.contracts.targets import TARGETS
from compressors.core.batches import batches, edge_example
from compressors.core.runner import rows_of_tables
from compressors.core.units import Unit, stored_bytes
from compressors.lower.export import Lowered, lower
from compressors.lower.serving_wrapper import ServedGraph, input_names, served_graphs
from compressors.lower.targets.registry import lowering_target
from compressors.prune.dense.sparse_2_4 import sparse_layers
from infra.onnxruntime.sessions import OnnxRuntime
from infra.settings import load_settings
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import Loaded, load_bundle, split_of
from tasks.evaluation.parity import Compared, checkable
from tasks.orchestration.documents import GraphInput, LoweredGraph, Lowering
from tasks.orchestration.policy import KEPT
from tasks.orchestration.workspace import store
from tasks.target_adapters import runtime_of_graphs

log = logging.getLogger(__name__)
PROBE_ROWS = 2048
SMALL_BATCHES = (1, 2)
EDGE_ROWS = 64


@task(task_run_name="lower {target}", **KEPT)
def lower_model(
    bundle: Artifact,
    target: str,
    probe: Artifact,
    probe_rows: int,
    most_rows: int,
) -> Artifact:
    """Lower a bundle's model for one target, and store its graphs with their facts.

    The graphs are compared with the module on rows of data, and on synthetic edge cases (ids out of
    range, empty and full lists): in the target's runtime if it serves graphs, otherwise in ONNX
    Runtime, which runs the graphs of every target.

    Args:
        bundle: the model.
        target: the target, which decides the lowering of each storage format.
        probe: a prepared split to compare on.
        probe_rows: number of rows of that split.
        most_rows: the largest batch a graph must accept.

    Raises:
        NotLowerable, ParityLost, AuditFailed: contains the graph and the problem.
    """
    loaded = load_bundle(bundle)
    # An engine contains the weights of its graph, so a graph that is built needs no links.
    files = {} if TARGETS[target].is_built else loaded.model.files
    with scratch_folder("lower", store().scratch(load_settings().cache)) as scratch:
        graphs = []
        for form in served_graphs(loaded.manifest.signature):
            path = Path(scratch) / f"{form.name}.onnx"
            model = loaded.model
            lowered = lower(model.module, form, target, path, most_rows, files)
            rows = split_of(probe, probe_rows)
            graph = _examine(loaded, lowered, target, path, rows, most_rows)
            log.info(
                "%s, %s: largest difference %.2g on %d rows",
                target,
                graph.name,
                graph.rows_parity.largest,
                graph.rows_parity.rows,
            )
            graphs.append(graph)
        lowering = Lowering(
            target=target,
            name=f"{loaded.manifest.name}@{loaded.manifest.version}",
            graphs=tuple(graphs),
            packed_bytes=_weight_bytes(loaded),
            repeated_bytes=_repeated_bytes(loaded),
        )
        (Path(scratch) / "lowering.json").write_text(lowering.model_dump_json(indent=1))
        return store().take_derived(Path(scratch), bundle, loaded.folder)


def _examine(
    loaded: Loaded,
    lowered: Lowered,
    target: str,
    path: Path,
    probe: Split,
    most_rows: int,
) -> LoweredGraph:
    form = lowered.served.form
    signature, plan = form.signature, _plan(loaded, form)
    runtime = runtime_of_graphs(target)
    checked_in = OnnxRuntime() if runtime is None else runtime
    with checkable(path, target, plan) as runnable:
        session = checked_in.open(runnable, load_settings().threads)
        compared = Compared(
            loaded.model.module, lowered, plan, target, most_rows, runnable, session
        )
        rows_parity, expected = compared.parity(_first(probe, signature, PROBE_ROWS), "the data")
        for few in SMALL_BATCHES:
            compared.same_alone(expected[:few], _first(probe, signature, few), rows_parity)
        tables = rows_of_tables(loaded.model.module, signature)
        edge = edge_example(signature, tables, max(EDGE_ROWS, 2 * len(signature.inputs) + 2))
        edge_parity, _ = compared.parity(edge, "the edge cases")
        del session, compared  # the audit opens a second session of the same graph
    optimized = None
    # To write the optimized graph, ONNX Runtime copies each tensor. An untouched model contains
    # nothing that was ordered, so its tables are not copied.
    if runtime is not None and plan is not None:
        optimized = runtime.optimized_graph(path)
    found_in_graph = None
    if optimized is not None:
        rule = lowering_target(target)
        found_in_graph = rule.audit(optimized, plan, lowered.tables, lowered.layers)
    return LoweredGraph(
        name=form.name,
        inputs=tuple(_inputs(edge, signature)),
        output=form.output,
        width=expected.shape[1] if expected.ndim == 2 else None,
        rows_parity=rows_parity,
        edge_parity=edge_parity,
        audit=found_in_graph,
        tables=lowered.tables,
        packed_bytes=_packed_bytes(loaded, form),
        sparse_layers=sparse_layers(loaded.model.module, plan),
    )


def _plan(loaded: Loaded, form: ServedGraph) -> Plan | None:
    """Return the lines of the plan about units that a graph runs."""
    plan = loaded.model.plan
    if plan is None or not form.module:
        return plan
    mine = set(form.part(loaded.model.module).modules())
    names = {unit.name for unit in Unit.of(loaded.model.module) if unit.module in mine}
    return Plan(lines=tuple(line for line in plan.lines if line.module in names))


def _first(split: Split, signature: Signature, rows: int) -> dict[str, Tensor]:
    return next(batches(split, signature, rows)).inputs


def _inputs(example: dict[str, Tensor], signature: Signature) -> list[GraphInput]:
    longest = {item.name: item.shape[0] for item in signature.inputs if isinstance(item, JaggedBag)}
    return [
        GraphInput(
            name=name,
            dtype=str(example[name].dtype).removeprefix("torch."),
            shape=tuple(example[name].shape[1:]),
            longest=longest.get(name),
        )
        for name in input_names(signature)
    ]


def _packed_bytes(loaded: Loaded, form: ServedGraph) -> int:
    """Return the bytes of one graph's weights; a table that both towers read counts in both."""
    if form.module:
        return stored_bytes(form.part(loaded.model.module))
    return _weight_bytes(loaded)


def _repeated_bytes(loaded: Loaded) -> int:
    """Return the bytes of shared tensors, counted in every graph except the first."""
    seen: set[int] = set()
    repeated = 0
    for form in served_graphs(loaded.manifest.signature):
        part = form.part(loaded.model.module)
        repeated += stored_bytes(part) - stored_bytes(part, seen)
        seen |= {id(tensor) for tensor in part.state_dict(keep_vars=True).values()}
    return repeated


def _weight_bytes(loaded: Loaded) -> int:
    """Return the bytes of a model's weights, each stored tensor once, as plans count them."""
    plan = loaded.model.plan
    if plan is not None:
        return sum(line.bytes_after for line in plan.lines)
    return stored_bytes(loaded.model.module)
