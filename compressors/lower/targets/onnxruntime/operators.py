"""How compressed layers are written down for ONNX Runtime.

Tables are in ``onnxruntime_tables``, dense layers of few bits in ``onnxruntime_dense``.

Dense int8 must have explicit zero points on weight and bias, and no Relu right behind the Gemm, or
it silently stays float (``benchmarks/qdq_forms.py``).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from compressors.lower.graph_builders import FLOAT, INT32, as_matrix, constant
from compressors.lower.targets.onnxruntime import dense as onnxruntime_dense
from compressors.lower.targets.onnxruntime import tables as onnxruntime_tables


def static_int8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Q/DQ around a Gemm in the one form ONNX Runtime fuses to a fast QGemm.

    Inputs are uint8 around 128, the same levels as int8 around 0: ONNX Runtime packs weights
    ahead for unsigned inputs only, and its own rewriting to unsigned stops where two layers
    read the same input.
    """
    zero = constant(onnx.TensorProto.UINT8, 128)
    channels = int(codes.shape[0])
    flat, restore = as_matrix(x, int(codes.shape[1]), channels)
    inputs = op.DequantizeLinear(op.QuantizeLinear(flat, input_scale, zero), input_scale, zero)
    weight_zero = constant(onnx.TensorProto.INT8, [0] * channels)
    weight = op.DequantizeLinear(codes, weight_scale, weight_zero, axis=0)
    step = op.Mul(weight_scale, input_scale)
    whole = op.Cast(op.Round(op.Div(bias, step)), to=INT32)
    bias_zero = constant(INT32, [0] * channels)
    offset = op.DequantizeLinear(whole, step, bias_zero, axis=0)
    return restore(op.Gemm(inputs, weight, offset, transB=1))


def short_float_linear(x: Any, weight: Any, bias: Any) -> Any:
    """Weights widened once when the session starts: CPUs have no float16 or bfloat16 Gemm."""
    flat, restore = as_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    return restore(op.Gemm(flat, op.Cast(weight, to=FLOAT), op.Cast(bias, to=FLOAT), transB=1))


def ids_beside(ids: Any) -> Any:
    """One below the other, then turned: two operators instead of one an input."""
    rows = op.Reshape(op.Concat(*ids, axis=0), op.Constant(value_ints=[len(ids), -1]))
    return op.Transpose(rows, perm=[1, 0])


def rows_beside(rows: Any) -> Any:
    """Rows of several inputs as one row."""
    width = int(rows.shape[1]) * int(rows.shape[2])
    return op.Reshape(rows, op.Constant(value_ints=[-1, width]))


def translations() -> dict[Any, Callable[..., Any]]:
    """Custom op -> the subgraph that stands for it."""
    ops = torch.ops.recpress
    return {
        **onnxruntime_tables.translations(),
        **onnxruntime_dense.translations(),
        ops.static_int8_linear.default: static_int8_linear,
        ops.float16_linear.default: short_float_linear,
        ops.bfloat16_linear.default: short_float_linear,
        ops.ids_beside.default: ids_beside,
        ops.rows_beside.default: rows_beside,
    }


def join_split_rows(model: ir.Model) -> None:
    """Let a Concat that puts all parts of a Split side by side again read what was split."""
    for node in list(model.graph):
        if node.op_type != "Concat" or node.outputs[0].is_graph_output():
            continue
        inputs, joined = list(node.inputs), list[ir.Value | None]()
        while inputs:
            source = inputs[0].producer() if inputs[0] is not None else None
            parts = list(source.outputs) if source is not None else []
            whole = (
                source is not None
                and source.op_type == "Split"
                and inputs[: len(parts)] == parts
                and source.inputs[0] is not None
                and _axis(source, source.inputs[0]) == _axis(node, source.inputs[0]) is not None
            )
            joined.append(source.inputs[0] if source is not None and whole else inputs[0])
            inputs = inputs[len(parts) if whole else 1 :]
        if len(joined) == len(node.inputs):
            continue
        if len(joined) == 1 and joined[0] is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], joined[0])
            model.graph.remove(node, safe=True)
            continue
        new = ir.node("Concat", joined, attributes=dict(node.attributes))
        new.outputs[0].dtype, new.outputs[0].shape = node.outputs[0].dtype, node.outputs[0].shape
        new.outputs[0].name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [new], node.outputs, new.outputs
        )
    for node in reversed(list(model.graph)):
        if node.op_type == "Split" and not any(out.uses() for out in node.outputs):
            model.graph.remove(node, safe=True)


