"""Translate int8, float16 and bfloat16 dense layers for ONNX Runtime; list all translations.

``tables.py`` translates tables; ``dense.py`` translates weight-only and 8-bit float layers.

An int8 dense layer needs explicit zero points on weight and bias, and no Relu directly after the
Gemm; otherwise ONNX Runtime silently computes it in float (``benchmarks/qdq_forms.py``).
"""

from collections.abc import Callable
from typing import Any

import onnx
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset

from compressors.lower.custom_operators import OPS
from compressors.lower.graph_builders import FLOAT, INT32, constant, flatten_to_matrix
from compressors.lower.targets.onnxruntime import dense as onnxruntime_dense
from compressors.lower.targets.onnxruntime import tables as onnxruntime_tables


def _matmul_integer_to_float() -> Op:
    """Declare ONNX Runtime's operator MatMulIntegerToFloat, which the exporter does not know."""
    parameter = onnx.defs.OpSchema.FormalParameter
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return Op(
        Opset("com.microsoft", 1),
        "MatMulIntegerToFloat",
        onnx.defs.OpSchema(
            "MatMulIntegerToFloat",
            "com.microsoft",
            1,
            inputs=[
                parameter("A", "T1"),
                parameter("B", "T2"),
                parameter("a_scale", "T3"),
                parameter("b_scale", "T3"),
                parameter("a_zero_point", "T1", param_option=optional),
                parameter("b_zero_point", "T2", param_option=optional),
                parameter("bias", "T3", param_option=optional),
            ],
            outputs=[parameter("Y", "T3")],
            type_constraints=[
                ("T1", ["tensor(uint8)"], ""),
                ("T2", ["tensor(int8)"], ""),
                ("T3", ["tensor(float)"], ""),
            ],
        ),
    )


matmul_integer_to_float = _matmul_integer_to_float()


def static_int8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Build a Gemm between QuantizeLinear and DequantizeLinear, which ONNX Runtime fuses to QGemm.

    For inputs of dynamic length, such as tokens, it is a MatMulIntegerToFloat, which accepts inputs
    with more than two dimensions: a Gemm would need two Reshapes with computed shapes. The other
    layers keep the Gemm, whose output ONNX Runtime can fuse with the quantization of the next
    input.

    Inputs are uint8 with zero point 128, which gives the same levels as int8 with zero point 0.
    ONNX Runtime prepacks weights only for unsigned inputs, and does not convert inputs to unsigned
    if two layers read the same input.
    """
    if any(not isinstance(size, int) for size in list(x.shape)[1:-1]):
        return _build_int8_matmul(x, codes, weight_scale, input_scale, bias)
    flat, restore = flatten_to_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    rounded = op.QuantizeLinear(flat, input_scale, constant(onnx.TensorProto.UINT8, 128))
    return restore(_build_int8_gemm(rounded, codes, weight_scale, input_scale, bias))


def int8_codes_linear(x: Any, codes: Any, weight_scale: Any, bias: Any) -> Any:
    """Build the Gemm of ``static_int8_linear`` with inputs that are codes already."""
    flat, restore = flatten_to_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    one = op.Constant(value_float=1.0)
    return restore(_build_int8_gemm(flat, codes, weight_scale, one, bias))


def _build_int8_gemm(
    rounded: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any
) -> Any:
    """Build an int8 Gemm of inputs ``(rows, inputs)``, uint8 with zero point 128."""
    channels = int(codes.shape[0])
    inputs = op.DequantizeLinear(rounded, input_scale, constant(onnx.TensorProto.UINT8, 128))
    weight_zero = constant(onnx.TensorProto.INT8, [0] * channels)
    weight = op.DequantizeLinear(codes, weight_scale, weight_zero, axis=0)
    bias_scale = op.Mul(weight_scale, input_scale)
    bias_codes = op.Cast(op.Round(op.Div(bias, bias_scale)), to=INT32)
    bias_zero = constant(INT32, [0] * channels)
    rounded_bias = op.DequantizeLinear(bias_codes, bias_scale, bias_zero, axis=0)
    return op.Gemm(inputs, weight, rounded_bias, transB=1)


def table_codes(codes: Any, ids: Any) -> Any:
    """Build the lookup of a table's codes."""
    return op.Gather(codes, ids, axis=0)


def dequantize_codes(codes: Any, scale: Any) -> Any:
    """Build the conversion of codes to float32; with several scales, they are of the lookups.

    The scale is multiplied afterwards. If a MatMul read two DequantizeLinears, ONNX Runtime would
    fuse them to a MatMulIntegerToFloat, which fails for a batch of matrices.
    """
    zero = constant(onnx.TensorProto.UINT8, 128)
    levels = op.DequantizeLinear(codes, op.Constant(value_float=1.0), zero)
    if len(scale.shape):
        scale = op.Unsqueeze(scale, op.Constant(value_ints=[1]))  # (lookups, 1)
    return op.Mul(levels, scale)


def input_codes(x: Any, scale: Any) -> Any:
    """Build the rounding of inputs to codes, with one scale or one for each element of a row."""
    zero = constant(onnx.TensorProto.UINT8, 128)
    if not len(scale.shape):
        return op.QuantizeLinear(x, scale, zero)
    if len(scale.shape) == 1 and len(x.shape) == 2:
        zeros = constant(onnx.TensorProto.UINT8, [128] * int(scale.shape[0]))
        return op.QuantizeLinear(x, scale, zeros, axis=1)
    return op.QuantizeLinear(op.Div(x, scale), op.Constant(value_float=1.0), zero)


def _build_int8_matmul(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """Build an int8 Gemm of inputs ``(*, inputs)``; ``static_int8_linear`` explains the form."""
    input_zero = constant(onnx.TensorProto.UINT8, 128)
    rounded = op.QuantizeLinear(x, input_scale, input_zero)
    # ONNX Runtime transposes the codes once, at session start.
    transposed = op.Transpose(codes, perm=[1, 0])
    bias_scale = op.Mul(weight_scale, input_scale)
    rounded_bias = op.Mul(op.Round(op.Div(bias, bias_scale)), bias_scale)
    return matmul_integer_to_float(  # None: the weights have zero point 0
        rounded, transposed, input_scale, weight_scale, input_zero, None, rounded_bias
    )


def short_float_linear(x: Any, weight: Any, bias: Any) -> Any:
    """Build a float32 Gemm; weights are converted once, at session start.

    ONNX Runtime has no float16 or bfloat16 Gemm on CPUs.
    """
    flat, restore = flatten_to_matrix(x, int(weight.shape[1]), int(weight.shape[0]))
    return restore(op.Gemm(flat, op.Cast(weight, to=FLOAT), op.Cast(bias, to=FLOAT), transB=1))


def join_ids(ids: Any) -> Any:
    """Build ids ``(rows, inputs)`` with Concat and Transpose, without an Unsqueeze per input."""
    rows = op.Reshape(op.Concat(*ids, axis=0), op.Constant(value_ints=[len(ids), -1]))
    return op.Transpose(rows, perm=[1, 0])


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the function that builds the subgraph of each custom op."""
    return {
        **onnxruntime_tables.translations(),
        **onnxruntime_dense.translations(),
        OPS.static_int8_linear.default: static_int8_linear,
        OPS.float16_linear.default: short_float_linear,
        OPS.bfloat16_linear.default: short_float_linear,
        OPS.join_ids.default: join_ids,
        OPS.table_codes.default: table_codes,
        OPS.dequantize_codes.default: dequantize_codes,
        OPS.input_codes.default: input_codes,
        OPS.int8_codes_linear.default: int8_codes_linear,
    }
