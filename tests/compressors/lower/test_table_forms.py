"""Graphs of tables in every format and form have the scores of torch, on both targets.

A form is a format with an offset or symmetric levels, and with one scale per row, per four rows or
per table. One network has a table for each form, which single ids, padded bags and jagged bags read
in turn. With the marker ``nightly``, tests have all forms of the integer formats; without it, few
forms that contain every pair of bits, levels and rows per scale (``tests/pairwise.py``).

The audit checks that an optimized graph keeps the formats of the plan. A table is packed if the
graph reads its codes.
"""

import itertools
from collections.abc import Iterable

import numpy as np
import onnx
import pytest
import torch
from models import LONGEST, Graph, Reference, only_served_graph
from pairwise import pairwise
from torch import Tensor, nn

from compressors.contracts import IdInput, JaggedBag, Output, PaddedBag, Signature, TargetName
from compressors.core.modules.formats import PackedTable
from compressors.core.runner import run
from compressors.core.steps.step import TableStep
from compressors.errors.compression import ParityLost
from compressors.lower.audit import audit
from compressors.lower.comparison.parity import check_parity
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import input_names, wrap_for_serving
from compressors.quantize.tables.bfloat16 import BFloat16
from compressors.quantize.tables.float8_e4m3 import Float8E4M3
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import optimized_graph

ROWS = 30  # not a multiple of 4: the last scale belongs to 2 rows
BITS = {8: RowwiseInt8, 4: RowwiseInt4, 2: RowwiseInt2}
KINDS = ("offset", "symmetric")
ROWS_PER_SCALE = (4, 1, 0)
IntegerForms = Iterable[tuple[int, str, int]]
"""Bits, kind of levels and rows per scale of integer formats."""


def steps(integer_forms: IntegerForms) -> dict[str, TableStep]:
    """Return a step for each form, by the name of its table.

    The forms are ``integer_forms``, bfloat16, and float8 with each number of rows per scale.
    """
    forms: dict[str, TableStep] = {"bf16": BFloat16(tables=("bf16",))}
    for rows_per_scale in ROWS_PER_SCALE:
        name = f"float8_{rows_per_scale}"
        forms[name] = Float8E4M3(tables=(name,), rows_per_scale=rows_per_scale)
    for bits, kind, rows_per_scale in integer_forms:
        name = f"int{bits}_{kind}_{rows_per_scale}"
        forms[name] = BITS[bits](
            tables=(name,), symmetric=kind == "symmetric", rows_per_scale=rows_per_scale
        )
    return forms


FORMS = {
    "pairwise": steps(pairwise(list(BITS), KINDS, ROWS_PER_SCALE)),
    "all": steps(itertools.product(BITS, KINDS, ROWS_PER_SCALE)),
}


