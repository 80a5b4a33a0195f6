"""Compress the tables in a stored artifact's files, in row blocks, so that any size is possible."""

from prefect import task

from compressors.contracts import Artifact
from compressors.core.registries import AnyStep
from compressors.core.steps.step import TableStep
from infra.errors import CommandRefused
from tasks.bundles.table_files import quantize_artifact, table_steps
from tasks.orchestration.task_calls import TASK_OPTIONS


@task(task_run_name="tables {step.kind}", **TASK_OPTIONS)
def quantize_tables(
    source: Artifact,
    step: AnyStep,
    block_rows: int | None = None,
    workers: int | None = None,
) -> Artifact:
    """Compress every table of an artifact's safetensors files.

    Args:
        source: the artifact with the tables.
        step: a table method and its settings.
        block_rows: rows that each thread encodes at once; does not affect the result.
        workers: number of threads, by default one per core; does not affect the result.

    Raises:
        CommandRefused: the step is not a table method.
        NothingToCompress: the step applies to no tensor.
    """
    if not isinstance(step, TableStep):
        raise CommandRefused("method_needs_model", method=step.kind, methods=tuple(table_steps()))
    return quantize_artifact(source, step, block_rows, workers)
