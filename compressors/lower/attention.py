"""Attention as torch computes it, written for every target: also where all places are masked.

The exporter's own translation of ``scaled_dot_product_attention`` takes four-dimensional tensors
only, and for a row whose places are all masked (an empty history) it gives the mean of all values,
or NaN, where torch gives zeros.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset21 as op

BOOL = 9  # onnx.TensorProto.BOOL


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - evaluation mode
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Softmax of scaled products, masked; zeros for a query all of whose keys are masked.

    ``query`` is ``(*, queries, dim)``, ``key`` ``(*, keys, dim)`` and ``value`` ``(*, keys, out)``.
    A boolean ``attn_mask`` is True at keys that count, a float one is added. With ``enable_gqa``
    several heads of queries, ``(rows, heads, queries, dim)``, share one of keys and values.
    """
    if enable_gqa:
        heads = int(query.shape[1])
        key, value = _repeated(key, heads), _repeated(value, heads)
    share = 1 / math.sqrt(int(query.shape[-1])) if scale is None else scale
    rank = len(query.shape)
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    fit = op.MatMul(op.Mul(query, op.Constant(value_float=share)), turned)
    if is_causal:
        attn_mask = _until_now(fit)
    if attn_mask is None:
        return op.MatMul(op.Softmax(fit, axis=-1), value)
    never = op.Constant(value_float=-math.inf)
    boolean = is_causal or int(attn_mask.dtype) == BOOL
    fit = op.Where(attn_mask, fit, never) if boolean else op.Add(fit, attn_mask)
    largest = op.ReduceMax(fit, op.Constant(value_ints=[-1]), keepdims=1)
    none = op.Equal(largest, never)
    zero = op.Constant(value_float=0.0)
    weights = op.Softmax(op.Where(none, zero, fit), axis=-1)
    return op.MatMul(op.Where(none, zero, weights), value)


def _repeated(x: Any, heads: int) -> Any:
    """Each head of ``(rows, few heads, length, dim)`` several times, ``heads`` in all."""
    few, dim = int(x.shape[1]), int(x.shape[3])
    times = op.Constant(value_ints=[1, 1, heads // few, 1, 1])
    wide = op.Expand(op.Unsqueeze(x, op.Constant(value_ints=[2])), times)
    return op.Reshape(wide, op.Constant(value_ints=[0, heads, -1, dim]))


def _until_now(fit: Any) -> Any:
    """A mask ``(queries, keys)`` that is True at keys up to the query's own place."""
    sizes = op.Slice(op.Shape(fit), [-2], [2**31 - 1], [0])
    ones = op.Expand(op.Constant(value_float=1.0), sizes)
    return op.Cast(op.Trilu(ones, upper=0), to=BOOL)


def translations() -> dict[Any, Callable[..., Any]]:
    """Torch's operator -> the subgraph that stands for it, the same on every target."""
    return {torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention}
