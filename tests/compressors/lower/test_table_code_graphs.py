"""Graphs of tables with codebooks for ONNX Runtime and TensorRT-RTX: scores, and packed codes.

``STEPS`` (``tests/table_codes.py``) has steps of each codebook format, with codes of 2, 4 and 8
bits, which is their width. The audit checks that an optimized graph looks up codes, and does not
decode a whole table first.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from error_codes import raises_code
from models import LONGEST, Graph, Reference, only_served_graph, run
from onnx import TensorProto
from table_codes import STEPS, step_id
from torch import Tensor, nn

from compressors.contracts import (
    Bench,
    IdInput,
    JaggedBag,
    Output,
    PaddedBag,
    Signature,
    TargetName,
)
from compressors.errors.compression import AuditFailed
from compressors.lower.audit import audit
from compressors.lower.comparison.parity import check_parity
from compressors.lower.export import lower
from compressors.quantize.tables.product_codes import ProductCodes
from infra.onnxruntime.sessions import optimized_graph

ORT: TargetName = "onnxruntime"
RTX: TargetName = "tensorrt-rtx"
_SCRATCH = tempfile.TemporaryDirectory(prefix="codes-")


class Lookups(nn.Module):
    """A table with rows of 7 values for single ids, and a table for each kind of bag."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(300, 7)
        self.genres = nn.EmbeddingBag(20, 6, mode="mean", padding_idx=0)
        self.history = nn.EmbeddingBag(50, 6, mode="sum")
        self.out = nn.Linear(19, 1)

    def forward(
        self, item: Tensor, genres: Tensor, history: Tensor, history_offsets: Tensor
    ) -> Tensor:
        bags = self.genres(genres), self.history(history, history_offsets)
        score: Tensor = self.out(torch.cat([self.item(item), *bags], dim=1)).squeeze(1)
        return score


REFERENCE = Reference(
    Lookups,
    Signature(
        inputs=(
            IdInput(name="item", table="item"),
            PaddedBag(name="genres", table="genres", shape=(4,)),
            # ``LONGEST``: the declared length of the longest list
            JaggedBag(name="history", table="history", shape=(LONGEST,)),
        ),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    ),
)

# Indices in ``STEPS``: with the other tests, these have every format with every width of codes.
TESTED_STEPS = (0, 2, 4, 5, 8)
# Graphs for TensorRT depend on the width of codes. Those for ONNX Runtime do not, so all but one of
# them are marked ``nightly``.
ONNXRUNTIME_IN_DEFAULT_TIER = (2,)


def cases(target: TargetName) -> list[Any]:
    """Return the tested steps for a target as parameters of a test."""
    return [
        pytest.param(
            step_index,
            id=step_id(STEPS[step_index]),
            marks=()
            if target == RTX or step_index in ONNXRUNTIME_IN_DEFAULT_TIER
            else pytest.mark.nightly,
        )
        for step_index in TESTED_STEPS
    ]


each_graph_for_onnxruntime = pytest.mark.parametrize("step_index", cases(ORT))
each_graph_for_tensorrt = pytest.mark.parametrize("step_index", cases(RTX))
each_graph = pytest.mark.parametrize(
    ("step_index", "target"),
    [
        pytest.param(*case.values, target, id=f"{target}-{case.id}", marks=case.marks)
        for target in (ORT, RTX)
        for case in cases(target)
    ],
)


@functools.cache
def lower_step(step_index: int, target: TargetName) -> Graph:
    """Apply a step of ``STEPS`` to the network and export its graph."""
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    bench = Bench(signature=REFERENCE.signature)
    model = run(STEPS[step_index], REFERENCE.model(), bench, folder)
    path = folder / "model.onnx"
    lowered = lower(model.module, only_served_graph(REFERENCE.signature), target, path)
    return Graph(model, lowered, REFERENCE.signature, path)


