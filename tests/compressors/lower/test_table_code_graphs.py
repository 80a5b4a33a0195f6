"""Tables with codebooks, written down for both targets: the same numbers, and nothing widened."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from error_codes import raises_code
from models import LONGEST, Graph, Reference, run, whole
from onnx import TensorProto
from table_codes import STEPS, named
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
from compressors.lower.export import lower
from compressors.lower.parity import compare
from infra.onnxruntime.sessions import optimized_graph

ORT: TargetName = "onnxruntime"
RTX: TargetName = "tensorrt-rtx"
_SCRATCH = tempfile.TemporaryDirectory(prefix="codes-")


class Lookups(nn.Module):
    """A table of odd width read by single ids, and one by each kind of bag."""

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
            JaggedBag(name="history", table="history", shape=(LONGEST,)),
        ),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    ),
)

# Every width of codes of every format with the shared tests of default settings.
WRITTEN = (0, 2, 4, 5, 8)
# TensorRT's codes differ by width. ONNX Runtime's do not: one in the default tier.
FOR_ONNXRUNTIME = (2,)


def cases(target: TargetName) -> list[Any]:
    return [
        pytest.param(
            place,
            id=named(STEPS[place]),
            marks=() if target == RTX or place in FOR_ONNXRUNTIME else pytest.mark.nightly,
        )
        for place in WRITTEN
    ]


each_graph_for_onnxruntime = pytest.mark.parametrize("place", cases(ORT))
each_graph_for_tensorrt = pytest.mark.parametrize("place", cases(RTX))
each_graph = pytest.mark.parametrize(
    ("place", "target"),
    [
        pytest.param(*case.values, target, id=f"{target}-{case.id}", marks=case.marks)
        for target in (ORT, RTX)
        for case in cases(target)
    ],
)


@functools.cache
def written(place: int, target: TargetName) -> Graph:
    """The network under one of the steps."""
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    bench = Bench(signature=REFERENCE.signature)
    model = run(STEPS[place], REFERENCE.model(), bench, folder)
    path = folder / "model.onnx"
    lowered = lower(model.module, whole(REFERENCE.signature), target, path)
    return Graph(model, lowered, REFERENCE.signature, path)


@each_graph
def test_the_graph_reads_what_the_module_reads(place, target):
    lowered = written(place, target)
    for count in (1, 400):
        inputs = lowered.rows(count)
        expected, found = lowered.in_torch(inputs), lowered.in_onnx(inputs)
        # Codes are whole numbers and entries are looked up: what differs is float32's last bits
        # in the sums after the tables, on every target.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    compare(expected, found, lowered.model.plan, target)


@each_graph
def test_every_stored_tensor_takes_the_bytes_of_the_plan(place, target):
    lowered = written(place, target)
    held = {item.name: item for item in onnx.load(lowered.path).graph.initializer}
    taken = [table for table in lowered.lowered.tables if table.format == STEPS[place].kind]
    lines = lowered.model.plan.lines
    assert [t.module for t in taken] == [n.module for n in lines if n.format == STEPS[place].kind]
    assert "item" in {table.module for table in taken}
    for table in taken:
        size = sum(len(held[name].raw_data) for name in table.names)
        assert size == lowered.model.plan.of(table.module).bytes_after
        (book,) = (name for name in table.names if name.endswith(".codebook"))
        assert table.entries(book) is None
        for name in table.names:
            assert table.entries(name) in {None, held[name].dims[0]}


@each_graph_for_onnxruntime
def test_onnxruntime_looks_codes_up_before_it_unpacks_them(place):
    lowered = written(place, ORT)
    found = optimized_graph(lowered.path)
    judged = audit(found, lowered.model.plan, lowered.lowered.tables)
    taken = [table for table in lowered.lowered.tables if table.format != "float32"]
    assert judged.packed_tables == len(taken)
    for table in taken:
        for name in table.names:
            assert [n.op_type for n in found.node if name in n.input] == ["Gather"], name


@each_graph_for_tensorrt
def test_tensorrt_gets_signed_codes_that_are_dequantized_by_one(place):
    step, lowered = STEPS[place], written(place, RTX)
    graph = onnx.load(lowered.path).graph
    held = {item.name: item for item in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    for table in lowered.lowered.tables:
        if table.format == "float32":
            continue
        (codes,) = (name for name in table.names if name.endswith(".codes"))
        module = lowered.model.module.get_submodule(table.module)
        inside = getattr(module, "table", module)
        bits = step.storage.width(inside.rows, inside.dim, step.settings())
        # A nibble holds two codes of two bits: TensorRT takes nothing narrower.
        assert held[codes].data_type == (TensorProto.INT8 if bits == 8 else TensorProto.INT4)
        (read,) = (node for node in graph.node if codes in node.input)
        assert read.op_type == "DequantizeLinear"
        scale = held.get(read.input[1])
        if scale is None:
            (attribute,) = maker[read.input[1]].attribute
            scale = attribute.t
        assert onnx.numpy_helper.to_array(scale) == 1
        readers = [node.op_type for node in graph.node if read.output[0] in node.input]
        assert readers == ["Gather"]


def test_codes_that_are_widened_as_a_whole_are_refused():
    lowered = written(4, ORT)
    graph = optimized_graph(lowered.path)
    (table,) = (t for t in lowered.lowered.tables if t.module == "item")
    (name,) = (name for name in table.names if name.endswith(".codes"))
    (read,) = (node for node in graph.node if name in node.input)
    graph.node.insert(0, onnx.helper.make_node("Cast", [name], ["wide"], to=TensorProto.INT32))
    read.input[0] = "wide"
    with raises_code(AuditFailed, "graph_not_as_ordered") as caught:
        audit(graph, lowered.model.plan, lowered.lowered.tables)
    assert (
        "table 'model.item.codes' is widened (Cast) before its Gather"
        in caught.value.fields["faults"]
    )
