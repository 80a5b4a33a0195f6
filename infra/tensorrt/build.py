"""The child process that builds an engine: the only file that calls TensorRT.

``infra.tensorrt.engines.build_engine`` starts it. ``audit.py`` explains the terms of the audit.

Networks are strongly typed: the casts and quantize/dequantize operators of the graph set the
precision, not builder flags. The only builder flag that is set allows sparse kernels. TensorRT 10
requires the flag STRONGLY_TYPED when the network is created; 11 and RTX accept it.

A test parses this file and compares every attribute of a TensorRT object with
``infra.tensorrt.engines.NAMES``. For this, variables of such objects are always called builder,
network, parser, config, profile, layer, tensor or fault, and calls on them are never chained.
"""

import ctypes
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from compressors.contracts.targets.builder import BuildRequest, Profile
from infra.child import serve
from infra.errors import BuildRefused
from infra.tensorrt.audit import (
    check_weights,
    count_widened_bytes,
    find_tables,
    halve_large_tables,
    judge_scratch,
    judge_sparsity,
    read_log_bytes,
)
from infra.tensorrt.engines import Engine, EngineAudit, load

_TYPES = {  # TensorRT's name -> ours, bits
    "FLOAT": ("fp32", 32),
    "HALF": ("fp16", 16),
    "BF16": ("bf16", 16),
    "FP8": ("fp8", 8),
    "FP4": ("fp4", 4),
    "E8M0": ("e8m0", 8),
    "INT4": ("int4", 4),
    "INT8": ("int8", 8),
    "UINT8": ("uint8", 8),
    "INT32": ("int32", 32),
    "INT64": ("int64", 64),
    "BOOL": ("bool", 8),
}
_CUDA_MAJOR, _CUDA_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class SerializedEngine:
    """A serialized engine and the log of its builder.

    Attributes:
        plan: the serialized engine, which TensorRT calls a plan.
        messages: the builder's log.
        layer_types: number of layer outputs per type in the parsed network.
        constant_bytes: bytes of constants per type in the parsed network.
        seconds: duration of the build.
    """

    plan: memoryview
    messages: list[str]
    layer_types: dict[str, int]
    constant_bytes: dict[str, int]
    seconds: float


class BuildLog:
    """Collects TensorRT's messages, and prints them except verbose ones.

    Attributes:
        messages: all messages.
        errors: the error messages.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.errors: list[str] = []

    def add(self, severity: str, text: str) -> None:
        """Add one message; ``severity`` is the name of TensorRT's enumeration value."""
        self.messages.append(text)
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(text)
        if severity != "VERBOSE":
            print(f"[{severity}] {text}")  # noqa: T201

    @property
    def reason(self) -> str:
        """TensorRT's first three error messages, which state the cause of a failure."""
        return " ".join(self.errors[:3]) or "it gave no reason."


def engine_from_onnx(
    trt: Any, request: BuildRequest, model: bytes | None = None
) -> SerializedEngine:
    """Build an engine from an ONNX graph.

    Args:
        trt: TensorRT's Python module.
        request: the graph's path, profiles and limits.
        model: a serialized graph to build instead of the file ``request.onnx``; its external data
            is next to that file.

    Raises:
        BuildRefused: there is no builder, or it does not accept the graph or the profiles.
    """
    build_log = BuildLog()
    logger = _create_logger(trt, build_log)
    version = trt.__version__
    try:
        builder = trt.Builder(logger)
    except TypeError as fault:  # the factory returned None: no driver or no device
        raise BuildRefused("builder_missing", version=version, problem=build_log.reason) from fault
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if model is None:
        parsed = parser.parse_from_file(request.onnx)
    else:
        parsed = parser.parse(model, request.onnx)
    if not parsed:
        raise BuildRefused("tensorrt_graph_refused", version=version, problem=_parse_errors(parser))
    layer_types, constant_bytes = _count_types(trt, network)
    config = builder.create_builder_config()
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.sparse_layers:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if request.profiles or _list_dynamic_inputs(network):
        profile = builder.create_optimization_profile()
        # The engine accepts shapes from ``low`` to ``high`` and is optimized for ``best``.
        for shapes in _check_profiles(network, request.profiles):
            profile.set_shape(shapes.input, shapes.low, shapes.best, shapes.high)
        if config.add_optimization_profile(profile) < 0:
            raise BuildRefused("profiles_refused", version=version, problem=build_log.reason)
    start = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    seconds = time.monotonic() - start
    if plan is None:
        raise BuildRefused("engine_not_built", version=version, problem=build_log.reason)
    return SerializedEngine(
        memoryview(plan), build_log.messages, layer_types, constant_bytes, seconds
    )


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Build and audit an engine; write it only if it passes the audit.

    Args:
        job: the fields that ``build_engine`` passes: ``request``, ``folder``, ``file`` (the name
            of the engine) and ``is_bound_to_gpu`` (whether an engine for this target runs only on
            GPUs of the compute capability on which it was built).

    Returns:
        The fields of ``Engine``.

    Raises:
        BuildRefused: the engine cannot be built from this graph, or failed its audit.
    """
    import onnx

    request = BuildRequest.model_validate(job["request"])
    folder = Path(job["folder"])
    trt = load(request.target)
    if not Path(request.onnx).is_file():
        raise BuildRefused("graph_missing", path=request.onnx)

    built = engine_from_onnx(trt, request)
    scratch_bytes, weights_bytes = read_log_bytes(built.messages, trt.__version__)
    check_weights(weights_bytes, request.packed_bytes, built.constant_bytes)

    audited, audited_bytes = request, scratch_bytes
    if any(table.multiplied for table in request.tables):
        print("--- the engine for requests of one row ---")  # noqa: T201
        audited = _restrict_to_one_row(request)
        audited_bytes, _ = read_log_bytes(engine_from_onnx(trt, audited).messages, trt.__version__)
    model = onnx.load(request.onnx, load_external_data=False)
    copy_bytes = {
        name: count_widened_bytes(tensors)
        for name, tensors in find_tables(model, request.tables).items()
    }
    removed_bytes = halve_large_tables(model, request.tables)
    twin_bytes = None
    if removed_bytes is not None:
        print("--- the twin with half the rows ---")  # noqa: T201
        twin = engine_from_onnx(trt, audited, model.SerializeToString())
        twin_bytes, _ = read_log_bytes(twin.messages, trt.__version__)
    scratch, reason, proven = judge_scratch(audited_bytes, twin_bytes, removed_bytes, copy_bytes)
    if scratch == "grows":
        raise BuildRefused("scratch_grows", scratch_bytes=audited_bytes, twin_bytes=twin_bytes)

    sparsity, sparsity_reason = judge_sparsity(
        built.messages, len(request.sparse_layers), trt.__version__
    )

    path = folder / job["file"]
    path.write_bytes(built.plan)
    engine = Engine(
        path=str(path),
        bytes=built.plan.nbytes,
        sha256=hashlib.sha256(built.plan).hexdigest(),
        target=request.target,
        version=trt.__version__,
        seconds=built.seconds,
        audit=EngineAudit(
            scratch=scratch,
            scratch_reason=reason,
            scratch_bytes=scratch_bytes,
            twin_scratch_bytes=twin_bytes,
            tables_checked=proven,
            weights_bytes=weights_bytes,
            packed_bytes=request.packed_bytes,
            layer_types=built.layer_types,
            constant_bytes=built.constant_bytes,
            sparsity=sparsity,
            sparsity_reason=sparsity_reason,
        ),
        capability=compute_capability() if job["is_bound_to_gpu"] else None,
    )
    return engine.model_dump(mode="json")


def _restrict_to_one_row(request: BuildRequest) -> BuildRequest:
    """Return a request for an engine that accepts only the smallest shape of each input."""
    profiles = tuple(
        shapes.model_copy(update={"best": shapes.low, "high": shapes.low})
        for shapes in request.profiles
    )
    return request.model_copy(update={"profiles": profiles})


def compute_capability() -> str | None:
    """Return the first visible CUDA device's capability, such as ``8.9``; None without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (  # every call returns 0 on success
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CUDA_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CUDA_MINOR, device)
    )
    if failed:
        return None
    return f"{major.value}.{minor.value}"


