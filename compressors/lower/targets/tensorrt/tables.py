"""Translations of tables for TensorRT and TensorRT-RTX.

Only a DequantizeLinear may read a quantized constant, so tables are dequantized before their
Gather. The builder fuses the two and keeps the table packed; the audit of the engine's scratch
memory proves it. All codes are symmetric, because TensorRT refuses a nonzero zero point.

A scale per row or per table is an input of the DequantizeLinear and keeps its stored type. With
float16 scales a looked-up weight is rounded to float16 once; parity tolerates this here but not in
ONNX Runtime's graph. A DequantizeLinear cannot represent offsets, or scales that some rows share:
then codes are dequantized with scale 1, which is exact, gathered, and multiplied in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset21 as op

from compressors.lower.graph_builders import (
    FLOAT,
    FLOAT16,
    INT32,
    INT64,
    code_tables,
    constant,
    divided_by,
    joined_bytes,
    placed,
    scaled,
    short_float_table,
    without_padding,
)


def rowwise_int8(codes: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Dequantize by row, then gather. ``types.py`` later stores codes with an offset 128 lower."""
    if _in_dequantize(offset, rows_per_scale):
        return _dequantized(codes, scale, ids)
    rows = _dequantized(codes, constant(FLOAT16, 1), ids)
    if offset is not None:
        rows = op.Add(rows, op.Constant(value_float=128.0))
    return scaled(rows, scale, offset, ids, rows_per_scale)


def rowwise_int4(
    codes: Any, scale: Any, offset: Any, ids: Any, dim: int, rows_per_scale: int
) -> Any:
    """Dequantize with one block per row, then gather. ``types.py`` later makes ``codes`` int4."""
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
    """Two codes per int4, separated after the Gather: TensorRT refuses ONNX's int2."""
    pairs = op.Add(_dequantized(codes, constant(FLOAT16, 1), ids), op.Constant(value_float=8.0))
    high = op.Floor(op.Mul(pairs, op.Constant(value_float=0.25)))
    low = op.Sub(pairs, op.Mul(high, op.Constant(value_float=4.0)))
    rows = _cut(op.Concat(low, high, axis=-1), dim, 4)
    if offset is None:
        rows = op.Sub(rows, op.Constant(value_float=1.5))
    return scaled(rows, scale, offset, ids, rows_per_scale)


def float8_e4m3_table(codes: Any, scale: Any, ids: Any, rows_per_scale: int) -> Any:
    """Dequantize by row, then gather. ``types.py`` later makes ``codes`` 8-bit floats."""
    if _in_dequantize(None, rows_per_scale):
        return _dequantized(codes, scale, ids)
    rows = _dequantized(codes, constant(FLOAT16, 1), ids)
    return scaled(rows, scale, None, ids, rows_per_scale)


def planned_place(planes: Any, ids: Any) -> Any:
    """Dequantize with scale 1, gather, and add up the bytes of each place."""
    return joined_bytes(_whole_numbers(planes, ids), int(planes.shape[1]))


def kept_place(within: Any, before: Any, ids: Any) -> Any:
    """Dequantize with scale 1, gather, and add the count before the block."""
    return placed(_whole_numbers(within, ids), before, ids)


def unpacked(codes: Any, ids: Any, count: int, width: int) -> Any:
    """Codes as int32 ``(*ids, count)``, kept packed in the engine.

    A quantized constant can only be dequantized, so codes are stored as signed numbers (int8, or
    two int4 per byte), dequantized with scale 1, gathered, and cast to integers. TensorRT would
    silently widen uint8 codes to int32. Nibbles of two codes are separated by division, because
    there are no bit operations.
    """
    nibbles = width < 8
    one = constant(FLOAT16, 1)
    table = op.DequantizeLinear(codes, one)
    values = op.Cast(op.Gather(table, ids, axis=0), to=INT32)
    values = op.Add(values, constant(INT32, 8 if nibbles else 128))
    if width == 2:
        high = op.Div(values, constant(INT32, 4))
        low = op.Sub(values, op.Mul(high, constant(INT32, 4)))
        values = op.Concat(low, high, axis=-1)
    return without_padding(values, count, width)


def _in_dequantize(offset: Any, rows_per_scale: int) -> bool:
    """Whether a DequantizeLinear can apply the scale."""
    return offset is None and rows_per_scale in (0, 1)


def _dequantized(codes: Any, scale: Any, ids: Any, block: int = 0) -> Any:
    """Rows as float32: dequantized as a table, gathered, cast."""
    if block:
        table = op.DequantizeLinear(codes, scale, axis=1, block_size=block)
    else:
        table = op.DequantizeLinear(codes, scale, axis=0)
    return op.Cast(op.Gather(table, ids, axis=0), to=FLOAT)


def _cut(rows: Any, dim: int, planes: int) -> Any:
    """Remove the padding of a width that the number of planes does not divide."""
    return op.Slice(rows, [0], [dim], [-1]) if dim % planes else rows


def _whole_numbers(values: Any, ids: Any) -> Any:
    """Rows of an int8 constant as int64; with a DequantizeLinear the constant stays int8."""
    as_float = op.DequantizeLinear(values, op.Constant(value_float=1.0))
    return op.Cast(op.Gather(as_float, ids, axis=0), to=INT64)


def translations() -> dict[Any, Callable[..., Any]]:
    """Custom op -> the function that builds its subgraph."""
    ops = torch.ops.recpress
    return {
        ops.rowwise_int8.default: rowwise_int8,
        ops.rowwise_int4.default: rowwise_int4,
        ops.rowwise_int2.default: rowwise_int2,
        ops.float8_e4m3_table.default: float8_e4m3_table,
        ops.bfloat16_table.default: short_float_table,
        ops.float16_table.default: short_float_table,
        **code_tables(unpacked),
        ops.planned_place.default: planned_place,
        ops.kept_place.default: kept_place,
        ops.divided_by.default: divided_by,
    }
