"""Convert stored tensors of dense layers to the types and shapes that TensorRT accepts.

Codes are unsigned in a bundle, and TensorRT's DequantizeLinear reads signed ones. Inverting the
highest bit of a code subtracts half of its range. 8-bit floats are bytes in a bundle and floats in
a graph.
"""

import numpy as np
import onnx_ir as ir

from compressors.core.modules.formats import PackedLinear
from compressors.lower.float8_tensors import float8_codes
from compressors.quantize.dense.float8_dense import Float8DenseFormat
from compressors.quantize.dense.weight_only import LayoutSettings, WeightOnlyFormat


def convert_type(layer: PackedLinear, name: str, values: np.ndarray) -> ir.TensorProtocol | None:
    """Convert a stored tensor to TensorRT's type and shape; None if it needs no change.

    Args:
        layer: the layer to which the tensor belongs.
        name: the tensor's name in the layer's format.
        values: the tensor as the module stores it.
    """
    form = layer.storage
    if isinstance(form, Float8DenseFormat):
        return float8_codes(name, values)
    if not isinstance(form, WeightOnlyFormat):
        return None
    block = LayoutSettings.from_settings(layer.settings).block
    if name == "scale" and not block:  # one per channel: a vector
        return ir.Tensor(values.reshape(-1))
    if name != "codes":
        return None
    codes = values[:, : signed_length(layer.in_features, block, form.bits) * form.bits // 8]
    if form.bits == 8:
        return ir.Tensor((codes ^ 128).view(np.int8))
    signed = np.ascontiguousarray(codes ^ 0x88)  # inverts the highest bit of both codes of a byte
    shape = ir.Shape((len(codes), 2 * codes.shape[1]))
    return ir.PackedTensor(signed.reshape(-1), ir.DataType.INT4, shape=shape)


def signed_length(inputs: int, block: int, bits: int) -> int:
    """Return the number of codes per row: ``inputs``, rounded up to whole blocks or whole bytes.

    ``block`` is 0 if a row has one scale; then whole bytes of codes with ``bits`` bits are counted.
    """
    multiple = block or 8 // bits
    return -(-inputs // multiple) * multiple
