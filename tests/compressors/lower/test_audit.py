"""The audit accepts graphs that keep the plan's formats and rejects those that lost them.

A fault is a sentence of the audit about one violation, in the field ``faults`` of its error. A
table or layer is packed if the graph reads its codes. It is widened if all of its codes are decoded
to float32 first.

Some tests audit graphs of the networks ``Ranker`` and ``Compact`` of ``models.py``, which have five
dense layers each. ``OTHERS`` of ``test_lowering.py`` are the other networks, ``OTHER_RECIPES`` the
recipes that it exports for them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from error_codes import raises_code
from models import FORMATS, build_recipe, lower_reference
from onnx import TensorProto, helper, numpy_helper
from test_lowering import OTHER_GRAPHS, OTHER_RECIPES, OTHERS, networks_and_recipes

from compressors.contracts import Plan, PlanLine
from compressors.contracts.reasons import Reason
from compressors.errors.compression import AuditFailed
from compressors.lower.audit import audit
from compressors.lower.findings import LayerInitializer, TableInitializers
from infra.onnxruntime.sessions import optimized_graph

TABLE_FORMATS = {
    method.model_fields["kind"].default for method in FORMATS if "tables" in method.model_fields
}
WIDTH = 32
INPUT_SCALE = np.float32(0.03)  # any positive number: the tests do not compute scores


class GraphBuilder:
    """Builds a graph of initializers and nodes with generated names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def add_constant(self, value: Any, name: str = "") -> str:
        """Add an initializer and return its name."""
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add_node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def add_quantize_dequantize(self, x: str, zero_point: np.generic) -> str:
        """Add a QuantizeLinear and a DequantizeLinear with this zero point."""
        scale, zero_points = self.add_constant(INPUT_SCALE), self.add_constant(zero_point)
        return self.add_node(
            "DequantizeLinear",
            self.add_node("QuantizeLinear", x, scale, zero_points),
            scale,
            zero_points,
        )

    def add_gemm(self, x: str, *, int32_bias: bool = True) -> str:
        """Add a Gemm with int8 weights and an int32 or a float bias."""
        weight = self.rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
        scale = np.abs(weight).max(axis=1) / 127
        codes = self.add_constant(np.rint(weight / scale[:, None]).astype(np.int8))
        zeros = self.add_constant(np.zeros(WIDTH, np.int8))
        w = self.add_node("DequantizeLinear", codes, self.add_constant(scale), zeros, axis=0)
        bias = self.rng.standard_normal(WIDTH).astype(np.float32)
        if int32_bias:
            bias_scale = scale * INPUT_SCALE
            b = self.add_node(
                "DequantizeLinear",
                self.add_constant(np.rint(bias / bias_scale).astype(np.int32)),
                self.add_constant(bias_scale),
                self.add_constant(np.zeros(WIDTH, np.int32)),
                axis=0,
            )
        else:
            b = self.add_constant(bias)
        return self.add_node("Gemm", x, w, b, transB=1)

    def optimize(self, output: str, path: Path) -> onnx.GraphProto:
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
"""Zero points of unsigned and signed inputs."""


def create_plan(int8_layers: int) -> Plan:
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


def add_fused_layers(builder: GraphBuilder) -> str:
    """Add two int8 layers in the form that ONNX Runtime fuses."""
    x = builder.add_quantize_dequantize("x", UNSIGNED)
    floor = builder.add_constant(np.float32(0))
    return builder.add_node(
        "Add", builder.add_node("Max", builder.add_gemm(x), floor), builder.add_gemm(x)
    )


def add_relu_after_product(builder: GraphBuilder) -> str:
    """Add two int8 layers, one of them followed by a Relu, which prevents fusion."""
    x = builder.add_quantize_dequantize("x", UNSIGNED)
    return builder.add_node(
        "Add", builder.add_node("Relu", builder.add_gemm(x)), builder.add_gemm(x)
    )


def add_layer_with_float_bias(builder: GraphBuilder) -> str:
    """Add two int8 layers, one of them with a float bias, which prevents fusion."""
    x = builder.add_quantize_dequantize("x", UNSIGNED)
    return builder.add_node("Add", builder.add_gemm(x, int32_bias=False), builder.add_gemm(x))


