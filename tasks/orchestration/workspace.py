"""The object store of this process, and local copies of its artifacts. No Prefect."""

from pathlib import Path

from compressors.contracts import Artifact
from infra.settings import load_settings
from infra.store.object_store import Store


def store() -> Store:
    """Return the object store of this process's settings."""
    return Store(load_settings().store_root)


def local(artifact: Artifact) -> Path:
    """Return a verified local folder of an artifact."""
    return store().local(artifact, load_settings().cache)
