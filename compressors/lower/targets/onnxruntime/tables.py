"""Translate tables for ONNX Runtime.

Rows are gathered first and dequantized afterwards, so a lookup reads only the requested rows. The
order that TensorRT needs, DequantizeLinear before Gather, would make ONNX Runtime convert the whole
table to float32 at every call.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op

from compressors.lower.custom_operators import OPS
from compressors.lower.graph_builders import (
    FLOAT,
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
from compressors.quantize.kernels.products import BLOCK_VALUES
from compressors.quantize.tables.float8_e4m3 import convert_from_float8

MAX_BLOCKS = 64
"""Largest number of blocks of rows in which a table is multiplied; each takes five operators."""


def rowwise_int8(codes: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Gather codes and scales of the requested rows, then multiply in float32."""
    rows = op.Cast(op.Gather(codes, ids, axis=0), to=FLOAT)
    return apply_scales(rows, scale, offset, ids, rows_per_scale)


def rowwise_int4(
    codes: Any, scale: Any, offset: Any, ids: Any, dim: int, rows_per_scale: int
) -> Any:
    """Gather packed bytes, unpack two codes per byte, and multiply in float32.

    Without an offset, the level of a code is the code minus 8.
    """
    rows = unpack_to_float(codes, ids, dim, bits=4)
    if offset is None:
        rows = op.Sub(rows, op.Constant(value_float=8.0))
    return apply_scales(rows, scale, offset, ids, rows_per_scale)


def rowwise_int2(
    codes: Any, scale: Any, offset: Any, ids: Any, dim: int, rows_per_scale: int
) -> Any:
    """Gather packed bytes, unpack four codes per byte, and multiply in float32.

    Without an offset, the levels are -1.5, -0.5, 0.5 and 1.5.
    """
    rows = unpack_to_float(codes, ids, dim, bits=2)
    if offset is None:
        rows = op.Sub(rows, op.Constant(value_float=1.5))
    return apply_scales(rows, scale, offset, ids, rows_per_scale)


def rowwise_int8_product(x: Any, codes: Any, scale: Any) -> Any:
    """Dequantize blocks of rows, and multiply by each block."""

    def rows(begin: Any, end: Any) -> Any:
        if int(scale.shape[0]) == 1:
            shared = op.Cast(op.Squeeze(scale), to=FLOAT)
            return op.DequantizeLinear(op.Slice(codes, begin, end, [0]), shared)
        scales = op.Cast(op.Slice(scale, begin, end, [0]), to=FLOAT)
        axis = op.Constant(value_ints=[1])
        return op.DequantizeLinear(
            op.Slice(codes, begin, end, [0]), op.Squeeze(scales, axis), axis=0
        )

    return _multiply_by_blocks(x, codes, rows)


def float16_product(x: Any, weight: Any) -> Any:
    """Convert blocks of rows to float32, and multiply by each block."""
    return _multiply_by_blocks(
        x, weight, lambda begin, end: op.Cast(op.Slice(weight, begin, end, [0]), to=FLOAT)
    )