def add_layers_with_signed_inputs(builder: GraphBuilder) -> str:
    """Add two int8 layers with signed inputs, whose weights are repacked at every call."""
    x = builder.add_quantize_dequantize("x", SIGNED)
    return builder.add_node("Add", builder.add_gemm(x), builder.add_gemm(x))


def add_one_int8_layer(builder: GraphBuilder) -> str:
    """Add one int8 layer, where the plan of the test has two."""
    return builder.add_node(
        "Add", builder.add_gemm(builder.add_quantize_dequantize("x", UNSIGNED)), "x"
    )


def test_audit_accepts_int8_layers_in_the_fused_form(tmp_path):
    builder = GraphBuilder()
    result = audit(
        builder.optimize(add_fused_layers(builder), tmp_path / "g.onnx"), create_plan(2), ()
    )
    assert result.int8_products == 2
    assert result.nodes["QGemm"] == 2


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        (add_relu_after_product, "computes in float32 after a DequantizeLinear"),
        (add_layer_with_float_bias, "computes in float32 after a DequantizeLinear"),
        (add_layers_with_signed_inputs, "reads signed inputs and repacks"),
        (add_one_int8_layer, "the plan has 2 int8 layers, the graph 1 int8 products"),
    ],
)
def test_audit_rejects_int8_layers_that_are_not_fused_or_are_repacked(
    form: Callable[[GraphBuilder], str], fault, tmp_path
):
    builder = GraphBuilder()
    optimized = builder.optimize(form(builder), tmp_path / "g.onnx")
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, create_plan(2), ())
    assert any(fault in sentence for sentence in caught.value.fields["faults"])


ROWS = 1000


def add_table(builder: GraphBuilder, form: str) -> tuple[str, TableInitializers]:
    """Add a table whose rows are the graph's output; ``form`` says how they are looked up.

    ``gather first`` decodes only the rows that are looked up. ``dequantize first`` decodes the
    whole table before the lookup. So does ``widened and folded``, but with other operators, which
    the runtime replaces by a constant of float32 rows.
    """
    codes = builder.add_constant(builder.rng.integers(-127, 128, (ROWS, 8), np.int8), "codes")
    scale = builder.rng.random(ROWS).astype(np.float32)
    names = ("codes", "scale")
    if form == "gather first":
        builder.add_constant(scale[:, None], "scale")
        rows = builder.add_node(
            "Cast", builder.add_node("Gather", codes, "ids"), to=TensorProto.FLOAT
        )
        out = builder.add_node("Mul", rows, builder.add_node("Gather", "scale", "ids"))
    elif form == "dequantize first":
        builder.add_constant(scale, "scale")
        out = builder.add_node(
            "Gather", builder.add_node("DequantizeLinear", codes, "scale", axis=0), "ids"
        )
    else:
        builder.add_constant(scale[:, None], "scale")
        widened = builder.add_node(
            "Mul", builder.add_node("Cast", codes, to=TensorProto.FLOAT), "scale"
        )
        out = builder.add_node("Gather", widened, "ids")
    initializers = TableInitializers(module="user", rows=ROWS, format="rowwise_int8", names=names)
    return out, initializers


def test_audit_accepts_table_that_is_gathered_before_it_is_dequantized(tmp_path):
    builder = GraphBuilder()
    out, initializers = add_table(builder, "gather first")
    result = audit(builder.optimize(out, tmp_path / "g.onnx"), None, (initializers,))
    assert result.packed_tables == 1
    assert result.weight_bytes == ROWS * (8 + 4)  # eight int8 codes and a float32 scale per row


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ("dequantize first", "table 'codes' is widened (DequantizeLinear) before its Gather"),
        ("widened and folded", "table 'user': 'codes' was replaced by the runtime"),
    ],
)
def test_audit_rejects_table_that_is_dequantized_as_a_whole(form, fault, tmp_path):
    builder = GraphBuilder()
    out, initializers = add_table(builder, form)
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(builder.optimize(out, tmp_path / "g.onnx"), None, (initializers,))
    assert fault in caught.value.fields["faults"]


def test_audit_rejects_table_with_fewer_rows_than_the_module(tmp_path):
    builder = GraphBuilder()
    out, initializers = add_table(builder, "gather first")
    table_with_more_rows = initializers.model_copy(update={"rows": ROWS + 1})
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(builder.optimize(out, tmp_path / "g.onnx"), None, (table_with_more_rows,))
    assert "table 'user': 'codes' lost rows" in caught.value.fields["faults"]


