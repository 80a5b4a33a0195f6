"""Rounding errors of a target's arithmetic: perturb a network in torch by errors of their size."""

from typing import Any

import torch
from torch import Tensor, nn

from compressors.core.modules.formats import PackedLinear
from compressors.core.units import private_copy
from compressors.quantize.dense.weight_only import zero_code
from tests.random_networks.inputs import Rows

ROUNDING_ERRORS = {"float32": 2.0**-21, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Relative error of a layer's output by the precision of the target's arithmetic."""
FLOAT16_MAX = 65504.0
IN_FLOAT16 = ("weight_int8", "weight_int4", "float16")
"""Formats of layers that TensorRT multiplies in float16."""


def add_rounding_errors(module: nn.Module, size: float, seed: int) -> nn.Module:
    """Return a copy of a module that perturbs every layer's output by a relative error."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(layer: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        sign = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
        magnitude = output.abs()
        if isinstance(layer, PackedLinear) and layer.settings.get("activations") == "int8":
            magnitude = magnitude + _offset_products(layer, inputs[0])
        return output + size * sign.to(output.dtype) * magnitude

    copied = private_copy(module).eval()
    for layer in copied.modules():
        layer.register_forward_hook(perturb)
    return copied


def _offset_products(layer: PackedLinear, x: Tensor) -> Tensor:
    """Return the size of the sums that cancel for unsigned weights and int8 inputs.

    The codes have an offset of half their range. ONNX Runtime sums the products of the inputs with
    that offset in float32 and subtracts the sum, even for weights of 0.
    """
    offset = zero_code(8 if layer.storage.name == "weight_int8" else 4)
    scale = layer.get_buffer("scale").float().amax(dim=1)  # (out,)
    return x.abs().sum(dim=-1, keepdim=True) * offset * scale


def is_beyond_float16(module: nn.Module, rows: Rows) -> bool:
    """Return whether values of a layer that TensorRT runs in float16 are beyond its range."""
    beyond: list[bool] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        beyond.append(max(float(inputs[0].abs().max()), float(output.abs().max())) > FLOAT16_MAX)

    copied = private_copy(module).eval()
    for layer in copied.modules():
        if isinstance(layer, PackedLinear) and layer.storage.name in IN_FLOAT16:
            layer.register_forward_hook(record)
    with torch.no_grad():
        copied(**rows)
    return any(beyond)
