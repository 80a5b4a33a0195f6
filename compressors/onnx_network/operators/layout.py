"""ONNX operators that reshape, slice, gather, concatenate or pad tensors.

Parameters of type ``Sizes`` are constant or computed sizes (``sizes.py``), not tensors. ``device``
is the device of the network's inputs.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.onnx_network.operators.sizes import Sizes, as_int, as_list, sizes_to_tensor

Indices: TypeAlias = Tensor | Sizes
"""Indices that depend on the values of inputs, or sizes, which do not."""


def _reshape(x: Tensor, shape: Sizes, *, allowzero: int = 0) -> Tensor:
    target = as_list(shape)
    if not allowzero:
        target = [x.shape[i] if _is_static_size(size, 0) else size for i, size in enumerate(target)]
    return x.reshape(target)


def _is_static_size(size: int, value: int) -> bool:
    """Return whether a size is static and equals ``value``."""
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
    return x.squeeze() if axes is None else x.squeeze(tuple(as_list(axes)))


def _unsqueeze(x: Tensor, axes: Sizes) -> Tensor:
    rank = x.dim() + len(as_list(axes))
    for axis in sorted(axis % rank for axis in as_list(axes)):
        x = x.unsqueeze(axis)
    return x


def _expand(x: Tensor, shape: Sizes) -> Tensor:
    target = as_list(shape)
    new_dims = max(0, len(target) - x.dim())
    target = [1] * (x.dim() - len(target)) + target
    # In ONNX, a size of 1 in the target keeps the size of the tensor; in torch, -1 does.
    return x.expand(
        [-1 if i >= new_dims and _is_static_size(s, 1) else s for i, s in enumerate(target)]
    )


def _tile(x: Tensor, repeats: Sizes) -> Tensor:
    return x.repeat(as_list(repeats))


def _concat(*inputs: Tensor, axis: int) -> Tensor:
    return torch.cat(inputs, dim=axis)


def _split(
    x: Tensor, split: Sizes | None = None, *, axis: int = 0, num_outputs: int = 1
) -> tuple[Tensor, ...]:
    if split is not None:
        return torch.split(x, as_list(split), dim=axis)
    return torch.split(x, -(-x.shape[axis] // num_outputs), dim=axis)


def _slice(
    x: Tensor,
    starts: Sizes,
    ends: Sizes,
    axes: Sizes | None = None,
    steps: Sizes | None = None,
) -> Tensor:
    begins, stops = as_list(starts), as_list(ends)
    sliced_axes = list(range(len(begins))) if axes is None else as_list(axes)
    strides = [1] * len(begins) if steps is None else as_list(steps)
    for axis, begin, stop, stride in zip(sliced_axes, begins, stops, strides, strict=True):
        if stride < 0:  # torch cannot slice backwards; flipping moves element i to -1 - i
            x, begin, stop, stride = x.flip(axis), -1 - begin, -1 - stop, -stride
        x = x[(slice(None),) * (axis % x.dim()) + (slice(begin, stop, stride),)]
    return x


def wrap_negative_indices(indices: Tensor, size: int) -> Tensor:
    """Return non-negative indices: in ONNX, negative ones count from the end of a dimension."""
    return torch.where(indices < 0, indices + size, indices)


def _gather(x: Tensor, indices: Indices, *, axis: int = 0) -> Tensor:
    if not isinstance(indices, Tensor) and indices.ndim == 0:
        return x.select(axis, as_int(indices))
    if not isinstance(indices, Tensor):
        indices = sizes_to_tensor(indices, x.device)
    axis = axis % x.dim()
    rows = x.index_select(axis, wrap_negative_indices(indices, x.shape[axis]).reshape(-1).long())
    return rows.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    # Both torch.gather and ONNX accept fewer indices than elements in the other dimensions.
    return torch.gather(x, axis, wrap_negative_indices(indices, x.shape[axis]).long())


def _gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    batch = tuple(
        torch.arange(indices.shape[axis], device=x.device).reshape(
            [-1 if other == axis else 1 for other in range(indices.dim() - 1)]
        )
        for axis in range(batch_dims)
    )
    return x[(*batch, *(index.long() for index in indices.unbind(dim=-1)))]


def _one_hot(indices: Tensor, depth: Sizes, values: Tensor, *, axis: int = -1) -> Tensor:
    count = as_int(depth)
    classes = torch.arange(count, device=indices.device)
    is_class = wrap_negative_indices(indices.long(), count).unsqueeze(-1) == classes
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
    padded_axes = list(range(x.dim())) if axes is None else [a % x.dim() for a in as_list(axes)]
    before, after = as_list(pads)[: len(padded_axes)], as_list(pads)[len(padded_axes) :]
    by_axis = dict(zip(padded_axes, zip(before, after, strict=True), strict=True))
    # torch expects the pairs from the last dimension to the first.
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
    # JSON has no infinity or NaN, so they are stored as strings.
    number = float(value) if isinstance(value, str) else value
    torch_dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    return torch.full(as_list(shape), number, dtype=torch_dtype, device=device)


def _range(
    start: Sizes, limit: Sizes, delta: Sizes, *, device: torch.device | None = None
) -> Tensor:
    first, last, step = as_int(start), as_int(limit), as_int(delta)
    if isinstance(first, int) and isinstance(last, int):  # torch.arange rejects an empty range
        last = max(first, last) if step > 0 else min(first, last)
    return torch.arange(first, last, step, device=device)


def _trilu(x: Tensor, k: Sizes | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else as_int(k)
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
"""The functions of this file by the ONNX name of their operator."""
