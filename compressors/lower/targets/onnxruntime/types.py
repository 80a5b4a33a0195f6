"""Convert stored tensors of dense layers to the types and shapes that ONNX Runtime accepts.

MatMulNBits reads unsigned codes in blocks. 8-bit floats are bytes in a bundle and floats in a
graph. The bits of the codes do not change.
"""

import numpy as np
import onnx_ir as ir

from compressors.core.modules.formats import PackedLinear
from compressors.lower.float8_tensors import float8_codes
from compressors.quantize.dense.float8_dense import Float8DenseFormat
from compressors.quantize.dense.weight_only import LayoutSettings, WeightOnlyFormat, block_length


def convert_type(layer: PackedLinear, name: str, values: np.ndarray) -> ir.TensorProtocol | None:
    """Convert a stored tensor to ONNX Runtime's type and shape; None if it needs no change.

    Args:
        layer: the layer to which the tensor belongs.
        name: the tensor's name in the layer's format.
        values: the tensor as the module stores it.
    """
    storage = layer.storage
    if isinstance(storage, Float8DenseFormat):
        return float8_codes(name, values)
    if not isinstance(storage, WeightOnlyFormat) or name != "codes" or not stays_packed(layer):
        return None
    block = block_length(layer.in_features, LayoutSettings.from_settings(layer.settings).block)
    bytes_per_block = block * storage.bits // 8
    return ir.Tensor(values.reshape(len(values), -1, bytes_per_block))


def stays_packed(layer: PackedLinear) -> bool:
    """Return whether ONNX Runtime multiplies by a layer's codes as they are stored."""
    storage = layer.storage
    if not isinstance(storage, WeightOnlyFormat):
        return False
    return multiplies_codes(storage.bits, LayoutSettings.from_settings(layer.settings).activations)


def multiplies_codes(bits: int, activations: str) -> bool:
    """Return whether ONNX Runtime multiplies by codes of weight-only layers as they are stored.

    It does not for 8-bit codes and float inputs: for one row, that product is four to twelve times
    slower than a Gemm.

    Args:
        bits: bits of a code.
        activations: ``int8`` if the inputs are rounded to int8.
    """
    return bits == 4 or activations == "int8"
