"""Translate tables for TensorRT and TensorRT-RTX.

Only a DequantizeLinear may read a quantized constant, so tables are dequantized before their
Gather. TensorRT's builder fuses the two and keeps the table packed, which the engine's audit checks
by the size of its scratch memory. All codes are signed and have zero point 0, because TensorRT
refuses other codes.

If each row, or the whole table, has one scale, the scale is an input of the DequantizeLinear and
keeps its stored type. With float16 scales a looked-up weight is rounded to float16 once; the parity
check tolerates this for TensorRT but not for ONNX Runtime. A DequantizeLinear cannot represent
offsets, or scales that several rows share. Codes are then dequantized with scale 1, which is exact,
gathered, and multiplied in float32.
"""

from collections.abc import Callable
from typing import Any

import onnx
from onnxscript import opset21 as op

from compressors.lower.custom_operators import OPS
from compressors.lower.graph_builders import (
    FLOAT,
    FLOAT16,
    INT32,
    INT64,
    apply_scales,
    codebook_translations,
    constant,
    divided_by,
    drop_padding,
    flatten_to_matrix,
    gather_short_floats,
    integers_from_bytes,
    position_from_rank,
)
from compressors.quantize.dense.weight_only import MAX_MULTIPLE, SMALLEST_INPUT

STEP = 1 / 128
"""The scale of inputs that are rounded to int8."""
REFINEMENT = 2 * MAX_MULTIPLE
"""Factor of the remainder after rounding (at most 1/2), so that it uses all levels of int8."""


