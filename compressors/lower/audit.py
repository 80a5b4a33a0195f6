"""What a target's own graph must and must not contain.

A runtime may quietly rewrite an ordered graph into something slower: an int8 Gemm that was not
fused computes in float32 behind a DequantizeLinear, a folded table is float32 again. So the
graph is read back after the runtime has optimized it, and judged here.
"""

import math
from collections import Counter

import onnx

from compressors.contracts import Plan
from compressors.errors.compression import AuditFailed
from compressors.lower.findings import GraphAudit, LayerInitializer, TableInitializers

FLOAT_PRODUCTS = {"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Conv", "FusedConv"}
INT8_PRODUCTS = {"QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}


def audit(
    graph: onnx.GraphProto,
    plan: Plan | None,
    tables: tuple[TableInitializers, ...],
    layers: tuple[LayerInitializer, ...] = (),
) -> GraphAudit:
    """Judge an ONNX Runtime graph as optimized by the runtime itself.

    Args:
        graph: the optimized graph; initializers may lie outside it, their shapes not.
        plan: what was decided; None for an untouched model.
        tables: the stored tensors of every table, by their names in the graph.
        layers: the stored weights of every packed dense layer.

    Raises:
        AuditFailed: a Gemm stayed in float behind a DequantizeLinear, fewer int8 products than
            ordered, a table widened before its Gather, or a table or layer that is not there as
            packed.
    """
    maker = {output: node for node in graph.node for output in node.output}
    held = {item.name: item for item in graph.initializer}
    faults = [*_unfused(graph, maker), *_slow(graph, maker, held), *_widened(graph, maker, held)]
    lines = plan.lines if plan else ()
    ordered = sum(line.format == "static_int8" for line in lines)
    fused = sum(node.op_type in INT8_PRODUCTS for node in graph.node)
    if fused < ordered:
        faults.append(f"{ordered} int8 layers were ordered and {fused} run in int8")
    for table in tables:
        for name in table.names:
            entries = table.entries(name)  # None: of the whole table, and small enough to fold
            if name not in held and entries is not None:
                faults.append(f"table {table.module!r}: {name!r} was replaced by the runtime")
            elif entries is not None and entries != held[name].dims[0]:
                faults.append(f"table {table.module!r}: {name!r} lost rows")
    faults += _not_multiplied(graph, held, layers)
    if faults:
        modules = [table.module for table in tables] + [layer.module for layer in layers]
        raise AuditFailed("graph_not_as_ordered", faults=tuple(faults)).caused_by(
            *(name for name in modules if any(f"{name!r}:" in fault for fault in faults))
        )
    return GraphAudit(
        nodes=dict(Counter(node.op_type for node in graph.node).most_common()),
        int8_products=fused,
        packed_tables=sum(table.format != "float32" for table in tables),
        weight_bytes=sum(_bytes(item) for item in graph.initializer),
        packed_layers=sum(layer.packed for layer in layers),
        widened_layers=sum(layer.name not in held for layer in layers if not layer.packed),
    )


def _not_multiplied(
    graph: onnx.GraphProto,
    held: dict[str, onnx.TensorProto],
    layers: tuple[LayerInitializer, ...],
) -> list[str]:
    """Layers whose codes a product should read as they are stored, and does not."""
    faults = []
    for layer in layers:
        if not layer.packed:
            continue
        readers = {node.op_type for node in graph.node if layer.name in node.input}
        if layer.name not in held:
            faults.append(
                f"dense layer {layer.module!r}: {layer.name!r} was widened by the runtime"
            )
        elif readers != {"MatMulNBits"}:
            names = ", ".join(sorted(readers)) or "nothing"
            faults.append(f"dense layer {layer.module!r}: its codes are read by {names}")
    return faults


def _unfused(graph: onnx.GraphProto, maker: dict[str, onnx.NodeProto]) -> list[str]:
    return [
        f"{node.op_type} {node.name or node.output[0]!r} computes in float32 behind a "
        f"DequantizeLinear"
        for node in graph.node
        if node.op_type in FLOAT_PRODUCTS
        and any(name in maker and maker[name].op_type == "DequantizeLinear" for name in node.input)
    ]


def _slow(
    graph: onnx.GraphProto, maker: dict[str, onnx.NodeProto], held: dict[str, onnx.TensorProto]
) -> list[str]:
    """Int8 products on signed inputs: the runtime packs weights ahead for unsigned ones only."""
    faults = []
    for node in graph.node:
        source = maker.get(node.input[0]) if node.op_type == "QGemm" else None
        if source is None or source.op_type != "QuantizeLinear" or len(source.input) < 3:
            continue
        zero = held.get(source.input[2])
        if zero is not None and zero.data_type == onnx.TensorProto.INT8:
            faults.append(f"QGemm {node.name!r} reads signed inputs and repacks at every call")
    return faults


def _widened(
    graph: onnx.GraphProto, maker: dict[str, onnx.NodeProto], held: dict[str, onnx.TensorProto]
) -> list[str]:
    """Gathers from a stored tensor that is computed on the way, as a whole, at every call."""
    faults = []
    for node in graph.node:
        if not node.op_type.startswith("Gather") or not node.input:
            continue
        name, path = node.input[0], []
        while name in maker and maker[name].op_type in {"DequantizeLinear", "Cast", "Mul", "Sub"}:
            path.append(maker[name].op_type)
            name = maker[name].input[0]
        if path and name in held and len(held[name].dims) > 1:
            faults.append(f"table {name!r} is widened ({', '.join(path)}) before its Gather")
    return faults


def _bytes(item: onnx.TensorProto) -> int:
    packed = {int(onnx.TensorProto.INT4): 4, int(onnx.TensorProto.UINT4): 4}
    bits = packed.get(item.data_type)
    if bits is None:
        bits = 8 * int(onnx.helper.tensor_dtype_to_np_dtype(item.data_type).itemsize)
    count: int = math.prod(item.dims)
    return (count * bits + 7) // 8
