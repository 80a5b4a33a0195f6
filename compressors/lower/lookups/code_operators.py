"""Custom ops that pass int8 codes of tables to int8 layers without converting them to floats.

Only lowered graphs contain them. Codes are uint8: an int8 code plus 128, because ONNX Runtime
multiplies unsigned inputs. A table has one scale for all rows.
"""

import torch
from torch import Tensor

from compressors.quantize.dense.int8_codes import quantize

ZERO = 128
"""The uint8 code of zero."""


@torch.library.custom_op("recpress::table_codes", mutates_args=())
def table_codes(codes: Tensor, ids: Tensor) -> Tensor:
    """Look up the codes of rows: uint8 ``(*ids, dim)`` from uint8 ``(rows, dim)``."""
    return codes[ids]


@table_codes.register_fake
def _(codes: Tensor, ids: Tensor) -> Tensor:
    return codes.new_empty((*ids.shape, codes.shape[1]))


@torch.library.custom_op("recpress::dequantize_codes", mutates_args=())
def dequantize_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """Convert codes to float32.

    Args:
        codes: uint8 ``(*,)``, or ``(rows, lookups, dim)`` if there are several scales.
        scale: float32, a scalar or ``(lookups,)``.
    """
    return (codes.float() - ZERO) * (scale.unsqueeze(1) if scale.ndim else scale)


@dequantize_codes.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


@torch.library.custom_op("recpress::input_codes", mutates_args=())
def input_codes(x: Tensor, scale: Tensor) -> Tensor:
    """Round inputs of an int8 layer to codes.

    Args:
        x: float32 ``(rows, *row)``.
        scale: float32, a scalar or ``(*row,)``.

    Returns:
        Uint8 of the shape of ``x``.
    """
    return (quantize(x, scale) + ZERO).to(torch.uint8)


@input_codes.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


@torch.library.custom_op("recpress::int8_codes_linear", mutates_args=())
def int8_codes_linear(x: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    """Compute an int8 Gemm of codes, as ``static_int8_linear`` does of floats.

    ``x`` uint8 ``(*, in)``; the other arguments are those of ``static_int8_linear``, whose
    ``input_scale`` is 1. Returns float32 ``(*, out)``.
    """
    levels = x.float() - ZERO
    result: Tensor = torch.ops.recpress.static_int8_linear(
        levels, codes, weight_scale, levels.new_ones(()), bias
    )
    return result


@int8_codes_linear.register_fake
def _(x: Tensor, codes: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=torch.float32)
