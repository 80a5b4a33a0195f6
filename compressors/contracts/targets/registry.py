"""The registry of targets: a target by its name, and the built-in targets.

To add a target, write its lowering, and its builder and runtime if it has them. Then add a
``Target`` here or call ``register``. ``target.py`` describes its attributes. "Gated" in a
description means that limits are compared with measurements of this target.
"""

from typing import Annotated, Any

from pydantic import AfterValidator, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from compressors.contracts.targets.target import Engines, Target, TritonBackend
from compressors.contracts.value_errors import value_error

TARGETS: dict[str, Target] = {}
"""Every target by its name, in the order of reports and of Prefect's form for orders."""


def register(target: Target) -> None:
    """Add a target.

    Raises:
        ValueError: a target with this name exists, or both this and another one are the default.
    """
    if target.name in TARGETS:
        raise ValueError(f"target {target.name!r} is already registered")
    if target.is_default and any(other.is_default for other in TARGETS.values()):
        raise ValueError(f"the default target is {default_target().name!r}, not {target.name!r}")
    TARGETS[target.name] = target


for _target in (
    Target(
        name="onnxruntime",
        label="ONNX Runtime",
        title="ONNX Runtime (CPU)",
        description="Measured and gated here.",
        lowering="compressors.lower.targets.onnxruntime.target:OnnxRuntime",
        runtime="infra.onnxruntime.sessions:OnnxRuntime",
        triton=TritonBackend(
            platform="onnxruntime_onnx", instance_kind="KIND_CPU", has_threads=True
        ),
        libraries=("onnxruntime",),
        is_default=True,
        is_always_stored=True,
    ),
    Target(
        name="tensorrt-rtx",
        label="TensorRT-RTX",
        description="Built without a GPU and portable; runs on compute capability 8.0, 8.6, 8.9 "
        "and 12.0 or later.",
        lowering="compressors.lower.targets.tensorrt.target:TensorRT",
        engines=Engines(builder="infra.tensorrt.engines:TensorRTBuilder", suffix=".engine"),
        libraries=("tensorrt-rtx-cu13-bindings",),
        is_always_stored=True,
    ),
    Target(
        name="tensorrt",
        label="TensorRT",
        description="Needs the tensorrt package and the GPU it will be served on.",
        lowering="compressors.lower.targets.tensorrt.target:TensorRT",
        engines=Engines(
            builder="infra.tensorrt.engines:TensorRTBuilder",
            suffix=".plan",
            is_bound_to_gpu=True,
        ),
        triton=TritonBackend(platform="tensorrt_plan", instance_kind="KIND_GPU", suffix="tensorrt"),
        libraries=("tensorrt",),
        is_always_stored=True,
    ),
):
    register(_target)


def target(name: str) -> Target:
    """Return the target with this name.

    Raises:
        KeyError: no target has it.
    """
    return TARGETS[name]


def default_target() -> Target:
    """Return the target that orders require by default."""
    return next(target for target in TARGETS.values() if target.is_default)


def engine_suffixes() -> set[str]:
    """Return the file suffixes of all targets' engines."""
    return {item.engines.suffix for item in TARGETS.values() if item.engines is not None}


def _require_known(name: str) -> str:
    """Return the name of a registered target unchanged; raise for another name."""
    if name not in TARGETS:
        raise value_error("target_unknown", target=name, known=tuple(TARGETS))
    return name


class _NameSchema:
    """Adds the names of all targets to the JSON schema of a target's name."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "string", "enum": list(TARGETS)}


TargetName = Annotated[str, AfterValidator(_require_known), _NameSchema()]
"""The name of a registered target."""
