"""Compress the tables of safetensors files of any size, without a model. No Prefect.

Rows are read and written in blocks, so memory does not grow with the tables. An interrupted run is
resumed by the same call.

The *result* is an artifact. ``infra/store/artifact_writer.py`` writes it to a hidden folder next to
that of the result, with a journal of the blocks that have been written. ``seal`` completes the
files and hashes them. Then ``publish`` renames the folder to that of the result; or ``Store.take``
moves the files to the store, and ``drop`` removes the folder.
"""

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
from compressors.core.state.safetensors_rows import StoredRows, build_spec
from compressors.core.state.safetensors_stream import StreamedFile, compute_size
from compressors.core.steps.step import TableStep
from compressors.errors.compression import NothingToCompress
from compressors.quantize.table_stream import EncodingJob, encode_file
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.bundle.json_reader import read_document
from infra.bundle.shards import stored_tensors
from infra.errors import CommandRefused
from infra.settings import load_settings
from infra.store.artifact_writer import FILES, ArtifactWriter, open_writer, verify_result
from infra.store.disk import translate_input_errors
from tasks.orchestration.code_digest import code_digest
from tasks.orchestration.workspace import local, store

TENSORS, TABLES = "model.safetensors", "tables.json"
"""Names of the files of a result: all tensors, and the contents of ``Tables``."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of the tensors that can be compressed."""

Progress = Callable[[int, int], None]
"""Called after each block of rows with the bytes of this block and of all blocks together."""


class Tables(Frozen):
    """Contents of ``tables.json``.

    Attributes:
        step: the method and its settings.
        modules: the compressed tables, by name of the module.
        plan: a line for each tensor.
    """

    step: AnyStep
    modules: dict[str, ModuleRecord]
    plan: Plan


class QuantizeResult(Frozen):
    """Where ``quantize`` wrote its result, and the plan."""

    place: str = Field(description="Folder of the result, or URI of its artifact.")
    sha256: Sha256 = Field(description="Hash of the result: the root over its chunk hashes.")
    bytes: int = Field(description="Bytes of all files of the result.")
    plan: Plan


def table_steps() -> dict[str, type[Frozen]]:
    """Return the step classes that encode tables in row blocks, by kind."""
    defaults = {kind: method.model_validate({}) for kind, method in METHODS.items()}
    return {kind: METHODS[kind] for kind, step in defaults.items() if isinstance(step, TableStep)}


def build_table_step(name: str, settings: dict[str, object]) -> TableStep:
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
    """Return the short name of a kind: ``int8`` for ``rowwise_int8``."""
    return kind.removeprefix("rowwise_")


