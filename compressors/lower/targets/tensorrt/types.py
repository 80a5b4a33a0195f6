"""Stored tensors in the types and shapes that TensorRT's operators take.

A DequantizeLinear accepts signed codes, with two int4 codes per byte; scales per row are a vector,
the scale of a whole table is a scalar.
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


def retyped(table: PackedTable, name: str, values: np.ndarray) -> ir.TensorProtocol | None:
    """Convert a stored tensor to TensorRT's type and shape; None if it needs no change.

    Args:
        table: to which it belongs.
        name: its name in the table's format.
        values: as the module stores it.
    """
    form = table.storage
    if isinstance(form, KMeansFormat | ProductCodesFormat | ResidualCodesFormat):
        if name != "codes":
            return None
        return codes_tensor(values, form.width(table.rows, table.dim, table.settings))
    if form.name not in {"rowwise_int8", "rowwise_int4", "rowwise_int2", "float8_e4m3"}:
        return None
    shared = SharedScales.of(table.settings)
    if name == "scale":
        return _scale(form.name, shared, values)
    match form.name, name:
        case "rowwise_int8", "codes":
            return None if shared.symmetric else ir.Tensor((values ^ 128).view(np.int8))
        case "rowwise_int4", "codes":
            return codes_tensor(values, 4)
        case "rowwise_int2", "codes":
            return codes_tensor(values, 2)
        case "float8_e4m3", "codes":
            return ir.Tensor(values.view(ir.DataType.FLOAT8E4M3FN.numpy()))
    return None


def _scale(form: str, shared: SharedScales, values: np.ndarray) -> ir.TensorProtocol | None:
    """Reshape the scale of a DequantizeLinear; None for a scale that stays a matrix."""
    gathered = shared.rows_per_scale > 1 or not shared.symmetric or form == "rowwise_int2"
    block = form == "rowwise_int4" and shared.rows_per_scale == 1  # one block per row: a matrix
    if gathered or block:
        return None
    return ir.Tensor(values.reshape((-1,) if shared.rows_per_scale else ()))


def codes_tensor(values: np.ndarray, width: int) -> ir.TensorProtocol:
    """Convert packed codes to signed numbers: int8, each 128 lower, or int4, each 8 lower.

    An int4 holds a code of 4 bits, or two codes of 2 bits that are half a row apart.

    Args:
        values: codes packed in planes, uint8 ``(rows, bytes)``.
        width: bits of a code.
    """
    if width == 8:
        return ir.Tensor((values ^ 128).view(np.int8))
    each = unpack(torch.from_numpy(values), values.shape[1] * 8 // width, width).numpy()
    if width == 2:
        half = each.shape[1] // 2
        each = each[:, :half] | (each[:, half:] << 2)
    signed = each ^ 8  # in two's complement the sign is bit 3
    packed = signed[:, 0::2] | (signed[:, 1::2] << 4)
    return ir.PackedTensor(packed.reshape(-1), ir.DataType.INT4, shape=ir.Shape(each.shape))
