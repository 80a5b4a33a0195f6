"""ONNX operators: matrix products, reductions, normalization, softmax, convolution."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.onnx_network.operators.sizes import Sizes, as_int, as_list


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803 - the name of the ONNX attribute
    transB: int = 0,  # noqa: N803
) -> Tensor:
    product = alpha * torch.matmul(a.T if transA else a, b.T if transB else b)
    return product if c is None else product + beta * c


def _einsum(*inputs: Tensor, equation: str) -> Tensor:
    result: Tensor = torch.einsum(equation, *inputs)
    return result


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    """Return a Reduce operator from a function of a tensor, the reduced axes and ``keepdim``."""

    def reduce(
        x: Tensor, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        reduced_axes = [] if axes is None else as_list(axes)
        if not reduced_axes and noop_with_empty_axes:  # reduce each element separately
            return function(x.unsqueeze(-1), [-1], False)
        return function(x, reduced_axes or list(range(x.dim())), bool(keepdims))

    return reduce


def _product(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(dim=axis, keepdim=keepdim)
    return x


def _extend_to_integers(
    function: Callable[..., Tensor],
) -> Callable[[Tensor, list[int], bool], Tensor]:
    """Extend a function of floats to integers: compute in float64 and round towards zero."""

    def compute(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
        floats = x if x.is_floating_point() else x.double()
        return function(floats, dim=axes, keepdim=keepdim).to(x.dtype)

    return compute


def _arg_reduction(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the operator ArgMax or ArgMin from the function of torch."""

    def reduce(
        x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0
    ) -> Tensor:
        if not select_last_index:
            return function(x, dim=axis, keepdim=bool(keepdims))
        return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=bool(keepdims))

    return reduce


def _top_k(
    x: Tensor,
    k: Sizes,
    *,
    axis: int = -1,
    largest: int = 1,
    sorted: int = 1,  # noqa: A002
) -> tuple[Tensor, Tensor]:
    count, descending = as_int(k), bool(largest)
    # ONNX's TopK returns equal elements in their original order, torch.topk in any order. So topk
    # is used only in an export, where it becomes a TopK node; else a stable sort has ONNX's order.
    if torch.compiler.is_exporting():
        values, indices = torch.topk(x, count, axis, largest=descending)
        return values, indices
    values, indices = torch.sort(x, dim=axis, descending=descending, stable=True)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def _cumulative_sum(x: Tensor, axis: Sizes, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = as_int(axis)
    x = x.flip(dim) if reverse else x
    if exclusive:  # shift by one; torch expects the pairs from the last dimension to the first
        x = F.pad(x, [*[0, 0] * (-1 - dim if dim < 0 else x.dim() - 1 - dim), 1, -1])
    total = x.cumsum(dim, dtype=x.dtype)
    return total.flip(dim) if reverse else total


def _softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, dim=axis)


def _log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, dim=axis)


def _layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    shape = list(x.shape[axis % x.dim() :])
    bias = None if bias is None else _expand_weight(bias, shape)
    return F.layer_norm(x, shape, _expand_weight(scale, shape), bias, epsilon)


def _expand_weight(weight: Tensor, shape: list[int]) -> Tensor:
    """Expand a weight to a shape; it may have additional leading dimensions of size 1."""
    return weight.reshape(weight.shape[-len(shape) :]).expand(shape)


def _rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    axes = list(range(axis % x.dim(), x.dim()))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale


def _batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor:
    if training_mode:
        raise NotImplementedError("BatchNormalization with training_mode")
    # Bundles of earlier versions store the statistics as parameters. F.batch_norm raises if they
    # require gradients.
    statistics = (mean.detach(), variance.detach())
    return F.batch_norm(x, *statistics, scale, bias, training=False, eps=epsilon)


def _lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, p, dim=axis, keepdim=True)
    return x / norm.masked_fill(norm == 0, 1)  # a vector of zeros stays a vector of zeros


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    rank = x.dim() - 2
    before, after = (pads or [0] * 2 * rank)[:rank], (pads or [0] * 2 * rank)[rank:]
    if auto_pad not in ("NOTSET", "VALID") or rank not in (1, 2):
        raise NotImplementedError(f"Conv of {rank} dimensions with auto_pad {auto_pad}")
    pairs = [count for axis in reversed(range(rank)) for count in (before[axis], after[axis])]
    function: Callable[..., Tensor] = F.conv1d if rank == 1 else F.conv2d
    return function(
        F.pad(x, pairs),
        weight,
        bias,
        stride=strides or [1] * rank,
        dilation=dilations or [1] * rank,
        groups=group,
    )


REDUCTIONS: Mapping[str, Callable[..., Any]] = {
    "MatMul": torch.matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "ReduceSum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype)),
    "ReduceMean": _reduction(_extend_to_integers(torch.mean)),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": _reduction(_product),
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduction(_extend_to_integers(torch.linalg.vector_norm)),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "ReduceLogSum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "ReduceLogSumExp": _reduction(_extend_to_integers(torch.logsumexp)),
    "ArgMax": _arg_reduction(torch.argmax),
    "ArgMin": _arg_reduction(torch.argmin),
    "TopK": _top_k,
    "CumSum": _cumulative_sum,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "LayerNormalization": _layer_normalization,
    "RMSNormalization": _rms_normalization,
    "BatchNormalization": _batch_normalization,
    "LpNormalization": _lp_normalization,
    "Conv": _convolution,
}
"""The functions of this file by the ONNX name of their operator."""
