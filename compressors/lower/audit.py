"""Check that weights still have the plan's formats in the graph that ONNX Runtime optimized.

A runtime may silently rewrite a graph into a slower or larger one: an int8 Gemm that it does not
fuse computes in float32 after a DequantizeLinear, and a table that it folds into a constant is
float32 again. The audit therefore reads the optimized graph, not the exported one.

"Packed" weights are stored in fewer bits than float32, usually as integer "codes"; "widening"
converts them to float32. A "matmul", or "product" in messages, is any operator that multiplies
matrices, also Gemm and Conv.
"""

import math
from collections import Counter

import onnx

from compressors.contracts import Plan
from compressors.errors.compression import AuditFailed
from compressors.lower.findings import GraphAudit, LayerInitializer, TableInitializers

FLOAT_MATMULS = {"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Conv", "FusedConv"}
INT8_MATMULS = {"QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
WIDENING = {"DequantizeLinear", "Cast", "Mul", "Sub"}
"""Operators that convert packed weights to float32."""


def audit(
    graph: onnx.GraphProto,
    plan: Plan | None,
    tables: tuple[TableInitializers, ...],
    layers: tuple[LayerInitializer, ...] = (),
) -> GraphAudit:
    """Check that the optimized graph stores and multiplies weights as the plan says.

    Args:
        graph: the graph that ONNX Runtime optimized. Only the data of initializers may be in an
            external file.
        plan: the compression plan; None for an uncompressed model.
        tables: names in the graph of the stored tensors of every table.
        layers: names in the graph of the stored weights of every compressed dense layer.

    Returns:
        Counts and sizes of the optimized graph.

    Raises:
        AuditFailed: a matmul computes in float32 after a DequantizeLinear, an int8 matmul has
            signed inputs, there are fewer int8 matmuls than int8 layers in the plan, a table is
            widened before its Gather or matmul, a table's tensor is missing or has another number
            of rows, or the stored codes of a packed layer are missing or not read by MatMulNBits.
    """
    producers = {output: node for node in graph.node for output in node.output}
    initializers = {item.name: item for item in graph.initializer}
    faults = [
        *_describe_unfused_matmuls(graph, producers),
        *_describe_matmuls_of_signed_inputs(graph, producers, initializers),
        *_describe_widened_tables(graph, producers, initializers, tables),
    ]
    lines = plan.lines if plan else ()
    expected = sum(line.format == "static_int8" for line in lines)
    int8_products = sum(node.op_type in INT8_MATMULS for node in graph.node)
    if int8_products < expected:
        faults.append(
            f"the plan has {expected} int8 layers, the graph {int8_products} int8 products"
        )
    for table in tables:
        for name in table.names:
            entries = table.entries(name)  # None: a tensor of the whole table, which may be folded
            if name not in initializers and entries is not None:
                faults.append(f"table {table.module!r}: {name!r} was replaced by the runtime")
            elif entries is not None and entries != initializers[name].dims[0]:
                faults.append(f"table {table.module!r}: {name!r} lost rows")
    faults += _describe_layers_without_matmul(graph, initializers, layers)
    if faults:
        modules = [table.module for table in tables] + [layer.module for layer in layers]
        raise AuditFailed("graph_not_as_ordered", faults=tuple(faults)).name_cause(
            *(name for name in modules if any(f"{name!r}:" in fault for fault in faults))
        )
    return GraphAudit(
        nodes=dict(Counter(node.op_type for node in graph.node).most_common()),
        int8_products=int8_products,
        packed_tables=sum(table.format != "float32" for table in tables),
        weight_bytes=sum(_count_bytes(item) for item in graph.initializer),
        packed_layers=sum(layer.packed for layer in layers),
        widened_layers=sum(layer.name not in initializers for layer in layers if not layer.packed),
    )


def _describe_layers_without_matmul(
    graph: onnx.GraphProto,
    initializers: dict[str, onnx.TensorProto],
    layers: tuple[LayerInitializer, ...],
) -> list[str]:
    """Describe packed dense layers whose stored codes no MatMulNBits reads."""
    faults = []
    for layer in layers:
        if not layer.packed:
            continue
        consumers = {node.op_type for node in graph.node if layer.name in node.input}
        if layer.name not in initializers:
            faults.append(
                f"dense layer {layer.module!r}: {layer.name!r} was widened by the runtime"
            )
        elif consumers != {"MatMulNBits"}:
            names = ", ".join(sorted(consumers)) or "nothing"
            fault = f"its codes are read by {names} instead of MatMulNBits"
            faults.append(f"dense layer {layer.module!r}: {fault}")
    return faults


def _describe_unfused_matmuls(
    graph: onnx.GraphProto, producers: dict[str, onnx.NodeProto]
) -> list[str]:
    """Describe the float matmuls that read stored weights after a DequantizeLinear.

    Rows of a table may be dequantized after their lookup, or a block of them after a Slice, and
    then multiplied in float32: an int8 matmul would round its other input.
    """
    return [
        f"{node.op_type} {node.name or node.output[0]!r} computes in float32 after a "
        f"DequantizeLinear"
        for node in graph.node
        if node.op_type in FLOAT_MATMULS
        and any(
            name in producers
            and producers[name].op_type == "DequantizeLinear"
            and producers[name].input[0] not in producers  # stored, not computed
            for name in node.input
        )
    ]


def _describe_matmuls_of_signed_inputs(
    graph: onnx.GraphProto,
    producers: dict[str, onnx.NodeProto],
    initializers: dict[str, onnx.TensorProto],
) -> list[str]:
    """Describe int8 matmuls with signed inputs.

    ONNX Runtime reorders weights once, at session start, if inputs are unsigned. For signed inputs,
    it reorders them at every call.
    """
    faults = []
    for node in graph.node:
        source = producers.get(node.input[0]) if node.op_type == "QGemm" else None
        if source is None or source.op_type != "QuantizeLinear" or len(source.input) < 3:
            continue
        zero_point = initializers.get(source.input[2])
        if zero_point is not None and zero_point.data_type == onnx.TensorProto.INT8:
            faults.append(
                f"QGemm {node.name!r} reads signed inputs and repacks its weights at every call"
            )
    return faults


def _describe_widened_tables(
    graph: onnx.GraphProto,
    producers: dict[str, onnx.NodeProto],
    initializers: dict[str, onnx.TensorProto],
    tables: tuple[TableInitializers, ...],
) -> list[str]:
    """Describe the Gathers and matmuls that read a table that is dequantized at every call."""
    table_names = {name for table in tables for name in table.names}
    faults = []
    for node in graph.node:
        is_matmul = node.op_type in FLOAT_MATMULS
        if not (is_matmul or node.op_type.startswith("Gather")):
            continue
        for name in node.input if is_matmul else node.input[:1]:
            path = []
            while name in producers and producers[name].op_type in WIDENING:
                path.append(producers[name].op_type)
                name = producers[name].input[0]
            if is_matmul and name not in table_names:
                continue  # a dense layer, which ``_describe_unfused_matmuls`` checks
            if path and name in initializers and len(initializers[name].dims) > 1:
                what = "product" if is_matmul else "Gather"
                faults.append(f"table {name!r} is widened ({', '.join(path)}) before its {what}")
    return faults


def _count_bytes(item: onnx.TensorProto) -> int:
    """Return the bytes of an initializer, whose data may be in an external file."""
    bits_of_short_types = {int(onnx.TensorProto.INT4): 4, int(onnx.TensorProto.UINT4): 4}
    bits = bits_of_short_types.get(item.data_type)
    if bits is None:
        bits = 8 * int(onnx.helper.tensor_dtype_to_np_dtype(item.data_type).itemsize)
    count: int = math.prod(item.dims)
    return (count * bits + 7) // 8
