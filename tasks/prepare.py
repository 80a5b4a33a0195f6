"""Convert one split of a bundle's data from parquet to tensors, for its model or for a teacher."""

import logging
from pathlib import Path

from prefect import task

from compressors.contracts import Artifact
from infra.bundle.bundle_folder import SplitName, read, table_rows
from infra.bundle.shards import stored_tensors
from infra.data.catalogue import prepare as prepare_split
from infra.data.split_statistics import check_ids, split_statistics
from infra.errors import DataRefused
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import data_path, tokenizer_files
from tasks.orchestration.task_calls import TASK_OPTIONS
from tasks.orchestration.workspace import local, store

log = logging.getLogger(__name__)


@task(task_run_name="prepare {split}", **TASK_OPTIONS)
def prepare(bundle: Artifact, split: SplitName) -> Artifact:
    """Convert one parquet split to memory-mappable tensors and store them.

    Rows of a retrieval model (interactions) are joined with their items' features, which are in the
    split ``items``.

    Args:
        bundle: the bundle with the data and the signature.
        split: name of the split.

    Returns:
        The artifact of the tensors: a prepared split.
    """
    manifest = read(local(bundle))
    with scratch_folder("prepare") as scratch:
        catalogue: tuple[SplitName, ...] = ("items",) if "items" in manifest.data else ()
        paths: dict[str, Path] = {name: data_path(manifest, name) for name in (split, *catalogue)}
        files = tokenizer_files(manifest)
        prepared = prepare_split(paths, split, manifest.signature, Path(scratch), files)
        log.info("%s: %d rows, %d bytes of tensors", split, prepared.rows, prepared.bytes)
        return store().put(Path(scratch))


@task(task_run_name="prepare {split} for a teacher", **TASK_OPTIONS)
def prepare_for_teacher(bundle: Artifact, split: SplitName, teacher: Artifact) -> Artifact:
    """Convert one split of a student's data to the inputs of a teacher, and check them.

    Args:
        bundle: the student's bundle, with the data.
        split: name of the split.
        teacher: the teacher's bundle, whose inputs are used.

    Returns:
        The artifact of the tensors: a prepared split.

    Raises:
        DataRefused: the student's data lacks a column that the teacher reads, or a value is not
            valid for the teacher's inputs or tables; names the teacher.
    """
    manifest, teachers_folder = read(local(bundle)), local(teacher)
    teachers_manifest = read(teachers_folder)
    not_read = {"group": None, "time": None}  # scores do not depend on them
    signature = teachers_manifest.signature.remove_labels().model_copy(update=not_read)
    path = data_path(manifest, split)
    facts = {name: tensor.fact for name, tensor in stored_tensors(teachers_folder).items()}
    try:
        statistics = split_statistics(path, signature)
        check_ids({split: statistics}, signature, table_rows(facts, teachers_manifest))
        with scratch_folder("prepare") as scratch:
            files = tokenizer_files(teachers_manifest)
            prepare_split({split: path}, split, signature, Path(scratch), files)
            return store().put(Path(scratch))
    except DataRefused as fault:
        name = f"{teachers_manifest.name}@{teachers_manifest.version}"
        raise DataRefused(
            "teacher_data_unusable", teacher=name, split=split, problem=str(fault)
        ) from fault
