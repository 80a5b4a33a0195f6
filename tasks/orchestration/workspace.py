"""Open the object store that the settings name, and copy artifacts from it to this machine."""

from pathlib import Path

from compressors.contracts import Artifact
from infra.settings import load_settings
from infra.store.object_store import Store


def store() -> Store:
    """Return the object store of this process's settings."""
    return Store(load_settings().store_root)


def local(artifact: Artifact) -> Path:
    """Return a local folder with an artifact's files, which are checked against their hashes."""
    return store().local(artifact, load_settings().cache)
