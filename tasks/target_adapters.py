"""Return the engine builder and the runtime of a target. No Prefect.

Targets load these adapters by name. This file imports them as well, so that the code digest of a
task changes with their source (``tasks/orchestration/code_digest.py``).
"""

from compressors.contracts import target
from compressors.contracts.targets.builder import Builder
from compressors.contracts.targets.runtime import Machine, Runtime
from infra.onnxruntime.sessions import OnnxRuntime as OnnxRuntime
from infra.settings import load_settings
from infra.tensorrt.engines import TensorRTBuilder as TensorRTBuilder
from infra.timing import describe_machine


def get_builder(name: str) -> Builder:
    """Return the builder of a target's engines.

    Raises:
        ValueError: the target has no builder, because it serves graphs.
    """
    builder = target(name).load_builder()
    if builder is None:
        raise ValueError(f"target {name!r} has no builder")
    return builder


def get_runtime(name: str) -> Runtime:
    """Return the runtime that scores and times a target's graphs or engines.

    Raises:
        ValueError: the target has no runtime, so it cannot be measured.
    """
    runtime = target(name).load_runtime()
    if runtime is None:
        raise ValueError(f"target {name!r} has no runtime")
    return runtime


def runtime_of_graphs(name: str) -> Runtime | None:
    """Return the runtime of a target that serves graphs; None if it serves engines or has none."""
    return None if target(name).is_built else target(name).load_runtime()


def machine_of(name: str) -> Machine:
    """Describe this machine and the runtime of a target.

    Raises:
        ValueError: the target has no runtime.
    """
    return describe_machine(
        target(name).label, get_runtime(name).version(), load_settings().threads
    )
