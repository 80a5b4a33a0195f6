"""What this process works on: its store and its local copies. No Prefect."""

from pathlib import Path

from compressors.contracts import Artifact
from infra.settings import load_settings
from infra.store.object_store import Store


def store() -> Store:
    """The object store of this process's settings."""
    return Store(load_settings().store_root)


def local(artifact: Artifact) -> Path:
    """A verified local folder of an artifact."""
    return store().local(artifact, load_settings().cache)
