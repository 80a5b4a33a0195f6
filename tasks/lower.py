"""Lower a model to ONNX graphs for one target.

Each graph is exported, compared with the torch module, and audited: the audit counts quantized
operators in the graph as the target's runtime has optimized it.
"""

import logging
from pathlib import Path

import torch
from prefect import task
from torch import Tensor

from compressors.contracts import (
    Artifact,
    JaggedBag,
    Plan,
    SequenceInput,
    Signature,
    Split,
    TokensInput,
)
from compressors.contracts.targets import TARGETS
from compressors.core.batches import Rows, rows_per_batch
from compressors.core.modules.formats import PackedLinear
from compressors.core.random_inputs import edge_rows, generate_edge_inputs
from compressors.core.runner import rows_of_tables
from compressors.core.scores import tower_arguments
from compressors.core.units import Unit, stored_bytes
from compressors.lower.comparison.parity import worst_parity
from compressors.lower.export import Lowered, lower
from compressors.lower.findings import Parity
from compressors.lower.graph_weights import find_unused_layers, weights_of_graph
from compressors.lower.serving_wrapper import (
    SCORE,
    VECTOR,
    ServedGraph,
    input_names,
    served_graphs,
)
from compressors.lower.targets.registry import lowering_target
from compressors.prune.dense.sparse_2_4 import sparse_layers
from infra.data.tokenization import load_tokenizers
from infra.onnxruntime.sessions import OnnxRuntime
from infra.settings import load_settings
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import LoadedBundle, fetch_split, load_bundle, tokenizer_files
from tasks.evaluation.parity import GraphCheck, runnable_graph
from tasks.orchestration.graph_documents import (
    TOKENIZER_SUFFIX,
    GraphInput,
    LoweredGraph,
    Lowering,
    TextInput,
)
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import store
from tasks.target_adapters import runtime_of_graphs

log = logging.getLogger(__name__)
PROBE_ROWS = 2048
"""Rows of data on which a graph and the module are compared."""
SMALL_BATCHES = (1, 2)
"""Batch sizes at which scores must be as in a batch of ``PROBE_ROWS``, within the tolerance."""
EDGE_ROWS = 64
"""Fewest synthetic rows with extreme inputs."""


@task(task_run_name="lower {target}", **TASK_OPTIONS)
def lower_model(
    bundle: Artifact,
    target: str,
    probe: Artifact,
    probe_rows: int,
    most_rows: int,
) -> Artifact:
    """Export a bundle's model for one target, check its graphs, and store them.

    Graphs and module are compared on rows of data and on synthetic edge cases (ids out of range,
    empty and full lists). If the target serves graphs, they run in its runtime, otherwise in ONNX
    Runtime, which runs the graphs of every target.

    Args:
        bundle: the model.
        target: name of the target.
        probe: the prepared split (its columns as tensors) whose first rows are compared.
        probe_rows: number of rows of that split.
        most_rows: the largest batch a graph must accept.

    Returns:
        The artifact of one ``.onnx`` file per graph, the tokenizers of inputs that are texts, and
        ``lowering.json``.

    Raises:
        NotLowerable: the target has no lowering for a part of the model.
        ParityLost: a graph's outputs differ from the module's by more than the tolerance.
        AuditFailed: the runtime computes a quantized layer or table in float.
    """
    loaded = load_bundle(bundle)
    # A served graph links to the bundle's weight files. An engine contains its weights instead.
    files = {} if TARGETS[target].is_built else loaded.model.files
    with scratch_folder("lower", store().scratch(load_settings().cache)) as scratch:
        graphs = []
        for served_graph in served_graphs(loaded.manifest.signature):
            path = Path(scratch) / f"{served_graph.name}.onnx"
            model = loaded.model
            lowered = lower(model.module, served_graph, target, path, most_rows, files)
            rows = fetch_split(probe, probe_rows)
            graph = _check_graph(loaded, lowered, target, path, rows, most_rows)
            log.info(
                "%s, graph %s: outputs differ from torch by at most %.2g on %d rows",
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
            packed_bytes=_count_weight_bytes(loaded),
            repeated_bytes=_count_repeated_bytes(loaded),
            texts=_write_tokenizers(loaded, Path(scratch)),
        )
        (Path(scratch) / "lowering.json").write_text(lowering.model_dump_json(indent=1))
        # Files that link to files of the bundle have known hashes, so they are not hashed again.
        return store().take_derived(Path(scratch), bundle, loaded.folder)


