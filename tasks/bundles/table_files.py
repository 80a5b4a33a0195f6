"""Compress tables of any size from file to file. No Prefect."""

import fnmatch
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch
from pydantic import Field

from compressors.contracts import (
    Artifact,
    Frozen,
    ModuleRecord,
    Plan,
    PlanLine,
    Reason,
    Sha256,
    digest,
)
from compressors.core.modules.formats import TensorSpec
from compressors.core.registries import METHODS, AnyStep
from compressors.core.state.safetensors_rows import StoredRows, spec_of
from compressors.core.state.safetensors_stream import StreamedFile, size_of
from compressors.core.steps.step import TableStep
from compressors.errors.compression import NothingToCompress
from compressors.quantize.table_stream import Job, carry_out
from infra.bundle.json_reader import read_document
from infra.bundle.shards import stored_tensors
from infra.errors import CommandRefused
from infra.settings import load_settings
from infra.store.disk import input_files
from infra.store.draft import FILES, ArtifactDraft, draft, finished
from tasks.orchestration.code_digest import code_digest
from tasks.orchestration.workspace import local, store

TENSORS, TABLES = "model.safetensors", "tables.json"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Progress = Callable[[int, int], None]
"""Called with the bytes of a block that was read, and of all blocks."""


class Tables(Frozen):
    """Contents of ``tables.json``: the modules of the stored tensors, and each tensor's result."""

    step: AnyStep
    modules: dict[str, ModuleRecord]
    plan: Plan


class Quantized(Frozen):
    """The result of quantizing a file of tables."""

    place: str = Field(description="The folder, or the artifact's URI.")
    sha256: Sha256 = Field(description="The root over all chunk hashes: the artifact's name.")
    bytes: int = Field(description="All files of the result.")
    plan: Plan


def table_steps() -> dict[str, type[Frozen]]:
    """Return the table methods that process row blocks, by kind."""
    defaults = {kind: method.model_validate({}) for kind, method in METHODS.items()}
    return {kind: METHODS[kind] for kind, step in defaults.items() if isinstance(step, TableStep)}


def step_named(name: str, settings: dict[str, object]) -> TableStep:
    """Build a table step from its kind or short name (``int8`` for ``rowwise_int8``).

    Raises:
        CommandRefused: there is no such method, or it has no such setting.
    """
    short = {short_name(kind): kind for kind in table_steps()}
    kind = short.get(name, name)
    if kind not in table_steps():
        raise CommandRefused("table_format_unknown", format=name, formats=tuple(short))
    fields = table_steps()[kind].model_fields.keys() - {"kind"}
    if unknown := sorted(settings.keys() - fields):
        raise CommandRefused(
            "setting_unknown", method=kind, setting=unknown[0], settings=tuple(sorted(fields))
        )
    return cast(TableStep, table_steps()[kind].model_validate(settings))


def short_name(kind: str) -> str:
    """Return the short name of a kind."""
    return kind.removeprefix("rowwise_")


