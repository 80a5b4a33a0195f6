"""Read an ONNX file of a user, which is untrusted input.

The size of the file is checked before it is parsed. Large weights may be external data: tensors in
other files to which the model refers. These files must be in the model's folder and large enough
for their tensors. They are read when the values are needed.

A draft is the folder that becomes a bundle when it is packed. ``DraftRefused`` is raised if no
draft can be written.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compressors.contracts import is_out_of_memory
from infra.errors import DraftRefused, OutOfMemory
from infra.memory import require_memory

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

MAX_ONNX_BYTES = 2**31 - 1
"""Protobuf's limit for one message; larger models need external data."""

MEMORY_FACTOR = 3
"""Bytes of memory per byte of the file: its content, the parsed message, and a copy of the weights.
External data is memory-mapped, so only its copy counts."""

OPSETS = (7, 25)
"""The first supported opset, in which binary operators began to broadcast as they do now, and the
last supported opset."""


def read_onnx(path: Path) -> "ir.Model":
    """Read an ONNX model and check the locations of its external data.

    Raises:
        DraftRefused: the file is not an ONNX model, is too large, has an unsupported opset, or
            refers to external data that is missing, too short or outside of the file's folder.
        OutOfMemory: there is not enough memory.
        OSError: the file cannot be read.
    """
    import onnx
    import onnx_ir as ir

    size = path.stat().st_size
    if size > MAX_ONNX_BYTES:
        raise DraftRefused("onnx_too_large", path=str(path), most_bytes=MAX_ONNX_BYTES, bytes=size)
    require_memory(MEMORY_FACTOR * size, f"Reading {path.name}")
    try:
        proto = onnx.ModelProto.FromString(path.read_bytes())
        if not proto.graph.output:
            raise DraftRefused("onnx_unreadable", path=str(path), problem="no graph with outputs")
        _require_opset(proto, path)
        model = ir.from_proto(proto)
        external = [item for item in _iterate_tensors(model) if isinstance(item, ir.ExternalTensor)]
        for tensor in external:
            tensor.base_dir = path.parent
            _require_readable(tensor, path)
        external_bytes = sum(tensor.nbytes for tensor in external)
        needed = MEMORY_FACTOR * size + external_bytes
        require_memory(needed, f"Reading {path.name} and its external data")
        onnx.checker.check_model(str(path))
    except (DraftRefused, OutOfMemory, OSError):
        raise
    except Exception as fault:  # the libraries raise many types for a damaged file
        if is_out_of_memory(fault):
            raise
        problem = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        raise DraftRefused("onnx_unreadable", path=str(path), problem=problem) from fault
    return model


def _require_opset(proto: "onnx.ModelProto", path: Path) -> None:
    """Raise unless the opset of the standard ONNX operators is supported."""
    first, last = OPSETS
    versions = [item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")]
    # A model that does not state its opset is refused, like one with opset 0.
    if not all(first <= version <= last for version in versions or [0]):
        got = versions[0] if versions else "none"
        raise DraftRefused("onnx_opset", path=str(path), first=first, last=last, got=got)


def _iterate_tensors(model: "ir.Model") -> "Iterator[ir.TensorProtocol]":
    """Yield all tensors of a model: weights and attributes, also of subgraphs and functions."""
    import onnx_ir as ir

    functions = tuple(model.functions.values())
    graphs = [model.graph, *(function.graph for function in functions)]
    nodes = [node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph)]
    graphs += [node.graph for node in nodes if isinstance(node.graph, ir.Graph)]
    for graph in dict.fromkeys(graphs):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
    for owner in (*nodes, *functions):  # a function's attributes are default values
        for attribute in owner.attributes.values():
            if attribute.value is None:
                continue
            if attribute.type is ir.AttributeType.TENSOR:
                yield attribute.value
            elif attribute.type is ir.AttributeType.TENSORS:
                yield from attribute.value


def _require_readable(tensor: "ir.ExternalTensor", path: Path) -> None:
    """Raise if the file of a tensor's external data is not allowed or does not contain it.

    Raises:
        DraftRefused: the file is outside of the model's folder, missing or too short.
    """
    location = str(tensor.location)
    if Path(location).is_absolute() or not _is_inside(path.parent / location, path.parent):
        raise DraftRefused("onnx_data_outside", path=str(path), location=location)
    file, needed = path.parent / location, tensor.nbytes
    size = file.stat().st_size if file.is_file() else 0
    offset = tensor.offset or 0
    if offset < 0 or offset + max(needed, tensor.length or 0) > size:
        raise DraftRefused(
            "onnx_data_missing", name=str(tensor.name), location=location, bytes=needed
        )


def _is_inside(file: Path, folder: Path) -> bool:
    """Return whether a file is in a folder after symbolic links are resolved."""
    return file.resolve().is_relative_to(folder.resolve())
