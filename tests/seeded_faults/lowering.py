"""Faults in lowered graphs, graph passes, parity and the audit."""

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
        tests=(f"{CONSTANTS}::test_only_an_exact_neutral_element_is_removed",),
    ),
    Fault(
        id="passes-merge-clips-apart",
        file="compressors/lower/passes/exact_rules.py",
        old="    rules.successive_clip_relu_rule,\n",
        new="    rules.successive_clip_relu_rule,\n    rules.successive_clip_rule,\n",
        effect="Two clamps whose bounds do not overlap become one wrong clamp.",
        tests=(
            f"{CONSTANTS}::test_successive_clips_with_bounds_apart_give_the_second_clips_bound",
        ),
    ),
    Fault(
        id="log-sigmoid-overflows",
        file="compressors/lower/graph_builders.py",
        old="return op.Neg(op.Softplus(op.Neg(x)))",
        new="return op.Log(op.Sigmoid(x))",
        effect="The logarithm of a sigmoid that underflows is -inf in served graphs.",
        tests=(f"{CONSTANTS}::test_the_log_of_a_vanishing_sigmoid_is_finite_in_the_graph",),
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
        old="    return op.Squeeze(x, op.Constant(value_ints=axes)) if axes else op.Identity(x)",
        new="    return op.Squeeze(x) if axes else op.Identity(x)",
        effect="A request of one row gets a score without a dimension.",
        tests=(GRAPH_VALUES,),
    ),
    Fault(
        id="attention-averages-masked-places",
        file="compressors/lower/attention.py",
        old="return op.MatMul(op.Where(is_masked, zero, weights), value)",
        new="return op.MatMul(weights, value)",
        effect="Attention over an empty history gives the mean of all values instead of zeros.",
        tests=(
            "tests/compressors/lower/test_attention_graphs.py"
            "::test_attention_scores_an_empty_history_as_torch_does",
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
            "::test_masked_means_of_empty_lists_are_the_modules_on_every_target"
            "[1e-08-rowwise_int4-onnxruntime]",
        ),
    ),
    Fault(
        id="tensorrt-bias-not-rounded",
        file="compressors/lower/targets/tensorrt/operators.py",
        old="rounded = op.Mul(op.Round(op.Div(bias, step)), step)",
        new="rounded = op.Mul(op.Div(bias, step), step)",
        effect="With very wide inputs the int8 bias differs between TensorRT and the module.",
        tests=(GRAPH_VALUES,),
    ),
    Fault(
        id="int8-bias-truncated-in-onnxruntime",
        file="compressors/lower/targets/onnxruntime/operators.py",
        old="bias_codes = op.Cast(op.Round(op.Div(bias, step)), to=INT32)",
        new="bias_codes = op.Cast(op.Div(bias, step), to=INT32)",
        effect="ONNX Runtime's int8 bias is truncated, the module's is rounded.",
        tests=(GRAPH_VALUES,),
    ),
    Fault(
        id="audit-accepts-float-gemm",
        file="compressors/lower/audit.py",
        old="        *_unfused_products(graph, producers),\n",
        new="",
        effect="A Gemm that computes in float32 after a DequantizeLinear passes the audit.",
        tests=(f"{AUDIT}::test_int8_that_does_not_pay_is_refused",),
    ),
    Fault(
        id="audit-accepts-widened-table",
        file="compressors/lower/audit.py",
        old="        if path and name in initializers and len(initializers[name].dims) > 1:",
        new="        if path and name in initializers and len(initializers[name].dims) > 2:",
        effect="A table that every call decodes completely passes the audit.",
        tests=(f"{AUDIT}::test_a_table_that_is_float32_at_every_call_is_refused",),
    ),
    Fault(
        id="audit-counts-no-int8-products",
        file="compressors/lower/audit.py",
        old="    if int8_products < expected:\n",
        new="    if int8_products < 0:\n",
        effect="Fewer int8 products than ordered pass the audit.",
        tests=(f"{AUDIT}::test_int8_that_does_not_pay_is_refused",),
    ),
    Fault(
        id="audit-accepts-lost-rows",
        file="compressors/lower/audit.py",
        old="elif entries is not None and entries != initializers[name].dims[0]:",
        new="elif entries is not None and entries < initializers[name].dims[0]:",
        effect="A table with missing rows in the runtime's graph passes the audit.",
        tests=(f"{AUDIT}::test_a_table_that_lost_rows_is_refused",),
    ),
    Fault(
        id="parity-ignores-single-rows",
        file="compressors/lower/parity.py",
        old="        or parity.largest > parity.largest_limit\n",
        new="",
        effect="One row with a large difference passes the parity check.",
        tests=(f"{PARITY}::test_one_row_far_off_is_enough_to_fail",),
    ),
    Fault(
        id="parity-ignores-nan",
        file="compressors/lower/parity.py",
        old="    if not np.array_equal(refused, np.isnan(found)):\n",
        new="    if np.isnan(found).all() and not refused.all():\n",
        effect="NaN in the graph's scores passes where the module has a number.",
        tests=(f"{PARITY}::test_refused_rows_must_be_the_same_ones",),
    ),
    Fault(
        id="parity-spread-of-infinite-scores",
        file="compressors/lower/parity.py",
        old="finite = expected[np.isfinite(expected)]",
        new="finite = np.nan_to_num(expected[~np.isnan(expected)])",
        effect="One infinite score makes every parity limit huge and hides other differences.",
        tests=(f"{PARITY}::test_an_infinite_score_does_not_hide_other_differences",),
    ),
)
