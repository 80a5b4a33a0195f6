"""Round the weights and inputs of a dense layer to the codes of ``static_int8``.

A *scale* is the distance of two levels; a *code* is the int8 number of a level, for weights at most
``LEVELS`` (127) in absolute value. Two neighbouring codes of an output channel add up to at most
128 in absolute value, because some processors add two products in 16 bits, which larger codes could
overflow (``static_int8.py``).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.quantize.calibration.calibrators import LEVELS

CLIP_RATIOS = tuple(1 - index / 64 for index in range(33))
"""Clipping ranges that ``clipped_scale`` tries, as ratios to a channel's largest weight."""


def encode(
    weight: Tensor, bias: Tensor | None, input_scale: Tensor, weight_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round the weights of each output channel to 255 evenly spaced levels.

    Args:
        weight: float, ``(out, in)``.
        bias: float ``(out,)`` or None; runtimes store it as an int32 multiple of
            ``weight_scale * input_scale``, so a channel's scale is kept large enough for it.
        input_scale: float, scalar.
        weight_scale: requested scales, float ``(out,)``; by default, each channel's largest weight
            becomes the highest level.

    Returns:
        ``codes`` int8 ``(out, in)``, whose columns 0 and 1, 2 and 3, ... add up to at most 128 in
        absolute value, and ``weight_scale`` float32 ``(out,)``, always positive.
    """
    scale = weight.float().abs().amax(dim=1) / LEVELS if weight_scale is None else weight_scale
    clipped, scale = clip_to_scale(weight.float(), scale, bias, input_scale)
    codes = (clipped / scale[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return codes, scale


def clip_to_scale(
    weight: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Clip weights ``(out, in)`` to the range of the requested scales ``(out,)``.

    For the arguments, see ``encode``.

    Returns:
        The clipped weights, and the requested scales, increased where two neighbouring codes would
        add up to more than 128 or the bias could not be stored. Both pass gradients to ``weight``
        and ``scale``.
    """
    largest = LEVELS * scale[:, None]
    clipped = torch.minimum(torch.maximum(weight, -largest), largest)
    pair_scale = torch.maximum(scale, paired_scale(clipped.detach()))
    return clipped, storable_scales(pair_scale, bias, input_scale)


def paired_scale(weight: Tensor) -> Tensor:
    """Return the smallest scales at which two neighbouring codes add up to at most 128.

    Rounding changes each code by at most 0.5 and the sum of two by at most 1. Therefore the sum of
    two neighbouring weights may be at most 127 times the scale. Weights of different sign need no
    larger scale than one of them alone, because their sum is smaller than the larger one.

    Args:
        weight: float, ``(out, in)``.

    Returns:
        float ``(out,)``.
    """
    padded = F.pad(weight, (0, weight.shape[1] % 2))  # to an even number of inputs
    return (padded[:, 0::2] + padded[:, 1::2]).abs().amax(dim=1) / LEVELS


def storable_scales(scale: Tensor, bias: Tensor | None, input_scale: Tensor) -> Tensor:
    """Increase the scales of output channels ``(out,)`` so that runtimes can store the bias.

    Runtimes store a bias as an int32 multiple of ``scale * input_scale`` and add the products of
    codes to it in int32. With the returned scales the multiple is at most 2^23. This leaves almost
    all of the int32 range to the products, and float32, which has 24 bits, represents the multiple
    exactly.
    """
    if bias is not None:
        scale = torch.maximum(scale, bias.float().abs() / (input_scale * 2**23))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # A dead channel's weights may be almost zero. The bias is divided by the product of both
    # scales, so this product must not underflow to zero.
    return scale.clamp(min=torch.finfo(torch.float32).tiny / min(float(input_scale), 1.0))


def clipped_scale(weight: Tensor) -> Tensor:
    """Return the scale of each output channel with the least squared error of its weights.

    A smaller scale has smaller rounding errors, but weights outside of its range are clipped.

    Args:
        weight: float, ``(out, in)``.

    Returns:
        float32 ``(out,)``: a channel's largest absolute weight divided by 127, times one of
        ``CLIP_RATIOS``.
    """
    unclipped = weight.float().abs().amax(dim=1) / LEVELS
    best, least = unclipped, torch.full_like(unclipped, torch.inf)
    for ratio in CLIP_RATIOS:
        codes, scale = encode(
            weight, bias=None, input_scale=torch.tensor(1.0), weight_scale=ratio * unclipped
        )
        error = (codes.float() * scale[:, None] - weight.float()).square().sum(dim=1)
        best = torch.where(error < least, ratio * unclipped, best)
        least = torch.minimum(error, least)
    return best


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Round inputs to integers in [-128, 127], as floats, like ONNX's QuantizeLinear."""
    return (x / scale).round().clamp(-128, 127)
