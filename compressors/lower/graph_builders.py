"""Build ONNX subgraphs that the translations of several targets use.

Arguments and results of type ``Any`` are values of the graph (``onnx_ir.Value``). "Build" means to
add operators to the graph that compute a value. ``ids`` are the requested rows of a table, and
``(*ids, dim)`` is the shape of ``ids`` with one more dimension. A codebook is a small table of
entries, to which a row's codes refer by index. A level is a weight before it is multiplied by its
scale. Product codes split each row into parts, which have separate codes and codebooks. ``width``
is the number of bits of a code. "Short floats" are float16 and bfloat16.
"""

from collections.abc import Callable, Sequence
from typing import Any

import onnx
from onnxscript import opset21 as op

from compressors.lower.custom_operators import OPS
from compressors.prune.tables.kept_rows import BLOCK
from compressors.quantize.tables.product_codes import padded_columns

FLOAT, FLOAT16, BFLOAT16, INT32, INT64 = (
    int(getattr(onnx.TensorProto, name))
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64")
)


def constant(dtype: int, values: list[int] | float) -> Any:
    """Build a constant of an ONNX type: a scalar from a number, a vector from a list."""
    dims = [len(values)] if isinstance(values, list) else []
    flat = values if isinstance(values, list) else [values]
    return op.Constant(value=onnx.helper.make_tensor("", dtype, dims, flat))


def flatten_to_matrix(x: Any, inputs: int, outputs: int) -> tuple[Any, Callable[[Any], Any]]:
    """Reshape ``(*, inputs)`` to ``(rows, inputs)`` for a Gemm; also return the inverse function.

    The inverse function maps the Gemm's output ``(rows, outputs)`` to ``(*, outputs)``.
    """
    if len(x.shape) == 2:
        return x, lambda y: y
    leading = op.Slice(op.Shape(x), [0], [len(x.shape) - 1], [0])
    flat = op.Reshape(x, op.Constant(value_ints=[-1, inputs]))
    shape = op.Concat(leading, op.Constant(value_ints=[outputs]), axis=0)
    return flat, lambda y: op.Reshape(y, shape)


def exact_sigmoid(x: Any) -> Any:
    """Build a sigmoid with full relative precision near zero.

    ONNX Runtime's Sigmoid has an absolute error of about 6e-8 and is 0 for inputs of -18 and below.
    This is not precise enough if the logarithm of the result is computed.
    """
    return op.Reciprocal(op.Add(op.Constant(value_float=1.0), op.Exp(op.Neg(x))))


def apply_scales(levels: Any, scale: Any, offset: Any, ids: Any, rows_per_scale: int) -> Any:
    """Multiply float32 ``levels`` ``(*ids, dim)`` by their scales and add their offsets, if any.

    ``rows_per_scale`` consecutive rows share a scale; 0 if the whole table has one.
    """
    rows = op.Mul(levels, _gather_for_rows(scale, ids, rows_per_scale))
    return rows if offset is None else op.Add(rows, _gather_for_rows(offset, ids, rows_per_scale))


def _gather_for_rows(stored: Any, ids: Any, rows_per_scale: int) -> Any:
    """Gather the scale or offset of each requested row, as float32."""
    if not rows_per_scale:  # one scale for the table
        return op.Cast(stored, to=FLOAT)
    scale_rows = ids
    if rows_per_scale > 1:
        scale_rows = op.Div(ids, constant(int(ids.dtype), rows_per_scale))
    return op.Cast(op.Gather(stored, scale_rows, axis=0), to=FLOAT)


def gather_short_floats(weight: Any, ids: Any) -> Any:
    """Gather float16 or bfloat16 rows, then convert them to float32."""
    return op.Cast(op.Gather(weight, ids, axis=0), to=FLOAT)


def drop_padding(codes: Any, count: int, width: int) -> Any:
    """Remove the codes after the first ``count``, which pad the last byte of a row."""
    return codes if count * width % 8 == 0 else op.Slice(codes, [0], [count], [-1])


def gather_levels(codes: Any, codebook: Any, scale: Any, ids: Any) -> Any:
    """Look up the level of each code in ``codebook``, times the row's scale if there is one.

    Takes codes int32 ``(*ids, dim)``; returns float32 of the same shape.
    """
    rows = op.Gather(codebook, codes, axis=0)
    return rows if scale is None else op.Mul(rows, op.Cast(op.Gather(scale, ids, axis=0), to=FLOAT))


def gather_entries(codes: Any, codebook: Any, num_codebooks: int) -> Any:
    """Look up codebook entries: float32 ``(*ids, num_codebooks, entry)``.

    Takes codes int32 ``(*ids, num_codebooks)``: one code for each of the ``num_codebooks``
    codebooks, which are concatenated in ``codebook``.
    """
    entries_per_book = int(codebook.shape[0]) // num_codebooks
    first_entries = constant(INT32, [entries_per_book * book for book in range(num_codebooks)])
    return op.Cast(op.Gather(codebook, op.Add(codes, first_entries), axis=0), to=FLOAT)


