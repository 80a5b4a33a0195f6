"""How each storage format is written down for TensorRT and TensorRT-RTX.

A quantized constant may only feed a DequantizeLinear, so tables are dequantized before their
Gather; the builder fuses the two and keeps the table packed (the audit of the engine's scratch
memory proves it). Everything is symmetric: a non-zero zero point is refused. Precision is what
the graph says, since builders from version 11 on know no other way.

A scale that is a row's own, or the table's, is the DequantizeLinear's, and keeps its stored type:
with float16 scales a looked-up weight is rounded to float16 once, which is what parity tolerates
here and not in ONNX Runtime's graph. Offsets, and scales that some rows share, have no place in a
DequantizeLinear: codes are dequantized by 1, exactly, gathered, and multiplied in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from compressors.lower.onnxruntime import (
    FLOAT,
    FLOAT16,
    as_matrix,
    constant,
    scaled,
    short_float_table,
)
from compressors.tables.planar import unpack
from compressors.tables.scales import Shared


def rowwise_int8(codes: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Dequantize by row, then gather. Codes with an offset are retyped, 128 lower, afterwards."""
    if _in_dequantize(offset, rows_per_scale):
        return _dequantized(codes, scale, ids)
    rows = _dequantized(codes, constant(FLOAT16, 1), ids)
    if offset is not None:
        rows = op.Add(rows, op.Constant(value_float=128.0))
    return scaled(rows, scale, offset, ids, rows_per_scale)


def rowwise_int4(
    codes: Any, scale: Any, offset: Any, ids: Any, dim: int, rows_per_scale: int
) -> Any:
    """Dequantize with one block a row, then gather. ``codes`` is retyped to int4 afterwards."""
    if _in_dequantize(offset, rows_per_scale):
        block = dim + dim % 2 if rows_per_scale else 0
        return _cut(_dequantized(codes, scale, ids, block=block), dim, 2)
    rows = _cut(_dequantized(codes, constant(FLOAT16, 1), ids), dim, 2)
    if offset is not None:
        rows = op.Add(rows, op.Constant(value_float=8.0))
    return scaled(rows, scale, offset, ids, rows_per_scale)


def rowwise_int2(
    codes: Any, scale: Any, offset: Any, ids: Any, dim: int, rows_per_scale: int
) -> Any:
    """Two codes to an int4, taken apart after the gather: ONNX's own int2 is refused here."""
    pairs = op.Add(_dequantized(codes, constant(FLOAT16, 1), ids), op.Constant(value_float=8.0))
    high = op.Floor(op.Mul(pairs, op.Constant(value_float=0.25)))
    low = op.Sub(pairs, op.Mul(high, op.Constant(value_float=4.0)))
    rows = _cut(op.Concat(low, high, axis=-1), dim, 4)
    if offset is None:
        rows = op.Sub(rows, op.Constant(value_float=1.5))
    return scaled(rows, scale, offset, ids, rows_per_scale)


def float8_e4m3_table(codes: Any, scale: Any, ids: Any, rows_per_scale: int) -> Any:
    """Dequantize by row, then gather. ``codes`` is retyped to 8-bit floats afterwards."""
    if _in_dequantize(None, rows_per_scale):
        return _dequantized(codes, scale, ids)
    rows = _dequantized(codes, constant(FLOAT16, 1), ids)
    return scaled(rows, scale, None, ids, rows_per_scale)


def _in_dequantize(offset: Any, rows_per_scale: int) -> bool:
    """Whether the scale can be the DequantizeLinear's own."""
    return offset is None and rows_per_scale in (0, 1)


def _dequantized(codes: Any, scale: Any, ids: Any, block: int = 0) -> Any:
    """Rows as float32: dequantized as a table, gathered, cast."""
    if block:
        table = op.DequantizeLinear(codes, scale, axis=1, block_size=block)
    else:
        table = op.DequantizeLinear(codes, scale, axis=0)
    return op.Cast(op.Gather(table, ids, axis=0), to=FLOAT)


