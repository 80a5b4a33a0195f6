"""Faults in lowered graphs, graph passes, parity and the audit.

Each ``Fault`` replaces ``old`` by ``new`` in one file; at least one of its ``tests`` must then fail.
Parity is the comparison of a graph with the torch module; the audit reads the graph that the
runtime optimized. In a sensitive network, rounding alone changes scores by more than the limits of
parity.
"""

from tests.seeded_faults.fault import Fault

CONSTANTS = "tests/compressors/lower/test_small_constants.py"
AUDIT = "tests/compressors/lower/test_audit.py"
PARITY = "tests/compressors/lower/test_parity.py"
GRAPH_VALUES = "tests/compressors/lower/test_graph_values.py"

FAULTS = (
    Fault(
        id="passes-remove-small-constants",
        file="compressors/lower/passes/exact_rules.py",
        old="return pattern.Constant(value, rel_tol=0.0, abs_tol=0.0)",
        new="return pattern.Constant(value)",
        effect="'+ 1e-9' is removed, so masked means of empty lists are NaN in the graph.",
        tests=(f"{CONSTANTS}::test_no_op_rules_remove_only_exact_neutral_elements",),
    ),
    Fault(
        id="passes-merge-clips-apart",
        file="compressors/lower/passes/exact_rules.py",
        old="    rules.successive_clip_relu_rule,\n",
        new="    rules.successive_clip_relu_rule,\n    rules.successive_clip_rule,\n",
        effect="Two clamps whose bounds do not overlap become one wrong clamp.",
        tests=(f"{CONSTANTS}::test_successive_clips_with_disjoint_bounds_return_the_second_bound",),
    ),
    Fault(
        id="log-sigmoid-overflows",
        file="compressors/lower/graph_builders.py",
        old="return op.Neg(op.Softplus(op.Neg(x)))",
        new="return op.Log(op.Sigmoid(x))",
        effect="The logarithm of a sigmoid that underflows is -inf in served graphs.",
        tests=(f"{CONSTANTS}::test_log_sigmoid_of_a_large_negative_logit_is_finite_in_the_graph",),
    ),
    Fault(
        id="sigmoid-of-runtime-after-recalibration",
        file="compressors/lower/graph_builders.py",
        old="return op.Reciprocal(op.Add(op.Constant(value_float=1.0), op.Exp(op.Neg(x))))",
        new="return op.Sigmoid(x)",
        effect="A recalibrated probability close to 0 differs between torch and ONNX Runtime.",
        tests=(GRAPH_VALUES,),
    ),
    Fault(
        id="squeeze-removes-the-row-dimension",
        file="compressors/lower/graph_builders.py",
        old="    return op.Squeeze(x, axes) if axes else op.Identity(x)",
        new="    return op.Squeeze(x) if axes else op.Identity(x)",
        effect="A request of one row gets a score without a dimension.",
        tests=(GRAPH_VALUES,),
    ),
    Fault(
        id="attention-averages-masked-places",
        file="compressors/lower/attention.py",
        old="return op.Where(is_masked, zero, op.MatMul(weights, value))",
        new="return op.MatMul(weights, value)",
        effect="Attention over an empty history gives NaN instead of zeros.",
        tests=(
            "tests/compressors/lower/test_attention_graphs.py"
            "::test_attention_in_graphs_has_the_scores_of_torch_also_for_empty_histories",
        ),
    ),
    Fault(
        id="int4-zero-in-graph-shifted",
        file="compressors/lower/targets/onnxruntime/tables.py",
        old="rows = op.Sub(rows, op.Constant(value_float=8.0))",
        new="rows = op.Sub(rows, op.Constant(value_float=7.0))",
        effect="ONNX Runtime reads int4 tables one level too high.",
        tests=(
            "tests/compressors/lower/test_small_constants.py"
            "::test_masked_means_are_equal_in_graphs_and_torch"
            "[1e-08-rowwise_int4-onnxruntime]",
        ),
    ),
    Fault(
        id="tensorrt-bias-not-rounded",
        file="compressors/lower/targets/tensorrt/operators.py",
        old="rounded = op.Mul(op.Round(op.Div(bias, bias_scale)), bias_scale)",
        new="rounded = op.Mul(op.Div(bias, bias_scale), bias_scale)",
        effect="With very wide inputs the int8 bias differs between TensorRT and the module.",
        tests=(GRAPH_VALUES,),
    ),
    Fault(
        id="int8-bias-truncated-in-onnxruntime",
        file="compressors/lower/targets/onnxruntime/operators.py",
        old="bias_codes = op.Cast(op.Round(op.Div(bias, bias_scale)), to=INT32)",
        new="bias_codes = op.Cast(op.Div(bias, bias_scale), to=INT32)",
        effect="ONNX Runtime's int8 bias is truncated, the module's is rounded.",
        tests=(GRAPH_VALUES,),
    ),
    Fault(
        id="audit-accepts-float-gemm",
        file="compressors/lower/audit.py",
        old="        *_describe_unfused_matmuls(graph, producers),\n",
        new="",
        effect="A Gemm that computes in float32 after a DequantizeLinear passes the audit.",
        tests=(f"{AUDIT}::test_audit_rejects_int8_layers_that_are_not_fused_or_are_repacked",),
    ),
    Fault(
        id="audit-accepts-widened-table",
        file="compressors/lower/audit.py",
        old="            if path and name in initializers and len(initializers[name].dims) > 1:",
        new="            if path and name in initializers and len(initializers[name].dims) > 2:",
        effect="A table that every call decodes completely passes the audit.",
        tests=(f"{AUDIT}::test_audit_rejects_table_that_is_dequantized_as_a_whole",),
    ),
    Fault(
        id="audit-counts-no-int8-products",
        file="compressors/lower/audit.py",
        old="    if int8_products < expected:\n",
        new="    if int8_products < 0:\n",
        effect="Fewer int8 products than ordered pass the audit.",
        tests=(f"{AUDIT}::test_audit_rejects_int8_layers_that_are_not_fused_or_are_repacked",),
    ),
    Fault(
        id="audit-accepts-lost-rows",
        file="compressors/lower/audit.py",
        old="elif entries is not None and entries != initializers[name].dims[0]:",
        new="elif entries is not None and entries < initializers[name].dims[0]:",
        effect="A table with missing rows in the runtime's graph passes the audit.",
        tests=(f"{AUDIT}::test_audit_rejects_table_with_fewer_rows_than_the_module",),
    ),
    Fault(
        id="parity-ignores-single-rows",
        file="compressors/lower/findings.py",
        old="            or self.largest > self.largest_limit\n",
        new="",
        effect="One row with a large difference passes the parity check.",
        tests=(f"{PARITY}::test_one_row_with_a_large_difference_fails",),
    ),
    Fault(
        id="operators-of-a-sensitive-network-not-compared",
        file="tasks/evaluation/parity.py",
        old="        if any(parity.by_rounding for parity in parities):\n",
        new="        if any(parity.by_rounding < 0 for parity in parities):\n",
        effect="A wrong operator passes in a network where rounding changes scores as much.",
        tests=("tests/tasks/test_sensitive_networks.py",),
    ),
    Fault(
        id="gates-in-the-order-of-torch",
        file="compressors/lower/recurrent_layers.py",
        old="GRU_GATES, LSTM_GATES, RNN_GATES = (1, 0, 2), (0, 3, 1, 2), (0,)\n",
        new="GRU_GATES, LSTM_GATES, RNN_GATES = (0, 1, 2), (0, 1, 2, 3), (0,)\n",
        effect="The graph of a GRU or LSTM uses the weights of other gates.",
        tests=("tests/compressors/lower/test_recurrent_graphs.py",),
    ),
    Fault(
        id="parity-ignores-nan",
        file="compressors/lower/comparison/parity.py",
        old="    if not np.array_equal(is_nan, np.isnan(actual)):\n",
        new="    if np.isnan(actual).all() and not is_nan.all():\n",
        effect="NaN in the graph's scores passes where the module has a number.",
        tests=(f"{PARITY}::test_nan_in_different_rows_fails",),
    ),
    Fault(
        id="parity-spread-of-infinite-scores",
        file="compressors/lower/comparison/parity.py",
        old="finite = expected[np.isfinite(expected)]",
        new="finite = np.nan_to_num(expected[~np.isnan(expected)])",
        effect="One infinite score makes every parity limit huge and hides other differences.",
        tests=(f"{PARITY}::test_equal_infinite_scores_do_not_hide_other_differences",),
    ),
)
