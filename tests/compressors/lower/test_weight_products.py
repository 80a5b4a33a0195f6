"""Graphs of networks that multiply by a table's weight or slice it, on every target.

``READERS`` (``tests/weight_readers.py``) has the networks; a reader is a network that reads a
weight in this way. The ONNX Runtime graph converts blocks of rows to float32, never the whole
table, which the audit checks. The TensorRT graph multiplies in float16, or in int8 with each input
as the sum of two int8 numbers.
"""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from error_codes import raises_code
from models import Graph, only_served_graph
from onnx import TensorProto, helper
from weight_readers import LONGEST, READERS

from compressors.core.model import Model
from compressors.core.skipping import run_or_skip
from compressors.core.steps.step import Method
from compressors.errors.compression import AuditFailed, NothingToCompress
from compressors.factorize.low_rank import LowRank
from compressors.lower.audit import audit
from compressors.lower.export import lower
from compressors.lower.findings import TableInitializers
from compressors.lower.targets.onnxruntime import tables as onnxruntime_tables
from compressors.lower.targets.registry import lowering_target
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.rewrite.fold import Fold
from infra.onnxruntime.sessions import optimized_graph

RECIPES: dict[str, tuple[Method, ...]] = {
    "none": (),
    # The presets ``fast`` and ``small`` with the steps that do not train.
    "fast": (RowwiseInt8(), Fold(), StaticInt8(), Float16()),
    "small": (RowwiseInt4(), RowwiseInt8(), Fold(), StaticInt8(), Float16()),
    "float16": (Float16(),),
    "shared scale": (RowwiseInt8(scale="float32", rows_per_scale=0),),
    "low rank": (LowRank(rank=0.5), RowwiseInt8()),
}
TARGETS = ("onnxruntime", "tensorrt-rtx")
_SCRATCH = tempfile.TemporaryDirectory(prefix="weights-")


@functools.cache
def compress(reader: str, recipe: str) -> Model:
    """Return a network of ``READERS`` after the steps of a recipe that apply to it."""
    folder, reference = Path(tempfile.mkdtemp(dir=_SCRATCH.name)), READERS[reader]
    model, bench = reference.model(), reference.bench(folder / "data")
    for number, step in enumerate(RECIPES[recipe]):
        try:
            model = run_or_skip(step, model, bench, folder / str(number))
        except NothingToCompress:
            continue
    return model


def lower_network(reader: str, recipe: str, target: str) -> Graph:
    model, signature = compress(reader, recipe), READERS[reader].signature
    path = Path(tempfile.mkdtemp(dir=_SCRATCH.name)) / "model.onnx"
    return Graph(
        model,
        lower(model.module, only_served_graph(signature), target, path),
        signature,
        path,
        target,
    )


# The cases without the marker ``nightly``.
DEFAULT_TIER = {
    ("self-attentive", "fast", "onnxruntime"),
    ("self-attentive", "fast", "tensorrt-rtx"),
    ("recurrent", "fast", "onnxruntime"),
    ("masked", "small", "tensorrt-rtx"),
    ("masked", "low rank", "onnxruntime"),
}


@pytest.mark.parametrize(
    ("reader", "recipe", "target"),
    [
        pytest.param(
            *case, id="-".join(case), marks=() if case in DEFAULT_TIER else pytest.mark.nightly
        )
        for case in ((a, b, c) for a in READERS for b in RECIPES for c in TARGETS)
    ],
)
def test_scores_of_a_graph_are_those_of_the_network(reader: str, recipe: str, target: str) -> None:
    graph = lower_network(reader, recipe, target)
    inputs = graph.rows(64)
    expected = graph.run_in_torch(inputs)
    difference = (graph.run_in_onnx(inputs) - expected) / expected.std()
    tolerance = lowering_target(target).tolerance(graph.model.plan)
    assert np.sqrt(np.mean(difference**2)) <= tolerance.root_mean_square
    one_row = {name: tensor[:1] for name, tensor in inputs.items()}
    assert abs(graph.run_in_onnx(one_row) - graph.run_in_torch(one_row)).max() <= (
        tolerance.largest * expected.std()
    )
    if recipe == "none":
        return
    plan = graph.model.plan
    assert plan is not None
    # A low-rank table is composed of the table ``narrow`` and a projection.
    item = plan.of("item.narrow" if recipe == "low rank" else "item")
    assert item is not None
    # Int4 rows have no product, so RowwiseInt4 skips the table, and RowwiseInt8 stores it.
    assert item.format == ("float16" if recipe == "float16" else "rowwise_int8")
    assert {table.module for table in graph.lowered.tables if table.multiplied} == {item.module}
    if target == "onnxruntime":
        result = audit(optimized_graph(graph.path), plan, graph.lowered.tables)
        assert result.packed_tables == len(graph.lowered.tables)


def test_blocks_of_rows_give_the_scores_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    one_block = lower_network("self-attentive", "fast", "onnxruntime")
    monkeypatch.setattr(onnxruntime_tables, "BLOCK_VALUES", 7 * 16)  # 7 of 40 rows
    blocks = lower_network("self-attentive", "fast", "onnxruntime")
    slice_counts = [
        sum(node.op_type == "Slice" for node in onnx.load(graph.path).graph.node)
        for graph in (one_block, blocks)
    ]
    # Codes and scales of five more blocks: six blocks instead of one.
    assert slice_counts[1] - slice_counts[0] == 2 * 5
    inputs = blocks.rows(8)
    np.testing.assert_array_equal(blocks.run_in_onnx(inputs), one_block.run_in_onnx(inputs))
    assert inputs["history"].shape[1] <= LONGEST
    audit(optimized_graph(blocks.path), blocks.model.plan, blocks.lowered.tables)


@pytest.mark.parametrize("sliced", [True, False], ids=["blocks", "whole table"])
def test_audit_rejects_a_product_by_a_table_that_is_dequantized_as_a_whole(sliced: bool) -> None:
    rows, dim = 8, 4
    nodes = [
        helper.make_node("Slice", ["codes", "begin", "end"], ["block"]),
        helper.make_node("DequantizeLinear", ["block" if sliced else "codes", "scale"], ["rows"]),
        helper.make_node("Gemm", ["x", "rows"], ["y"], transB=1),
    ]
    constants = {
        "codes": (TensorProto.INT8, (rows, dim)),
        "scale": (TensorProto.FLOAT, ()),
        "begin": (TensorProto.INT64, (1,)),
        "end": (TensorProto.INT64, (1,)),
    }
    graph = helper.make_graph(
        nodes if sliced else nodes[1:],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("batch", dim))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", None))],
        [
            helper.make_tensor(name, kind, shape, [1] * int(np.prod(shape)))
            for name, (kind, shape) in constants.items()
        ],
    )
    table = TableInitializers(
        module="item", rows=rows, format="rowwise_int8", names=("codes",), multiplied=True
    )
    if sliced:
        assert audit(graph, None, (table,)).packed_tables == 1
        return
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(graph, None, (table,))
    fault = "table 'codes' is widened (DequantizeLinear) before its product"
    assert fault in caught.value.fields["faults"]
