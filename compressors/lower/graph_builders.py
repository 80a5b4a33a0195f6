"""Builders of ONNX subgraphs that the translations of several targets use."""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op

from compressors.prune.tables.kept_rows import BLOCK
from compressors.quantize.tables.product_codes import columns

FLOAT, FLOAT16, BFLOAT16, INT32, INT64 = (
    int(getattr(onnx.TensorProto, name))
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64")
)


def constant(dtype: int, values: list[int] | float) -> Any:
    """A small constant of a given ONNX type: a scalar, or a vector."""
    dims = [len(values)] if isinstance(values, list) else []
    flat = values if isinstance(values, list) else [values]
    return op.Constant(value=onnx.helper.make_tensor("", dtype, dims, flat))


def as_matrix(x: Any, inputs: int, outputs: int) -> tuple[Any, Callable[[Any], Any]]:
    """``x`` as ``(rows, inputs)`` for a Gemm, and a function that restores the output's shape."""
    if len(x.shape) == 2:
        return x, lambda y: y
    leading = op.Slice(op.Shape(x), [0], [len(x.shape) - 1], [0])
    flat = op.Reshape(x, op.Constant(value_ints=[-1, inputs]))
    shape = op.Concat(leading, op.Constant(value_ints=[outputs]), axis=0)
    return flat, lambda y: op.Reshape(y, shape)


def exact_sigmoid(x: Any) -> Any:
    """A sigmoid with full relative precision near zero.

    ONNX Runtime's Sigmoid has an absolute error of about 6e-8 and is 0 for inputs of -18 and below.
    This is not precise enough if the logarithm of the result is computed.
    """
    return op.Reciprocal(op.Add(op.Constant(value_float=1.0), op.Exp(op.Neg(x))))


def scaled(steps: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Float32 levels of the requested rows, times their scales, plus their offsets if any."""
    rows = op.Mul(steps, _of_rows(scale, ids, rows_per_scale))
    return rows if offset is None else op.Add(rows, _of_rows(offset, ids, rows_per_scale))


def _of_rows(stored: Any, ids: Any, rows_per_scale: int) -> Any:
    if not rows_per_scale:  # one scale for the table
        return op.Cast(stored, to=FLOAT)
    entries = ids
    if rows_per_scale > 1:
        entries = op.Div(ids, constant(int(ids.dtype), rows_per_scale))
    return op.Cast(op.Gather(stored, entries, axis=0), to=FLOAT)


def short_float_table(weight: Any, ids: Any) -> Any:
    """Gather float16 or bfloat16 rows, then widen them."""
    return op.Cast(op.Gather(weight, ids, axis=0), to=FLOAT)


def without_padding(codes: Any, count: int, width: int) -> Any:
    """The codes of a row without the padding of its last byte."""
    return codes if count * width % 8 == 0 else op.Slice(codes, [0], [count], [-1])


def kmeans_levels(codes: Any, codebook: Any, scale: Any, ids: Any) -> Any:
    """The level of each code int32 ``(*ids, dim)``, times the row's scale if there is one."""
    rows = op.Gather(codebook, codes, axis=0)
    return rows if scale is None else op.Mul(rows, op.Cast(op.Gather(scale, ids, axis=0), to=FLOAT))


def entries(codes: Any, codebook: Any, books: int) -> Any:
    """Codebook entries of codes int32 ``(*ids, books)``: float32 ``(*ids, books, entry)``."""
    levels = int(codebook.shape[0]) // books
    first = constant(INT32, [levels * book for book in range(books)])
    return op.Cast(op.Gather(codebook, op.Add(codes, first), axis=0), to=FLOAT)


def side_by_side(found: Any, ids: Any, dim: int, parts: int) -> Any:
    """Concatenate entries ``(*ids, parts, widest)`` to rows ``(*ids, dim)``."""
    shape = [0] * len(ids.shape) + [parts * -(-dim // parts)]  # 0: unchanged
    rows = op.Reshape(found, op.Constant(value_ints=shape))
    places = columns(dim, parts)
    return rows if places is None else op.Gather(rows, op.Constant(value_ints=places), axis=-1)


def joined_bytes(digits: Any, count: int) -> Any:
    """Places, int64 ``(*,)``, from their bytes, int64 ``(*, count)`` in [-128, 127]."""
    weight = op.Constant(value_ints=[256**plane for plane in range(count)])
    weighed = op.Mul(op.Add(digits, op.Constant(value_int=128)), weight)
    return op.ReduceSum(weighed, op.Constant(value_ints=[-1]), keepdims=0)


def placed(rank: Any, before: Any, ids: Any) -> Any:
    """Place of a row among the kept or the other rows, from its int64 rank within its block."""
    block = op.Div(op.Cast(ids, to=INT64), op.Constant(value_int=BLOCK))
    base = op.Cast(op.Gather(before, block, axis=0), to=INT64)
    other = op.Less(rank, op.Constant(value_int=0))
    back = op.Where(other, op.Constant(value_int=BLOCK), op.Constant(value_int=0))
    return op.Sub(op.Add(base, rank), op.Mul(back, block))


def divided_by(ids: Any, divisor: int) -> Any:
    """Integer division of ids; they are not negative, so Div rounds down."""
    return op.Div(ids, constant(onnx.TensorProto.INT64, divisor))


def log_sigmoid(x: Any) -> Any:
    """Logarithm of a sigmoid, finite for all inputs; the same on every target.

    torch's exporter writes Log(Sigmoid(x)), which is -inf below -88.
    """
    return op.Neg(op.Softplus(op.Neg(x)))


def squeeze_fixed(x: Any) -> Any:
    """``x`` without its dimensions of size 1, except the number of rows.

    torch's exporter writes a Squeeze of every dimension of size 1. With one row, the batch
    dimension has size 1 too, so the score would lose all of its dimensions.
    """
    axes = [axis for axis, size in enumerate(x.shape) if size == 1]
    return op.Squeeze(x, op.Constant(value_ints=axes)) if axes else op.Identity(x)


def code_tables(unpacked: Callable[[Any, Any, int, int], Any]) -> dict[Any, Callable[..., Any]]:
    """The ops of codebook tables -> their subgraphs, with a target's function that unpacks codes.

    ``unpacked`` takes packed codes, ids, the number of codes per row and the bits per code.
    """

    def kmeans_table(codes: Any, codebook: Any, scale: Any, ids: Any, dim: int, width: int) -> Any:
        """Gather codes, then their levels."""
        return kmeans_levels(unpacked(codes, ids, dim, width), codebook, scale, ids)

    def product_codes(codes: Any, codebook: Any, ids: Any, dim: int, parts: int, width: int) -> Any:
        """Gather codes, then their entries, and concatenate the parts."""
        found = entries(unpacked(codes, ids, parts, width), codebook, parts)
        return side_by_side(found, ids, dim, parts)

    def residual_codes(codes: Any, codebook: Any, ids: Any, books: int, width: int) -> Any:
        """Gather codes, then their entries, and add them up."""
        found = entries(unpacked(codes, ids, books, width), codebook, books)
        return op.ReduceSum(found, op.Constant(value_ints=[-2]), keepdims=0)

    ops = torch.ops.recpress
    return {
        ops.kmeans_table.default: kmeans_table,
        ops.product_codes.default: product_codes,
        ops.residual_codes.default: residual_codes,
    }
