"""Export one graph of a compressed module for one target with ``torch.onnx.export``.

``lower`` exports the graph, converts stored tensors to the target's types, runs the graph passes,
checks that no compressed weight was replaced or enlarged, and writes the file. A "packed" table or
layer is a ``PackedTable`` or ``PackedLinear``: its weights take fewer bits than float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir
import torch
from torch import nn

from compressors.core.modules.formats import PackedLinear, PackedTable
from compressors.core.runner import rows_of_tables
from compressors.core.state.tensor_files import TensorFile
from compressors.errors.compression import AuditFailed, NotLowerable
from compressors.lower.external_weights import link_weights
from compressors.lower.findings import LayerInitializer, TableInitializers
from compressors.lower.lookups.find_lookups import get_unit_name
from compressors.lower.lookups.merged_tables import MergedTable
from compressors.lower.passes.simplify import simplify
from compressors.lower.passes.strip_metadata import StripMetadata
from compressors.lower.passes.table_reads import depends_on_request, is_used_in_matmul
from compressors.lower.program import export_program
from compressors.lower.serving_wrapper import ServedGraph, ServingWrapper, wrap_for_serving
from compressors.lower.targets.registry import lowering_target

DEDUPLICATED_ELEMENTS = 1024  # the optimizer removes equal copies of initializers up to this size
EXTERNAL_BYTES = 2**29  # more weights are stored outside the .onnx file (protobuf limit: 2 GiB)
SHORT_TYPES = {  # types of stored weights; if their Cast were folded, they would become float32
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.UINT8,
    ir.DataType.FLOAT8E4M3FN,
}


@dataclass(frozen=True)
class Lowered:
    """The result of an export.

    Attributes:
        wrapper: the PyTorch module with which the graph's scores are compared (no merged lookups).
        tables: the names of the stored tensors of each table, except tables whose looked-up rows
            are the same for every request.
        layers: the names of the stored weights of each packed dense layer.
    """

    wrapper: ServingWrapper
    tables: tuple[TableInitializers, ...]
    layers: tuple[LayerInitializer, ...] = ()


def lower(
    model: nn.Module,
    served_graph: ServedGraph,
    target: str,
    path: Path,
    most_rows: int = 65_536,
    files: Mapping[str, TensorFile] = MappingProxyType({}),
) -> Lowered:
    """Write one graph of a model for one target.

    Args:
        model: a plain or compressed module.
        served_graph: the graph to write: the whole model, or one tower.
        target: name of the serving target, whose translation of each storage format is used.
        path: the ``.onnx`` file to write; large weights are stored in files next to it.
        most_rows: the largest batch size that the graph must accept.
        files: stored files of the model's tensors by tensor name. A large graph links to them
            instead of storing the tensors again.

    Raises:
        NotLowerable: torch.export cannot trace the module, or an operator has no ONNX form.
        AuditFailed: a packed weight is missing in the graph, or is larger there than in the model.
    """
    wrapper, program = export_program(model, served_graph, target, most_rows)
    tables = _collect_table_initializers(wrapper, program.model.graph)
    _convert_initializers(program.model, wrapper, target)
    initializers = program.model.graph.initializers
    tables = tuple(
        table
        for table in tables
        if any(depends_on_request(initializers[name]) for name in table.names)
    )
    packed = _collect_packed_weights(wrapper, program.model.graph)
    small_before = _describe_small_initializers(program.model.graph)
    simplify(program.model, _may_fold)
    new_names = _map_removed_names(small_before, program.model.graph)
    packed = tuple(
        replace(tensor, name=new_names.get(tensor.name, tensor.name)) for tensor in packed
    )
    tables = tuple(_rename_initializers(table, new_names) for table in tables)
    for graph_pass in lowering_target(target).passes():
        graph_pass(program.model)
    StripMetadata()(program.model)
    _require_packed(packed, program.model.graph, target)
    _save(program, path, files)
    rows = rows_of_tables(model, served_graph.signature)
    layers = _collect_layer_initializers(wrapper, packed, target)
    return Lowered(wrap_for_serving(model, served_graph, rows), tables, layers)


def _save(program: torch.onnx.ONNXProgram, path: Path, files: Mapping[str, TensorFile]) -> None:
    """Write the graph; the weights of a large graph are written or linked next to it."""
    if _count_inline_bytes(program.model) <= EXTERNAL_BYTES:
        program.save(str(path), external_data=False)
        return
    values = program.model.graph.initializers.values()
    weights = [(value, value.const_value) for value in values]
    links = link_weights(program.model, path, files)
    if _count_inline_bytes(program.model) <= EXTERNAL_BYTES:  # the links replace enough weights
        ir.save(program.model, path)
        return
    for value, weight in weights:  # otherwise undo the links and write all weights to one file
        value.const_value = weight
    for link in links:
        link.unlink()
    program.save(str(path), external_data=True)


def _count_inline_bytes(model: ir.Model) -> int:
    """Return the bytes of the initializers that are not in an external file yet."""
    values = (value.const_value for value in model.graph.initializers.values())
    return sum(value.nbytes for value in values if not isinstance(value, ir.ExternalTensor))


def _may_fold(node: ir.Node) -> bool | None:
    """Return False if folding a node would enlarge or rename stored weights; None by default."""
    dtype = next((value.dtype for value in node.inputs[:1] if value is not None), None)
    is_widening = node.op_type == "Cast" and dtype in SHORT_TYPES
    is_renaming = node.op_type == "Transpose" and dtype == ir.DataType.INT8  # of a layer's codes
    if is_widening or is_renaming or node.op_type == "Expand":  # Expand repeats a stored scale
        return False
    if any(value is not None and _is_shared_weight(value) for value in node.inputs):
        return False  # the result would be a second copy of a tied weight
    return None


def _is_shared_weight(value: ir.Value) -> bool:
    """Return whether a value is a large initializer that more than one operator reads."""
    stored = value.const_value if value.is_initializer() else None
    return stored is not None and stored.size > DEDUPLICATED_ELEMENTS and len(value.uses()) > 1


@dataclass(frozen=True)
class _PackedTensor:
    """A stored tensor of a unit (table or layer) ``module``, and its initializer's name."""

    module: str
    format: str
    bytes: int
    name: str


