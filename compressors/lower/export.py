"""Export one graph of a compressed module for one target with ``torch.onnx.export``."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from compressors.contracts import is_out_of_memory
from compressors.core.batches import example
from compressors.core.modules.formats import Bag, PackedLinear, PackedTable
from compressors.core.modules.output_calibration import recalibration_of
from compressors.core.runner import rows_of_tables
from compressors.core.state.tensor_files import TensorFile
from compressors.errors.compression import AuditFailed, NotLowerable
from compressors.lower import attention
from compressors.lower.external_weights import link_weights
from compressors.lower.findings import LayerInitializer, TableInitializers
from compressors.lower.graph_builders import exact_sigmoid, log_sigmoid, squeeze_fixed
from compressors.lower.merged_tables import MergedTable
from compressors.lower.passes.simplify import simplify
from compressors.lower.passes.strip_metadata import StripMetadata
from compressors.lower.serving_wrapper import (
    ServedGraph,
    ServingWrapper,
    dynamic_shapes,
    input_names,
    wrap_for_serving,
)
from compressors.lower.targets.registry import lowering_target

OPSET = 21  # the first with blocked DequantizeLinear and int4
MERGED = 1024  # the optimizer merges equal initializers up to this many elements
EXTERNAL_BYTES = 2**29  # one protobuf file holds at most 2 GiB, and is read into memory
TRACE_ROWS = 3
NARROW = {
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.UINT8,
    ir.DataType.FLOAT8E4M3FN,
}


@dataclass(frozen=True)
class Lowered:
    """The result of an export: the module to compare with, and the initializers of its tables.

    Tables in which no request looks up a row are left out. ``layers`` are the packed dense layers.
    """

    served: ServingWrapper
    tables: tuple[TableInitializers, ...]
    layers: tuple[LayerInitializer, ...] = ()


def lower(
    model: nn.Module,
    form: ServedGraph,
    target: str,
    path: Path,
    most_rows: int = 65_536,
    files: Mapping[str, TensorFile] = MappingProxyType({}),
) -> Lowered:
    """Write one graph of ``model`` for one target to ``path`` (large weights to a file next to it).

    Args:
        model: a plain or compressed module.
        form: which of its graphs.
        target: the serving target, whose translation of each storage format is used.
        path: the ``.onnx`` file to write.
        most_rows: the largest batch size that the graph must accept.
        files: files of the model's tensors, to which a large graph has links; none if it is built.

    Raises:
        NotLowerable: torch.export cannot trace the module, or an op has no ONNX form.
        AuditFailed: a packed weight did not reach the graph as it is stored.
    """
    wrapper, program = exported(model, form, target, most_rows)
    tables = _tables(wrapper, program.model.graph)
    _retype(program.model, wrapper, target)
    initializers = program.model.graph.initializers
    looked_up = tuple(
        table for table in tables if any(_looked_up(initializers[name]) for name in table.names)
    )
    packed = _packed_weights(wrapper, program.model.graph)
    small = _small_initializers(program.model.graph)
    simplify(program.model, _may_fold)
    merged = _merged_names(small, program.model.graph)
    packed = tuple(replace(each, name=merged.get(each.name, each.name)) for each in packed)
    looked_up = tuple(_renamed(table, merged) for table in looked_up)
    for graph_pass in lowering_target(target).passes():
        graph_pass(program.model)
    StripMetadata()(program.model)
    _require_packed(packed, program.model.graph, target)
    _save(program, path, files)
    rows = rows_of_tables(model, form.signature)
    layers = _layers(wrapper, packed, target)
    return Lowered(wrap_for_serving(model, form, rows), looked_up, layers)


def _save(program: torch.onnx.ONNXProgram, path: Path, files: Mapping[str, TensorFile]) -> None:
    """Write the graph; weights of a large one are in files next to it."""
    if _inline_bytes(program.model) <= EXTERNAL_BYTES:
        program.save(str(path), external_data=False)
        return
    values = program.model.graph.initializers.values()
    weights = [(value, value.const_value) for value in values]
    links = link_weights(program.model, path, files)
    if _inline_bytes(program.model) <= EXTERNAL_BYTES:
        ir.save(program.model, path)
        return
    for value, weight in weights:
        value.const_value = weight
    for link in links:
        link.unlink()
    program.save(str(path), external_data=True)


def _inline_bytes(model: ir.Model) -> int:
    """Return the bytes of the initializers that are not in an external file yet."""
    values = (value.const_value for value in model.graph.initializers.values())
    return sum(value.nbytes for value in values if not isinstance(value, ir.ExternalTensor))


def exported(
    model: nn.Module, form: ServedGraph, target: str, most_rows: int = 65_536
) -> tuple[ServingWrapper, torch.onnx.ONNXProgram]:
    """Export one graph of ``model`` for a target with torch, before it is simplified.

    Takes the same arguments as ``lower`` and returns the same program every time.

    Raises:
        NotLowerable: torch.export cannot trace the module, or an op has no ONNX form.
    """
    signature = form.signature
    rows = rows_of_tables(model, signature)
    functions = lowering_target(target)
    wrapper = wrap_for_serving(model, form, rows, together=functions.merges_lookups)
    translations = {
        torch.ops.aten.log_sigmoid.default: log_sigmoid,
        torch.ops.aten.squeeze.default: squeeze_fixed,
        **attention.translations(),
        **functions.translations(),
    }
    output = signature.single_output
    if output.form == "probability" and recalibration_of(wrapper.model) is not None:
        translations[torch.ops.aten.sigmoid.default] = exact_sigmoid
    inputs = example(signature, rows, TRACE_ROWS)
    names = input_names(signature)
    try:
        args = tuple(inputs[name] for name in names)
        shapes = dynamic_shapes(signature, most_rows)
        program = _export(wrapper, args, names, translations, shapes)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        first = _original_error(fault)
        if isinstance(first, NotLowerable):
            raise copy.copy(first) from fault
        reason = (str(first).strip().splitlines() or [repr(first)])[0].rstrip(".")
        raise NotLowerable("export_failed", target=target, problem=reason) from fault
    return wrapper, program


def _original_error(fault: BaseException) -> BaseException:
    """The original error, which torch's exporter wraps in advice to torch developers."""
    while fault.__cause__ is not None:
        fault = fault.__cause__
    return fault