def rowwise_int8(codes: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Dequantize by row, then gather. ``types.py`` later makes unsigned codes signed (- 128)."""
    if _is_scale_of_dequantize_linear(offset, rows_per_scale):
        return _dequantize_and_gather(codes, scale, ids)
    rows = _dequantize_and_gather(codes, constant(FLOAT16, 1), ids)
    if offset is not None:
        rows = op.Add(rows, op.Constant(value_float=128.0))
    return apply_scales(rows, scale, offset, ids, rows_per_scale)


def rowwise_int8_product(x: Any, codes: Any, scale: Any) -> Any:
    """Multiply by int8 codes in int8, with each input as the sum of two int8 numbers.

    If the inputs were floats, the builder would write the whole dequantized table into scratch
    memory (measured with TensorRT-RTX 1.7). So each vector is divided by its largest element and
    split into a multiple of 1/127 and a remainder, 254 times as precise. The product of both is
    about as precise as one with float16 inputs.
    """
    count, dim = (int(side) for side in codes.shape)
    flat, restore = flatten_to_matrix(x, dim, count)
    last = op.Constant(value_ints=[1])
    largest = op.ReduceMax(op.Abs(flat), last, keepdims=1)
    largest = op.Max(largest, op.Constant(value_float=SMALLEST_INPUT))  # a vector may be all zeros
    levels = op.Mul(op.Div(flat, largest), op.Constant(value_float=float(MAX_MULTIPLE)))
    coarse = op.Round(levels)
    fine = op.Mul(op.Sub(levels, coarse), op.Constant(value_float=float(REFINEMENT)))
    table = op.DequantizeLinear(codes, scale, axis=0)  # as for lookups: one copy in the engine
    dtype = int(scale.dtype)

    def product(numbers: Any) -> Any:
        # Divided by 128, which is exact in float16, so that sums stay in its range.
        inputs = op.Cast(op.Mul(numbers, op.Constant(value_float=STEP)), to=dtype)
        step, zero = constant(dtype, STEP), constant(onnx.TensorProto.INT8, 0)
        rounded = op.DequantizeLinear(op.QuantizeLinear(inputs, step, zero), step)
        return op.Cast(op.Gemm(rounded, table, transB=1), to=FLOAT)

    total = op.Add(
        product(coarse), op.Mul(product(op.Round(fine)), op.Constant(value_float=1 / REFINEMENT))
    )
    return restore(
        op.Mul(total, op.Mul(largest, op.Constant(value_float=1 / (STEP * MAX_MULTIPLE))))
    )


def float16_product(x: Any, weight: Any) -> Any:
    """Build a Gemm in float16 between two casts."""
    flat, restore = flatten_to_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    return restore(op.Cast(op.Gemm(op.Cast(flat, to=FLOAT16), weight, transB=1), to=FLOAT))


def rowwise_int4(
    codes: Any, scale: Any, offset: Any, ids: Any, dim: int, rows_per_scale: int
) -> Any:
    """Dequantize with one block per row, then gather.

    ``types.py`` later makes ``codes`` int4 (- 8). A row has an even number of them, because it is
    stored in whole bytes.
    """
    if _is_scale_of_dequantize_linear(offset, rows_per_scale):
        block = dim + dim % 2 if rows_per_scale else 0
        gathered = _dequantize_and_gather(codes, scale, ids, block=block)
        return _drop_row_padding(gathered, dim, codes_per_byte=2)
    gathered = _dequantize_and_gather(codes, constant(FLOAT16, 1), ids)
    rows = _drop_row_padding(gathered, dim, codes_per_byte=2)
    if offset is not None:
        rows = op.Add(rows, op.Constant(value_float=8.0))
    return apply_scales(rows, scale, offset, ids, rows_per_scale)


def rowwise_int2(
    codes: Any, scale: Any, offset: Any, ids: Any, dim: int, rows_per_scale: int
) -> Any:
    """Dequantize int4 numbers that hold two codes each, gather, and separate the codes.

    TensorRT refuses ONNX's int2. ``types.py`` later subtracts 8 from each int4, which is added
    here. Without an offset, the level of a code is the code minus 1.5.
    """
    pairs = op.Add(
        _dequantize_and_gather(codes, constant(FLOAT16, 1), ids), op.Constant(value_float=8.0)
    )
    high = op.Floor(op.Mul(pairs, op.Constant(value_float=0.25)))
    low = op.Sub(pairs, op.Mul(high, op.Constant(value_float=4.0)))
    rows = _drop_row_padding(op.Concat(low, high, axis=-1), dim, codes_per_byte=4)
    if offset is None:
        rows = op.Sub(rows, op.Constant(value_float=1.5))
    return apply_scales(rows, scale, offset, ids, rows_per_scale)


def float8_e4m3_table(codes: Any, scale: Any, ids: Any, rows_per_scale: int) -> Any:
    """Dequantize by row, then gather. ``types.py`` later makes ``codes`` 8-bit floats."""
    if _is_scale_of_dequantize_linear(None, rows_per_scale):
        return _dequantize_and_gather(codes, scale, ids)
    rows = _dequantize_and_gather(codes, constant(FLOAT16, 1), ids)
    return apply_scales(rows, scale, None, ids, rows_per_scale)


def unique_row_index(planes: Any, ids: Any) -> Any:
    """Build the stored row's number of each id from the bytes that a row map has for the id.

    A row map belongs to a table in which several ids share a row. ``planes`` has the bytes, int8
    ``(ids, bytes)``.
    """
    return integers_from_bytes(_gather_integers(planes, ids), int(planes.shape[1]))


def kept_row_index(within: Any, before: Any, ids: Any) -> Any:
    """Build the index of each id's row in a part of a pruned table; see ``position_from_rank``.

    ``within`` has the rank of each row in its block, ``before`` the kept rows before each block.
    """
    return position_from_rank(_gather_integers(within, ids), before, ids)


def unpack_codes(codes: Any, ids: Any, count: int, width: int) -> Any:
    """Gather rows of packed codes and unpack them: int32 ``(*ids, count)``.

    ``count`` is the number of codes per row, ``width`` the bits of a code. The engine stores codes
    as int8 or int4 only if a DequantizeLinear reads them; it would silently store uint8 codes as
    int32. So signed codes are dequantized with scale 1, gathered, and cast to integers. Codes of 2
    bits are pairs in an int4; division separates them, because TensorRT has no bit operations.
    """
    is_int4 = width < 8
    one = constant(FLOAT16, 1)
    table = op.DequantizeLinear(codes, one)
    values = op.Cast(op.Gather(table, ids, axis=0), to=INT32)
    values = op.Add(values, constant(INT32, 8 if is_int4 else 128))
    if width == 2:
        high = op.Div(values, constant(INT32, 4))
        low = op.Sub(values, op.Mul(high, constant(INT32, 4)))
        values = op.Concat(low, high, axis=-1)
    return drop_padding(values, count, width)


def _is_scale_of_dequantize_linear(offset: Any, rows_per_scale: int) -> bool:
    """Return whether a DequantizeLinear can apply the scale."""
    return offset is None and rows_per_scale in (0, 1)


def _dequantize_and_gather(codes: Any, scale: Any, ids: Any, block: int = 0) -> Any:
    """Dequantize the table, gather rows, and cast them to float32.

    ``block`` is the number of codes of a row that share a scale; 0 if ``scale`` has one entry per
    row or is a scalar.
    """
    if block:
        table = op.DequantizeLinear(codes, scale, axis=1, block_size=block)
    else:
        table = op.DequantizeLinear(codes, scale, axis=0)
    return op.Cast(op.Gather(table, ids, axis=0), to=FLOAT)


def _drop_row_padding(rows: Any, dim: int, codes_per_byte: int) -> Any:
    """Remove the codes after the first ``dim``, which pad a row to whole bytes."""
    return op.Slice(rows, [0], [dim], [-1]) if dim % codes_per_byte else rows


def _gather_integers(values: Any, ids: Any) -> Any:
    """Gather rows of an int8 constant as int64; a DequantizeLinear keeps the constant int8."""
    as_float = op.DequantizeLinear(values, op.Constant(value_float=1.0))
    return op.Cast(op.Gather(as_float, ids, axis=0), to=INT64)


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the function that builds the subgraph of each custom op."""
    return {
        OPS.rowwise_int8.default: rowwise_int8,
        OPS.rowwise_int8_product.default: rowwise_int8_product,
        OPS.rowwise_int4.default: rowwise_int4,
        OPS.rowwise_int2.default: rowwise_int2,
        OPS.float8_e4m3_table.default: float8_e4m3_table,
        OPS.bfloat16_table.default: gather_short_floats,
        OPS.float16_table.default: gather_short_floats,
        OPS.float16_product.default: float16_product,
        **codebook_translations(unpack_codes),
        OPS.unique_row_index.default: unique_row_index,
        OPS.kept_row_index.default: kept_row_index,
        OPS.divided_by.default: divided_by,
    }
