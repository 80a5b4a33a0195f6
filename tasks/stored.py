"""What this process works on: its store, its local copies, and which code it is. No Prefect."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

from compressors.contracts import Artifact, digest
from infra.settings import load_settings
from infra.store import Store

# What changes results without a line of ours changing.
LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "pyarrow",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "great-expectations",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
)


def code_digest() -> str:
    """What changes results without an order changing: our sources, libraries, thread count."""
    return digest([_sources_digest(), load_settings().threads])


@functools.cache
def _sources_digest() -> str:
    digester = hashlib.sha256()
    root = Path(__file__).parent.parent
    for package in ("flows", "tasks", "compressors", "infra"):
        for path in sorted((root / package).rglob("*.py")):
            digester.update(f"{path.relative_to(root)}\0".encode())
            digester.update(path.read_bytes())
    for name in LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        digester.update(f"{name}=={version}\0".encode())
    return digester.hexdigest()


def store() -> Store:
    """The object store of this process's settings."""
    return Store(load_settings().store_root)


def local(artifact: Artifact) -> Path:
    """A verified local folder of an artifact."""
    return store().local(artifact, load_settings().cache)