def _export(
    wrapper: ServingWrapper,
    args: tuple[Tensor, ...],
    names: tuple[str, ...],
    translations: dict[Any, Callable[..., Any]],
    shapes: tuple[dict[int, Any], ...],
) -> torch.onnx.ONNXProgram:
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns once per missing torchvision op
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                wrapper,
                args,
                dynamo=True,
                custom_translation_table=translations,
                dynamic_shapes=(shapes,),
                opset_version=OPSET,
                input_names=list(names),
                output_names=[wrapper.form.output],
                optimize=False,
                verbose=False,
            )
            assert program is not None  # noqa: S101 - never None with dynamo=True; for mypy
            return program
    finally:
        quiet.setLevel(level)


def _may_fold(node: ir.Node) -> bool | None:
    """Whether constant folding may replace a node: not if it would store a weight as float32."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Cast" and source is not None and source.dtype in NARROW:
        return False
    if node.op_type == "Expand":  # it would store one scale for every block
        return False
    if any(value is not None and _is_shared_weight(value) for value in node.inputs):
        return False  # the result would be a second copy of a tied weight
    return None


def _is_shared_weight(value: ir.Value) -> bool:
    """Whether an initializer is large and more than one operator reads it."""
    stored = value.const_value if value.is_initializer() else None
    return stored is not None and stored.size > MERGED and len(value.uses()) > 1


@dataclass(frozen=True)
class _Packed:
    """One packed weight, and the name of its initializer in the exported graph."""

    module: str
    format: str
    bytes: int
    name: str


def _packed_weights(wrapper: ServingWrapper, graph: ir.Graph) -> tuple[_Packed, ...]:
    """The stored tensors of packed modules in a graph: weights of layers, all tensors of tables.

    Tensors of tables are left out if requests do not decide which of their rows are read.
    """
    names = _names(wrapper)
    result = []
    for module_name, module in wrapper.named_modules():
        if not isinstance(module, PackedTable | PackedLinear):
            continue
        stored = list(module.buffers())
        if isinstance(module, PackedLinear):  # a bias may be exported in another type
            stored = stored[:1]
        for tensor in stored:
            name = next((n for n in names[id(tensor)] if n in graph.initializers), None)
            if name is None:  # nothing reads it
                continue
            if isinstance(module, PackedTable) and not _looked_up(graph.initializers[name]):
                continue
            label = _label(wrapper, module_name)
            result.append(_Packed(label, module.storage.name, tensor.nbytes, name))
    return tuple(result)


def _layers(
    wrapper: ServingWrapper, packed: tuple[_Packed, ...], target: str
) -> tuple[LayerInitializer, ...]:
    """The initializers of packed dense layers, and which of them stay packed at serving."""
    modules = {name.removeprefix("model."): module for name, module in wrapper.named_modules()}
    result = []
    for weight in packed:
        layer = modules.get(weight.module)  # merged tables have no single name
        if isinstance(layer, PackedLinear):
            stays_packed = lowering_target(target).stays_packed(layer)
            result.append(
                LayerInitializer(
                    module=weight.module,
                    format=weight.format,
                    name=weight.name,
                    packed=stays_packed,
                )
            )
    return tuple(result)


def _require_packed(packed: tuple[_Packed, ...], graph: ir.Graph, target: str) -> None:
    """Raise if the packed weights of a graph are not those of the module.

    Raises:
        AuditFailed: a stored tensor is missing, or takes more bytes.
    """
    for weight in packed:
        value = graph.initializers.get(weight.name)
        size = None if value is None or value.const_value is None else value.const_value.nbytes
        if size is None or size > weight.bytes:
            raise (
                AuditFailed(
                    "weight_replaced",
                    target=target,
                    unit=weight.module,
                    expected=weight.bytes,
                    format=weight.format,
                )
                if size is None
                else AuditFailed(
                    "weight_expanded",
                    target=target,
                    unit=weight.module,
                    expected=weight.bytes,
                    got=size,
                    format=weight.format,
                )
            ).caused_by(weight.module)


def _small_initializers(graph: ir.Graph) -> dict[str, tuple[object, ...]]:
    """Dtype, shape and bytes of the small initializers, which the optimizer merges if equal."""
    return {
        name: (value.const_value.dtype, tuple(value.const_value.shape), value.const_value.tobytes())
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.size <= MERGED
    }


def _merged_names(before: dict[str, tuple[object, ...]], graph: ir.Graph) -> dict[str, str]:
    """The new name of each initializer that was merged into an equal one, by old name."""
    after = {content: name for name, content in _small_initializers(graph).items()}
    removed = before.keys() - graph.initializers.keys()
    return {name: after[before[name]] for name in removed if before[name] in after}


def _renamed(table: TableInitializers, merged: dict[str, str]) -> TableInitializers:
    every = {merged.get(name, name): share for name, share in table.every.items()}
    names = tuple(merged.get(name, name) for name in table.names)
    return table.model_copy(update={"names": names, "every": every})


def _names(wrapper: ServingWrapper) -> dict[int, list[str]]:
    """All names of each tensor by ``id``; a graph stores a tied tensor under any one of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in wrapper.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return names


