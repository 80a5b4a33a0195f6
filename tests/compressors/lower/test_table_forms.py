"""Every form of every table format, written down for both targets, computes what torch computes.

One network has a table for each: single ids, padded bags and jagged bags in turn. In the default
tier it has a pairwise cover of the forms.
"""

import itertools
from collections.abc import Iterable

import numpy as np
import onnx
import pytest
import torch
from models import LONGEST, Graph, Reference, whole
from pairwise import pairwise
from torch import Tensor, nn

from compressors.contracts import IdInput, JaggedBag, Output, PaddedBag, Signature, TargetName
from compressors.core.modules.formats import PackedTable
from compressors.core.runner import run
from compressors.core.steps.step import TableStep
from compressors.errors.compression import ParityLost
from compressors.lower.audit import audit
from compressors.lower.export import lower
from compressors.lower.parity import compare
from compressors.lower.serving_wrapper import input_names, wrap_for_serving
from compressors.quantize.tables.bfloat16 import BFloat16
from compressors.quantize.tables.float8_e4m3 import Float8E4M3
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import optimized_graph

ROWS = 30  # no multiple of four: the last rows that share a scale are two
BITS = {8: RowwiseInt8, 4: RowwiseInt4, 2: RowwiseInt2}


KINDS = ("offset", "symmetric")
TOGETHER = (4, 1, 0)
Grids = Iterable[tuple[int, str, int]]


def steps(grids: Grids) -> dict[str, TableStep]:
    """A step for each form: of these grids, and of those without any."""
    forms: dict[str, TableStep] = {"bf16": BFloat16(tables=("bf16",))}
    for together in TOGETHER:
        name = f"float8_{together}"
        forms[name] = Float8E4M3(tables=(name,), rows_per_scale=together)
    for bits, kind, together in grids:
        name = f"int{bits}_{kind}_{together}"
        forms[name] = BITS[bits](
            tables=(name,), symmetric=kind == "symmetric", rows_per_scale=together
        )
    return forms


FORMS = {
    "pairwise": steps(pairwise(list(BITS), KINDS, TOGETHER)),
    "all": steps(itertools.product(BITS, KINDS, TOGETHER)),
}