def _check_graph(
    loaded: LoadedBundle,
    lowered: Lowered,
    target: str,
    path: Path,
    probe: Split,
    most_rows: int,
) -> LoweredGraph:
    """Compare a graph with its module, audit it, and return its description.

    Args:
        loaded: the model.
        lowered: the exported graph.
        target: name of the target.
        path: the graph's file.
        probe: the prepared split whose first rows are compared.
        most_rows: the largest batch the graph must accept.

    Raises:
        ParityLost: the graph's outputs differ from the module's by more than the tolerance.
        AuditFailed: the runtime computes a quantized layer or table in float.
    """
    served_graph = lowered.wrapper.served_graph
    signature, plan = served_graph.signature, _select_plan_lines(loaded, lowered)
    runtime = runtime_of_graphs(target)
    comparison_runtime = OnnxRuntime() if runtime is None else runtime
    with runnable_graph(path, target, plan) as runnable:
        session = comparison_runtime.open(runnable, load_settings().threads)
        check = GraphCheck(loaded.model.module, lowered, plan, target, most_rows, runnable, session)
        rows_parities: list[Parity] = []
        for rows in _build_probe_rows(probe, loaded.manifest.signature, served_graph):
            parities, expected = check.parity(rows.take(rows.first(PROBE_ROWS)), "the data")
            for size in SMALL_BATCHES:
                inputs = rows.take(rows.first(size))
                check.require_same_in_small_batch(expected[:size], inputs, parities)
            if (indices := rows.find_most_padded()) is not None:
                padded, _ = check.scores(rows.take(indices), "the data")
                check.require_same_in_small_batch(padded[:1], rows.take(indices[:1]), parities)
            rows_parities += parities
        tables = rows_of_tables(loaded.model.module, signature)
        # Two rows per input with ids out of range, one with empty lists, one with full lists.
        edge = generate_edge_inputs(signature, tables, max(EDGE_ROWS, edge_rows(signature)))
        edge_parities, _ = check.parity(edge, "the edge cases")
        del session, check  # frees their memory: the audit opens a second session of this graph
    optimized = None
    # ONNX Runtime copies each tensor to write the optimized graph. An untouched model has nothing
    # to audit, so its tables are not copied.
    if runtime is not None and plan is not None:
        optimized = runtime.optimized_graph(path)
    audit = None
    if optimized is not None:
        audit = lowering_target(target).audit(optimized, plan, lowered.tables, lowered.layers)
    return LoweredGraph(
        name=served_graph.name,
        inputs=tuple(_describe_graph_inputs(edge, signature)),
        output=VECTOR if served_graph.is_tower else SCORE,
        several_outputs=served_graph.outputs if len(served_graph.outputs) > 1 else (),
        width=expected.shape[1] if served_graph.is_tower else None,
        rows_parity=worst_parity(rows_parities),
        edge_parity=worst_parity(edge_parities),
        audit=audit,
        tables=lowered.tables,
        packed_bytes=_count_packed_bytes(loaded, served_graph),
        sparse_layers=sparse_layers(loaded.model.module, plan),
    )


def _select_plan_lines(loaded: LoadedBundle, lowered: Lowered) -> Plan | None:
    """Return the plan with only the units that a graph runs; None if the model has no plan."""
    plan, served_graph = loaded.model.plan, lowered.wrapper.served_graph
    if plan is None:
        return None
    if served_graph.is_tower:
        names = _list_units_of_tower(loaded, served_graph)
        plan = Plan(lines=tuple(line for line in plan.lines if line.module in names))
    in_graph = {layer.module for layer in lowered.layers}
    missing = [
        unit.name
        for unit in Unit.of(loaded.model.module)
        if isinstance(unit.module, PackedLinear)
        and unit.name not in in_graph
        and plan.of(unit.name) is not None
    ]
    if not missing:  # as for most networks: each layer affects an output
        return plan
    unused = find_unused_layers(loaded.model.module, served_graph, missing)
    return Plan(lines=tuple(line for line in plan.lines if line.module not in unused))


def _list_units_of_tower(loaded: LoadedBundle, served_graph: ServedGraph) -> set[str]:
    """Return the names of the units whose tensors the graph of a tower reads."""
    tensors = set(map(id, weights_of_graph(loaded.model.module, served_graph)))
    modules = set(served_graph.part(loaded.model.module).modules())
    return {
        unit.name
        for unit in Unit.of(loaded.model.module)
        if unit.module in modules
        and any(id(tensor) in tensors for tensor in unit.module.state_dict(keep_vars=True).values())
    }


