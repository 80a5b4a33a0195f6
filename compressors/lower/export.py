"""One compressed module, written down for one target with ``torch.onnx.export``."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from compressors.batches import example
from compressors.contracts import Schema, TargetKind
from compressors.errors import NotLowerable
from compressors.formats import Bag, PackedTable
from compressors.lower import onnxruntime, tensorrt
from compressors.lower.served import SCORE, Served, dynamic_shapes, input_names, served
from compressors.step import rows_of_tables

OPSET = 21  # the first with blocked DequantizeLinear and int4
EXTERNAL_BYTES = 2**30  # one protobuf file holds at most 2 GiB
TRACE_ROWS = 3


@dataclass(frozen=True)
class TableInitializers:
    """The stored tensors of one table in a graph, by name; the first dimension is its rows."""

    module: str
    rows: int
    format: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Lowered:
    """What was exported: the wrapper to compare with, and where each table lies in the graph."""

    served: Served
    tables: tuple[TableInitializers, ...]


def lower(
    model: nn.Module, schema: Schema, target: TargetKind, path: Path, most_rows: int = 65_536
) -> Lowered:
    """Write ``model`` for one target to ``path`` (``.onnx``; large weights beside it).

    Args:
        model: a plain or compressed module.
        schema: its inputs and output.
        target: which serving target's form each storage format gets.
        path: the file to write.
        most_rows: the largest batch the graph must take.

    Raises:
        NotLowerable: torch.export cannot trace the module, or an op has no ONNX form.
    """
    rows = rows_of_tables(model, schema)
    wrapper = served(model, schema, rows)
    form = onnxruntime if target == "onnxruntime" else tensorrt
    inputs = example(schema, rows, TRACE_ROWS)
    names = input_names(schema)
    try:
        args = tuple(inputs[name] for name in names)
        shapes = dynamic_shapes(schema, most_rows)
        program = _export(wrapper, args, names, form.translations(), shapes)
    except Exception as fault:
        reason = (str(fault).strip().splitlines() or [repr(fault)])[-1]
        raise NotLowerable(
            f"The network cannot be written down for {target}: {reason}. "
            f"Its forward must be free of Python control flow that depends on tensor values."
        ) from fault
    tables = _tables(wrapper)
    if target != "onnxruntime":
        _retype(program.model, tables)
    program.optimize()
    if target == "onnxruntime":
        onnxruntime.spell_out_clipping(program.model)
    _strip(program.model)
    size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
    program.save(str(path), external_data=size > EXTERNAL_BYTES)
    return Lowered(wrapper, tables)


def _export(
    wrapper: Served,
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
                output_names=[SCORE],
                optimize=False,
                verbose=False,
            )
            assert program is not None  # noqa: S101 - what dynamo=True returns, for the checker
            return program
    finally:
        quiet.setLevel(level)


def _strip(model: ir.Model) -> None:
    """Drop the exporter's notes (stack traces of every node): they can outweigh small weights."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _tables(wrapper: Served) -> tuple[TableInitializers, ...]:
    found = []
    for name, module in wrapper.named_modules():
        public = name.removeprefix("model.").removesuffix(".table")
        if isinstance(module, PackedTable):
            tensors = tuple(f"{name}.{leaf}" for leaf, _ in module.named_buffers())
            found.append(TableInitializers(public, module.rows, module.storage.name, tensors))
        elif isinstance(module, nn.Embedding):
            inside_bag = isinstance(wrapper.get_submodule(name.rpartition(".")[0]), Bag)
            label = public if inside_bag else name.removeprefix("model.")
            found.append(
                TableInitializers(label, module.num_embeddings, "float32", (f"{name}.weight",))
            )
    return tuple(found)


def _retype(model: ir.Model, tables: tuple[TableInitializers, ...]) -> None:
    """Give packed tables the element types and shapes TensorRT's operators take."""
    for table in tables:
        if table.format not in {"rowwise_int8", "rowwise_int4"}:
            continue
        codes, scale = (_initializer(model, name) for name in table.names)
        if table.format == "rowwise_int4":
            packed = tensorrt.packed_int4(codes.const_value.numpy())
            shape = (packed.shape[0], 2 * packed.shape[1])
            _set(codes, ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape(shape)))
        else:
            _set(scale, ir.Tensor(scale.const_value.numpy().reshape(-1)))


def _initializer(model: ir.Model, name: str) -> ir.Value:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise NotLowerable(f"The exported graph holds no tensor {name!r}.")
    return value


def _set(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    value.const_value = tensor
    value.dtype = tensor.dtype
    value.shape = tensor.shape
