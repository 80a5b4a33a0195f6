"""The audit passes what ONNX Runtime serves well and stops what it quietly makes slow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from error_codes import raises_code
from models import FORMATS, graph, recipe_with
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


class Drawing:
    """A graph drawn by hand: constants and nodes under made-up names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def constant(self, value: Any, name: str = "") -> str:
        name = name or f"c{len(self.held)}"
        self.held.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def rounded(self, x: str, zero: np.generic) -> str:
        """Quantize and back."""
        scale, point = self.constant(np.float32(0.03)), self.constant(zero)
        return self.node(
            "DequantizeLinear", self.node("QuantizeLinear", x, scale, point), scale, point
        )

    def gemm(self, x: str, *, whole_bias: bool = True) -> str:
        """A Gemm with int8 weights; a bias in int32, or left in float."""
        weight = self.random.standard_normal((WIDTH, WIDTH)).astype(np.float32)
        scale = np.abs(weight).max(axis=1) / 127
        codes = self.constant(np.rint(weight / scale[:, None]).astype(np.int8))
        zeros = self.constant(np.zeros(WIDTH, np.int8))
        w = self.node("DequantizeLinear", codes, self.constant(scale), zeros, axis=0)
        bias = self.random.standard_normal(WIDTH).astype(np.float32)
        if whole_bias:
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
        """The graph after ONNX Runtime has rewritten it."""
        drawn = helper.make_graph(
            self.nodes,
            "drawn",
            [
                helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", WIDTH]),
                helper.make_tensor_value_info("ids", TensorProto.INT64, ["rows"]),
            ],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.held,
        )
        opsets = [helper.make_opsetid("", 21)]
        onnx.save(helper.make_model(drawn, opset_imports=opsets, ir_version=10), path)
        return optimized_graph(path)


UNSIGNED, SIGNED = np.uint8(128), np.int8(0)


def plan(int8_layers: int) -> Plan:
    line = PlanLine(
        module="layer",
        role="dense",
        format="static_int8",
        bytes_before=4,
        bytes_after=1,
        reasons=(Reason("as_written", text="r"),),
    )
    return Plan(lines=(line,) * int8_layers)


def good(draw: Drawing) -> str:
    x = draw.rounded("x", UNSIGNED)
    floor = draw.constant(np.float32(0))
    return draw.node("Add", draw.node("Max", draw.gemm(x), floor), draw.gemm(x))


def relu_after_product(draw: Drawing) -> str:
    x = draw.rounded("x", UNSIGNED)
    return draw.node("Add", draw.node("Relu", draw.gemm(x)), draw.gemm(x))


def float_bias(draw: Drawing) -> str:
    x = draw.rounded("x", UNSIGNED)
    return draw.node("Add", draw.gemm(x, whole_bias=False), draw.gemm(x))


def signed_and_shared(draw: Drawing) -> str:
    x = draw.rounded("x", SIGNED)
    return draw.node("Add", draw.gemm(x), draw.gemm(x))


def left_in_float(draw: Drawing) -> str:
    return draw.node("Add", draw.gemm(draw.rounded("x", UNSIGNED)), "x")


def test_the_drawn_form_of_ours_passes(tmp_path):
    draw = Drawing()
    found = audit(draw.optimized(good(draw), tmp_path / "g.onnx"), plan(2), ())
    assert found.int8_products == 2
    assert found.nodes["QGemm"] == 2


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        (relu_after_product, "computes in float32 after a DequantizeLinear"),
        (float_bias, "computes in float32 after a DequantizeLinear"),
        (signed_and_shared, "reads signed inputs and repacks"),
        (left_in_float, "the plan has 2 int8 layers, the graph 1 int8 products"),
    ],
)
def test_int8_that_does_not_pay_is_refused(form: Callable[[Drawing], str], fault, tmp_path):
    draw = Drawing()
    optimized = draw.optimized(form(draw), tmp_path / "g.onnx")
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, plan(2), ())
    assert any(fault in found for found in caught.value.fields["faults"])


ROWS = 1000


def table(draw: Drawing, form: str) -> tuple[str, TableInitializers]:
    """A table read in one of several forms, as a graph's output."""
    codes = draw.constant(draw.random.integers(-127, 128, (ROWS, 8), np.int8), "codes")
    scale = draw.random.random(ROWS).astype(np.float32)
    names = ("codes", "scale")
    if form == "gather first":
        draw.constant(scale[:, None], "scale")
        rows = draw.node("Cast", draw.node("Gather", codes, "ids"), to=TensorProto.FLOAT)
        out = draw.node("Mul", rows, draw.node("Gather", "scale", "ids"))
    elif form == "dequantize first":
        draw.constant(scale, "scale")
        out = draw.node("Gather", draw.node("DequantizeLinear", codes, "scale", axis=0), "ids")
    else:
        draw.constant(scale[:, None], "scale")
        wide = draw.node("Mul", draw.node("Cast", codes, to=TensorProto.FLOAT), "scale")
        out = draw.node("Gather", wide, "ids")
    held = TableInitializers(module="user", rows=ROWS, format="rowwise_int8", names=names)
    return out, held


def test_a_table_gathered_before_it_is_widened_passes(tmp_path):
    draw = Drawing()
    out, held = table(draw, "gather first")
    found = audit(draw.optimized(out, tmp_path / "g.onnx"), None, (held,))
    assert found.packed_tables == 1
    assert found.weight_bytes == ROWS * (8 + 4)