class _ProbeRows:
    """The rows on which a graph and its module are compared, as inputs of the graph.

    Args:
        rows: the rows, with the inputs of the model or of a tower.
        signature: the model's signature.
        tower: the tower whose inputs the graph has; None for a model without towers.
    """

    def __init__(self, rows: Rows, signature: Signature, tower: str | None) -> None:
        self._rows, self._signature, self._tower = rows, signature, tower

    def first(self, count: int) -> Tensor:
        """Return the indices of the first ``count`` rows; of fewer if they have long texts."""
        return torch.arange(min(rows_per_batch(self._rows.signature, count), len(self._rows)))

    def find_most_padded(self) -> Tensor | None:
        """Return the indices of the shortest and longest row; None if all have one length."""
        lengths = self._rows.lengths()
        if lengths is None or bool((lengths == lengths[0]).all()):
            return None
        return torch.stack([lengths.argmin(), lengths.argmax()])

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the rows with these indices, int64 ``(batch,)``."""
        inputs = self._rows.take(indices).inputs
        if self._tower is None:
            return inputs
        return tower_arguments(inputs, self._signature, self._tower)


def _build_probe_rows(
    split: Split, signature: Signature, served_graph: ServedGraph
) -> list[_ProbeRows]:
    """Return the rows of a split for each tower of a graph, or for a model without towers."""
    if not served_graph.towers:
        return [_ProbeRows(Rows(split, served_graph.signature), signature, None)]
    return [
        _ProbeRows(Rows(split, signature.of_tower(tower)), signature, tower)
        for tower in served_graph.towers
    ]


def _describe_graph_inputs(example: dict[str, Tensor], signature: Signature) -> list[GraphInput]:
    """Describe a graph's inputs; dtypes and shapes are those of an example batch.

    The example has a row with lists of the longest length, so sequences have their largest shape.
    """
    longest = {item.name: item.shape[0] for item in signature.inputs if isinstance(item, JaggedBag)}
    shortest = {
        name: item.shortest
        for item in signature.inputs
        if isinstance(item, SequenceInput) and item.is_dynamic
        for name in item.tensors_of_ids
    }
    return [
        GraphInput(
            name=name,
            dtype=str(example[name].dtype).removeprefix("torch."),
            shape=tuple(example[name].shape[1:]),
            longest=longest.get(name),
            shortest=shortest.get(name),
        )
        for name in input_names(signature)
    ]


def _write_tokenizers(loaded: LoadedBundle, folder: Path) -> tuple[TextInput, ...]:
    """Write the tokenizer of each input that reads texts, and return how clients use it."""
    signature = loaded.manifest.signature
    tokenizers = load_tokenizers(signature, tokenizer_files(loaded.manifest))
    texts = []
    for served_graph in served_graphs(signature):
        for part in [signature.of_tower(name) for name in served_graph.towers] or [signature]:
            # If both towers are one module, they share the graph ``encoder``, whose inputs have the
            # names of the query tower's inputs.
            for item, of_graph in zip(part.inputs, served_graph.signature.inputs, strict=True):
                if not isinstance(item, TokensInput) or not isinstance(of_graph, TokensInput):
                    continue
                file = f"{item.name}{TOKENIZER_SUFFIX}"
                tokenizers[item.name].save(folder / file)
                texts.append(
                    TextInput(
                        column=item.columns[0],
                        graph=served_graph.name,
                        tokenizer=file,
                        ids=of_graph.name,
                        mask=of_graph.mask,
                        token_types=of_graph.token_types,
                        lengths=of_graph.lengths,
                        positions=of_graph.positions,
                        first_position=of_graph.first_position,
                    )
                )
    return tuple(texts)


def _count_packed_bytes(loaded: LoadedBundle, served_graph: ServedGraph) -> int:
    """Return the bytes of one graph's weights as stored, which is packed if they are compressed.

    A table that both towers read counts in both graphs.
    """
    if served_graph.is_tower:
        return sum(tensor.nbytes for tensor in weights_of_graph(loaded.model.module, served_graph))
    return _count_weight_bytes(loaded)


def _count_repeated_bytes(loaded: LoadedBundle) -> int:
    """Return the bytes of tensors that several graphs store, without each tensor's first copy."""
    counted: set[int] = set()
    repeated = 0
    for served_graph in served_graphs(loaded.manifest.signature):
        tensors = weights_of_graph(loaded.model.module, served_graph)
        repeated += sum(tensor.nbytes for tensor in tensors if id(tensor) in counted)
        counted |= set(map(id, tensors))
    return repeated


def _count_weight_bytes(loaded: LoadedBundle) -> int:
    """Return the bytes of a model's weights, counting each shared tensor once, as plans do."""
    plan = loaded.model.plan
    if plan is not None:
        return plan.bytes_after
    return stored_bytes(loaded.model.module)
