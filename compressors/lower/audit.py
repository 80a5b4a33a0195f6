"""Check that the graph a runtime has optimized still contains what the plan ordered.

A runtime may silently rewrite a graph into something slower: an int8 Gemm that was not fused
computes in float32 after a DequantizeLinear, and a folded table is float32 again. The audit
therefore reads the graph that the runtime has optimized.
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
    """Audit a graph that ONNX Runtime has optimized.

    Args:
        graph: the optimized graph; data of initializers may be in an external file, their shapes
            may not.
        plan: the compression plan; None for an uncompressed model.
        tables: names in the graph of the stored tensors of every table.
        layers: names in the graph of the stored weights of every packed dense layer.

    Raises:
        AuditFailed: a Gemm computes in float after a DequantizeLinear, there are fewer int8
            products than ordered, a table is widened before its Gather, or a packed table or layer
            is missing.
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
            entries = table.entries(name)  # None: for the whole table, small enough to fold
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
    """Faults of layers whose stored codes should be read by a product but are not."""
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
        f"{node.op_type} {node.name or node.output[0]!r} computes in float32 after a "
        f"DequantizeLinear"
        for node in graph.node
        if node.op_type in FLOAT_PRODUCTS
        and any(name in maker and maker[name].op_type == "DequantizeLinear" for name in node.input)
    ]


def _slow(
    graph: onnx.GraphProto, maker: dict[str, onnx.NodeProto], held: dict[str, onnx.TensorProto]
) -> list[str]:
    """Int8 products with signed inputs: the runtime prepacks weights only for unsigned inputs."""
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
    """Gathers from a stored tensor that is dequantized completely at every call."""
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