@pytest.mark.parametrize(
    ("form", "fault"),
    [
        ("dequantize first", "table 'codes' is widened (DequantizeLinear) before its Gather"),
        ("widened and folded", "table 'user': 'codes' was replaced by the runtime"),
    ],
)
def test_a_table_that_is_float32_at_every_call_is_refused(form, fault, tmp_path):
    draw = Drawing()
    out, held = table(draw, form)
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(draw.optimized(out, tmp_path / "g.onnx"), None, (held,))
    assert fault in caught.value.fields["faults"]


def test_a_table_that_lost_rows_is_refused(tmp_path):
    draw = Drawing()
    out, held = table(draw, "gather first")
    more = held.model_copy(update={"rows": ROWS + 1})
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(draw.optimized(out, tmp_path / "g.onnx"), None, (more,))
    assert "table 'user': 'codes' lost rows" in caught.value.fields["faults"]


def test_scales_that_rows_share_are_as_many_as_their_ranges(tmp_path):
    draw = Drawing()
    out, held = table(draw, "gather first")
    shared = held.model_copy(
        update={"rows": 4 * ROWS - 1, "names": ("scale",), "every": {"scale": 4}}
    )
    optimized = draw.optimized(out, tmp_path / "g.onnx")
    audit(optimized, None, (shared,))
    # What belongs to the whole table is not counted in rows, and may be folded into the graph.
    audit(optimized, None, (shared.model_copy(update={"names": ("gone",), "every": {"gone": 0}}),))
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, None, (shared.model_copy(update={"rows": 4 * ROWS + 1}),))
    assert "table 'user': 'scale' lost rows" in caught.value.fields["faults"]


def test_a_layer_that_is_float32_in_memory_is_refused_where_it_should_be_packed(tmp_path):
    lowered = graph("Compact", recipe_with("weight_int4"), "onnxruntime")
    optimized = optimized_graph(lowered.path)
    layers = lowered.lowered.layers
    found = audit(optimized, lowered.model.plan, (), layers)
    assert (found.packed_layers, found.widened_layers) == (5, 0)
    assert found.nodes["MatMulNBits"] == 5
    gone = layers[0].model_copy(update={"name": "folded"})
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, lowered.model.plan, (), (*layers[1:], gone))
    (fault,) = caught.value.fields["faults"]
    assert fault == f"dense layer {gone.module!r}: 'folded' was widened by the runtime"
    assert caught.value.units == (gone.module,)
    # A weight that something else than a product of codes reads.
    draw = Drawing()
    codes = draw.constant(np.zeros((WIDTH, WIDTH), np.uint8))
    wide = draw.node("MatMul", "x", draw.node("Cast", codes, to=TensorProto.FLOAT))
    drawn = helper.make_graph(draw.nodes, "g", [], [], draw.held)
    layer = LayerInitializer(module="cross", format="weight_int4", name=codes, packed=True)
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(drawn, None, (), (layer,))
    fault = "dense layer 'cross': its codes are read by Cast instead of MatMulNBits"
    assert fault in caught.value.fields["faults"]
    assert wide


@pytest.mark.parametrize("kind", ["float16", "float8_dense"])
def test_layers_widened_when_a_session_starts_are_counted(kind):
    lowered = graph("Compact", recipe_with(kind), "onnxruntime")
    found = audit(optimized_graph(lowered.path), None, (), lowered.lowered.layers)
    assert (found.packed_layers, found.widened_layers) == (0, 5)


def test_tensorrts_form_of_a_table_is_refused_in_onnxruntime():
    lowered = graph("Compact", recipe_with("rowwise_int8"), "tensorrt-rtx")
    optimized = optimized_graph(lowered.path)
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(optimized, lowered.model.plan, lowered.lowered.tables)
    fault = "table 'model.genres.codes' is widened (DequantizeLinear) before its Gather"
    assert fault in caught.value.fields["faults"]


TABLES_OF = {"Ranker": 6, "Compact": 2}


@networks_and_recipes("Ranker", "Compact")
def test_what_we_write_for_onnxruntime_passes(network, kinds):
    lowered = graph(network, kinds, "onnxruntime")
    found = audit(optimized_graph(lowered.path), lowered.model.plan, lowered.lowered.tables)
    assert found.int8_products == (5 if {"static_int8", "qat"} & set(kinds) else 0)
    packs_tables = set(kinds) & TABLES
    assert found.packed_tables == (TABLES_OF[network] if packs_tables else 0)


@pytest.mark.parametrize(
    ("reference", "kinds"),
    [
        # In the default tier those that test_lowering.py writes for this target.
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
def test_what_we_write_for_other_networks_passes(reference, kinds):
    lowered = graph(reference, kinds, "onnxruntime")
    found = audit(optimized_graph(lowered.path), lowered.model.plan, lowered.lowered.tables)
    ordered = sum(line.format == "static_int8" for line in lowered.model.plan.lines)
    assert found.int8_products == ordered
    assert found.packed_tables >= 1


def test_the_weights_of_a_compressed_graph_are_fewer_bytes():
    sizes = []
    for kinds in ((), recipe_with("rowwise_int8"), recipe_with("rowwise_int4")):
        lowered = graph("Compact", kinds, "onnxruntime")
        optimized = optimized_graph(lowered.path)
        sizes.append(audit(optimized, lowered.model.plan, lowered.lowered.tables).weight_bytes)
    assert sizes[0] > sizes[1] > sizes[2]
