"""Build a target's engines from a lowered model, one engine per graph.

The builder audits each engine: it checks, for example, that tables stay compressed in it.
"""

import logging
import shutil
from pathlib import Path

from prefect import task

from compressors.contracts import Artifact
from compressors.contracts import target as declared_target
from compressors.contracts.targets.builder import BuildRequest, Profile, TableWeights
from infra.store.temporary import scratch_folder
from tasks.orchestration.graph_documents import (
    BatchSizes,
    LoweredGraph,
    build_record,
    read_lowering,
)
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import local, store
from tasks.target_adapters import get_builder

log = logging.getLogger(__name__)


def require_builder(target: str) -> None:
    """Raise if a target needs an engine builder that is not usable on this machine.

    Called before a long recipe, whose result could otherwise not be built at the end.

    Raises:
        Refused: the target's builder cannot build on this machine.
    """
    if declared_target(target).is_built:
        get_builder(target).version()


@task(task_run_name="build {target}", **{**TASK_OPTIONS, "retries": 1})
def build(
    lowered: Artifact,
    target: str,
    batch: BatchSizes,
    longest: dict[str, int],
    seconds: float,
) -> Artifact:
    """Build and audit one engine per graph, and store the engines.

    Each engine is built in a child process, so that it can be stopped at the time limit.

    Args:
        lowered: the artifact of the graphs, as stored by ``lower_model``.
        target: a target that serves engines.
        batch: the batch sizes that an engine must accept.
        longest: maximum list length of each jagged input, by name.
        seconds: time limit of building and auditing one engine.

    Returns:
        The artifact of the engines, a record of each build, the tokenizers of texts, and
        ``lowering.json``, the description of the graphs.

    Raises:
        BuildRefused: the builder is not installed, refuses a graph, or an audit failed.
        ChildFailed: the time limit passed, or the builder crashed.
    """
    builder = get_builder(target)
    folder = local(lowered)
    lowering = read_lowering(folder)
    with scratch_folder("build") as scratch:
        output = Path(scratch) / "release"
        output.mkdir()
        for graph in lowering.graphs:
            request = BuildRequest(
                target=target,
                onnx=str(folder / graph.file),
                profiles=_build_optimization_profiles(graph, batch, longest),
                tables=tuple(
                    TableWeights(
                        module=table.module,
                        rows=table.rows,
                        initializers=table.names,
                        rows_per_entry=table.rows_per_entry,  # such as rows that share a scale
                        multiplied=table.multiplied,  # whether a matmul reads the whole table
                    )
                    for table in graph.tables
                ),
                packed_bytes=graph.packed_bytes,  # of the weights in the graph, as compressed
                sparse_layers=graph.sparse_layers,
                seconds=seconds,
            )
            work = Path(scratch) / graph.name
            work.mkdir()
            engine = builder.build(request, work)
            path = Path(engine.path)
            name = f"{graph.name}{path.suffix}"
            path.rename(output / name)
            (output / build_record(graph.name)).write_text(engine.record(name))
            log.info("%s %s, %s: %d bytes", target, engine.version, name, engine.bytes)
        for text in lowering.texts:
            shutil.copyfile(folder / text.tokenizer, output / text.tokenizer)
        (output / "lowering.json").write_text(lowering.model_dump_json(indent=1))
        return store().put(output)


def _build_optimization_profiles(
    graph: LoweredGraph, batch: BatchSizes, longest: dict[str, int]
) -> tuple[Profile, ...]:
    """Return the smallest, best and largest shape of each input, for TensorRT."""
    profiles = []
    for item in graph.inputs:
        sizes = [batch.low, batch.best, batch.high]
        if item.name in longest:
            # The first dimension is the values of all lists of a batch. Engines are optimized for
            # lists of half the maximum length.
            max_length = longest[item.name]
            sizes = [1, batch.best * max(max_length // 2, 1), batch.high * max_length]
        low, best, high = ((size, *item.shape) for size in sizes)
        if item.shortest is not None:  # a sequence; best is half the longest, too
            low = (low[0], item.shortest)
            best = (best[0], max(item.shape[0] // 2, item.shortest))
        profiles.append(Profile(input=item.name, low=low, best=best, high=high))
    return tuple(profiles)
