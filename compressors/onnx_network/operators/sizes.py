"""ONNX operators on sizes: integers from which a graph computes the shapes of tensors.

ONNX graphs compute the shape arguments of Reshape, Expand and similar operators with nodes such as
Shape, Gather and Concat. ``torch.export`` can trace a network with a dynamic number of rows only if
these values are Python integers or ``torch.SymInt``, which represents a dynamic size, and not
tensors. Sizes are numpy arrays of such objects, so that numpy functions compute with both.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sizes: TypeAlias = NDArray[np.object_]
"""Array of ``int``, ``torch.SymInt`` or ``bool`` (the result of a comparison), of any shape."""

MAX_SIZES = 1024
"""Most elements of ``Sizes``; larger values are tensors."""


def as_sizes(values: Any) -> Sizes:
    """Return an integer, or a list of integers, as ``Sizes``."""
    return np.asarray(values, dtype=object)


def as_list(sizes: Sizes) -> list[int]:
    """Return all elements as a flat list."""
    values: list[int] = sizes.reshape(-1).tolist()
    return values


def as_int(sizes: Sizes) -> int:
    """Return the only element."""
    (value,) = as_list(sizes)
    return value


def sizes_to_tensor(sizes: Sizes, device: torch.device) -> Tensor:
    """Convert sizes to a tensor of the same shape: int64, or bool for results of comparisons."""
    values = as_list(sizes)
    dtype = torch.bool if values and isinstance(values[0], bool) else torch.int64
    if any(isinstance(value, torch.SymInt) for value in values):
        scalars = [torch.scalar_tensor(value, dtype=dtype, device=device) for value in values]
        return torch.stack(scalars).reshape(sizes.shape)
    return torch.tensor(values, dtype=dtype, device=device).reshape(sizes.shape)


def tensor_shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Sizes:
    """Return the sizes of the dimensions ``start`` to ``end`` (exclusive) of a tensor."""
    return as_sizes(list(x.shape)[start:end])


def tensor_size(x: Tensor) -> Sizes:
    """Return the number of elements of a tensor."""
    return as_sizes(x.numel())


def _is_small(target: Sequence[int]) -> bool:
    """Return whether a shape is static and has at most ``MAX_SIZES`` elements."""
    return all(isinstance(size, int) for size in target) and math.prod(target) <= MAX_SIZES


def _elementwise(function: Callable[..., Any]) -> Callable[..., Sizes]:
    """Return an operator that combines its inputs by a numpy function, from first to last."""

    def operator(*sizes: Sizes) -> Sizes:
        return as_sizes(functools.reduce(function, sizes[1:], sizes[0]))

    return operator


def _quotient(x: int, y: int) -> int:
    """Divide and round towards zero; dynamic sizes are not negative."""
    if isinstance(x, int) and isinstance(y, int) and (x < 0) != (y < 0):
        return -(-x // y)
    return x // y


_divide = np.frompyfunc(_quotient, 2, 1)  # two inputs, one output
_minimum = np.frompyfunc(torch.sym_min, 2, 1)
_maximum = np.frompyfunc(torch.sym_max, 2, 1)


def _modulo(x: Sizes, y: Sizes, *, fmod: int = 0) -> Sizes:
    return as_sizes(x - y * _divide(x, y) if fmod else np.mod(x, y))


def _gather(x: Sizes, indices: Sizes, *, axis: int = 0) -> Sizes:
    return as_sizes(np.take(x, indices.astype(np.int64), axis=axis))


def _slice(
    x: Sizes,
    starts: Sizes,
    ends: Sizes,
    axes: Sizes | None = None,
    steps: Sizes | None = None,
) -> Sizes:
    begins, stops = as_list(starts), as_list(ends)
    sliced_axes = range(len(begins)) if axes is None else as_list(axes)
    strides = [1] * len(begins) if steps is None else as_list(steps)
    slices = [slice(None)] * x.ndim
    for axis, begin, stop, stride in zip(sliced_axes, begins, stops, strides, strict=True):
        slices[axis] = slice(begin, stop, stride)
    return x[tuple(slices)]


def _concat(*sizes: Sizes, axis: int) -> Sizes:
    return np.concatenate(sizes, axis=axis)


def _split(
    x: Sizes, split: Sizes | None = None, *, axis: int = 0, num_outputs: int = 1
) -> tuple[Sizes, ...]:
    size = -(-x.shape[axis] // num_outputs)
    counts = [size] * num_outputs if split is None else as_list(split)
    return tuple(np.split(x, np.cumsum(counts)[:-1], axis=axis))


def _squeeze(x: Sizes, axes: Sizes | None = None) -> Sizes:
    return np.squeeze(x, axis=None if axes is None else tuple(as_list(axes)))


def _unsqueeze(x: Sizes, axes: Sizes) -> Sizes:
    return np.expand_dims(x, tuple(as_list(axes)))


def _reshape(x: Sizes, target: Sizes, *, allowzero: int = 0) -> Sizes:
    sizes = as_list(target)
    if not allowzero:
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _transpose(x: Sizes, *, perm: list[int] | None = None) -> Sizes:
    return np.transpose(x, perm)


def _expand(x: Sizes, target: Sizes) -> Sizes | None:
    sizes = as_list(target)
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, sizes)) if _is_small(sizes) else None


def _tile(x: Sizes, repeats: Sizes) -> Sizes | None:
    counts = as_list(repeats)
    return np.tile(x, counts) if _is_small([*counts, x.size]) else None


def _identity(x: Sizes, **_: Any) -> Sizes:
    return x


def _where(condition: Sizes, x: Sizes, y: Sizes) -> Sizes:
    return as_sizes(np.where(condition.astype(bool), x, y))


def _reduction(function: np.ufunc) -> Callable[..., Sizes]:
    """Return a Reduce operator from a function of two sizes."""

    def reduce(
        x: Sizes, axes: Sizes | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Sizes:
        reduced_axes = [] if axes is None else as_list(axes)
        if not reduced_axes and not noop_with_empty_axes:
            reduced_axes = list(range(x.ndim))
        for axis in sorted((axis % x.ndim for axis in reduced_axes), reverse=True):
            x = as_sizes(function.reduce(x, axis=axis, keepdims=bool(keepdims)))
        return x

    return reduce


def _one_hot(indices: Sizes, depth: Sizes, values: Sizes, *, axis: int = -1) -> Sizes | None:
    count = as_int(depth)
    if not _is_small([count, indices.size]):
        return None
    off, on = as_list(values)
    classes = np.where(indices < 0, indices + count, indices)
    is_class = np.equal.outer(classes, np.arange(count))
    return np.moveaxis(as_sizes(np.where(is_class, as_sizes(on), as_sizes(off))), -1, axis)


def _shape(x: Sizes, *, start: int = 0, end: int | None = None) -> Sizes:
    return as_sizes(x.shape[start:end])


def _size(x: Sizes) -> Sizes:
    return as_sizes(x.size)


def _constant_of_shape(target: Sizes, *, value: int = 0) -> Sizes | None:
    sizes = as_list(target)
    return np.full(sizes, value, dtype=object) if _is_small(sizes) else None


OPERATORS_ON_SIZES: Mapping[str, Callable[..., Sizes | tuple[Sizes, ...] | None]] = {
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Div": _elementwise(_divide),
    "Mod": _modulo,
    "Sum": _elementwise(np.add),
    "Neg": lambda x: as_sizes(np.negative(x)),
    "Abs": lambda x: as_sizes(np.absolute(x)),
    "Min": _elementwise(_minimum),
    "Max": _elementwise(_maximum),
    "Equal": _elementwise(np.equal),
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal),
    "And": _elementwise(np.logical_and),
    "Or": _elementwise(np.logical_or),
    "Not": lambda x: as_sizes(np.logical_not(x)),
    "Where": _where,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "Identity": _identity,
    "Cast": _identity,
    "ReduceSum": _reduction(np.add),
    "ReduceProd": _reduction(np.multiply),
    "ReduceMin": _reduction(_minimum),
    "ReduceMax": _reduction(_maximum),
    "ConstantOfShape": _constant_of_shape,
    "OneHot": _one_hot,
    "Shape": _shape,
    "Size": _size,
}
"""Operators on sizes by their ONNX name, used if all inputs of a node are sizes.

They return None if the number of elements of the result is dynamic or above ``MAX_SIZES``. The
operator on tensors computes the result then."""
