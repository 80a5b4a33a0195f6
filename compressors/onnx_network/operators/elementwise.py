"""Elementwise ONNX operators: arithmetic, comparison, logic, activations, casts.

Each function computes one operator. Its positional parameters are the operator's inputs, and its
keyword-only parameters are the attributes. ONNX and PyTorch have the same broadcasting rules.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES: Mapping[int, torch.dtype] = {
    **dict.fromkeys((2, 3, 4, 5, 6, 7, 12, 13), torch.int64),  # all integer types
    1: torch.float32,
    9: torch.bool,
    11: torch.float64,
}
"""The torch dtype of each supported ``TensorProto.DataType``, by its number. All integer types are
int64, as ids are in a signature."""

NARROW_INTEGERS: Mapping[int, torch.dtype] = {
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
    5: torch.int16,
    6: torch.int32,
    12: torch.uint32,
}
"""The integer types of ``TensorProto.DataType`` with fewer than 64 bits, by their number."""


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return an operator of any number of inputs from a function of two."""
    return lambda *inputs: functools.reduce(function, inputs)


def _mean(*inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    # ONNX rounds the quotient of integers towards zero.
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


def _modulo(x: Tensor, y: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(x, y) if fmod else torch.remainder(x, y)


def _power(x: Tensor, y: Tensor) -> Tensor:
    return torch.pow(x, y).to(x.dtype)


def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    if x.dtype is torch.int64 and to in NARROW_INTEGERS:  # keeps the low-order bits
        x = x.to(NARROW_INTEGERS[to])
    return x.to(DTYPES[to])


def _cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(like.dtype)


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def _celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def _selu(
    x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Tensor:
    return gamma * F.elu(x, alpha)


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def _swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def _thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


def _dropout(
    x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None, *, seed: int = 0
) -> Tensor:
    return x


ELEMENTWISE: Mapping[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": _divide,
    "Mod": _modulo,
    "Pow": _power,
    "Sum": _variadic(torch.add),
    "Mean": _mean,
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Not": torch.logical_not,
    "Where": torch.where,
    "IsNaN": torch.isnan,
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Sign": torch.sign,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Round": torch.round,
    "Reciprocal": torch.reciprocal,
    "Sqrt": torch.sqrt,
    "Exp": torch.exp,
    "Log": torch.log,
    "Erf": torch.erf,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": F.hardswish,
    "Relu": torch.relu,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "ThresholdedRelu": _thresholded_relu,
    "Elu": _elu,
    "Celu": _celu,
    "Selu": _selu,
    "Gelu": _gelu,
    "Mish": F.mish,
    "Swish": _swish,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Identity": lambda x: x,
    "Dropout": _dropout,
}
"""The functions of this file by the ONNX name of their operator."""
