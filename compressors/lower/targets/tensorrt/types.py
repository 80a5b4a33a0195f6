"""Stored tensors in the types and shapes that TensorRT's operators take.

A DequantizeLinear takes signed codes and int4 two to a byte; a scale a row as a vector, the table's
own as a scalar.
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
    """A stored tensor in the type and shape TensorRT's operators take; None if it has them.

    Args:
        table: whose it is.
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
    """The scale of a DequantizeLinear; one that is gathered by itself stays a matrix."""
    gathered = shared.rows_per_scale > 1 or not shared.symmetric or form == "rowwise_int2"
    block = form == "rowwise_int4" and shared.rows_per_scale == 1  # a block of a row: a matrix
    if gathered or block:
        return None
    return ir.Tensor(values.reshape((-1,) if shared.rows_per_scale else ()))


def codes_tensor(values: np.ndarray, width: int) -> ir.TensorProtocol:
    """Packed codes as signed numbers: int8, each 128 lower, or int4, each 8 lower.

    An int4 holds a code of 4 bits, or two of 2 bits, which lie half a row apart.

    Args:
        values: planar, uint8 ``(rows, bytes)``.
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
