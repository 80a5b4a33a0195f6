"""Round the weights and inputs of a dense layer to the codes of ``static_int8``.

``static_int8.py`` says why neighbouring codes are limited. A *scale* is the distance of two levels;
a *code* is the int8 number of a level, for weights at most ``LEVELS`` (127) in absolute value.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.quantize.calibration.calibrators import LEVELS

SHARES = tuple(1 - index / 64 for index in range(33))
"""``clipped_scale`` compares ranges of these shares of a channel's largest weight: 1 to 0.5."""


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
    """Clip weights ``(out, in)`` to the range of the requested scales.

    For the arguments, see ``encode``.

    Returns:
        The clipped weights and the scales that can be stored. Both pass gradients to ``weight`` and
        ``scale``.
    """
    end = LEVELS * scale[:, None]
    clipped = torch.minimum(torch.maximum(weight, -end), end)
    pair_scale = torch.maximum(scale, paired_scale(clipped.detach()))
    return clipped, storable_scales(pair_scale, bias, input_scale)


def paired_scale(weight: Tensor) -> Tensor:
    """Return the smallest scales at which two neighbouring codes add up to at most 128.

    Rounding changes each code by at most a half, so the sum of two weights may be 127 times the
    scale. The sum of two weights of different sign is smaller than the larger of them, and so
    within the range.

    Args:
        weight: float, ``(out, in)``.

    Returns:
        float ``(out,)``.
    """
    padded = F.pad(weight, (0, weight.shape[1] % 2))  # to an even number of inputs
    return (padded[:, 0::2] + padded[:, 1::2]).abs().amax(dim=1) / LEVELS


def storable_scales(scale: Tensor, bias: Tensor | None, input_scale: Tensor) -> Tensor:
    """Increase the scales of output channels ``(out,)`` so that runtimes can store the bias.

    Runtimes store a bias as an int32 multiple of ``scale * input_scale``. With the returned scales
    the multiple is at most 2^23: the sum of products has range left, and float32 is exact.
    """
    if bias is not None:
        scale = torch.maximum(scale, bias.float().abs() / (input_scale * 2**23))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # A dead channel's weights may be almost zero. The bias is divided by the product of both
    # scales, so this product must not underflow to zero.
    return scale.clamp(min=torch.finfo(torch.float32).tiny / min(float(input_scale), 1.0))


def clipped_scale(weight: Tensor) -> Tensor:
    """Return the scale of each output channel with the least squared error of its weights.

    Args:
        weight: float, ``(out, in)``.

    Returns:
        float32 ``(out,)``: a channel's largest absolute weight divided by 127, or a share of that
        down to a half.
    """
    unclipped = weight.float().abs().amax(dim=1) / LEVELS
    best, least = unclipped, torch.full_like(unclipped, torch.inf)
    for share in SHARES:
        codes, scale = encode(
            weight, bias=None, input_scale=torch.tensor(1.0), weight_scale=share * unclipped
        )
        error = (codes.float() * scale[:, None] - weight.float()).square().sum(dim=1)
        best = torch.where(error < least, share * unclipped, best)
        least = torch.minimum(error, least)
    return best


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Round inputs to integers in [-128, 127], as floats, like ONNX's QuantizeLinear."""
    return (x / scale).round().clamp(-128, 127)
