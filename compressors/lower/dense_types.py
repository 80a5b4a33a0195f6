"""Stored tensors of dense layers in the types and shapes that a target's operators take.

ONNX Runtime's MatMulNBits reads unsigned codes in blocks, TensorRT's DequantizeLinear signed codes.
Weights are not packed again: only the type, the shape and the sign bit change. 8-bit floats are
stored as bytes in a bundle and as floats in a graph.
"""

import numpy as np
import onnx_ir as ir

from compressors.contracts import TargetKind
from compressors.core.modules.formats import PackedLinear
from compressors.quantize.dense.float8_dense import Float8DenseFormat
from compressors.quantize.dense.weight_only import Reading, WeightOnlyFormat, together


def retyped(
    layer: PackedLinear, name: str, values: np.ndarray, target: TargetKind
) -> ir.TensorProtocol | None:
    """Convert a stored tensor to the type and shape of a target; None if it needs no change.

    Args:
        layer: to which it belongs.
        name: its name in the layer's format.
        values: as the module stores it.
        target: the serving target.
    """
    form = layer.storage
    if isinstance(form, Float8DenseFormat):
        floats = ir.DataType.FLOAT8E4M3FN.numpy()
        return ir.Tensor(values.view(floats)) if name == "codes" else None
    if not isinstance(form, WeightOnlyFormat):
        return None
    block = Reading.of(layer.settings).block
    if target == "onnxruntime":
        if name != "codes" or not stays_packed(layer):
            return None
        width = together(layer.in_features, block) * form.bits // 8
        return ir.Tensor(values.reshape(len(values), -1, width))
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
    """Number of codes per row for TensorRT: rounded up to whole blocks, or else whole bytes."""
    whole = block or 8 // bits
    return -(-inputs // whole) * whole


def stays_packed(layer: PackedLinear) -> bool:
    """Whether ONNX Runtime multiplies by a layer's codes as they are stored.

    It does not for 8-bit codes and float inputs: for one row, that product is four to twelve times
    slower than a Gemm.
    """
    form = layer.storage
    if not isinstance(form, WeightOnlyFormat):
        return False
    return multiplies_codes(form.bits, Reading.of(layer.settings).activations)


def multiplies_codes(bits: int, activations: str) -> bool:
    """As ``stays_packed``, from an op's arguments."""
    return bits == 4 or activations == "int8"
