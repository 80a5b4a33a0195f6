"""Verify a bundle completely before any other task uses it."""

import logging

from prefect import task

from compressors.contracts import Artifact
from tasks.bundles.packing import check
from tasks.orchestration.task_calls import TASK_OPTIONS

log = logging.getLogger(__name__)


@task(task_run_name="pull", **TASK_OPTIONS)
def pull(artifact: Artifact) -> Artifact:
    """Verify every hash, weight and id of a stored bundle, and that its module loads.

    Args:
        artifact: the artifact of the bundle.

    Returns:
        The same artifact.

    Raises:
        BundleRefused, DataRefused, ModelRefused, ArtifactMissing, ArtifactDamaged: the first
            problem.
    """
    manifest, facts = check(artifact.uri)
    log.info(
        "%s %s: %d tensors, %d bytes", manifest.name, manifest.version, len(facts), artifact.bytes
    )
    return artifact