def _axis(node: ir.Node, value: ir.Value) -> int | None:
    """Of a Concat or Split of tensors like a value, from the front; None where nobody knows."""
    if value.shape is None:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return axis % len(value.shape)


def spell_out_clipping(model: ir.Model) -> None:
    """Write a Relu or Clip right after an int8 Gemm in a form that leaves the product in int8.

    ONNX Runtime merges Gemm and Relu into a float FusedGemm *before* it looks for int8 products,
    and leaves the whole layer in float32 behind a DequantizeLinear: 3.5 times slower than fused
    (``benchmarks/qdq_forms.py``). It has no such rule for Max and Min, which mean the same. Where
    all that reads a Relu is the rounding for a next int8 layer, it is a floor of the rounded
    numbers instead: then the product itself gives them out.
    """
    for node in list(model.graph):
        if node.op_type not in {"Relu", "Clip"} or node.inputs[0] is None:
            continue
        gemm = node.inputs[0].producer()
        if gemm is None or gemm.op_type != "Gemm" or gemm.inputs[0] is None:
            continue
        source = gemm.inputs[0].producer()
        if source is None or source.op_type != "DequantizeLinear":
            continue
        if node.op_type != "Relu" or not _floor_steps(model, node):
            _spell_out(model, node)


def _floor_steps(model: ir.Model, relu: ir.Node) -> bool:
    """Put a floor behind the one QuantizeLinear that reads a Relu, if one alone does."""
    value, floored = relu.inputs[0], relu.outputs[0]
    readers = [use.node for use in floored.uses()]
    if value is None or floored.is_graph_output() or len(value.uses()) != 1 or len(readers) != 1:
        return False
    (rounding,) = readers
    if rounding.op_type != "QuantizeLinear" or (zero := rounding.inputs[2]) is None:
        return False
    if zero.dtype != ir.DataType.UINT8:
        return False
    steps = rounding.outputs[0]
    clip = ir.node("Clip", [steps, zero])
    clip.outputs[0].name = f"{steps.name}_floored"
    clip.outputs[0].dtype, clip.outputs[0].shape = steps.dtype, steps.shape
    ir.convenience.replace_all_uses_with(steps, clip.outputs[0])
    clip.replace_input_with(0, steps)
    model.graph.insert_after(rounding, clip)
    rounding.replace_input_with(0, value)
    model.graph.remove(relu, safe=True)
    return True


def _spell_out(model: ir.Model, node: ir.Node) -> None:
    low, high = (*node.inputs[1:], None, None)[:2]
    if node.op_type == "Relu":
        low = _scalar(model, "relu_floor", 0.0)
    current, new = node.inputs[0], []
    for op_type, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            new.append(ir.node(op_type, [current, bound]))
            current = new[-1].outputs[0]
            current.dtype, current.shape = node.outputs[0].dtype, node.outputs[0].shape
    if current is not None:
        current.name = node.outputs[0].name
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, node.outputs, [current])


def _scalar(model: ir.Model, name: str, value: float) -> ir.Value:
    if name not in model.graph.initializers:
        tensor = ir.Tensor(np.array(value, np.float32), name=name)
        kind = ir.TensorType(ir.DataType.FLOAT)
        model.graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(()), type=kind, const_value=tensor
        )
    return model.graph.initializers[name]
