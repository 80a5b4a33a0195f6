"""Every dense layer of every reference model runs in int8 in ONNX Runtime."""

from pathlib import Path

import onnx
import pytest
from chained_networks import BLOCK, NORM_FIRST
from models import REFERENCES, Reference
from torch import nn

from compressors.contracts import IdInput, JaggedBag, Output, Signature
from compressors.core.runner import run
from compressors.lower.audit import FLOAT_PRODUCTS, INT8_PRODUCTS, audit
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.rewrite.fold import Fold
from examples.dcnv2 import DCNv2
from examples.gowalla import signature
from examples.two_tower import TwoTower
from infra.onnxruntime.sessions import optimized_graph

FIELDS = {"user": 40, "item": 90}
CLICKS = Signature(
    inputs=(
        *(IdInput(name=name, table=f"tables.{name}") for name in FIELDS),
        JaggedBag(name="genres", table="bags.genres", shape=(4,)),
    ),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


def clicks(structure: str) -> Reference:
    config = {
        "fields": [{"name": name, "rows": rows} for name, rows in FIELDS.items()],
        "bags": [{"name": "genres", "rows": 12}],
        "dim": 8,
        "hidden": [24, 16],
        "batch_norm": True,
        "structure": structure,
    }
    return Reference(DCNv2, CLICKS, config)


MODELS = {
    **{item.network.__name__: item for item in (*REFERENCES, NORM_FIRST, BLOCK)},
    "DCNv2 parallel": clicks("parallel"),
    "DCNv2 stacked": clicks("stacked"),
    "TwoTower": Reference(
        TwoTower, signature(), {"users": 40, "items": 90, "dim": 8, "hidden": 24}
    ),
}


WITH_NORMS = ("Normed", "NormFirst", "Block", "DCNv2 parallel", "DCNv2 stacked")


# The default tier has the networks with attention, with two towers, with a residual block and with
# all layers of DCNv2, each in one form; test_audit.py counts the layers of the references.
PLAIN = ("Attention", "TwoTower")
FOLDED = ("Block", "DCNv2 stacked")


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        pytest.param(
            name, folded, marks=() if name in (FOLDED if folded else PLAIN) else pytest.mark.nightly
        )
        for folded, names in ((False, MODELS), (True, WITH_NORMS))
        for name in names
    ],
)
def test_no_product_of_weights_stays_in_float(name: str, folded: bool, tmp_path: Path) -> None:
    reference = MODELS[name]
    model, bench = reference.model(), reference.bench(tmp_path / "data")
    for part in model.module.modules():
        if isinstance(part, nn.Linear) and not part.weight.any():  # as before its training
            nn.init.normal_(part.weight)
    layers = {name for name, part in model.module.named_modules() if type(part) is nn.Linear}
    if folded:
        model = run(Fold(), model, bench, tmp_path / "fold")
    model = run(StaticInt8(), model, bench, tmp_path / "int8")
    assert {line.module for line in model.plan.lines if line.format == "static_int8"} == layers
    products = 0
    for number, form in enumerate(served_graphs(reference.signature)):
        path = tmp_path / f"{number}.onnx"
        made = lower(model.module, form, "onnxruntime", path)
        graph = optimized_graph(path)
        plan = model.plan.model_copy(update={"lines": ()})  # its lines are of both graphs
        audit(graph, plan, made.tables, made.layers)
        held = {item.name for item in graph.initializer}
        products += sum(node.op_type in INT8_PRODUCTS for node in graph.node)
        assert not [
            node.name
            for node in graph.node
            if node.op_type in FLOAT_PRODUCTS and held.intersection(node.input)
        ]
    assert products == len(layers)


def test_a_layer_that_is_left_out_is_seen(tmp_path: Path) -> None:
    """The test above can fail: one layer in float is one product that reads weights."""
    reference = MODELS["Normed"]
    step = StaticInt8(layers=("out",))
    model = run(step, reference.model(), reference.bench(tmp_path / "data"), tmp_path / "int8")
    path = tmp_path / "model.onnx"
    lower(model.module, served_graphs(reference.signature)[0], "onnxruntime", path)
    graph: onnx.GraphProto = optimized_graph(path)
    held = {item.name for item in graph.initializer}
    left = [n for n in graph.node if n.op_type in FLOAT_PRODUCTS and held.intersection(n.input)]
    assert len(left) == 1