def _multiply_by_blocks(x: Any, table: Any, rows: Callable[[Any, Any], Any]) -> Any:
    """Build ``x @ rows.T`` for ``x`` ``(*, dim)`` and all rows of a table: float32 ``(*, rows)``.

    Measured with 100,000 rows of 64 int8 codes on one thread: 1.1 ms for one vector and 8 ms for
    64, against 0.65 and 9 ms of a float32 Gemm. MatMulNBits takes 6.5 and 19 ms with the same
    scores, and rounds its inputs to 8 bits in its faster form. Only a block is float32 at once.

    Args:
        x: float32 ``(*, dim)``.
        table: the stored codes ``(rows, dim)``.
        rows: builds the rows from ``begin`` to ``end``, two vectors with one integer, as float32.
    """
    count, dim = (int(side) for side in table.shape)
    flat, restore = flatten_to_matrix(x, dim, count)
    # Always zero, but known only at run time: a block of constants would be converted once and
    # stored as float32 when a session starts.
    zero = op.Min(op.Shape(flat, start=0, end=1), op.Constant(value_ints=[0]))
    step = max(BLOCK_VALUES // dim, -(-count // MAX_BLOCKS), 1)
    products = []
    for begin in range(0, count, step):
        end = op.Constant(value_ints=[min(begin + step, count)])
        first = op.Add(op.Constant(value_ints=[begin]), zero)
        products.append(op.Gemm(flat, rows(first, end), transB=1))
    return restore(products[0] if len(products) == 1 else op.Concat(*products, axis=1))


def unpack_to_float(codes: Any, ids: Any, dim: int, bits: int) -> Any:
    """Gather rows of packed codes and unpack them: float32 ``(*ids, dim)``.

    ``bits``, 2 or 4, is the size of a code. A byte has one code in each of its groups of bits, the
    planes: plane ``p`` of byte ``b`` is code ``p * bytes + b`` of a row of that many bytes.
    """
    packed = op.Gather(codes, ids, axis=0)
    planes = []
    for shift in range(0, 8, bits):
        plane = packed
        if shift:
            count = constant(onnx.TensorProto.UINT8, shift)
            plane = op.BitShift(packed, count, direction="RIGHT")
        if shift + bits < 8:  # the last plane has the highest bits
            plane = op.BitwiseAnd(plane, constant(onnx.TensorProto.UINT8, 2**bits - 1))
        planes.append(plane)
    rows = op.Cast(op.Concat(*planes, axis=-1), to=FLOAT)
    return op.Slice(rows, [0], [dim], [-1]) if dim % len(planes) else rows


def float8_e4m3_table(codes: Any, scale: Any, ids: Any, rows_per_scale: int) -> Any:
    """Gather bytes, look up their values in a list of 256, and multiply.

    ONNX has no Gather of 8-bit floats, and cannot reinterpret bytes as 8-bit floats.
    """
    values = convert_from_float8(torch.arange(256, dtype=torch.uint8)).nan_to_num(
        0.0
    )  # 127 and 255 are NaN
    value_list = op.Constant(value_floats=values.tolist())
    rows = op.Gather(value_list, op.Cast(op.Gather(codes, ids, axis=0), to=INT32), axis=0)
    return apply_scales(rows, scale, None, ids, rows_per_scale)


def unpack_codes(codes: Any, ids: Any, count: int, width: int) -> Any:
    """Gather rows of packed codes and unpack them: int32 ``(*ids, count)``.

    ``count`` is the number of codes per row, ``width`` the bits of a code.
    """
    values = op.Gather(codes, ids, axis=0)
    byte = onnx.TensorProto.UINT8
    if width < 8:
        shifts = range(0, 8, width)
        planes = [op.BitShift(values, constant(byte, shift), direction="RIGHT") for shift in shifts]
        planes = [op.BitwiseAnd(plane, constant(byte, (1 << width) - 1)) for plane in planes]
        values = op.Concat(*planes, axis=-1)
    return drop_padding(op.Cast(values, to=INT32), count, width)


def unique_row_index(planes: Any, ids: Any) -> Any:
    """Build the stored row's number of each id from the bytes that a row map has for the id.

    A row map belongs to a table in which several ids share a row. ``planes`` has the bytes, int8
    ``(ids, bytes)``.
    """
    count = int(planes.shape[1])
    return integers_from_bytes(op.Cast(op.Gather(planes, ids, axis=0), to=INT64), count)


def kept_row_index(within: Any, before: Any, ids: Any) -> Any:
    """Build the index of each id's row in a part of a pruned table; see ``position_from_rank``.

    ``within`` has the rank of each row in its block, ``before`` the kept rows before each block.
    """
    return position_from_rank(op.Cast(op.Gather(within, ids, axis=0), to=INT64), before, ids)


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
        OPS.merged_codes.default: unpack_codes,
        OPS.unique_row_index.default: unique_row_index,
        OPS.kept_row_index.default: kept_row_index,
        OPS.divided_by.default: divided_by,
    }
