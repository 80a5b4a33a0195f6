"""ONNX operators that select, join, reorder or repeat elements.

Parameters annotated with ``Sizes`` are integers of a shape (``sizes.py``), not tensors, and
``device`` is the device of the network's inputs.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.onnx_network.operators.sizes import Sizes, integer, integers, tensor_of

Indices: TypeAlias = Tensor | Sizes
"""Indices that a graph computes from its inputs, or that are known without them."""


def _reshape(x: Tensor, shape: Sizes, *, allowzero: int = 0) -> Tensor:
    target = integers(shape)
    if not allowzero:
        target = [x.shape[i] if _is(target[i], 0) else target[i] for i in range(len(target))]
    return x.reshape(target)


def _is(size: int, value: int) -> bool:
    """Return whether a size is known to be ``value``; a dynamic one is not."""
    return isinstance(size, int) and size == value


def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    return (
        x.flatten(start_dim=axis).flatten(end_dim=axis - 1) if axis < x.dim() else x.reshape(-1, 1)
    )


def _transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    return x.permute(perm if perm is not None else list(range(x.dim()))[::-1])


def _squeeze(x: Tensor, axes: Sizes | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(integers(axes)))


def _unsqueeze(x: Tensor, axes: Sizes) -> Tensor:
    rank = x.dim() + len(integers(axes))
    for axis in sorted(axis % rank for axis in integers(axes)):
        x = x.unsqueeze(axis)
    return x


def _expand(x: Tensor, shape: Sizes) -> Tensor:
    target = integers(shape)
    missing = max(0, len(target) - x.dim())
    target = [1] * (x.dim() - len(target)) + target
    # A size of 1 in the target keeps that of the tensor.
    return x.expand([-1 if i >= missing and _is(s, 1) else s for i, s in enumerate(target)])


def _tile(x: Tensor, repeats: Sizes) -> Tensor:
    return x.repeat(integers(repeats))


def _concat(*inputs: Tensor, axis: int) -> Tensor:
    return torch.cat(inputs, dim=axis)


def _split(
    x: Tensor, split: Sizes | None = None, *, axis: int = 0, num_outputs: int = 1
) -> tuple[Tensor, ...]:
    if split is not None:
        return torch.split(x, integers(split), dim=axis)
    return torch.split(x, -(-x.shape[axis] // num_outputs), dim=axis)


def _slice(
    x: Tensor,
    starts: Sizes,
    ends: Sizes,
    axes: Sizes | None = None,
    steps: Sizes | None = None,
) -> Tensor:
    begins, stops = integers(starts), integers(ends)
    along = list(range(len(begins))) if axes is None else integers(axes)
    strides = [1] * len(begins) if steps is None else integers(steps)
    for axis, begin, stop, stride in zip(along, begins, stops, strides, strict=True):
        if stride < 0:  # torch has no negative strides; element i is -1 - i in the reverse order
            x, begin, stop, stride = x.flip(axis), -1 - begin, -1 - stop, -stride
        x = x[(slice(None),) * (axis % x.dim()) + (slice(begin, stop, stride),)]
    return x


def from_start(indices: Tensor, size: int) -> Tensor:
    """Return indices that count from the start; negative ones of ONNX count from the end."""
    return torch.where(indices < 0, indices + size, indices)


def _gather(x: Tensor, indices: Indices, *, axis: int = 0) -> Tensor:
    if not isinstance(indices, Tensor) and indices.ndim == 0:
        return x.select(axis, integer(indices))
    if not isinstance(indices, Tensor):
        indices = tensor_of(indices, x.device)
    axis = axis % x.dim()
    rows = x.index_select(axis, from_start(indices, x.shape[axis]).reshape(-1).long())
    return rows.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    # torch.gather accepts fewer indices than elements in the other dimensions, as ONNX does.
    return torch.gather(x, axis, from_start(indices, x.shape[axis]).long())


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    batch = tuple(
        torch.arange(indices.shape[axis], device=x.device).reshape(
            [-1 if other == axis else 1 for other in range(indices.dim() - 1)]
        )
        for axis in range(batch_dims)
    )
    return x[(*batch, *(place.long() for place in indices.unbind(dim=-1)))]


def _one_hot(indices: Tensor, depth: Sizes, values: Tensor, *, axis: int = -1) -> Tensor:
    count = integer(depth)
    classes = torch.arange(count, device=indices.device)
    is_class = from_start(indices.long(), count).unsqueeze(-1) == classes
    off, on = values.unbind()
    return torch.where(is_class, on, off).movedim(-1, axis)


def _pad(
    x: Tensor,
    pads: Sizes,
    value: Tensor | None = None,
    axes: Sizes | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    if mode != "constant":
        raise NotImplementedError(f"Pad with mode {mode}")
    along = list(range(x.dim())) if axes is None else [a % x.dim() for a in integers(axes)]
    before, after = integers(pads)[: len(along)], integers(pads)[len(along) :]
    by_axis = dict(zip(along, zip(before, after, strict=True), strict=True))
    # torch lists the pairs from the last dimension to the first.
    pairs = [by_axis.get(axis, (0, 0)) for axis in reversed(range(x.dim()))]
    padded = F.pad(x, [count for pair in pairs for count in pair])
    if value is None:
        return padded
    is_inside = F.pad(torch.ones_like(x, dtype=torch.bool), [c for pair in pairs for c in pair])
    return torch.where(is_inside, padded, value)


def _constant_of_shape(
    shape: Sizes,
    *,
    value: float | str = 0.0,
    dtype: str | None = None,
    device: torch.device | None = None,
) -> Tensor:
    # JSON has no infinite numbers; they are stored as texts.
    number = float(value) if isinstance(value, str) else value
    kind: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    return torch.full(integers(shape), number, dtype=kind, device=device)


def _range(
    start: Sizes, limit: Sizes, delta: Sizes, *, device: torch.device | None = None
) -> Tensor:
    first, last, step = integer(start), integer(limit), integer(delta)
    if isinstance(first, int) and isinstance(last, int):  # torch refuses an empty range
        last = max(first, last) if step > 0 else min(first, last)
    return torch.arange(first, last, step, device=device)


def _trilu(x: Tensor, k: Sizes | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else integer(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


LAYOUT: Mapping[str, Callable[..., Any]] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": _tile,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Pad": _pad,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Trilu": _trilu,
}
"""The operators of this file by their ONNX name."""
