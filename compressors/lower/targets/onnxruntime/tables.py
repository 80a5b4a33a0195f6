"""Translations of tables for ONNX Runtime.

Rows are gathered first and dequantized afterwards, so a lookup reads only the requested rows. The
form for TensorRT, DequantizeLinear before Gather, makes ONNX Runtime widen the whole table at every
call.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op

from compressors.lower.graph_builders import (
    FLOAT,
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
from compressors.quantize.tables.float8_e4m3 import steps_of


def rowwise_int8(codes: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Gather codes and scales of the requested rows, then multiply in float32."""
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
    """As ``rowwise_int4`` with four planes, and levels centered at zero if there is no offset."""
    rows = planar_rows(codes, ids, dim, bits=2)
    if offset is None:
        rows = op.Sub(rows, op.Constant(value_float=1.5))
    return scaled(rows, scale, offset, ids, rows_per_scale)


def planar_rows(codes: Any, ids: Any, dim: int, bits: int) -> Any:
    """The codes of the requested rows as float32, unpacked from bytes with several planes."""
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
    """Gather bytes of the requested rows, look up their values in a list of 256, and multiply.

    ONNX has no Gather of 8-bit floats, and cannot reinterpret bytes as 8-bit floats.
    """
    values = steps_of(torch.arange(256, dtype=torch.uint8)).nan_to_num(0.0)  # 127 and 255: unused
    meaning = op.Constant(value_floats=values.tolist())
    rows = op.Gather(meaning, op.Cast(op.Gather(codes, ids, axis=0), to=INT32), axis=0)
    return scaled(rows, scale, None, ids, rows_per_scale)


def unpacked(codes: Any, ids: Any, count: int, width: int) -> Any:
    """Gather packed codes and separate the planes: int32 ``(*ids, count)``."""
    values = op.Gather(codes, ids, axis=0)
    byte = onnx.TensorProto.UINT8
    if width < 8:
        shifts = range(0, 8, width)
        planes = [op.BitShift(values, constant(byte, by), direction="RIGHT") for by in shifts]
        planes = [op.BitwiseAnd(plane, constant(byte, (1 << width) - 1)) for plane in planes]
        values = op.Concat(*planes, axis=-1)
    return without_padding(op.Cast(values, to=INT32), count, width)


def planned_place(planes: Any, ids: Any) -> Any:
    """Gather the bytes of each place, then add them up."""
    count = int(planes.shape[1])
    return joined_bytes(op.Cast(op.Gather(planes, ids, axis=0), to=INT64), count)


def kept_place(within: Any, before: Any, ids: Any) -> Any:
    """Gather the rank within a block and the count before the block."""
    return placed(op.Cast(op.Gather(within, ids, axis=0), to=INT64), before, ids)


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
        ops.merged_codes.default: unpacked,
        ops.planned_place.default: planned_place,
        ops.kept_place.default: kept_place,
        ops.divided_by.default: divided_by,
    }
