"""Every dense layer of every reference model runs in int8 in ONNX Runtime.

``INT8_MATMULS`` and ``FLOAT_MATMULS`` are the ONNX operators that multiply matrices of int8 codes
and of floats. ``audit`` raises if the optimized graph lost a format of the plan.
"""

from pathlib import Path

import onnx
import pytest
from chained_networks import BLOCK, NORM_FIRST
from models import REFERENCES, Reference
from torch import nn

from compressors.contracts import IdInput, JaggedBag, Output, Signature
from compressors.core.runner import run
from compressors.lower.audit import FLOAT_MATMULS, INT8_MATMULS, audit
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.rewrite.fold import Fold
from examples.dcnv2 import DCNv2
from examples.gowalla import build_signature
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


def dcnv2(structure: str) -> Reference:
    """Return a small DCN-V2 with parallel or stacked cross and deep layers."""
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
    "DCNv2 parallel": dcnv2("parallel"),
    "DCNv2 stacked": dcnv2("stacked"),
    "TwoTower": Reference(
        TwoTower, build_signature(), {"users": 40, "items": 90, "dim": 8, "hidden": 24}
    ),
}


WITH_NORMS = ("Normed", "NormFirst", "Block", "DCNv2 parallel", "DCNv2 stacked")


# Not marked ``nightly`` are networks with attention, two towers, a residual block and all layers of
# DCNv2, each plain or folded; test_audit.py counts the layers of the other reference models.
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
def test_every_dense_layer_of_every_reference_model_runs_in_int8(
    name: str, folded: bool, tmp_path: Path
) -> None:
    reference = MODELS[name]
    model, bench = reference.model(), reference.bench(tmp_path / "data")
    for part in model.module.modules():
        # Layers that are initialized with zeros have no int8 scale.
        if isinstance(part, nn.Linear) and not part.weight.any():
            nn.init.normal_(part.weight)
    layers = {name for name, part in model.module.named_modules() if type(part) is nn.Linear}
    if folded:
        model = run(Fold(), model, bench, tmp_path / "fold")
    model = run(StaticInt8(), model, bench, tmp_path / "int8")
    assert {line.module for line in model.plan.lines if line.format == "static_int8"} == layers
    products = 0
    for number, served_graph in enumerate(served_graphs(reference.signature)):
        path = tmp_path / f"{number}.onnx"
        lowered = lower(model.module, served_graph, "onnxruntime", path)
        graph = optimized_graph(path)
        plan = model.plan.model_copy(update={"lines": ()})  # the lines are of both graphs
        audit(graph, plan, lowered.tables, lowered.layers)
        initializers = {item.name for item in graph.initializer}
        products += sum(node.op_type in INT8_MATMULS for node in graph.node)
        assert not [
            node.name
            for node in graph.node
            if node.op_type in FLOAT_MATMULS and initializers.intersection(node.input)
        ]
    assert products == len(layers)


def test_float_layer_is_found_among_the_products(tmp_path: Path) -> None:
    """Show that the test above would find a layer that does not run in int8."""
    reference = MODELS["Normed"]
    step = StaticInt8(layers=("out",))
    model = run(step, reference.model(), reference.bench(tmp_path / "data"), tmp_path / "int8")
    path = tmp_path / "model.onnx"
    lower(model.module, served_graphs(reference.signature)[0], "onnxruntime", path)
    graph: onnx.GraphProto = optimized_graph(path)
    initializers = {item.name for item in graph.initializer}
    float_products = [
        n for n in graph.node if n.op_type in FLOAT_MATMULS and initializers.intersection(n.input)
    ]
    assert len(float_products) == 1  # ``hidden``, the only other dense layer
