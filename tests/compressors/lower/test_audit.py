"""The audit accepts graphs that keep the plan's formats and rejects those that lost them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from error_codes import raises_code
from models import FORMATS, lowered_reference, recipe_with
from onnx import TensorProto, helper, numpy_helper
from test_lowering import OTHER_GRAPHS, OTHER_RECIPES, OTHERS, networks_and_recipes

from compressors.contracts import Plan, PlanLine
from compressors.contracts.reasons import Reason
from compressors.errors.compression import AuditFailed
from compressors.lower.audit import audit
from compressors.lower.findings import LayerInitializer, TableInitializers
from infra.onnxruntime.sessions import optimized_graph

TABLES = {
    method.model_fields["kind"].default for method in FORMATS if "tables" in method.model_fields
}
WIDTH = 32


class GraphBuilder:
    """Builds a graph of constants and nodes with generated names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def constant(self, value: Any, name: str = "") -> str:
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def quantize_dequantize(self, x: str, zero_point: np.generic) -> str:
        """Quantize and dequantize."""
        scale, zero_points = self.constant(np.float32(0.03)), self.constant(zero_point)
        return self.node(
            "DequantizeLinear",
            self.node("QuantizeLinear", x, scale, zero_points),
            scale,
            zero_points,
        )

    def gemm(self, x: str, *, int32_bias: bool = True) -> str:
        """Add a Gemm with int8 weights and an int32 or a float bias."""
        weight = self.random.standard_normal((WIDTH, WIDTH)).astype(np.float32)
        scale = np.abs(weight).max(axis=1) / 127
        codes = self.constant(np.rint(weight / scale[:, None]).astype(np.int8))
        zeros = self.constant(np.zeros(WIDTH, np.int8))
        w = self.node("DequantizeLinear", codes, self.constant(scale), zeros, axis=0)
        bias = self.random.standard_normal(WIDTH).astype(np.float32)
        if int32_bias:
            step = scale * np.float32(0.03)
            b = self.node(
                "DequantizeLinear",
                self.constant(np.rint(bias / step).astype(np.int32)),
                self.constant(step),
                self.constant(np.zeros(WIDTH, np.int32)),
                axis=0,
            )
        else:
            b = self.constant(bias)
        return self.node("Gemm", x, w, b, transB=1)

    def optimized(self, output: str, path: Path) -> onnx.GraphProto:
        """Return the graph as ONNX Runtime optimizes it."""
        built_graph = helper.make_graph(
            self.nodes,
            "built",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", WIDTH]),
                helper.make_tensor_value_info("ids", TensorProto.INT64, ["rows"]),
            ],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", 21)]
        onnx.save(helper.make_model(built_graph, opset_imports=opsets, ir_version=10), path)
        return optimized_graph(path)


UNSIGNED, SIGNED = np.uint8(128), np.int8(0)


def plan(int8_layers: int) -> Plan:
    """Return a plan with this number of int8 layers."""
    line = PlanLine(
        module="layer",
        role="dense",
        format="static_int8",
        bytes_before=4,
        bytes_after=1,
        reasons=(Reason("as_written", text="r"),),
    )
    return Plan(lines=(line,) * int8_layers)


def fused_layers(builder: GraphBuilder) -> str:
    """Add two int8 layers in the form that ONNX Runtime fuses."""
    x = builder.quantize_dequantize("x", UNSIGNED)
    floor = builder.constant(np.float32(0))
    return builder.node("Add", builder.node("Max", builder.gemm(x), floor), builder.gemm(x))


def relu_after_product(builder: GraphBuilder) -> str:
    x = builder.quantize_dequantize("x", UNSIGNED)
    return builder.node("Add", builder.node("Relu", builder.gemm(x)), builder.gemm(x))


def float_bias(builder: GraphBuilder) -> str:
    x = builder.quantize_dequantize("x", UNSIGNED)
    return builder.node("Add", builder.gemm(x, int32_bias=False), builder.gemm(x))


def signed_inputs(builder: GraphBuilder) -> str:
    x = builder.quantize_dequantize("x", SIGNED)
    return builder.node("Add", builder.gemm(x), builder.gemm(x))


def one_float_layer(builder: GraphBuilder) -> str:
    return builder.node("Add", builder.gemm(builder.quantize_dequantize("x", UNSIGNED)), "x")