def test_audit_expects_one_scale_for_each_group_of_rows(tmp_path):
    """``rows_per_entry`` is the number of table rows that share an entry of a tensor; 0: all."""
    builder = GraphBuilder()
    out, initializers = add_table(builder, "gather first")
    shared_scales = initializers.model_copy(
        update={"rows": 4 * ROWS - 1, "names": ("scale",), "rows_per_entry": {"scale": 4}}
    )
    optimized = builder.optimize(out, tmp_path / "g.onnx")
    audit(optimized, None, (shared_scales,))
    # A tensor of the whole table does not depend on the rows and may be folded.
    audit(
        optimized,
        None,
        (shared_scales.model_copy(update={"names": ("gone",), "rows_per_entry": {"gone": 0}}),),
    )
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, None, (shared_scales.model_copy(update={"rows": 4 * ROWS + 1}),))
    assert "table 'user': 'scale' lost rows" in caught.value.fields["faults"]


def test_audit_rejects_weight_only_layer_without_a_product_of_its_codes(tmp_path):
    """``packed_layers`` multiply codes; ``widened_layers`` are decoded when a session starts."""
    lowered = lower_reference("Compact", build_recipe("weight_int4"), "onnxruntime")
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
    codes = builder.add_constant(np.zeros((WIDTH, WIDTH), np.uint8))
    builder.add_node("MatMul", "x", builder.add_node("Cast", codes, to=TensorProto.FLOAT))
    built_graph = helper.make_graph(builder.nodes, "g", [], [], builder.initializers)
    layer = LayerInitializer(module="cross", format="weight_int4", name=codes, packed=True)
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(built_graph, None, (), (layer,))
    fault = "dense layer 'cross': its codes are read by Cast instead of MatMulNBits"
    assert fault in caught.value.fields["faults"]


@pytest.mark.parametrize("kind", ["float16", "float8_dense"])
def test_audit_counts_layers_that_are_widened_when_a_session_starts(kind):
    lowered = lower_reference("Compact", build_recipe(kind), "onnxruntime")
    result = audit(optimized_graph(lowered.path), None, (), lowered.lowered.layers)
    assert (result.packed_layers, result.widened_layers) == (0, 5)


def test_audit_rejects_graph_that_was_exported_for_tensorrt():
    lowered = lower_reference("Compact", build_recipe("rowwise_int8"), "tensorrt-rtx")
    optimized = optimized_graph(lowered.path)
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, lowered.model.plan, lowered.lowered.tables)
    fault = "table 'model.genres.codes' is widened (DequantizeLinear) before its Gather"
    assert fault in caught.value.fields["faults"]


TABLE_COUNTS = {"Ranker": 6, "Compact": 2}
"""Number of tables of each network."""


@networks_and_recipes("Ranker", "Compact")
def test_audit_accepts_every_recipe_exported_for_onnxruntime(network, kinds):
    lowered = lower_reference(network, kinds, "onnxruntime")
    result = audit(optimized_graph(lowered.path), lowered.model.plan, lowered.lowered.tables)
    assert result.int8_products == (5 if {"static_int8", "qat"} & set(kinds) else 0)
    table_formats = set(kinds) & TABLE_FORMATS
    assert result.packed_tables == (TABLE_COUNTS[network] if table_formats else 0)


@pytest.mark.parametrize(
    ("reference", "kinds"),
    [
        # Not marked ``nightly`` are the graphs that test_lowering.py exports for this target.
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
    lowered = lower_reference(reference, kinds, "onnxruntime")
    result = audit(optimized_graph(lowered.path), lowered.model.plan, lowered.lowered.tables)
    expected = sum(line.format == "static_int8" for line in lowered.model.plan.lines)
    assert result.int8_products == expected
    assert result.packed_tables >= 1


def test_audit_reports_fewer_weight_bytes_for_fewer_bits():
    sizes = []
    for kinds in ((), build_recipe("rowwise_int8"), build_recipe("rowwise_int4")):
        lowered = lower_reference("Compact", kinds, "onnxruntime")
        optimized = optimized_graph(lowered.path)
        sizes.append(audit(optimized, lowered.model.plan, lowered.lowered.tables).weight_bytes)
    assert sizes[0] > sizes[1] > sizes[2]
