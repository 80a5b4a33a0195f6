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

from compressors.tables.kept_order import BLOCK
from compressors.tables.product_codes import columns

FLOAT, FLOAT16, INT32, INT64 = (
    int(getattr(onnx.TensorProto, name)) for name in ("FLOAT", "FLOAT16", "INT32", "INT64")
)


def constant(dtype: int, values: list[int] | int) -> Any:
    """A small constant of a given ONNX type: a scalar, or a vector."""
    dims = [len(values)] if isinstance(values, list) else []
    flat = values if isinstance(values, list) else [values]
    return op.Constant(value=onnx.helper.make_tensor("", dtype, dims, flat))


def rowwise_int8(codes: Any, scale: Any, ids: Any) -> Any:
    """Gather codes and scales of the rows asked for, then multiply in float32."""
    rows = op.Cast(op.Gather(codes, ids, axis=0), to=FLOAT)
    return op.Mul(rows, op.Cast(op.Gather(scale, ids, axis=0), to=FLOAT))


def rowwise_int4(codes: Any, scale: Any, ids: Any, dim: int) -> Any:
    """Gather packed bytes, split the two planes, drop the padding of an odd width."""
    packed = op.Gather(codes, ids, axis=0)
    low = op.BitwiseAnd(packed, constant(onnx.TensorProto.UINT8, 15))
    high = op.BitShift(packed, constant(onnx.TensorProto.UINT8, 4), direction="RIGHT")
    rows = op.Cast(op.Concat(low, high, axis=-1), to=FLOAT)
    if dim % 2:
        rows = op.Slice(rows, [0], [dim], [-1])
    rows = op.Sub(rows, op.Constant(value_float=8.0))
    return op.Mul(rows, op.Cast(op.Gather(scale, ids, axis=0), to=FLOAT))


def unpacked(codes: Any, ids: Any, count: int, width: int) -> Any:
    """Gather packed codes and take the planes apart: int32 ``(*ids, count)``."""
    found = op.Gather(codes, ids, axis=0)
    byte = onnx.TensorProto.UINT8
    if width < 8:
        shifts = range(0, 8, width)
        planes = [op.BitShift(found, constant(byte, by), direction="RIGHT") for by in shifts]
        planes = [op.BitwiseAnd(plane, constant(byte, (1 << width) - 1)) for plane in planes]
        found = op.Concat(*planes, axis=-1)
    return without_padding(op.Cast(found, to=INT32), count, width)


def without_padding(codes: Any, count: int, width: int) -> Any:
    """The codes of a row without those that fill up its last byte."""
    return codes if count * width % 8 == 0 else op.Slice(codes, [0], [count], [-1])


def kmeans_levels(codes: Any, codebook: Any, scale: Any, ids: Any) -> Any:
    """The level of each code int32 ``(*ids, dim)``, times the row's scale if there is one."""
    rows = op.Gather(codebook, codes, axis=0)
    return rows if scale is None else op.Mul(rows, op.Cast(op.Gather(scale, ids, axis=0), to=FLOAT))


def kmeans_table(codes: Any, codebook: Any, scale: Any, ids: Any, dim: int, width: int) -> Any:
    """Gather codes, then their levels."""
    return kmeans_levels(unpacked(codes, ids, dim, width), codebook, scale, ids)


def entries(codes: Any, codebook: Any, books: int) -> Any:
    """Codebook entries of codes int32 ``(*ids, books)``: float32 ``(*ids, books, entry)``."""
    levels = int(codebook.shape[0]) // books
    first = constant(INT32, [levels * book for book in range(books)])
    return op.Cast(op.Gather(codebook, op.Add(codes, first), axis=0), to=FLOAT)


def side_by_side(found: Any, ids: Any, dim: int, parts: int) -> Any:
    """Entries ``(*ids, parts, widest)`` as rows ``(*ids, dim)``."""
    shape = [0] * len(ids.shape) + [parts * -(-dim // parts)]  # 0: as it is
    rows = op.Reshape(found, op.Constant(value_ints=shape))
    places = columns(dim, parts)
    return rows if places is None else op.Gather(rows, op.Constant(value_ints=places), axis=-1)


def product_codes(codes: Any, codebook: Any, ids: Any, dim: int, parts: int, width: int) -> Any:
    """Gather codes, then their entries, and put the parts side by side."""
    found = entries(unpacked(codes, ids, parts, width), codebook, parts)
    return side_by_side(found, ids, dim, parts)


def residual_codes(codes: Any, codebook: Any, ids: Any, books: int, width: int) -> Any:
    """Gather codes, then their entries, and add them up."""
    found = entries(unpacked(codes, ids, books, width), codebook, books)
    return op.ReduceSum(found, op.Constant(value_ints=[-2]), keepdims=0)


def float16_table(weight: Any, ids: Any) -> Any:
    """Gather float16 rows, then widen them."""
    return op.Cast(op.Gather(weight, ids, axis=0), to=FLOAT)


def planned_place(planes: Any, ids: Any) -> Any:
    """Gather the bytes of each place, then add them up."""
    count = int(planes.shape[1])
    return joined_bytes(op.Cast(op.Gather(planes, ids, axis=0), to=INT64), count)


def joined_bytes(digits: Any, count: int) -> Any:
    """Places from int64 ``(*, count)`` in [-128, 127]."""
    weight = op.Constant(value_ints=[256**plane for plane in range(count)])
    weighed = op.Mul(op.Add(digits, op.Constant(value_int=128)), weight)
    return op.ReduceSum(weighed, op.Constant(value_ints=[-1]), keepdims=0)


def kept_place(within: Any, before: Any, ids: Any) -> Any:
    """Gather the rank within a block and the count before the block."""
    return placed(op.Cast(op.Gather(within, ids, axis=0), to=INT64), before, ids)


def placed(rank: Any, before: Any, ids: Any) -> Any:
    """The place of a row from its int64 rank within its block."""
    block = op.Div(op.Cast(ids, to=INT64), op.Constant(value_int=BLOCK))
    base = op.Cast(op.Gather(before, block, axis=0), to=INT64)
    other = op.Less(rank, op.Constant(value_int=0))
    back = op.Where(other, op.Constant(value_int=BLOCK), op.Constant(value_int=0))
    return op.Sub(op.Add(base, rank), op.Mul(back, block))


def divided_by(ids: Any, divisor: int) -> Any:
    """One integer division: ids are not negative, so rounding down is what Div does."""
    return op.Div(ids, constant(onnx.TensorProto.INT64, divisor))


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
        ops.kmeans_table.default: kmeans_table,
        ops.product_codes.default: product_codes,
        ops.residual_codes.default: residual_codes,
        ops.float16_table.default: float16_table,
        ops.planned_place.default: planned_place,
        ops.kept_place.default: kept_place,
        ops.divided_by.default: divided_by,
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
