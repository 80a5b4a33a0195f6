"""Verify a bundle completely before anything is built on it."""

import logging

from prefect import task

from compressors.contracts import Artifact
from tasks.bundles.packing import check
from tasks.orchestration.policy import KEPT

log = logging.getLogger(__name__)


@task(task_run_name="pull", **KEPT)
def pull(artifact: Artifact, code: str) -> Artifact:  # noqa: ARG001
    """Check every hash, weight and id of a stored bundle, and that its module loads.

    Args:
        artifact: the bundle.
        code: digest of the architecture's code and the attempt; part of the cache key.
    """
    manifest, facts = check(artifact.uri)
    log.info(
        "%s %s: %d tensors, %d bytes", manifest.name, manifest.version, len(facts), artifact.bytes
    )
    return artifact