def quantize(
    source: Path,
    into: Path,
    step: TableStep,
    *,
    block_rows: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Compress the tables of a safetensors file, or of a folder of shards, into a new folder.

    The folder ``into`` is created when the result is complete. The same call resumes an interrupted
    run.

    Args:
        source: a file or folder. Float32, float16 and bfloat16 tensors ``(rows, dim)`` are tables;
            other tensors are copied.
        into: folder of the result; must not exist, or be empty.
        step: the method; the patterns in its ``tables`` match names of tensors or modules.
        block_rows: rows that each thread encodes at once; does not affect the result.
        workers: number of threads; by default one per core; does not affect the result.
        progress: called from several threads after each block; None to report no progress.

    Raises:
        CommandRefused: ``source`` does not exist.
        NothingToCompress: the step applies to no tensor.
        BundleRefused: the source is not readable as safetensors.
        StoreRefused: ``into`` is not empty, or another process writes there.
    """
    with translate_input_errors(source):
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
) -> QuantizeResult:
    with _open_job(source, step, block_rows) as (job, plan):
        source_key = _build_source_key(source)
        with _write_result(job, plan, into, source_key, workers, progress) as writer:
            manifest = writer.seal()
            writer.publish(manifest)
    return QuantizeResult(place=str(into), sha256=manifest.root, bytes=manifest.bytes, plan=plan)


def quantize_artifact(
    source: Artifact, step: TableStep, block_rows: int | None = None, workers: int | None = None
) -> Artifact:
    """Compress the tables of a stored artifact with safetensors files; returns a new artifact.

    Arguments and errors as in ``quantize``. If the store is on this machine's disk, the result is
    moved there, not copied.
    """
    key = digest([source.sha256, step, block_rows, code_digest(quantize)])
    into = load_settings().home / "progress" / f"tables-{key}"
    with (
        _open_job(local(source), step, block_rows) as (job, plan),
        _write_result(job, plan, into, source.sha256, workers, None) as writer,
    ):
        artifact = store().take(writer.files, writer.seal())
        writer.drop()
    return artifact


def check(folder: Path) -> tuple[Artifact, Tables]:
    """Verify every chunk of a result of ``quantize`` and return its ``tables.json``.

    Raises:
        ArtifactMissing, ArtifactDamaged: the result is incomplete or damaged.
    """
    with translate_input_errors(folder):
        manifest = verify_result(folder)
        tables = read_document(Tables, folder / FILES / TABLES)
    uri = folder.absolute().as_uri()
    return Artifact(uri=uri, sha256=manifest.root, bytes=manifest.bytes), tables


@contextmanager
def _write_result(
    job: EncodingJob,
    plan: Plan,
    into: Path,
    source_key: object,
    workers: int | None,
    progress: Progress | None,
) -> Iterator[ArtifactWriter]:
    """Write all files of a result, and yield the writer, which the caller seals.

    An interrupted run is continued if its source, settings and code were the same.
    ``source_key`` identifies the content of the source.
    """
    file = StreamedFile(job.layout())
    total = sum(compute_size(rows.spec) for rows in job.sources.values())
    # ``block_rows`` does not affect the result, but the journal names a block by its first row
    # only. So with another value, the same name would stand for other rows.
    resume_key = [source_key, job.step, job.block_rows, code_digest(quantize)]
    with open_writer(into, resume_key, TENSORS, file.bytes) as writer:
        report_bytes = None if progress is None else (lambda read: progress(read, total))
        encode_file(job, file, writer, workers, report_bytes)
        records = job.records()
        tables = Tables.model_validate({"step": job.step, "modules": records, "plan": plan})
        writer.add(TABLES, tables.model_dump_json(indent=1).encode())
        yield writer


@contextmanager
def _open_job(
    source: Path, step: TableStep, block_rows: int | None
) -> Iterator[tuple[EncodingJob, Plan]]:
    """Open the files of a source; yields the work to do, and the plan with a line per tensor."""
    with ExitStack() as files:
        descriptors: dict[Path, int] = {}
        sources: dict[str, StoredRows] = {}
        for name, stored in sorted(stored_tensors(source).items()):
            if stored.shard not in descriptors:
                descriptors[stored.shard] = files.enter_context(stored.shard.open("rb")).fileno()
            spec = build_spec(stored.fact.dtype, stored.fact.shape, name)
            descriptor = descriptors[stored.shard]
            sources[name] = StoredRows(stored.shard, descriptor, name, stored.start, spec)
        reasons = {name: _find_skip_reason(step, name, rows.spec) for name, rows in sources.items()}
        _require_all_patterns_match(step, sources)
        tables = {name: module_name(name) for name, reason in reasons.items() if reason is None}
        if not tables:
            raise NothingToCompress("float_table_missing", step=step.kind, reasons=reasons)
        steps: dict[str, TableStep] = {}
        if isinstance(step, RowwiseInt8):
            steps = {name: step.for_table(sources[name].memory_map())[0] for name in tables}
        job = EncodingJob(step, tables, sources, block_rows, steps)
        yield job, Plan(lines=tuple(_build_plan_line(job, name, reasons[name]) for name in sources))


def _find_skip_reason(step: TableStep, name: str, spec: TensorSpec) -> Reason | None:
    """Return why a tensor is not compressed; None if it is compressed."""
    if len(spec.shape) != 2 or spec.dtype not in FLOATS:
        return Reason("not_a_table", shape=tuple(spec.shape), dtype=_name_dtype(spec))
    if not any(_is_match(pattern, name) for pattern in step.tables):
        return Reason("not_matched", patterns=step.tables)
    if spec.shape[0] < step.min_rows:
        return Reason("too_few_rows", rows=spec.shape[0], min_rows=step.min_rows)
    stored_tensor_specs = step.storage.layout(*spec.shape, step.settings()).values()
    size = sum(compute_size(stored) for stored in stored_tensor_specs)
    if size >= compute_size(spec):
        return Reason("not_smaller", step=step.kind, bytes=size, present=compute_size(spec))
    return None


def _is_match(pattern: str, name: str) -> bool:
    """Return whether a pattern matches the name of a tensor or of its module."""
    return any(fnmatch.fnmatchcase(text, pattern) for text in (name, module_name(name)))


def module_name(tensor: str) -> str:
    """Return the name of the module that has a tensor: ``user`` for ``user.weight``."""
    return "" if tensor == "weight" else tensor.removesuffix(".weight")


def _require_all_patterns_match(step: TableStep, sources: dict[str, StoredRows]) -> None:
    """Raise if a pattern of the step, except ``*``, matches no table.

    Raises:
        NothingToCompress: contains the pattern and the names of the tables.
    """
    tables = [
        name
        for name, rows in sources.items()
        if len(rows.spec.shape) == 2 and rows.spec.dtype in FLOATS
    ]
    for pattern in step.tables:
        if not any(_is_match(pattern, name) for name in tables) and pattern != "*":
            raise NothingToCompress(
                "name_unmatched", step=step.kind, role="table", pattern=pattern, names=tuple(tables)
            )


def _build_plan_line(job: EncodingJob, name: str, reason: Reason | None) -> PlanLine:
    """Return the plan line of a tensor; ``reason`` says why it is not compressed, None if it is."""
    spec = job.sources[name].spec
    before = compute_size(spec)
    if reason is not None:
        role = "table" if len(spec.shape) == 2 and spec.dtype in FLOATS else "other"
        return PlanLine(
            module=name,
            role=role,
            format=_name_dtype(spec),
            bytes_before=before,
            bytes_after=before,
            reasons=(reason,),
        )
    return PlanLine(
        module=job.tables[name],
        role="table",
        format=job.step.storage.name,
        bytes_before=before,
        bytes_after=sum(compute_size(part) for part in job.stored(name).values()),
        steps=(job.step.kind,),
        reasons=(Reason("selected", step=job.step.kind),),
    )


def _name_dtype(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _build_source_key(source: Path) -> object:
    """Return path, size and modification time of each file: a run resumes only if they are equal.

    Hashes would identify the files better, but need a read of all bytes.
    """
    shards = sorted({stored.shard for stored in stored_tensors(source).values()})
    stats = [(str(shard.absolute()), shard.stat()) for shard in shards]
    return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