def _create_logger(trt: Any, build_log: BuildLog) -> Any:
    """Return a TensorRT logger that adds its messages to ``build_log``."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # a native class without type information
        def __init__(self) -> None:
            # Not super(): pybind11 checks that the native constructor itself was called.
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            build_log.add(severity.name, msg)

    return Logger()


def _parse_errors(parser: Any) -> str:
    """Format the first three nodes that the parser refused, and the number of further ones."""
    lines = []
    for index in range(parser.num_errors):
        fault = parser.get_error(index)
        name, operator, number = fault.node_name(), fault.node_operator(), fault.node()
        lines.append(f"node {name or f'number {number}'!r} ({operator}): {fault.desc()}")
    more = f" And {len(lines) - 3} more." if len(lines) > 3 else ""
    return (" ".join(lines[:3]) or "it gave no reason.") + more


def _count_types(trt: Any, network: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of layer outputs per type, and bytes of constants per type."""
    outputs: Counter[str] = Counter()
    constants: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output_index in range(layer.num_outputs):
            tensor = layer.get_output(output_index)
            kind = tensor.dtype
            if kind.name not in _TYPES:
                raise BuildRefused("layer_type_unknown", layer=index, type=kind.name)
            name, bits = _TYPES[kind.name]
            outputs[name] += 1
            if layer.type == trt.LayerType.CONSTANT:
                constants[name] += (prod(tensor.shape) * bits + 7) // 8
    return dict(outputs), dict(constants)


def _list_input_shapes(network: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all inputs; a dynamic dimension is -1."""
    shapes = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes[tensor.name] = tuple(tensor.shape)
    return shapes


def _list_dynamic_inputs(network: Any) -> list[str]:
    """Return the names of inputs with a dynamic dimension, which need a profile."""
    return [name for name, shape in _list_input_shapes(network).items() if -1 in shape]


def _check_profiles(network: Any, profiles: Sequence[Profile]) -> Sequence[Profile]:
    """Check that profiles match the inputs of the network, and return the profiles.

    Raises:
        BuildRefused: an input with a dynamic dimension has no profile; or a profile is for an
            unknown input or does not match the input's shape.
    """
    inputs = _list_input_shapes(network)
    names = {shapes.input for shapes in profiles}
    if missing := sorted(set(_list_dynamic_inputs(network)) - names):
        raise BuildRefused("profiles_missing", inputs=tuple(missing))
    for shapes in profiles:
        if shapes.input not in inputs:
            raise BuildRefused(
                "profile_input_unknown", input=shapes.input, inputs=tuple(sorted(inputs))
            )
        expected = inputs[shapes.input]
        fits = len(expected) == len(shapes.low) and all(
            size == low == high
            for size, low, high in zip(expected, shapes.low, shapes.high, strict=True)
            if size != -1
        )
        if not fits:
            raise BuildRefused(
                "profile_shape_differs",
                input=shapes.input,
                low=shapes.low,
                high=shapes.high,
                shape=expected,
            )
    return profiles


if __name__ == "__main__":
    serve(build)
