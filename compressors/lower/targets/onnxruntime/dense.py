"""Translate dense layers with weight-only or 8-bit float weights for ONNX Runtime.

A weight-only format stores a layer's weights as integer codes of 4 or 8 bits and scales. Where it
is fast, ONNX Runtime's MatMulNBits multiplies by the stored codes.
Other weights are converted to float32 once, when a session starts: by constant folding.
"""

from collections.abc import Callable
from typing import Any

import onnx
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset

from compressors.lower.custom_operators import OPS
from compressors.lower.graph_builders import FLOAT, flatten_to_matrix
from compressors.lower.targets.onnxruntime.types import multiplies_codes
from compressors.quantize.dense.weight_only import block_length, zero_code

FLOAT8 = int(onnx.TensorProto.FLOAT8E4M3FN)


def _matmul_n_bits() -> Op:
    """Declare ONNX Runtime's operator MatMulNBits, which the exporter does not know."""
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    return Op(
        Opset("com.microsoft", 1),
        "MatMulNBits",
        schema(
            "MatMulNBits",
            "com.microsoft",
            1,
            inputs=[
                schema.FormalParameter("A", "T"),
                schema.FormalParameter("B", "B"),
                schema.FormalParameter("scales", "T"),
                schema.FormalParameter("zero_points", "B", param_option=optional),
                schema.FormalParameter("g_idx", "G", param_option=optional),
                schema.FormalParameter("bias", "T", param_option=optional),
            ],
            outputs=[schema.FormalParameter("Y", "T")],
            type_constraints=[
                ("T", ["tensor(float)"], ""),
                ("B", ["tensor(uint8)"], ""),
                ("G", ["tensor(int32)"], ""),
            ],
            attributes=[
                schema.Attribute(name, schema.AttrType.INT)
                for name in ("K", "N", "bits", "block_size", "accuracy_level")
            ],
        ),
    )


matmul_n_bits = _matmul_n_bits()


def weight_only_linear(
    x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int, activations: str
) -> Any:
    """Build a MatMulNBits on the stored codes, or a Gemm whose weights are converted once.

    MatMulNBits has two accuracy levels here: 1 for float inputs, 4 for inputs rounded to int8. With
    8-bit codes and one row, level 1 is four to twelve times slower than a Gemm
    (``benchmarks/weight_only.py``), so in that case the weights are converted to float32 when the
    session starts.

    Args:
        x: float32 ``(*, inputs)``.
        codes: uint8 codes of the weights, packed by row.
        scale: scale of each row, or of each block of a row.
        bias: float32 ``(outputs,)`` or None.
        bits: bits of a code, 4 or 8.
        block: number of weights that share a scale; 0 for one scale per row.
        activations: ``int8`` if inputs are rounded to int8.

    Returns:
        Float32 ``(*, outputs)``.
    """
    outputs, inputs = int(codes.shape[0]), int(x.shape[-1])
    if not multiplies_codes(bits, activations):
        return _build_widened_linear(x, codes, scale, bias, bits, block)
    block_size = block_length(inputs, block)
    scales = op.Cast(scale, to=FLOAT)
    if not block:  # one scale per row, repeated for each block
        scales = op.Expand(scales, op.Constant(value_ints=[outputs, -(-inputs // block_size)]))
    level = 4 if activations == "int8" else 1
    return matmul_n_bits(  # without zero_points and g_idx
        x, codes, scales, None, None, bias, K=inputs, N=outputs, bits=bits, block_size=block_size,
        accuracy_level=level,
    )  # fmt: skip


def _build_widened_linear(x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int) -> Any:
    """Build a Gemm whose weights are computed from codes once, when the session starts."""
    outputs, inputs = int(codes.shape[0]), int(x.shape[-1])
    flat, restore = flatten_to_matrix(x, inputs, outputs)
    weight = op.Sub(op.Cast(codes, to=FLOAT), op.Constant(value_float=float(zero_code(bits))))
    if block:
        weight = op.Reshape(weight, op.Constant(value_ints=[outputs, -1, block]))
    scales = op.Cast(scale, to=FLOAT)
    weight = op.Mul(weight, op.Unsqueeze(scales, op.Constant(value_ints=[2])) if block else scales)
    if block:
        weight = op.Reshape(weight, op.Constant(value_ints=[outputs, -1]))
    weight = op.Slice(weight, [0], [inputs], [1])
    return restore(op.Gemm(flat, weight, bias, transB=1))


def float8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Build an 8-bit float Gemm in float32: inputs are rounded, weights are converted once."""
    flat, restore = flatten_to_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    rounded = op.Cast(op.Cast(op.Div(flat, input_scale), to=FLOAT8, saturate=1), to=FLOAT)
    if len(weight_scale.shape):
        weight_scale = op.Unsqueeze(weight_scale, op.Constant(value_ints=[1]))
    weight = op.Mul(op.Cast(codes, to=FLOAT), weight_scale)
    return restore(op.Gemm(op.Mul(rounded, input_scale), weight, bias, transB=1))


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the function that builds the subgraph of each custom op."""
    return {
        OPS.weight_only_linear.default: weight_only_linear,
        OPS.float8_linear.default: float8_linear,
    }
