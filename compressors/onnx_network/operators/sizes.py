"""ONNX operators that compute shapes, on Python integers.

A graph computes the arguments of Reshape, Expand and similar operators with operators of its own,
such as Shape, Gather and Concat. ``torch.export`` can trace a network with a dynamic number of rows
only if these values are Python integers, or the symbolic integers that stand for dynamic
dimensions, and not tensors. ``Sizes`` holds them in a numpy array of objects, so that numpy's
functions compute with both.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sizes: TypeAlias = NDArray[np.object_]
"""Integers of a shape, of dtype object: ``()`` or ``(values,)``."""


def to_sizes(values: Any) -> Sizes:
    """Return an integer, or a list of them, as an array of objects."""
    return np.asarray(values, dtype=object)


def integers(sizes: Sizes) -> list[int]:
    """Return the values of ``sizes`` as a list, also of a single one."""
    values: list[int] = sizes.reshape(-1).tolist()
    return values


def integer(sizes: Sizes) -> int:
    """Return the only value of ``sizes``."""
    (value,) = integers(sizes)
    return value


def tensor_of(sizes: Sizes, device: torch.device) -> Tensor:
    """Return the values as a tensor of the same shape: int64, or bool for the result of Equal."""
    values = integers(sizes)
    dtype = torch.bool if values and isinstance(values[0], bool) else torch.int64
    if any(isinstance(value, torch.SymInt) for value in values):
        scalars = [torch.scalar_tensor(value, dtype=dtype, device=device) for value in values]
        return torch.stack(scalars).reshape(sizes.shape)
    return torch.tensor(values, dtype=dtype, device=device).reshape(sizes.shape)


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Sizes:
    """Shape: the sizes of dimensions ``start`` to ``end``."""
    return to_sizes(list(x.shape)[start:end])


def size(x: Tensor) -> Sizes:
    """Size: the number of elements."""
    return to_sizes(x.numel())


def _elementwise(function: Callable[..., Any]) -> Callable[..., Sizes]:
    """Return an operator that applies a function of numpy to integers."""

    def operator(*sizes: Sizes) -> Sizes:
        return to_sizes(functools.reduce(function, sizes[1:], sizes[0]))

    return operator


def _gather(x: Sizes, indices: Sizes, *, axis: int = 0) -> Sizes:
    return to_sizes(np.take(x, indices.astype(np.int64), axis=axis))


def _slice(
    x: Sizes,
    starts: Sizes,
    ends: Sizes,
    axes: Sizes | None = None,
    steps: Sizes | None = None,
) -> Sizes:
    return x[slice(integer(starts), integer(ends), None if steps is None else integer(steps))]


def _concat(*sizes: Sizes, axis: int) -> Sizes:
    return np.concatenate(sizes, axis=axis)


def _squeeze(x: Sizes, axes: Sizes | None = None) -> Sizes:
    return x.reshape(())


def _unsqueeze(x: Sizes, axes: Sizes) -> Sizes:
    return x.reshape(-1)


def _reshape(x: Sizes, target: Sizes, *, allowzero: int = 0) -> Sizes:
    return x.reshape(integers(target))


def _identity(x: Sizes, **_: Any) -> Sizes:
    return x


def _divide(x: Sizes, y: Sizes) -> Sizes:
    return to_sizes(np.floor_divide(x, y))


def _minimum(*sizes: Sizes) -> Sizes:
    return to_sizes(functools.reduce(np.frompyfunc(torch.sym_min, 2, 1), sizes))


def _maximum(*sizes: Sizes) -> Sizes:
    return to_sizes(functools.reduce(np.frompyfunc(torch.sym_max, 2, 1), sizes))


def _equal(x: Sizes, y: Sizes) -> Sizes:
    return to_sizes(np.equal(x, y))


def _where(condition: Sizes, x: Sizes, y: Sizes) -> Sizes:
    return to_sizes(np.where(condition.astype(bool), x, y))


def _product(x: Sizes, axes: Sizes | None = None, *, keepdims: int = 1, **_: Any) -> Sizes:
    return to_sizes(np.prod(x, keepdims=bool(keepdims)))


def _one_hot(indices: Sizes, depth: Sizes, values: Sizes, *, axis: int = -1) -> Sizes:
    off, on = integers(values)
    is_class = np.equal.outer(indices, np.arange(integer(depth)))
    return to_sizes(np.where(is_class, to_sizes(on), to_sizes(off)))


def _shape(x: Sizes, *, start: int = 0, end: int | None = None) -> Sizes:
    return to_sizes(x.shape[start:end])


def _filled(target: Sizes, *, value: int = 0) -> Sizes:
    return np.full(integers(target), value, dtype=object)


SIZE_OPERATORS: Mapping[str, Callable[..., Sizes]] = {
    "Add": _elementwise(np.add),
    "Sub": _elementwise(np.subtract),
    "Mul": _elementwise(np.multiply),
    "Mod": _elementwise(np.mod),
    "Neg": lambda x: to_sizes(np.negative(x)),
    "Div": _divide,
    "Min": _minimum,
    "Max": _maximum,
    "Equal": _equal,
    "Where": _where,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Identity": _identity,
    "Cast": _identity,
    "ReduceProd": _product,
    "ConstantOfShape": _filled,
    "OneHot": _one_hot,
    "Shape": _shape,
}
"""Operators on integers of shapes, used if all inputs of a node are such integers."""
