"""The builder and the runtime that a target declares. No Prefect.

The imports of this file make the digests of tasks contain the adapters of recpress.
"""

from compressors.contracts import target
from compressors.contracts.targets.builder import Builder
from compressors.contracts.targets.runtime import Runtime
from infra.onnxruntime.sessions import OnnxRuntime as OnnxRuntime
from infra.tensorrt.engines import TensorRTBuilder as TensorRTBuilder


def builder_of(name: str) -> Builder:
    """Return the builder of a target's engines.

    Raises:
        ValueError: the target serves graphs.
    """
    builder = target(name).load_builder()
    if builder is None:
        raise ValueError(f"target {name!r} has no builder")
    return builder


def runtime_of(name: str) -> Runtime:
    """Return the runtime of a measured target.

    Raises:
        ValueError: the target is not measured.
    """
    runtime = target(name).load_runtime()
    if runtime is None:
        raise ValueError(f"target {name!r} has no runtime")
    return runtime


def runtime_of_graphs(name: str) -> Runtime | None:
    """Return the runtime that serves a target's graphs; None if it serves engines or has none."""
    return None if target(name).is_built else target(name).load_runtime()
