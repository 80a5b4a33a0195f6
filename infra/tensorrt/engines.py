"""Build and audit engines of TensorRT 10 / 11 and TensorRT-RTX in a child process.

TensorRT (for data-center GPUs) and TensorRT-RTX share one API, so ``infra/tensorrt/build.py``
builds engines of both; it is the only file that calls the API. ``infra/tensorrt/audit.py`` has the
audit. ``docs/tensorrt.md`` lists the code that has never run on real hardware.
"""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

from pydantic import Field

from compressors.contracts import Frozen, Sha256, read_renamed, target
from compressors.contracts.targets import engine_suffixes
from compressors.contracts.targets.builder import BuildRequest
from infra.child import run_child
from infra.errors import BuildRefused

MODULES: dict[str, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    # The package tensorrt-rtx provides the first name; the packages that it depends on, installed
    # without it, provide only the second.
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
"""Modules to try to import for each target, in this order."""

EARLIER_SPARSITY = {"picked": "used", "did not pay": "not used", "not told": "unknown"}
"""Outcomes of sparsity in audits that earlier versions of recpress stored, and the current ones."""

NAMES: tuple[str, ...] = (
    "__version__",
    "ILogger",
    "Builder",
    "Builder.create_network",
    "Builder.create_builder_config",
    "Builder.create_optimization_profile",
    "Builder.build_serialized_network",
    "NetworkDefinitionCreationFlag",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser",
    "OnnxParser.parse_from_file",
    "OnnxParser.parse",
    "OnnxParser.num_errors",
    "OnnxParser.get_error",
    "ParserError.desc",
    "ParserError.node",
    "ParserError.node_name",
    "ParserError.node_operator",
    "INetworkDefinition.num_inputs",
    "INetworkDefinition.get_input",
    "INetworkDefinition.num_layers",
    "INetworkDefinition.get_layer",
    "ILayer.type",
    "ILayer.num_outputs",
    "ILayer.get_output",
    "ITensor.name",
    "ITensor.shape",
    "ITensor.dtype",
    "LayerType",
    "LayerType.CONSTANT",
    "IOptimizationProfile.set_shape",
    "IBuilderConfig.add_optimization_profile",
    "IBuilderConfig.set_memory_pool_limit",
    "IBuilderConfig.set_flag",
    "BuilderFlag",
    "BuilderFlag.SPARSE_WEIGHTS",
    "MemoryPoolType",
    "MemoryPoolType.WORKSPACE",
)
"""Every name of TensorRT's Python API that ``build.py`` uses.

Tests check that the code uses exactly these names, and that TensorRT 10, 11 and RTX have them.
"""


class EngineAudit(Frozen):
    """The results of an audit; ``infra/tensorrt/audit.py`` explains the checks.

    Attributes:
        scratch: whether scratch memory (the temporary memory of a call) depends on the number of
            rows of a table.
        scratch_reason: the reason, with numbers.
        scratch_bytes: scratch memory of the engine.
        twin_scratch_bytes: scratch memory of an engine with half the rows; None if not built.
        tables_checked: tables that are proven not to be converted to a wider type, since an fp16
            copy of them does not fit into the scratch memory.
        weights_bytes: bytes of the engine's weights.
        packed_bytes: bytes of all tensors as the plan (the format of each table and layer, not
            TensorRT's serialized engine) stores them.
        layer_types: number of layer outputs per type in the parsed network.
        constant_bytes: bytes of constants per type in the parsed network, before the builder folds
            any.
        sparsity: whether layers with 2:4 zeros run on sparse kernels (``used``), run on none
            (``not used``), or the log does not report it (``unknown``); None without such
            layers.
        sparsity_reason: the reason.
    """

    scratch: Literal["flat", "grows", "not checkable"]
    scratch_reason: str
    scratch_bytes: int | None
    twin_scratch_bytes: int | None = None
    tables_checked: tuple[str, ...] = ()
    weights_bytes: int | None
    packed_bytes: int
    layer_types: dict[str, int]
    constant_bytes: dict[str, int]
    sparsity: (
        Annotated[Literal["used", "not used", "unknown"], read_renamed(EARLIER_SPARSITY)] | None
    ) = None
    sparsity_reason: str | None = None


class Engine(Frozen):
    """A built engine that passed its audit.

    Attributes:
        path: the engine's file.
        bytes: size of the file.
        sha256: hash of the file.
        target: name of the target.
        version: version of the builder's library.
        seconds: duration of the build.
        audit: the result of the audit.
        capability: the compute capability it was built on; None for a portable RTX engine.
    """

    path: str
    bytes: int = Field(ge=1)
    sha256: Sha256
    target: str
    version: str
    seconds: float
    audit: EngineAudit
    capability: str | None = None

    def record(self, name: str) -> str:
        """Return the engine as JSON with the path ``name``, since its folder is temporary."""
        return self.model_copy(update={"path": name}).model_dump_json(indent=1)


@dataclass(frozen=True)
class TensorRTBuilder:
    """Engine builder of a target: TensorRT for ``tensorrt``, TensorRT-RTX for ``tensorrt-rtx``."""

    target: str

    def version(self) -> str:
        """Return the version of TensorRT.

        Raises:
            BuildRefused: TensorRT cannot be imported.
        """
        return str(load(self.target).__version__)

    def build(self, request: BuildRequest, folder: Path) -> Engine:
        """Build and audit an engine in a child process; see ``build_engine``."""
        return build_engine(request, folder)


def load(target: str) -> ModuleType:
    """Import the Python module of TensorRT that builds for a target.

    Raises:
        BuildRefused: none of the modules in ``MODULES`` can be imported.
    """
    reasons = []
    for name in MODULES[target]:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as fault:  # OSError: bindings without their libraries
            reasons.append(f"{name}: {fault}")
    raise BuildRefused("tensorrt_missing", target=target, problem="; ".join(reasons))


def find_installed_version(target: str) -> str | None:
    """Return the version of TensorRT for this target, or None if it cannot be imported."""
    try:
        return str(load(target).__version__)
    except BuildRefused:
        return None


def build_engine(request: BuildRequest, folder: Path) -> Engine:
    """Build an engine from an ONNX graph, audit it, and write it into ``folder``.

    If the audit passes, the folder contains ``model.engine`` (RTX) or ``model.plan``, and
    ``build.json`` (request and result). In any case ``child.log`` contains the builder's log.

    Args:
        request: the graph and how to build it; ``seconds`` limits the duration.
        folder: where to write; files of an earlier build are removed first.

    Raises:
        BuildRefused: TensorRT is not installed, does not accept the graph, or the engine failed
            its audit.
        ChildFailed: the time limit passed, or the builder crashed.
    """
    load(request.target)
    for stale in (*(f"model{suffix}" for suffix in engine_suffixes()), "build.json"):
        (folder / stale).unlink(missing_ok=True)
    engines = target(request.target).engines
    if engines is None:
        raise ValueError(f"target {request.target!r} has no engines")
    job = {
        "request": request.model_dump(mode="json"),
        "folder": str(folder.absolute()),
        "file": f"model{engines.suffix}",
        "is_bound_to_gpu": engines.is_bound_to_gpu,
    }
    result = run_child("infra.tensorrt.build", job, folder, request.seconds)
    engine = Engine.model_validate(result)
    record = {"request": job["request"], "engine": result}
    (folder / "build.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    return engine
