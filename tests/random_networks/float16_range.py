"""Find values beyond the range of float16 at layers that TensorRT multiplies in float16."""

import torch
from torch import Tensor, nn

from compressors.core.modules.formats import PackedLinear
from compressors.core.units import private_copy
from tests.random_networks.inputs import Rows

FLOAT16_MAX = 65504.0
IN_FLOAT16 = ("weight_int8", "weight_int4", "float16")
"""Formats of layers that TensorRT multiplies in float16."""


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
