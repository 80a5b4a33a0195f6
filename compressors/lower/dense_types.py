"""Stored tensors of dense layers in the types and shapes that a target's operators take.

ONNX Runtime's MatMulNBits reads unsigned codes by blocks, TensorRT's DequantizeLinear signed ones.
The bits are the same: no weight is packed anew. 8-bit floats are bytes in a bundle, floats here.
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
    """A stored tensor as a target's operators take it; None if it is so already.

    Args:
        layer: whose it is.
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
    if name == "scale" and not block:  # one a channel: a vector
        return ir.Tensor(values.reshape(-1))
    if name != "codes":
        return None
    kept = values[:, : signed_length(layer.in_features, block, form.bits) * form.bits // 8]
    if form.bits == 8:
        return ir.Tensor((kept ^ 128).view(np.int8))
    signed = np.ascontiguousarray(kept ^ 0x88)  # in two's complement the sign is bit 3
    shape = ir.Shape((len(kept), 2 * kept.shape[1]))
    return ir.PackedTensor(signed.reshape(-1), ir.DataType.INT4, shape=shape)


def signed_length(inputs: int, block: int, bits: int) -> int:
    """How many codes a row has for TensorRT: whole blocks, or without blocks whole bytes."""
    whole = block or 8 // bits
    return -(-inputs // whole) * whole


def stays_packed(layer: PackedLinear) -> bool:
    """Whether ONNX Runtime multiplies by a layer's codes as they are stored.

    Not 8 bits on float inputs: for one row its product of those is four to twelve times slower
    than a Gemm.
    """
    form = layer.storage
    if not isinstance(form, WeightOnlyFormat):
        return False
    return multiplies_codes(form.bits, Reading.of(layer.settings).activations)


def multiplies_codes(bits: int, activations: str) -> bool:
    """The same, of an op's arguments."""
    return bits == 4 or activations == "int8"
