"""Convert one split of a bundle's data from parquet to tensors."""

import logging
from pathlib import Path

from prefect import task

from compressors.contracts import Artifact
from infra.bundle.bundle_folder import SplitName, read
from infra.data.catalogue import prepare as prepare_split
from infra.store.temporary import scratch_folder
from tasks.bundles.loading import data_path
from tasks.orchestration.policy import TASK_OPTIONS
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
        prepared = prepare_split(paths, split, manifest.signature, Path(scratch))
        log.info("%s: %d rows, %d bytes of tensors", split, prepared.rows, prepared.bytes)
        return store().put(Path(scratch))
