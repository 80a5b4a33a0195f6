"""How each storage format is written down for ONNX Runtime.

Tables are gathered first and widened after, so a lookup touches only its own rows: the form
TensorRT wants, DequantizeLinear before Gather, makes ONNX Runtime widen the whole table at every
call. Dense int8 must have explicit zero points on weight and bias, and no Relu right behind the
Gemm, or it silently stays float (``benchmarks/qdq_forms.py``).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from compressors.tables.float8_e4m3 import steps_of

FLOAT, FLOAT16, INT32 = (int(getattr(onnx.TensorProto, n)) for n in ("FLOAT", "FLOAT16", "INT32"))


def constant(dtype: int, values: list[int] | float) -> Any:
    """A small constant of a given ONNX type: a scalar, or a vector."""
    dims = [len(values)] if isinstance(values, list) else []
    flat = values if isinstance(values, list) else [values]
    return op.Constant(value=onnx.helper.make_tensor("", dtype, dims, flat))


def scaled(steps: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Float32 levels of the rows asked for, times their scales and, if there are, plus offsets."""
    rows = op.Mul(steps, _of_rows(scale, ids, rows_per_scale))
    return rows if offset is None else op.Add(rows, _of_rows(offset, ids, rows_per_scale))


def _of_rows(stored: Any, ids: Any, rows_per_scale: int) -> Any:
    if not rows_per_scale:  # one for the table
        return op.Cast(stored, to=FLOAT)
    entries = ids
    if rows_per_scale > 1:
        entries = op.Div(ids, constant(int(ids.dtype), rows_per_scale))
    return op.Cast(op.Gather(stored, entries, axis=0), to=FLOAT)


def rowwise_int8(codes: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Gather codes and scales of the rows asked for, then multiply in float32."""
    rows = op.Cast(op.Gather(codes, ids, axis=0), to=FLOAT)
    return scaled(rows, scale, offset, ids, rows_per_scale)


def rowwise_int4(
    codes: Any, scale: Any, offset: Any, ids: Any, dim: int, rows_per_scale: int
) -> Any:
    """Gather packed bytes, split the two planes, drop the padding of an odd width."""
    rows = planar_rows(codes, ids, dim, bits=4)
    if offset is None:
        rows = op.Sub(rows, op.Constant(value_float=8.0))
    return scaled(rows, scale, offset, ids, rows_per_scale)


def rowwise_int2(
    codes: Any, scale: Any, offset: Any, ids: Any, dim: int, rows_per_scale: int
) -> Any:
    """The same with four planes, and levels around zero where there is no offset."""
    rows = planar_rows(codes, ids, dim, bits=2)
    if offset is None:
        rows = op.Sub(rows, op.Constant(value_float=1.5))
    return scaled(rows, scale, offset, ids, rows_per_scale)


def planar_rows(codes: Any, ids: Any, dim: int, bits: int) -> Any:
    """The codes of the rows asked for, from bytes of several planes, as float32."""
    packed = op.Gather(codes, ids, axis=0)
    planes = []
    for shift in range(0, 8, bits):
        plane = packed
        if shift:
            count = constant(onnx.TensorProto.UINT8, shift)
            plane = op.BitShift(packed, count, direction="RIGHT")
        if shift + bits < 8:  # the last plane has nothing above it
            plane = op.BitwiseAnd(plane, constant(onnx.TensorProto.UINT8, 2**bits - 1))
        planes.append(plane)
    rows = op.Cast(op.Concat(*planes, axis=-1), to=FLOAT)
    return op.Slice(rows, [0], [dim], [-1]) if dim % len(planes) else rows


def float8_e4m3_table(codes: Any, scale: Any, ids: Any, rows_per_scale: int) -> Any:
    """Gather bytes of the rows asked for, read their values from a list of all 256, multiply.

    ONNX has no Gather of 8-bit floats, and no way to take bytes for them.
    """
    values = steps_of(torch.arange(256, dtype=torch.uint8)).nan_to_num(0.0)  # 127 and 255: unused
    meaning = op.Constant(value_floats=values.tolist())
    rows = op.Gather(meaning, op.Cast(op.Gather(codes, ids, axis=0), to=INT32), axis=0)
    return scaled(rows, scale, None, ids, rows_per_scale)


def short_float_table(weight: Any, ids: Any) -> Any:
    """Gather float16 or bfloat16 rows, then widen them."""
    return op.Cast(op.Gather(weight, ids, axis=0), to=FLOAT)


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


def float16_linear(x: Any, weight: Any, bias: Any) -> Any:
    """Weights widened once when the session starts: CPUs have no float16 Gemm."""
    flat, restore = as_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    return restore(op.Gemm(flat, op.Cast(weight, to=FLOAT), op.Cast(bias, to=FLOAT), transB=1))


def as_matrix(x: Any, inputs: int, outputs: int) -> tuple[Any, Callable[[Any], Any]]:
    """``x`` as ``(rows, inputs)`` for a Gemm, and what brings its output back into shape."""
    if len(x.shape) == 2:
        return x, lambda y: y
    leading = op.Slice(op.Shape(x), [0], [len(x.shape) - 1], [0])
    flat = op.Reshape(x, op.Constant(value_ints=[-1, inputs]))
    shape = op.Concat(leading, op.Constant(value_ints=[outputs]), axis=0)
    return flat, lambda y: op.Reshape(y, shape)


def translations() -> dict[Any, Callable[..., Any]]:
    """Custom op -> the subgraph that stands for it."""
    ops = torch.ops.recpress
    return {
        ops.rowwise_int8.default: rowwise_int8,
        ops.rowwise_int4.default: rowwise_int4,
        ops.rowwise_int2.default: rowwise_int2,
        ops.float8_e4m3_table.default: float8_e4m3_table,
        ops.bfloat16_table.default: short_float_table,
        ops.float16_table.default: short_float_table,
        ops.static_int8_linear.default: static_int8_linear,
        ops.float16_linear.default: float16_linear,
    }


def spell_out_clipping(model: ir.Model) -> None:
    """Write a Relu or Clip right after an int8 Gemm as Max and Min, which mean the same.

    ONNX Runtime merges Gemm and Relu into a float FusedGemm *before* it looks for int8 products,
    and leaves the whole layer in float32 behind a DequantizeLinear: 3.5 times slower than fused
    (``benchmarks/qdq_forms.py``). It has no such rule for Max and Min.
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
        low, high = (*node.inputs[1:], None, None)[:2]
        if node.op_type == "Relu":
            low = _scalar(model, "relu_floor", 0.0)
        current, new = node.inputs[0], []
        for op_type, bound in (("Max", low), ("Min", high)):
            if bound is not None:
                new.append(ir.node(op_type, [current, bound]))
                current = new[-1].outputs[0]
                current.dtype, current.shape = node.outputs[0].dtype, node.outputs[0].shape
        current.name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], new, node.outputs, [current]
        )


def _scalar(model: ir.Model, name: str, value: float) -> ir.Value:
    if name not in model.graph.initializers:
        tensor = ir.Tensor(np.array(value, np.float32), name=name)
        kind = ir.TensorType(ir.DataType.FLOAT)
        model.graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(()), type=kind, const_value=tensor
        )
    return model.graph.initializers[name]