def _cut(rows: Any, dim: int, planes: int) -> Any:
    """Without the padding of a width that the planes do not divide."""
    return op.Slice(rows, [0], [dim], [-1]) if dim % planes else rows


def static_int8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Q/DQ around a Gemm with a float bias: an int32 DequantizeLinear is refused here."""
    flat, restore = as_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    zero = constant(onnx.TensorProto.INT8, 0)
    inputs = op.DequantizeLinear(op.QuantizeLinear(flat, input_scale, zero), input_scale)
    weight = op.DequantizeLinear(codes, weight_scale, axis=0)
    return restore(op.Gemm(inputs, weight, bias, transB=1))


def float16_linear(x: Any, weight: Any, bias: Any) -> Any:
    """A Gemm in float16 between two casts."""
    flat, restore = as_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    y = op.Gemm(op.Cast(flat, to=FLOAT16), weight, bias, transB=1)
    return op.Cast(restore(y), to=FLOAT)


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


# --- stored tensors, in the types and shapes that the operators take ---------------------------

Arrays = Mapping[str, np.ndarray]
Retyped = dict[str, ir.TensorProtocol]


def retyped(form: str, settings: Mapping[str, Any], stored: Arrays) -> Retyped:
    """What of a table's tensors lies in the graph otherwise than it is stored, by stored name.

    Args:
        form: the storage format.
        settings: of the table.
        stored: its tensors.
    """
    ways: dict[str, Callable[[Shared, Arrays], Retyped]] = {
        "rowwise_int8": _int8,
        "rowwise_int4": _int4,
        "rowwise_int2": _int2,
        "float8_e4m3": _float8,
    }
    return ways[form](Shared.of(settings), stored) if form in ways else {}


def _int8(shared: Shared, stored: Arrays) -> Retyped:
    if shared.symmetric:
        return _dequantize_scale(shared, stored)
    return {"codes": ir.Tensor((stored["codes"] ^ 128).view(np.int8))}


def _int4(shared: Shared, stored: Arrays) -> Retyped:
    codes = {"codes": int4_tensor(unpacked(stored["codes"], 4))}
    if shared.symmetric and not shared.rows_per_scale:
        return {**codes, **_dequantize_scale(shared, stored)}
    return codes  # a scale a row is a block's: a matrix, as it is stored


def _int2(shared: Shared, stored: Arrays) -> Retyped:  # noqa: ARG001
    codes = unpacked(stored["codes"], 2)
    half = codes.shape[1] // 2
    return {"codes": int4_tensor(codes[:, :half] | (codes[:, half:] << 2))}


def _float8(shared: Shared, stored: Arrays) -> Retyped:
    codes = ir.Tensor(stored["codes"].view(ir.DataType.FLOAT8E4M3FN.numpy()))
    return {"codes": codes, **_dequantize_scale(shared, stored)}


def _dequantize_scale(shared: Shared, stored: Arrays) -> Retyped:
    """A scale a row as a vector, the table's own as a scalar."""
    if shared.rows_per_scale > 1:
        return {}
    shape = (-1,) if shared.rows_per_scale else ()
    return {"scale": ir.Tensor(stored["scale"].reshape(shape))}


def unpacked(planar: np.ndarray, bits: int) -> np.ndarray:
    """Planar codes, uint8 ``(rows, width)``, one a byte: ``(rows, width * 8 / bits)``."""
    codes: np.ndarray = unpack(torch.from_numpy(planar), planar.shape[1] * 8 // bits, bits).numpy()
    return codes


def int4_tensor(codes: np.ndarray) -> ir.PackedTensor[np.ndarray]:
    """Codes below 16, uint8 ``(rows, even width)``, as int4, each 8 lower, low nibble first."""
    signed = codes ^ 8  # in two's complement the sign is bit 3
    packed = signed[:, 0::2] | (signed[:, 1::2] << 4)
    return ir.PackedTensor(packed.reshape(-1), ir.DataType.INT4, shape=ir.Shape(codes.shape))
