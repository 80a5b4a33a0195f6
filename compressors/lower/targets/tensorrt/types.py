"""Convert stored tensors of tables to the types and shapes that TensorRT accepts.

A DequantizeLinear accepts signed codes (int8, or two int4 per byte). One scale per row is a vector,
the scale of a whole table is a scalar. Levels are *symmetric* if they are symmetric around zero;
otherwise scales have offsets. Symmetric int8 codes are signed already.
"""

import numpy as np
import onnx_ir as ir
import torch

from compressors.core.modules.formats import PackedTable
from compressors.quantize.kernels.bitpacking import unpack
from compressors.quantize.tables.kmeans import KMeansFormat
from compressors.quantize.tables.product_codes import ProductCodesFormat
from compressors.quantize.tables.residual_codes import ResidualCodesFormat
from compressors.quantize.tables.scales import SharedScales


def convert_type(table: PackedTable, name: str, values: np.ndarray) -> ir.TensorProtocol | None:
    """Convert a stored tensor to TensorRT's type and shape; None if it needs no change.

    Args:
        table: the table to which the tensor belongs.
        name: the tensor's name in the table's format.
        values: the tensor as the module stores it.
    """
    storage_format = table.storage
    if isinstance(storage_format, KMeansFormat | ProductCodesFormat | ResidualCodesFormat):
        if name != "codes":
            return None
        return codes_tensor(values, storage_format.width(table.rows, table.dim, table.settings))
    if storage_format.name not in {"rowwise_int8", "rowwise_int4", "rowwise_int2", "float8_e4m3"}:
        return None
    sharing = SharedScales.from_settings(table.settings)
    if name == "scale":
        return _reshape_scale(storage_format.name, sharing, values)
    match storage_format.name, name:
        case "rowwise_int8", "codes":
            return None if sharing.symmetric else ir.Tensor((values ^ 128).view(np.int8))
        case "rowwise_int4", "codes":
            return codes_tensor(values, width=4)
        case "rowwise_int2", "codes":
            return codes_tensor(values, width=2)
        case "float8_e4m3", "codes":
            return ir.Tensor(values.view(ir.DataType.FLOAT8E4M3FN.numpy()))
    return None


def _reshape_scale(
    storage_format: str, sharing: SharedScales, values: np.ndarray
) -> ir.TensorProtocol | None:
    """Reshape the scale that a DequantizeLinear reads to a vector or scalar.

    Returns None for a scale that stays a matrix: one that a Gather reads, or that of blocks.
    """
    is_gathered = (
        sharing.rows_per_scale > 1 or not sharing.symmetric or storage_format == "rowwise_int2"
    )
    # A row of int4 codes is one block, whose scales are a matrix.
    has_blocks = storage_format == "rowwise_int4" and sharing.rows_per_scale == 1
    if is_gathered or has_blocks:
        return None
    return ir.Tensor(values.reshape((-1,) if sharing.rows_per_scale else ()))


def codes_tensor(values: np.ndarray, width: int) -> ir.TensorProtocol:
    """Convert packed unsigned codes to signed numbers: int8 (code - 128) or int4 (code - 8).

    An int4 has one code of 4 bits, or two codes of 2 bits whose positions are half a row apart.

    Args:
        values: uint8 ``(rows, bytes)`` with ``8 // width`` codes per byte: the code in group ``p``
            of the bits of byte ``b`` is code ``p * bytes + b`` of the row.
        width: bits of a code: 2, 4 or 8.
    """
    if width == 8:
        return ir.Tensor((values ^ 128).view(np.int8))
    unpacked = unpack(torch.from_numpy(values), values.shape[1] * 8 // width, width).numpy()
    if width == 2:
        half = unpacked.shape[1] // 2
        unpacked = unpacked[:, :half] | (unpacked[:, half:] << 2)
    signed = unpacked ^ 8  # in two's complement the sign is bit 3
    packed = signed[:, 0::2] | (signed[:, 1::2] << 4)
    return ir.PackedTensor(packed.reshape(-1), ir.DataType.INT4, shape=ir.Shape(unpacked.shape))
