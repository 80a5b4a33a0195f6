"""Stored tensors of dense layers in the types and shapes that TensorRT's operators take.

A DequantizeLinear reads signed codes. Weights are not packed again: only the type, the shape and
the sign bit change. 8-bit floats are stored as bytes in a bundle and as floats in a graph.
"""

import numpy as np
import onnx_ir as ir

from compressors.core.modules.formats import PackedLinear
from compressors.lower.float8_tensors import float8_codes
from compressors.quantize.dense.float8_dense import Float8DenseFormat
from compressors.quantize.dense.weight_only import Reading, WeightOnlyFormat


def retyped(layer: PackedLinear, name: str, values: np.ndarray) -> ir.TensorProtocol | None:
    """Convert a stored tensor to TensorRT's type and shape; None if it needs no change.

    Args:
        layer: to which it belongs.
        name: its name in the layer's format.
        values: as the module stores it.
    """
    form = layer.storage
    if isinstance(form, Float8DenseFormat):
        return float8_codes(name, values)
    if not isinstance(form, WeightOnlyFormat):
        return None
    block = Reading.of(layer.settings).block
    if name == "scale" and not block:  # one per channel: a vector
        return ir.Tensor(values.reshape(-1))
    if name != "codes":
        return None
    codes = values[:, : signed_length(layer.in_features, block, form.bits) * form.bits // 8]
    if form.bits == 8:
        return ir.Tensor((codes ^ 128).view(np.int8))
    signed = np.ascontiguousarray(codes ^ 0x88)  # in two's complement the sign is bit 3
    shape = ir.Shape((len(codes), 2 * codes.shape[1]))
    return ir.PackedTensor(signed.reshape(-1), ir.DataType.INT4, shape=shape)


def signed_length(inputs: int, block: int, bits: int) -> int:
    """Number of codes per row: rounded up to whole blocks, or else whole bytes."""
    whole = block or 8 // bits
    return -(-inputs // whole) * whole