def concatenate_parts(parts_of_rows: Any, ids: Any, dim: int, parts: int) -> Any:
    """Concatenate the entries of all parts: ``(*ids, parts, longest)`` to ``(*ids, dim)``.

    Entries of different parts can differ in length; shorter ones are padded to the longest.
    """
    shape = [0] * len(ids.shape) + [parts * -(-dim // parts)]  # 0: unchanged
    rows = op.Reshape(parts_of_rows, op.Constant(value_ints=shape))
    indices = padded_columns(dim, parts)
    return rows if indices is None else op.Gather(rows, op.Constant(value_ints=indices), axis=-1)


def integers_from_bytes(byte_values: Any, count: int) -> Any:
    """Build integers, int64 ``(*,)``, from their bytes, int64 ``(*, count)`` in [-128, 127]."""
    weight = op.Constant(value_ints=[256**plane for plane in range(count)])
    terms = op.Mul(op.Add(byte_values, op.Constant(value_int=128)), weight)
    return op.ReduceSum(terms, op.Constant(value_ints=[-1]), keepdims=0)


def position_from_rank(rank: Any, before: Any, ids: Any) -> Any:
    """Build the index of rows in one of the two parts of a pruned table: kept and other rows.

    Args:
        rank: int64 ``(*ids,)``. For a kept row, its index among the kept rows of its block; for a
            row that is not kept, -1 minus its index among such rows of its block.
        before: number of kept rows before each block of ``BLOCK`` rows.
        ids: row numbers, ``(*ids,)``.

    Returns:
        Int64 ``(*ids,)``; -1 minus the index for rows that are not kept.
    """
    block = op.Div(op.Cast(ids, to=INT64), op.Constant(value_int=BLOCK))
    kept_before = op.Cast(op.Gather(before, block, axis=0), to=INT64)
    is_other = op.Less(rank, op.Constant(value_int=0))
    # For a row that is not kept, the number of all rows before the block is subtracted: the result
    # is -1 minus its rank minus the number of rows before the block that are not kept.
    subtracted = op.Where(is_other, op.Constant(value_int=BLOCK), op.Constant(value_int=0))
    return op.Sub(op.Add(kept_before, rank), op.Mul(subtracted, block))


def divided_by(ids: Any, divisor: int) -> Any:
    """Build the integer quotient of ids; Div rounds it down, because ids are not negative."""
    return op.Div(ids, constant(onnx.TensorProto.INT64, divisor))


def log_sigmoid(x: Any) -> Any:
    """Build the logarithm of a sigmoid, finite for all inputs.

    torch's exporter writes Log(Sigmoid(x)), which is -inf below -88.
    """
    return op.Neg(op.Softplus(op.Neg(x)))


def squeeze_fixed(x: Any) -> Any:
    """Remove the dimensions whose size is 1 for every batch.

    torch's exporter writes a Squeeze of every dimension of size 1. In a batch of one row that
    removes the batch dimension too.
    """
    return squeeze_dimensions(x, range(len(x.shape)))


def squeeze_dimension(x: Any, dim: int) -> Any:
    """Remove a dimension if its size is 1 for every batch.

    torch leaves a dimension of another size as it is, for example in ``squeeze(-1)`` of scores
    ``(rows,)``; ONNX's Squeeze fails.
    """
    return squeeze_dimensions(x, (dim,))


def squeeze_dimensions(x: Any, dim: Sequence[int]) -> Any:
    """Remove those of some dimensions whose size is 1 for every batch."""
    axes = [axis for axis in dim if x.shape[axis] == 1]
    return op.Squeeze(x, axes) if axes else op.Identity(x)


def codebook_translations(
    unpack_codes: Callable[[Any, Any, int, int], Any],
) -> dict[Any, Callable[..., Any]]:
    """Return the function that builds the subgraph of each custom op of codebook tables.

    ``unpack_codes(codes, ids, count, width)`` is the target's function that gathers the packed
    codes of rows: ``count`` codes of ``width`` bits per row, as int32 ``(*ids, count)``.
    """

    def kmeans_table(codes: Any, codebook: Any, scale: Any, ids: Any, dim: int, width: int) -> Any:
        """Gather codes, then look up their levels."""
        return gather_levels(unpack_codes(codes, ids, dim, width), codebook, scale, ids)

    def product_codes(codes: Any, codebook: Any, ids: Any, dim: int, parts: int, width: int) -> Any:
        """Gather codes, look up their entries, and concatenate the parts."""
        parts_of_rows = gather_entries(unpack_codes(codes, ids, parts, width), codebook, parts)
        return concatenate_parts(parts_of_rows, ids, dim, parts)

    def residual_codes(codes: Any, codebook: Any, ids: Any, num_codebooks: int, width: int) -> Any:
        """Gather codes, look up their entries, and sum them."""
        parts_of_rows = gather_entries(
            unpack_codes(codes, ids, num_codebooks, width), codebook, num_codebooks
        )
        return op.ReduceSum(parts_of_rows, op.Constant(value_ints=[-2]), keepdims=0)

    return {
        OPS.kmeans_table.default: kmeans_table,
        OPS.product_codes.default: product_codes,
        OPS.residual_codes.default: residual_codes,
    }
