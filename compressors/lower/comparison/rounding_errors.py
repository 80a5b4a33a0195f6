"""Measure how far rounding errors change the scores of a network.

A runtime rounds other intermediate values than torch, because it sums in another order. Most
networks keep such errors small. In a network with many int8 layers, however, an error can move a
value to the next int8 level, which moves values of the following layers to other levels. Two
correct programs can then differ in every score.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compressors.core.modules.formats import PackedLinear
from compressors.quantize.dense.weight_only import zero_code


@contextlib.contextmanager
def rounding_errors(network: nn.Module, size: float, seed: int) -> Iterator[None]:
    """Add a relative error with a random sign to the output of every module, while in the context.

    Only outputs that are one floating-point tensor get an error.

    Args:
        network: the network; its weights are not changed.
        size: the error relative to the absolute value of an output.
        seed: seed of the random signs.
    """
    generator = torch.Generator().manual_seed(seed)

    def add_errors(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        sign = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        magnitude = output.abs()
        if isinstance(module, PackedLinear) and module.settings.get("activations") == "int8":
            magnitude = magnitude + _offset_products(module, inputs[0])
        return output + size * sign.to(output.dtype) * magnitude

    with contextlib.ExitStack() as hooks:
        for module in network.modules():
            hooks.callback(module.register_forward_hook(add_errors).remove)
        yield


def _offset_products(layer: PackedLinear, x: Tensor) -> Tensor:
    """Return the size of the sums that cancel for unsigned weights and int8 inputs.

    The codes have an offset of half their range. ONNX Runtime sums the products of the inputs with
    that offset in float32 and subtracts the sum, even for weights of 0.
    """
    offset = zero_code(bits=8 if layer.storage.name == "weight_int8" else 4)
    scale = layer.get_buffer("scale").float().amax(dim=1)  # (out,)
    return x.abs().sum(dim=-1, keepdim=True) * offset * scale