class TablesOfAllForms(nn.Module):
    """A sum over tables that single ids, padded bags and jagged bags read in turn."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for index, name in enumerate(names):
            dim = 5 + index % 4  # every remainder modulo 4, the largest number of codes per byte
            if index % 3 == 0:
                table: nn.Module = nn.Embedding(ROWS, dim)
            elif index % 3 == 1:
                table = nn.EmbeddingBag(ROWS, dim, mode="mean", padding_idx=0)
            else:
                table = nn.EmbeddingBag(ROWS, dim, mode="sum")
            self.add_module(name, table)
            self.add_module(f"out_{name}", nn.Linear(dim, 1, bias=False))

    def forward(self, **inputs: Tensor) -> Tensor:
        scores = []
        for name in self.names:
            tensors = [inputs[key] for key in (name, f"{name}_offsets") if key in inputs]
            rows = self.get_submodule(name)(*tensors)  # (batch, dim)
            scores.append(self.get_submodule(f"out_{name}")(torch.tanh(rows)))
        return torch.cat(scores, dim=1).sum(dim=1)


def reference(names: list[str]) -> Reference:
    """Return the network with one table of each name, and its signature."""
    inputs = []
    for index, name in enumerate(names):
        dtype = "int32" if index % 2 else "int64"
        common = {"name": name, "table": name, "dtype": dtype, "out_of_range": "clamp"}
        if index % 3 == 0:
            inputs.append(IdInput(**common))
        elif index % 3 == 1:
            inputs.append(PaddedBag(**common, shape=(4,)))
        else:
            # ``LONGEST``: the declared length of the longest list
            inputs.append(JaggedBag(**common, shape=(LONGEST,)))
    signature = Signature(
        inputs=tuple(inputs),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    )
    return Reference(TablesOfAllForms, signature, {"names": names})


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
    lowered = lower(compressed.module, only_served_graph(network.signature), request.param, path)
    return Graph(compressed, lowered, network.signature, path), request.param


def test_compressed_network_has_every_table_format(compressed):
    assert {line.format for line in compressed.plan.lines if line.role == "table"} == {
        "rowwise_int8",
        "rowwise_int4",
        "rowwise_int2",
        "float8_e4m3",
        "bfloat16",
    }


def test_graph_of_every_form_has_the_scores_of_torch(graph):
    lowered, target = graph
    for count in (1500, 2, 1):
        inputs = lowered.rows(count)
        expected, scores_of_graph = lowered.run_in_torch(inputs), lowered.run_in_onnx(inputs)
        if count > 2:
            # The limit is relative to the standard deviation of the scores, for which the smaller
            # batches have too few rows.
            parity = check_parity(expected, scores_of_graph, lowered.model.plan, target)
        np.testing.assert_allclose(scores_of_graph, expected, rtol=0, atol=parity.largest_limit)


def test_audit_counts_every_form_as_packed_in_onnxruntime(forms, graph):
    lowered, target = graph
    if target != "onnxruntime":
        pytest.skip("graphs for TensorRT are audited in tests/infra")
    result = audit(optimized_graph(lowered.path), lowered.model.plan, lowered.lowered.tables)
    assert result.packed_tables == len(forms)


def test_tables_of_every_form_take_the_bytes_of_the_plan(forms, graph):
    lowered, target = graph
    initializers = {item.name: item for item in onnx.load(lowered.path).graph.initializer}
    tables = {table.module: table for table in lowered.lowered.tables}
    assert set(tables) == set(forms)
    for name, table in tables.items():
        stored_bytes = sum(len(initializers[item].raw_data) for item in table.names)
        # In graphs for ONNX Runtime, the only scale of a table is float32 instead of float16.
        wider = 2 if name == "int8_symmetric_0" and target == "onnxruntime" else 0
        assert stored_bytes == lowered.model.plan.of(name).bytes_after + wider, name


def test_lowered_tables_list_how_many_rows_share_each_entry(graph):
    """Codes have one entry per row; scales and offsets may be shared (0: by all rows)."""
    lowered, _ = graph
    rows_per_entry = {
        table.module: [table.rows_per_entry.get(name, 1) for name in table.names]
        for table in lowered.lowered.tables
    }
    # Codes, scales, and offsets if the form has them.
    assert rows_per_entry["int4_offset_1"] == [1, 1, 1]
    assert rows_per_entry["int8_offset_4"] == [1, 4, 4]
    assert rows_per_entry["float8_0"] == [1, 0]
    assert rows_per_entry["bf16"] == [1]
    for table in lowered.lowered.tables:
        initializers = {item.name: item for item in onnx.load(lowered.path).graph.initializer}
        for name in table.names:
            if table.entries(name) is not None:
                assert table.entries(name) == initializers[name].dims[0]


def test_parity_fails_if_the_scales_of_any_one_table_are_wrong(forms, network, compressed, graph):
    """So ``test_graph_of_every_form_has_the_scores_of_torch`` would fail for one wrong form."""
    lowered, target = graph
    inputs = lowered.rows(1500)
    scores_of_graph = lowered.run_in_onnx(inputs)
    changed_model = compressed.private()  # a copy of the module tree, to change its tables
    for name in forms:
        parts = changed_model.module.get_submodule(name).modules()
        (table,) = (part for part in parts if isinstance(part, PackedTable))
        tensor_name = "scale" if name != "bf16" else "weight"
        original = dict(table.named_buffers())[tensor_name]
        setattr(table, tensor_name, (original.float() * 1.2).to(original.dtype))
        wrapper = wrap_for_serving(
            changed_model.module,
            only_served_graph(network.signature),
            network.rows_of_tables(),
        )
        with torch.no_grad():
            scores = wrapper(*(inputs[key] for key in input_names(network.signature))).numpy()
        with pytest.raises(ParityLost):
            check_parity(scores, scores_of_graph, lowered.model.plan, target)
        setattr(table, tensor_name, original)