def test_audit_accepts_int8_layers_in_the_fused_form(tmp_path):
    builder = GraphBuilder()
    result = audit(builder.optimized(fused_layers(builder), tmp_path / "g.onnx"), plan(2), ())
    assert result.int8_products == 2
    assert result.nodes["QGemm"] == 2


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        (relu_after_product, "computes in float32 after a DequantizeLinear"),
        (float_bias, "computes in float32 after a DequantizeLinear"),
        (signed_inputs, "reads signed inputs and repacks"),
        (one_float_layer, "the plan has 2 int8 layers, the graph 1 int8 products"),
    ],
)
def test_audit_rejects_int8_layers_that_are_not_fused_or_are_repacked(
    form: Callable[[GraphBuilder], str], fault, tmp_path
):
    builder = GraphBuilder()
    optimized = builder.optimized(form(builder), tmp_path / "g.onnx")
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, plan(2), ())
    assert any(fault in result for result in caught.value.fields["faults"])


ROWS = 1000


def table(builder: GraphBuilder, form: str) -> tuple[str, TableInitializers]:
    """Add a table whose rows are the graph's output; ``form`` says how they are looked up."""
    codes = builder.constant(builder.random.integers(-127, 128, (ROWS, 8), np.int8), "codes")
    scale = builder.random.random(ROWS).astype(np.float32)
    names = ("codes", "scale")
    if form == "gather first":
        builder.constant(scale[:, None], "scale")
        rows = builder.node("Cast", builder.node("Gather", codes, "ids"), to=TensorProto.FLOAT)
        out = builder.node("Mul", rows, builder.node("Gather", "scale", "ids"))
    elif form == "dequantize first":
        builder.constant(scale, "scale")
        out = builder.node(
            "Gather", builder.node("DequantizeLinear", codes, "scale", axis=0), "ids"
        )
    else:
        builder.constant(scale[:, None], "scale")
        widened = builder.node("Mul", builder.node("Cast", codes, to=TensorProto.FLOAT), "scale")
        out = builder.node("Gather", widened, "ids")
    initializers = TableInitializers(module="user", rows=ROWS, format="rowwise_int8", names=names)
    return out, initializers


def test_audit_accepts_table_that_is_gathered_before_it_is_dequantized(tmp_path):
    builder = GraphBuilder()
    out, initializers = table(builder, "gather first")
    result = audit(builder.optimized(out, tmp_path / "g.onnx"), None, (initializers,))
    assert result.packed_tables == 1
    assert result.weight_bytes == ROWS * (8 + 4)


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ("dequantize first", "table 'codes' is widened (DequantizeLinear) before its Gather"),
        ("widened and folded", "table 'user': 'codes' was replaced by the runtime"),
    ],
)
def test_audit_rejects_table_that_is_dequantized_as_a_whole(form, fault, tmp_path):
    builder = GraphBuilder()
    out, initializers = table(builder, form)
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(builder.optimized(out, tmp_path / "g.onnx"), None, (initializers,))
    assert fault in caught.value.fields["faults"]


def test_audit_rejects_table_with_fewer_rows_than_the_module(tmp_path):
    builder = GraphBuilder()
    out, initializers = table(builder, "gather first")
    table_with_more_rows = initializers.model_copy(update={"rows": ROWS + 1})
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(builder.optimized(out, tmp_path / "g.onnx"), None, (table_with_more_rows,))
    assert "table 'user': 'codes' lost rows" in caught.value.fields["faults"]


def test_audit_expects_one_scale_for_each_group_of_rows(tmp_path):
    builder = GraphBuilder()
    out, initializers = table(builder, "gather first")
    shared_scales = initializers.model_copy(
        update={"rows": 4 * ROWS - 1, "names": ("scale",), "every": {"scale": 4}}
    )
    optimized = builder.optimized(out, tmp_path / "g.onnx")
    audit(optimized, None, (shared_scales,))
    # A tensor of the whole table does not depend on the rows and may be folded.
    audit(
        optimized,
        None,
        (shared_scales.model_copy(update={"names": ("gone",), "every": {"gone": 0}}),),
    )
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, None, (shared_scales.model_copy(update={"rows": 4 * ROWS + 1}),))
    assert "table 'user': 'scale' lost rows" in caught.value.fields["faults"]