class EveryForm(nn.Module):
    """The sum of what is said by single ids, padded bags and jagged bags, a table each in turn."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for number, name in enumerate(names):
            dim = 5 + number % 4  # every remainder that packing can leave
            if number % 3 == 0:
                table: nn.Module = nn.Embedding(ROWS, dim)
            elif number % 3 == 1:
                table = nn.EmbeddingBag(ROWS, dim, mode="mean", padding_idx=0)
            else:
                table = nn.EmbeddingBag(ROWS, dim, mode="sum")
            self.add_module(name, table)
            self.add_module(f"out_{name}", nn.Linear(dim, 1, bias=False))

    def forward(self, **inputs: Tensor) -> Tensor:
        scores = []
        for name in self.names:
            given = [inputs[key] for key in (name, f"{name}_offsets") if key in inputs]
            rows = self.get_submodule(name)(*given)  # (batch, dim)
            scores.append(self.get_submodule(f"out_{name}")(torch.tanh(rows)))
        return torch.cat(scores, dim=1).sum(dim=1)


def reference(names: list[str]) -> Reference:
    inputs = []
    for number, name in enumerate(names):
        dtype = "int32" if number % 2 else "int64"
        common = {"name": name, "table": name, "dtype": dtype, "out_of_range": "clamp"}
        if number % 3 == 0:
            inputs.append(IdInput(**common))
        elif number % 3 == 1:
            inputs.append(PaddedBag(**common, shape=(4,)))
        else:
            inputs.append(JaggedBag(**common, shape=(LONGEST,)))
    signature = Signature(
        inputs=tuple(inputs),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    )
    return Reference(EveryForm, signature, {"names": names})


@pytest.fixture(scope="module", params=["pairwise", pytest.param("all", marks=pytest.mark.nightly)])
def forms(request: pytest.FixtureRequest) -> dict[str, TableStep]:
    return FORMS[request.param]


@pytest.fixture(scope="module")
def network(forms: dict[str, TableStep]) -> Reference:
    return reference(list(forms))


@pytest.fixture(scope="module")
def compressed(forms, network: Reference, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("forms")
    model, bench = network.model(), network.bench(folder / "data")
    for name, step in forms.items():
        model = run(step, model, bench, folder / name)
    return model


@pytest.fixture(
    scope="module",
    params=["onnxruntime", pytest.param("tensorrt-rtx", marks=pytest.mark.nightly)],
)
def graph(
    request: pytest.FixtureRequest, network, compressed, tmp_path_factory
) -> tuple[Graph, TargetName]:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    lowered = lower(compressed.module, whole(network.signature), request.param, path)
    return Graph(compressed, lowered, network.signature, path), request.param


def test_every_form_is_there(compressed):
    assert {line.format for line in compressed.plan.lines if line.role == "table"} == {
        "rowwise_int8",
        "rowwise_int4",
        "rowwise_int2",
        "float8_e4m3",
        "bfloat16",
    }


def test_the_graph_computes_what_torch_computes(graph):
    lowered, target = graph
    for count in (1500, 2, 1):
        inputs = lowered.rows(count)
        expected, found = lowered.in_torch(inputs), lowered.in_onnx(inputs)
        if count > 2:
            parity = compare(expected, found, lowered.model.plan, target)
        np.testing.assert_allclose(found, expected, rtol=0, atol=parity.largest_limit)


def test_onnxruntime_serves_every_form_packed(forms, graph):
    lowered, target = graph
    if target != "onnxruntime":
        pytest.skip("the other runtime's graph is judged in tests/infra")
    found = audit(optimized_graph(lowered.path), lowered.model.plan, lowered.lowered.tables)
    assert found.packed_tables == len(forms)


def test_a_graph_holds_the_bytes_of_the_plan(forms, graph):
    lowered, _ = graph
    held = {item.name: item for item in onnx.load(lowered.path).graph.initializer}
    tables = {table.module: table for table in lowered.lowered.tables}
    assert set(tables) == set(forms)
    for name, table in tables.items():
        stored = sum(len(held[item].raw_data) for item in table.names)
        assert stored == lowered.model.plan.of(name).bytes_after, name


def test_a_table_says_which_of_its_tensors_its_rows_share(graph):
    lowered, _ = graph
    every = {
        table.module: [table.every.get(name, 1) for name in table.names]
        for table in lowered.lowered.tables
    }
    assert every["int4_offset_1"] == [1, 1, 1]
    assert every["int8_offset_4"] == [1, 4, 4]
    assert every["float8_0"] == [1, 0]
    assert every["bf16"] == [1]
    for table in lowered.lowered.tables:
        held = {item.name: item for item in onnx.load(lowered.path).graph.initializer}
        for name in table.names:
            if table.entries(name) is not None:
                assert table.entries(name) == held[name].dims[0]


def test_wrong_scales_of_any_one_table_are_caught(forms, network, compressed, graph):
    """So that the comparison above would see a form that is wrong."""
    lowered, target = graph
    inputs = lowered.rows(1500)
    found = lowered.in_onnx(inputs)
    wrong = compressed.private()
    for name in forms:
        parts = wrong.module.get_submodule(name).modules()
        (table,) = (part for part in parts if isinstance(part, PackedTable))
        changed = "scale" if name != "bf16" else "weight"
        right = getattr(table, changed)
        setattr(table, changed, (right.float() * 1.2).to(right.dtype))
        wrapper = wrap_for_serving(wrong.module, whole(network.signature), network.rows_of_tables())
        with torch.no_grad():
            scores = wrapper(*(inputs[key] for key in input_names(network.signature))).numpy()
        with pytest.raises(ParityLost):
            compare(scores, found, lowered.model.plan, target)
        setattr(table, changed, right)