def _collect_packed_weights(wrapper: ServingWrapper, graph: ir.Graph) -> tuple[_PackedTensor, ...]:
    """Return the tensors of packed modules in a graph: weights of layers, all tensors of tables.

    Tensors of a table are left out if the looked-up rows are the same for every request.
    """
    names = _map_tensors_to_names(wrapper)
    result = []
    for module_name, module in wrapper.named_modules():
        if not isinstance(module, PackedTable | PackedLinear):
            continue
        stored = list(module.buffers())
        if isinstance(module, PackedLinear):  # scale and bias may be exported in another type
            stored = stored[:1]  # the codes
        for tensor in stored:
            name = next((n for n in names[id(tensor)] if n in graph.initializers), None)
            if name is None:  # no operator reads it
                continue
            value = graph.initializers[name]
            if isinstance(module, PackedTable) and not depends_on_request(value):
                continue
            unit = _get_unit_name(wrapper, module_name)
            result.append(_PackedTensor(unit, module.storage.name, tensor.nbytes, name))
    return tuple(result)


def _collect_layer_initializers(
    wrapper: ServingWrapper, packed: tuple[_PackedTensor, ...], target: str
) -> tuple[LayerInitializer, ...]:
    """Return the initializer of each packed dense layer, and whether a runtime keeps it packed."""
    modules = {name.removeprefix("model."): module for name, module in wrapper.named_modules()}
    result = []
    for weight in packed:
        layer = modules.get(weight.module)  # None for a merged table: its name lists several
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


def _require_packed(packed: tuple[_PackedTensor, ...], graph: ir.Graph, target: str) -> None:
    """Check that the graph has all tensors of packed modules, none larger than in the module.

    Raises:
        AuditFailed: a tensor is missing or larger; names the unit and both sizes in bytes.
    """
    for weight in packed:
        value = graph.initializers.get(weight.name)
        stored = None if value is None else value.const_value
        unit, expected, form = weight.module, weight.bytes, weight.format
        if stored is None:
            raise AuditFailed(
                "weight_replaced", target=target, unit=unit, expected=expected, format=form
            ).name_cause(unit)
        if (got := stored.nbytes) > expected:
            raise AuditFailed(
                "weight_expanded", target=target, unit=unit, expected=expected, got=got, format=form
            ).name_cause(unit)


