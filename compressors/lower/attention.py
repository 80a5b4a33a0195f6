"""Translate scaled dot-product attention to ONNX, with torch's result for fully masked queries.

This translation replaces that of torch's exporter on every target. The translation of the exporter
accepts only four-dimensional tensors. For a query whose keys are all masked (an empty history), it
returns the mean of all values, or NaN; torch returns zeros.
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
    dropout_p: float = 0.0,  # no dropout in evaluation mode
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Build attention with a softmax over unmasked keys; zeros for a query without such a key.

    The parameters are those of ``torch.nn.functional.scaled_dot_product_attention``.

    Args:
        query: float ``(*, queries, dim)``.
        key: float ``(*, keys, dim)``.
        value: float ``(*, keys, out)``.
        attn_mask: boolean, True at keys that are used; or float, which is added to the logits.
        dropout_p: ignored.
        is_causal: whether a query uses only keys up to its own position.
        scale: factor of the logits; None for ``1 / sqrt(dim)``.
        enable_gqa: grouped-query attention: several query heads share one head of keys and
            values. All tensors are ``(rows, heads, length, dim)``.

    Returns:
        Float ``(*, queries, out)``.
    """
    if enable_gqa:
        heads = int(query.shape[1])
        key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    factor = 1 / math.sqrt(int(query.shape[-1])) if scale is None else scale
    rank = len(query.shape)
    transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    logits = op.MatMul(op.Mul(query, op.Constant(value_float=factor)), transposed)
    if is_causal:
        attn_mask = _build_causal_mask(logits)
    if attn_mask is None:
        return op.MatMul(op.Softmax(logits, axis=-1), value)
    minus_infinity = op.Constant(value_float=-math.inf)
    zero = op.Constant(value_float=0.0)
    is_boolean = is_causal or int(attn_mask.dtype) == BOOL
    # A mask is the same for all heads and often for all queries, so it has far fewer elements than
    # the logits, and layers with the same mask share the operators on it. Only the Add reads both
    # the mask and the logits: more such operators took 15 % of the time in an encoder.
    added = op.Where(attn_mask, zero, minus_infinity) if is_boolean else attn_mask
    weights = op.Softmax(op.Add(logits, added), axis=-1)  # NaN for a query without a key
    largest = op.ReduceMax(added, op.Constant(value_ints=[-1]), keepdims=1)
    is_masked = op.Equal(largest, minus_infinity)
    return op.Where(is_masked, zero, op.MatMul(weights, value))


def _repeat_heads(x: Any, heads: int) -> Any:
    """Repeat each head of ``(rows, shared heads, length, dim)`` to get ``heads`` heads."""
    shared, dim = int(x.shape[1]), int(x.shape[3])
    repeats = op.Constant(value_ints=[1, 1, heads // shared, 1, 1])
    repeated = op.Expand(op.Unsqueeze(x, op.Constant(value_ints=[2])), repeats)
    return op.Reshape(repeated, op.Constant(value_ints=[0, heads, -1, dim]))


def _build_causal_mask(logits: Any) -> Any:
    """Build the boolean mask ``(queries, keys)``: True at keys up to the query's position."""
    sizes = op.Slice(op.Shape(logits), [-2], [2**31 - 1], [0])
    ones = op.Expand(op.Constant(value_float=1.0), sizes)
    return op.Cast(op.Trilu(ones, upper=0), to=BOOL)


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the function that builds the subgraph of each torch operator on every target."""
    return {torch.ops.aten.scaled_dot_product_attention.default: scaled_dot_product_attention}