@each_graph
def test_graph_of_codebook_tables_has_the_scores_of_torch(step_index, target):
    compressed = lower_step(step_index, target)
    for count in (1, 400):
        inputs = compressed.rows(count)
        expected, actual = compressed.run_in_torch(inputs), compressed.run_in_onnx(inputs)
        # Looked-up entries are exact on every target; only sums after the tables are rounded.
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
    # The scores of the 400 rows; one row has no standard deviation, to which the limit is relative.
    check_parity(expected, actual, compressed.model.plan, target)


@each_graph
def test_codebook_tables_in_graphs_take_the_bytes_of_the_plan(step_index, target):
    compressed = lower_step(step_index, target)
    initializers = {item.name: item for item in onnx.load(compressed.path).graph.initializer}
    compressed_tables = [
        table for table in compressed.lowered.tables if table.format == STEPS[step_index].kind
    ]
    lines = compressed.model.plan.lines
    assert [t.module for t in compressed_tables] == [
        n.module for n in lines if n.format == STEPS[step_index].kind
    ]
    assert "item" in {table.module for table in compressed_tables}
    for table in compressed_tables:
        size = sum(len(initializers[name].raw_data) for name in table.names)
        assert size == compressed.model.plan.of(table.module).bytes_after
        (codebook,) = (name for name in table.names if name.endswith(".codebook"))
        assert table.entries(codebook) is None  # a codebook belongs to the whole table
        # ``entries``: the first dimension of a tensor with an entry per row or group of rows.
        for name in table.names:
            assert table.entries(name) in {None, initializers[name].dims[0]}


@each_graph_for_onnxruntime
def test_codes_in_onnxruntime_are_gathered_before_they_are_unpacked(step_index):
    compressed = lower_step(step_index, ORT)
    optimized = optimized_graph(compressed.path)
    result = audit(optimized, compressed.model.plan, compressed.lowered.tables)
    compressed_tables = [table for table in compressed.lowered.tables if table.format != "float32"]
    assert result.packed_tables == len(compressed_tables)
    for table in compressed_tables:
        for name in table.names:
            assert [n.op_type for n in optimized.node if name in n.input] == ["Gather"], name


@each_graph_for_tensorrt
def test_codes_for_tensorrt_are_signed_and_dequantized_with_scale_1(step_index):
    step, compressed = STEPS[step_index], lower_step(step_index, RTX)
    graph = onnx.load(compressed.path).graph
    initializers = {item.name: item for item in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    for table in compressed.lowered.tables:
        if table.format == "float32":
            continue
        (codes,) = (name for name in table.names if name.endswith(".codes"))
        module = compressed.model.module.get_submodule(table.module)
        table_module = getattr(module, "table", module)
        bits = step.storage.width(table_module.rows, table_module.dim, step.settings())
        # An int4 holds two codes of 2 bits, because TensorRT has no smaller type.
        assert initializers[codes].data_type == (
            TensorProto.INT8 if bits == 8 else TensorProto.INT4
        )
        (reader,) = (node for node in graph.node if codes in node.input)
        assert reader.op_type == "DequantizeLinear"
        scale = initializers.get(reader.input[1])
        if scale is None:
            (attribute,) = producers[reader.input[1]].attribute
            scale = attribute.t
        assert onnx.numpy_helper.to_array(scale) == 1
        readers = [node.op_type for node in graph.node if reader.output[0] in node.input]
        assert readers == ["Gather"]


def test_audit_rejects_codes_that_are_unpacked_before_the_gather():
    compressed = lower_step(
        STEPS.index(ProductCodes(parts=3, bits=4, codebook_type="float16")), ORT
    )
    graph = optimized_graph(compressed.path)
    (table,) = (t for t in compressed.lowered.tables if t.module == "item")
    (name,) = (name for name in table.names if name.endswith(".codes"))
    (reader,) = (node for node in graph.node if name in node.input)
    graph.node.insert(0, onnx.helper.make_node("Cast", [name], ["wide"], to=TensorProto.INT32))
    reader.input[0] = "wide"
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(graph, compressed.model.plan, compressed.lowered.tables)
    assert (
        "table 'model.item.codes' is widened (Cast) before its Gather"
        in caught.value.fields["faults"]
    )