def _describe_small_initializers(graph: ir.Graph) -> dict[str, tuple[object, ...]]:
    """Return dtype, shape and bytes of each small initializer; the optimizer merges equal ones."""
    return {
        name: (value.const_value.dtype, tuple(value.const_value.shape), value.const_value.tobytes())
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.size <= DEDUPLICATED_ELEMENTS
    }


def _map_removed_names(before: dict[str, tuple[object, ...]], graph: ir.Graph) -> dict[str, str]:
    """Map the name of each initializer that was replaced by an equal one to that one."""
    after = {content: name for name, content in _describe_small_initializers(graph).items()}
    removed = before.keys() - graph.initializers.keys()
    return {name: after[before[name]] for name in removed if before[name] in after}


def _rename_initializers(table: TableInitializers, new_names: dict[str, str]) -> TableInitializers:
    shared = {new_names.get(name, name): rows for name, rows in table.rows_per_entry.items()}
    names = tuple(new_names.get(name, name) for name in table.names)
    return table.model_copy(update={"names": names, "rows_per_entry": shared})


def _map_tensors_to_names(wrapper: ServingWrapper) -> dict[int, list[str]]:
    """Return all names of each tensor by ``id``; a graph stores a tied tensor under one of them."""
    names: dict[int, list[str]] = {}
    for name, tensor in wrapper.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return names


def _collect_table_initializers(
    wrapper: ServingWrapper, graph: ir.Graph
) -> tuple[TableInitializers, ...]:
    """Return the initializers of each table in a graph, without tables that are never looked up."""
    names, result = _map_tensors_to_names(wrapper), []
    for name, module in wrapper.named_modules():
        # By tensor: how many rows of the table share an entry, such as a scale.
        rows_per_tensor: dict[str, int] = {}
        if isinstance(module, PackedTable):
            rows, storage_format, stored = module.rows, module.storage.name, list(module.buffers())
            layout = module.storage.layout(rows, module.dim, module.settings)
            rows_per_tensor = {key: spec.rows_per_entry for key, spec in layout.items()}
        elif isinstance(module, nn.Embedding):
            rows, storage_format, stored = module.num_embeddings, "float32", [module.weight]
        else:
            continue
        found = [next((n for n in names[id(t)] if n in graph.initializers), None) for t in stored]
        if found[0] is None:
            continue
        # A layer that reads codes of a table contains its scale, so no operator reads the scale.
        stored_names = tuple(n for n in found if n is not None)
        rows_per_entry = {n: rows_per_tensor.get(n.rpartition(".")[2], 1) for n in stored_names}
        result.append(
            TableInitializers(
                module=_get_unit_name(wrapper, name),
                rows=rows,
                format=storage_format,
                names=stored_names,
                rows_per_entry={n: shared for n, shared in rows_per_entry.items() if shared != 1},
                multiplied=is_used_in_matmul(graph.initializers[stored_names[0]]),
            )
        )
    return tuple(result)


def _get_unit_name(wrapper: ServingWrapper, name: str) -> str:
    """Return the name of a unit in plans; a merged table has the names of its tables."""
    parent_name, _, attribute = name.rpartition(".")
    parent = wrapper.get_submodule(parent_name)
    if attribute == "table" and isinstance(parent, MergedTable):
        return parent.label
    return get_unit_name(wrapper, name)


def _convert_initializers(model: ir.Model, wrapper: ServingWrapper, target: str) -> None:
    """Convert tensors of packed tables and layers to types and shapes that a target accepts."""
    names, converted_names, lowering = (
        _map_tensors_to_names(wrapper),
        set(),
        lowering_target(target),
    )
    for module in wrapper.modules():
        if not isinstance(module, PackedTable | PackedLinear):
            continue
        for stored, tensor in module.named_buffers():
            name = next((n for n in names[id(tensor)] if n in model.graph.initializers), None)
            if name is None or name in converted_names:  # it is unused, or shared and converted
                continue
            converted_names.add(name)
            value = _require_initializer(model, name)
            values = value.const_value.numpy()
            if isinstance(module, PackedTable):
                converted = lowering.convert_table_tensor(module, stored, values)
            else:
                converted = lowering.convert_layer_tensor(module, stored, values)
            if converted is not None:
                _set_tensor(value, converted)


def _require_initializer(model: ir.Model, name: str) -> ir.Value:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise NotLowerable("tensor_missing", name=name)
    return value


def _set_tensor(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    value.const_value = tensor
    value.dtype = tensor.dtype
    value.shape = tensor.shape