def quantize(
    source: Path,
    into: Path,
    step: TableStep,
    *,
    block_rows: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Compress the tables of a safetensors file, or of a folder of shards, into a new folder.

    If ``into`` exists, it is complete. The same call resumes an interrupted run. The bytes do not
    depend on ``block_rows`` and ``workers``.

    Args:
        source: float32, float16 or bfloat16 tables ``(rows, dim)``; other tensors are copied.
        into: must not exist, or be an empty folder.
        step: the method; its ``tables`` name tensors or their modules.
        block_rows: rows encoded at once by each thread.
        workers: number of threads; by default one per core.
        progress: called from several threads.

    Raises:
        NothingToCompress: the step fits no tensor.
        BundleRefused: the source is not readable as safetensors.
        StoreRefused: ``into`` is not empty, or another process writes there.
    """
    with input_files(source):
        if not source.exists():
            raise CommandRefused("tables_missing", path=str(source))
        return _quantize(source, into, step, block_rows, workers, progress)


def _quantize(
    source: Path,
    into: Path,
    step: TableStep,
    block_rows: int | None,
    workers: int | None,
    progress: Progress | None,
) -> Quantized:
    with _job(source, step, block_rows) as (job, plan):
        made = _identity(source)
        with _written(job, plan, into, made, workers, progress) as begun:
            manifest = begun.seal()
            begun.publish(manifest)
    return Quantized(place=str(into), sha256=manifest.root, bytes=manifest.bytes, plan=plan)


def quantize_artifact(
    source: Artifact, step: TableStep, block_rows: int | None = None, workers: int | None = None
) -> Artifact:
    """Quantize a stored artifact with safetensors files; the result is an artifact.

    If the store is on this machine's disk, the result is moved there, not copied.
    """
    made = source.sha256
    key = digest([made, step, block_rows, code_digest(quantize)])
    into = load_settings().home / "progress" / f"tables-{key}"
    with (
        _job(local(source), step, block_rows) as (job, plan),
        _written(job, plan, into, made, workers, None) as begun,
    ):
        artifact = store().take(begun.files, begun.seal())
        begun.drop()
    return artifact


def check(folder: Path) -> tuple[Artifact, Tables]:
    """Verify every chunk of a result of ``quantize`` and return its contents.

    Raises:
        ArtifactMissing, ArtifactDamaged: it is incomplete or damaged.
    """
    with input_files(folder):
        manifest = finished(folder)
        tables = read_document(Tables, folder / FILES / TABLES)
    uri = folder.absolute().as_uri()
    return Artifact(uri=uri, sha256=manifest.root, bytes=manifest.bytes), tables


@contextmanager
def _written(
    job: Job, plan: Plan, into: Path, made: object, workers: int | None, progress: Progress | None
) -> Iterator[ArtifactDraft]:
    """Return the draft of a result with all its bytes written."""
    file = StreamedFile(job.layout())
    total = sum(size_of(rows.spec) for rows in job.sources.values())
    one = [made, job.step, job.block_rows, code_digest(quantize)]
    with draft(into, one, TENSORS, file.bytes) as begun:
        report_bytes = None if progress is None else (lambda read: progress(read, total))
        carry_out(job, file, begun, workers, report_bytes)
        records = job.records()
        tables = Tables.model_validate({"step": job.step, "modules": records, "plan": plan})
        begun.add(TABLES, tables.model_dump_json(indent=1).encode())
        yield begun


@contextmanager
def _job(source: Path, step: TableStep, block_rows: int | None) -> Iterator[tuple[Job, Plan]]:
    """Yield the plan for every tensor of a file or folder, with its files open."""
    with ExitStack() as files:
        descriptors: dict[Path, int] = {}
        sources: dict[str, StoredRows] = {}
        for name, stored in sorted(stored_tensors(source).items()):
            if stored.shard not in descriptors:
                descriptors[stored.shard] = files.enter_context(stored.shard.open("rb")).fileno()
            spec = spec_of(stored.fact.dtype, stored.fact.shape, name)
            file = descriptors[stored.shard]
            sources[name] = StoredRows(stored.shard, file, name, stored.start, spec)
        reasons = {name: _reason(step, name, rows.spec) for name, rows in sources.items()}
        _all_match(step, sources)
        tables = {name: module_name(name) for name, why in reasons.items() if why is None}
        if not tables:
            raise NothingToCompress("float_table_missing", step=step.kind, reasons=reasons)
        job = Job(step, tables, sources, block_rows)
        yield job, Plan(lines=tuple(_line(job, name, reasons[name]) for name in sources))


def _reason(step: TableStep, name: str, spec: TensorSpec) -> Reason | None:
    """Return why a tensor is not compressed, or None."""
    if len(spec.shape) != 2 or spec.dtype not in FLOATS:
        return Reason("not_a_table", shape=tuple(spec.shape), dtype=_type(spec))
    if not any(_matches(pattern, name) for pattern in step.tables):
        return Reason("not_matched", patterns=step.tables)
    if spec.shape[0] < step.min_rows:
        return Reason("too_few_rows", rows=spec.shape[0], min_rows=step.min_rows)
    laid = step.storage.layout(*spec.shape, step.settings()).values()
    size = sum(size_of(part) for part in laid)
    if size >= size_of(spec):
        return Reason("not_smaller", step=step.kind, bytes=size, present=size_of(spec))
    return None


def _matches(pattern: str, name: str) -> bool:
    return any(fnmatch.fnmatchcase(own, pattern) for own in (name, module_name(name)))


def module_name(tensor: str) -> str:
    """Return the module of a table's tensor: ``user`` for ``user.weight``."""
    return "" if tensor == "weight" else tensor.removesuffix(".weight")


def _all_match(step: TableStep, sources: dict[str, StoredRows]) -> None:
    tables = [
        name
        for name, rows in sources.items()
        if len(rows.spec.shape) == 2 and rows.spec.dtype in FLOATS
    ]
    for pattern in step.tables:
        if not any(_matches(pattern, name) for name in tables) and pattern != "*":
            raise NothingToCompress(
                "name_unmatched", step=step.kind, role="table", pattern=pattern, names=tuple(tables)
            )


def _line(job: Job, name: str, reason: Reason | None) -> PlanLine:
    spec = job.sources[name].spec
    before = size_of(spec)
    if reason is not None:
        role = "table" if len(spec.shape) == 2 and spec.dtype in FLOATS else "other"
        return PlanLine(
            module=name,
            role=role,
            format=_type(spec),
            bytes_before=before,
            bytes_after=before,
            reasons=(reason,),
        )
    return PlanLine(
        module=job.tables[name],
        role="table",
        format=job.step.storage.name,
        bytes_before=before,
        bytes_after=sum(size_of(part) for part in job.stored(name).values()),
        steps=(job.step.kind,),
        reasons=(Reason("selected", step=job.step.kind),),
    )


def _type(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _identity(source: Path) -> object:
    """Return facts that identify the files an interrupted run was reading, without their bytes."""
    shards = sorted({stored.shard for stored in stored_tensors(source).values()})
    facts = [(str(shard.absolute()), shard.stat()) for shard in shards]
    return [[path, found.st_size, found.st_mtime_ns] for path, found in facts]
