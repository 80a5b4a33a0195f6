"""Rewrite rules that do not change what a graph computes.

``RULES`` contains onnxscript's default rules with two changes:

* onnxscript's no-op rules compare constants with a tolerance (absolute 1e-8, relative 1e-5), so
  they remove ``+ 1e-9`` and ``* 1.000009``. A masked mean ``sum / (count + 1e-12)`` of an empty
  list then divides 0 by 0. The no-op rules of this file compare exactly: they remove only ``+ 0``,
  ``- 0``, ``* 1`` and ``/ 1``.
* Two rules that merge consecutive Clips are omitted, because they are wrong for bounds that do not
  overlap: ``clamp(0, 1).clamp(2, 3)`` is 2, but one Clip from 2 to 1 gives 1.

onnxscript also compares with a tolerance in rules that recpress does not run (HardSwish, RMS norm,
attention scales). Constant folding and the passes that merge equal initializers and equal
subexpressions compare exactly.
"""

from typing import Any

from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules import common as rules


def _match_scalar(value: int) -> pattern.Constant:
    """Build a pattern that matches a scalar constant of exactly this value."""
    return pattern.Constant(value, rel_tol=0.0, abs_tol=0.0)


def _match_plus_0(_op: Any, x: Any) -> Any:
    return x + _match_scalar(0)


def _match_minus_0(_op: Any, x: Any) -> Any:
    return x - _match_scalar(0)


def _match_times_1(_op: Any, x: Any) -> Any:
    return x * _match_scalar(1)


def _match_over_1(_op: Any, x: Any) -> Any:
    return x / _match_scalar(1)


def _identity(op: Any, x: Any, **_: Any) -> Any:
    return op.Identity(x)


EXACT_NO_OPS = (
    *pattern.RewriteRule(_match_plus_0, _identity, name="ExactPlus0").commute(),
    pattern.RewriteRule(_match_minus_0, _identity, name="ExactMinus0"),
    *pattern.RewriteRule(_match_times_1, _identity, name="ExactTimes1").commute(),
    pattern.RewriteRule(_match_over_1, _identity, name="ExactOver1"),
)
RULES = (
    *EXACT_NO_OPS,
    rules.dropout_inference_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_clip_relu_rule,
    rules.successive_relu_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.slice_split_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.normalize_pad_format_conv_integer_rule,
    rules.fuse_pad_into_conv_rule,
    rules.fuse_pad_into_conv_integer_rule,
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_conv_transpose_rule,
    rules.remove_optional_bias_from_qlinear_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)
"""onnxscript's default rules in their order, with the changes in the module docstring."""
