"""A network of many layers in static int8, which is sensitive to rounding."""

import torch
from torch import Tensor, nn

from compressors.core.modules.formats import PackedLinear
from compressors.quantize.dense.int8_codes import encode
from compressors.quantize.dense.static_int8 import FORMAT

LEVELS = 127
"""Largest code of int8."""


class DeepInt8(nn.Module):
    """Layers in static int8, each followed by a tanh that keeps values within -1 and 1.

    Args:
        depth: number of layers.
        width: number of inputs and of outputs of each layer.
        wrong_scale: index of a layer whose input scale is 15 % too large; None for no such layer.
    """

    def __init__(self, depth: int, width: int, wrong_scale: int | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList()
        for index in range(depth):
            # A gain of 2 makes small differences grow from layer to layer.
            weight = 2 * torch.randn(width, width, generator=generator) / width**0.5
            bias, scale = torch.zeros(width), torch.tensor(1 / LEVELS)
            codes, weight_scale = encode(weight, bias, scale)
            stored = {"codes": codes, "weight_scale": weight_scale, "bias": bias}
            stored["input_scale"] = 1.15 * scale if index == wrong_scale else scale
            self.layers.append(PackedLinear(FORMAT, width, width, bias=True, stored=stored))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.sum(1)
