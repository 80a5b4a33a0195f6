"""Translation of scaled dot-product attention for every target, also for fully masked rows.

The exporter's translation of ``scaled_dot_product_attention`` accepts only four-dimensional
tensors. For a row whose positions are all masked (an empty history) it returns the mean of all
values, or NaN, but torch returns zeros.
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
    dropout_p: float = 0.0,  # evaluation mode
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention with softmax over the unmasked keys; zeros for a query with no unmasked key.

    ``query`` is ``(*, queries, dim)``, ``key`` ``(*, keys, dim)`` and ``value`` ``(*, keys, out)``.
    A boolean ``attn_mask`` is True at keys that are used; a float mask is added. With
    ``enable_gqa``, several query heads ``(rows, heads, queries, dim)`` share one head of keys and
    values.
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
    """Repeat each head of ``(rows, few heads, length, dim)`` to get ``heads`` heads."""
    few, dim = int(x.shape[1]), int(x.shape[3])
    times = op.Constant(value_ints=[1, 1, heads // few, 1, 1])
    wide = op.Expand(op.Unsqueeze(x, op.Constant(value_ints=[2])), times)
    return op.Reshape(wide, op.Constant(value_ints=[0, heads, -1, dim]))


def _until_now(fit: Any) -> Any:
    """Causal mask ``(queries, keys)``: True at keys up to the query's position."""
    sizes = op.Slice(op.Shape(fit), [-2], [2**31 - 1], [0])
    ones = op.Expand(op.Constant(value_float=1.0), sizes)
    return op.Cast(op.Trilu(ones, upper=0), to=BOOL)


def translations() -> dict[Any, Callable[..., Any]]:
    """Torch operator -> the function that builds its subgraph, the same on every target."""
    return {torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention}