def test_audit_rejects_weight_only_layer_without_a_product_of_its_codes(tmp_path):
    lowered = lowered_reference("Compact", recipe_with("weight_int4"), "onnxruntime")
    optimized = optimized_graph(lowered.path)
    layers = lowered.lowered.layers
    result = audit(optimized, lowered.model.plan, (), layers)
    assert (result.packed_layers, result.widened_layers) == (5, 0)
    assert result.nodes["MatMulNBits"] == 5
    folded = layers[0].model_copy(update={"name": "folded"})
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, lowered.model.plan, (), (*layers[1:], folded))
    (fault,) = caught.value.fields["faults"]
    assert fault == f"dense layer {folded.module!r}: 'folded' was widened by the runtime"
    assert caught.value.units == (folded.module,)
    # The codes are read by a Cast instead of a MatMulNBits.
    builder = GraphBuilder()
    codes = builder.constant(np.zeros((WIDTH, WIDTH), np.uint8))
    widened = builder.node("MatMul", "x", builder.node("Cast", codes, to=TensorProto.FLOAT))
    built_graph = helper.make_graph(builder.nodes, "g", [], [], builder.initializers)
    layer = LayerInitializer(module="cross", format="weight_int4", name=codes, packed=True)
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(built_graph, None, (), (layer,))
    fault = "dense layer 'cross': its codes are read by Cast instead of MatMulNBits"
    assert fault in caught.value.fields["faults"]
    assert widened


@pytest.mark.parametrize("kind", ["float16", "float8_dense"])
def test_audit_counts_layers_that_are_widened_when_a_session_starts(kind):
    lowered = lowered_reference("Compact", recipe_with(kind), "onnxruntime")
    result = audit(optimized_graph(lowered.path), None, (), lowered.lowered.layers)
    assert (result.packed_layers, result.widened_layers) == (0, 5)


def test_audit_rejects_graph_that_was_exported_for_tensorrt():
    lowered = lowered_reference("Compact", recipe_with("rowwise_int8"), "tensorrt-rtx")
    optimized = optimized_graph(lowered.path)
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, lowered.model.plan, lowered.lowered.tables)
    fault = "table 'model.genres.codes' is widened (DequantizeLinear) before its Gather"
    assert fault in caught.value.fields["faults"]


TABLES_OF = {"Ranker": 6, "Compact": 2}


@networks_and_recipes("Ranker", "Compact")
def test_audit_accepts_every_recipe_exported_for_onnxruntime(network, kinds):
    lowered = lowered_reference(network, kinds, "onnxruntime")
    result = audit(optimized_graph(lowered.path), lowered.model.plan, lowered.lowered.tables)
    assert result.int8_products == (5 if {"static_int8", "qat"} & set(kinds) else 0)
    packs_tables = set(kinds) & TABLES
    assert result.packed_tables == (TABLES_OF[network] if packs_tables else 0)


@pytest.mark.parametrize(
    ("reference", "kinds"),
    [
        # The default tier has the graphs that test_lowering.py exports for this target.
        pytest.param(
            name,
            kinds,
            id=f"{name}-{'+'.join(kinds)}",
            marks=() if (name, kinds, "onnxruntime") in OTHER_GRAPHS else pytest.mark.nightly,
        )
        for name in OTHERS
        for kinds in OTHER_RECIPES
    ],
)
def test_audit_accepts_other_networks_exported_for_onnxruntime(reference, kinds):
    lowered = lowered_reference(reference, kinds, "onnxruntime")
    result = audit(optimized_graph(lowered.path), lowered.model.plan, lowered.lowered.tables)
    expected = sum(line.format == "static_int8" for line in lowered.model.plan.lines)
    assert result.int8_products == expected
    assert result.packed_tables >= 1


def test_audit_reports_fewer_weight_bytes_for_fewer_bits():
    sizes = []
    for kinds in ((), recipe_with("rowwise_int8"), recipe_with("rowwise_int4")):
        lowered = lowered_reference("Compact", kinds, "onnxruntime")
        optimized = optimized_graph(lowered.path)
        sizes.append(audit(optimized, lowered.model.plan, lowered.lowered.tables).weight_bytes)
    assert sizes[0] > sizes[1] > sizes[2]
