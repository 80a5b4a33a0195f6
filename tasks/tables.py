"""Compress tables of any size as files; input and output are artifacts."""

from prefect import task

from compressors.contracts import Artifact
from compressors.core.registries import AnyStep
from compressors.core.steps.step import TableStep
from infra.errors import CommandRefused
from tasks.bundles.table_files import quantize_artifact, table_steps
from tasks.orchestration.policy import KEPT


@task(task_run_name="tables {step.kind}", **KEPT)
def quantize_tables(
    source: Artifact,
    step: AnyStep,
    block_rows: int | None = None,
    workers: int | None = None,
) -> Artifact:
    """Compress every table of an artifact's safetensors files.

    Args:
        source: the artifact of the tables.
        step: a table method and its settings.
        block_rows: rows encoded at once by each thread; changes no byte of the result.
        workers: number of threads, by default one per core; changes no byte of the result.
    """
    if not isinstance(step, TableStep):
        raise CommandRefused("method_needs_model", method=step.kind, methods=tuple(table_steps()))
    return quantize_artifact(source, step, block_rows, workers)
