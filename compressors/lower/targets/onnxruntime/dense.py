"""Translations of dense layers with codes of few bits for ONNX Runtime.

Weight-only formats are multiplied as they are stored by ONNX Runtime's MatMulNBits, where that is
fast. Other weights, for which a CPU has no product, are widened to float32 once, when a session
starts.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op
from onnxscript.values import Op, Opset

from compressors.lower.graph_builders import FLOAT, as_matrix
from compressors.lower.targets.onnxruntime.types import multiplies_codes
from compressors.quantize.dense.weight_only import together, zero_code

FLOAT8 = int(onnx.TensorProto.FLOAT8E4M3FN)


def _matmul_n_bits() -> Op:
    """Schema of ONNX Runtime's MatMulNBits, a product with packed codes that the exporter lacks."""
    define = onnx.defs.OpSchema
    optional = define.FormalParameterOption.Optional
    return Op(
        Opset("com.microsoft", 1),
        "MatMulNBits",
        define(
            "MatMulNBits",
            "com.microsoft",
            1,
            inputs=[
                define.FormalParameter("A", "T"),
                define.FormalParameter("B", "B"),
                define.FormalParameter("scales", "T"),
                define.FormalParameter("zero_points", "B", param_option=optional),
                define.FormalParameter("g_idx", "G", param_option=optional),
                define.FormalParameter("bias", "T", param_option=optional),
            ],
            outputs=[define.FormalParameter("Y", "T")],
            type_constraints=[
                ("T", ["tensor(float)"], ""),
                ("B", ["tensor(uint8)"], ""),
                ("G", ["tensor(int32)"], ""),
            ],
            attributes=[
                define.Attribute(name, define.AttrType.INT)
                for name in ("K", "N", "bits", "block_size", "accuracy_level")
            ],
        ),
    )


matmul_n_bits = _matmul_n_bits()


def weight_only_linear(
    x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int, activations: str
) -> Any:
    """MatMulNBits on the stored codes, or a Gemm whose weights are widened once.

    Accuracy level 1 computes on float inputs, 4 on inputs rounded to int8. With 8 bits level 1 is
    four to twelve times slower than a Gemm for one row (``benchmarks/weight_only.py``), so there
    the weights are widened when the session starts.
    """
    outputs, inputs = int(codes.shape[0]), int(x.shape[-1])
    if not multiplies_codes(bits, activations):
        return _widened_linear(x, codes, scale, bias, bits, block)
    size = together(inputs, block)
    each = op.Cast(scale, to=FLOAT)
    if not block:  # one scale per row: all of its blocks use it
        each = op.Expand(each, op.Constant(value_ints=[outputs, -(-inputs // size)]))
    level = 4 if activations == "int8" else 1
    return matmul_n_bits(
        x, codes, each, None, None, bias, K=inputs, N=outputs, bits=bits, block_size=size,
        accuracy_level=level,
    )  # fmt: skip


def _widened_linear(x: Any, codes: Any, scale: Any, bias: Any, bits: int, block: int) -> Any:
    """A Gemm whose weights are computed from codes once, when the session starts."""
    outputs, inputs = int(codes.shape[0]), int(x.shape[-1])
    flat, restore = as_matrix(x, inputs, outputs)
    weight = op.Sub(op.Cast(codes, to=FLOAT), op.Constant(value_float=float(zero_code(bits))))
    if block:
        weight = op.Reshape(weight, op.Constant(value_ints=[outputs, -1, block]))
    each = op.Cast(scale, to=FLOAT)
    weight = op.Mul(weight, op.Unsqueeze(each, op.Constant(value_ints=[2])) if block else each)
    if block:
        weight = op.Reshape(weight, op.Constant(value_ints=[outputs, -1]))
    weight = op.Slice(weight, [0], [inputs], [1])
    return restore(op.Gemm(flat, weight, bias, transB=1))


def float8_linear(x: Any, codes: Any, weight_scale: Any, input_scale: Any, bias: Any) -> Any:
    """An 8-bit float Gemm computed in float32: inputs are rounded, weights widened once."""
    flat, restore = as_matrix(x, int(codes.shape[1]), int(codes.shape[0]))
    near = op.Cast(op.Cast(op.Div(flat, input_scale), to=FLOAT8, saturate=1), to=FLOAT)
    if len(weight_scale.shape):
        weight_scale = op.Unsqueeze(weight_scale, op.Constant(value_ints=[1]))
    weight = op.Mul(op.Cast(codes, to=FLOAT), weight_scale)
    return restore(op.Gemm(op.Mul(near, input_scale), weight, bias, transB=1))


def translations() -> dict[Any, Callable[..., Any]]:
    """Custom op -> the function that builds its subgraph."""
    ops = torch.ops.recpress
    return {
        ops.weight_only_linear.default: weight_only_linear,
        ops.float8_linear.default: float8_linear,
    }