def _tables(wrapper: ServingWrapper, graph: ir.Graph) -> tuple[TableInitializers, ...]:
    """The initializers of each table in a graph, without tables that the network never reads."""
    names = _names(wrapper)
    result = []
    for name, module in wrapper.named_modules():
        every: dict[str, int] = {}
        if isinstance(module, PackedTable):
            rows, form, stored = module.rows, module.storage.name, list(module.buffers())
            laid = module.storage.layout(rows, module.dim, module.settings)
            every = {key: spec.every for key, spec in laid.items()}
        elif isinstance(module, nn.Embedding):
            rows, form, stored = module.num_embeddings, "float32", [module.weight]
        else:
            continue
        stored_names = [
            next((n for n in names[id(t)] if n in graph.initializers), None) for t in stored
        ]
        if None in stored_names:
            continue
        shared = {n: every.get(n.rpartition(".")[2], 1) for n in stored_names if n is not None}
        result.append(
            TableInitializers(
                module=_label(wrapper, name),
                rows=rows,
                format=form,
                names=stored_names,
                every={n: share for n, share in shared.items() if share != 1},
            )
        )
    return tuple(result)


def _label(wrapper: ServingWrapper, name: str) -> str:
    """The name of a unit as users know it: a table inside a bag has the bag's name."""
    owner, _, leaf = name.rpartition(".")
    outer = wrapper.get_submodule(owner)
    if leaf == "table" and isinstance(outer, MergedTable):
        return outer.label
    return (owner if leaf == "table" and isinstance(outer, Bag) else name).removeprefix("model.")


def _looked_up(value: ir.Value) -> bool:
    """Whether the request decides which rows of a stored tensor are read.

    Tables such as positions are read at the same rows in every call. A runtime computes such a
    lookup once and drops the table, which is not an error.
    """
    return any(not _constant(gather.inputs[1]) for gather in _gathers(value))


def _gathers(value: ir.Value) -> Iterator[ir.Node]:
    for node in value.consumers():
        if node.op_type == "Gather":
            yield node
        elif node.op_type == "DequantizeLinear":
            yield from _gathers(node.outputs[0])


def _constant(value: ir.Value | None) -> bool:
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(_constant(item) for item in node.inputs)


def _retype(model: ir.Model, wrapper: ServingWrapper, target: str) -> None:
    """Convert packed tables and layers to the types and shapes that a target's operators take."""
    names, done, functions = _names(wrapper), set(), lowering_target(target)
    for module in wrapper.modules():
        if not isinstance(module, PackedTable | PackedLinear):
            continue
        for stored, tensor in module.named_buffers():
            name = next((n for n in names[id(tensor)] if n in model.graph.initializers), None)
            if name is None or name in done:  # nothing reads it, or two tables share it
                continue
            done.add(name)
            value = _initializer(model, name)
            values = value.const_value.numpy()
            if isinstance(module, PackedTable):
                new = functions.retyped_table(module, stored, values)
            else:
                new = functions.retyped_layer(module, stored, values)
            if new is not None:
                _set(value, new)


def _initializer(model: ir.Model, name: str) -> ir.Value:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise NotLowerable("tensor_missing", name=name)
    return value


def _set(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    value.const_value = tensor
    value.dtype = tensor.dtype
    value.shape = tensor.shape
