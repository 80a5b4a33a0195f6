"""Open the object store of this process, and copy its artifacts to this machine. No Prefect."""

from pathlib import Path

from compressors.contracts import Artifact
from infra.settings import load_settings
from infra.store.object_store import Store


def store() -> Store:
    """Return the object store of this process's settings."""
    return Store(load_settings().store_root)


def local(artifact: Artifact) -> Path:
    """Return a local folder with the files of an artifact, verified by their hashes."""
    return store().local(artifact, load_settings().cache)
