"""One TensorRT engine from a lowered graph."""

import logging
import tempfile
from pathlib import Path

from prefect import task

from compressors.contracts import Artifact, TargetKind
from infra.tensorrt import BuildRequest, Profile, TableWeights, Target, build_engine, load
from tasks.documents import MODEL, Batch, Lowering, lowering_of
from tasks.policy import KEPT
from tasks.stored import local, store

log = logging.getLogger(__name__)


def need_builder(target: TargetKind) -> None:
    """Refuse early, before a long recipe, what could not be built at its end.

    Raises:
        BuildRefused: the target's TensorRT cannot be imported here.
    """
    if target != "onnxruntime":
        load(target)


@task(task_run_name="build {target}", **{**KEPT, "retries": 1})
def build(
    lowered: Artifact,
    target: Target,
    batch: Batch,
    longest: dict[str, int],
    seconds: float,
    code: str,  # noqa: ARG001
) -> Artifact:
    """Build and audit an engine in a child process that can be killed, and store it.

    Args:
        lowered: the graph.
        target: which flavour of TensorRT builds.
        batch: the shapes the engine must take.
        longest: the longest list of each jagged input.
        seconds: time limit of building and auditing.
        code: digest of the code that builds; part of the cache key.

    Raises:
        BuildRefused: TensorRT is not installed, refuses the graph, or the audit failed.
        ChildFailed: the time limit passed, or the builder crashed.
    """
    folder = local(lowered)
    lowering = lowering_of(folder)
    request = BuildRequest(
        target=target,
        onnx=str(folder / MODEL),
        profiles=_profiles(lowering, batch, longest),
        tables=tuple(
            TableWeights(module=table.module, rows=table.rows, initializers=table.names)
            for table in lowering.tables
        ),
        packed_bytes=lowering.packed_bytes,
        seconds=seconds,
    )
    with tempfile.TemporaryDirectory() as scratch:
        engine = build_engine(request, Path(scratch))
        kept_files = Path(scratch) / "release"
        kept_files.mkdir()
        name = Path(engine.path).name
        Path(engine.path).rename(kept_files / name)
        # What is served travels without this machine's paths.
        record = engine.model_copy(update={"path": name})
        (kept_files / "build.json").write_text(record.model_dump_json(indent=1))
        (kept_files / "lowering.json").write_text(lowering.model_dump_json(indent=1))
        log.info("%s %s: %d bytes", target, engine.version, engine.bytes)
        return store().put(kept_files)


def _profiles(lowering: Lowering, batch: Batch, longest: dict[str, int]) -> tuple[Profile, ...]:
    profiles = []
    for item in lowering.inputs:
        sizes = [batch.low, batch.best, batch.high]
        if item.name in longest:
            most = longest[item.name]
            sizes = [1, batch.best * max(most // 2, 1), batch.high * most]
        low, best, high = ((size, *item.shape) for size in sizes)
        profiles.append(Profile(input=item.name, low=low, best=best, high=high))
    return tuple(profiles)
