"""Lookups in tables of the same format and width are merged in ONNX Runtime's graph.

The audit checks that an optimized graph keeps the formats of the plan. A table is packed if the
graph reads its codes.
"""

import functools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import Reference
from torch import Tensor, nn

from compressors.contracts import IdInput, Output, Signature, TargetName
from compressors.core.model import Model
from compressors.core.random_inputs import generate_edge_inputs, generate_inputs
from compressors.core.registries import AnyStep
from compressors.core.runner import run
from compressors.lower.audit import audit
from compressors.lower.export import Lowered, lower
from compressors.lower.lookups import merged_tables
from compressors.lower.serving_wrapper import input_names, served_graphs
from compressors.quantize.tables.additive_codes import AdditiveCodes
from compressors.quantize.tables.bfloat16 import BFloat16
from compressors.quantize.tables.kmeans import KMeans
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.residual_codes import ResidualCodes
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import Session, optimized_graph

_SCRATCH = tempfile.TemporaryDirectory(prefix="merged-")
FIELDS = {"user": 40, "item": 300, "city": 9}


class ThreeTables(nn.Module):
    """Concatenates the rows of three tables of equal width, and of one of another width.

    With ``masks_by_id``, the id 0 of input ``user`` is also used to mask its row. With
    ``replaces_id``, id 7 of input ``item`` is replaced by 0 before the lookup.
    """

    def __init__(self, *, masks_by_id: bool = False, replaces_id: bool = False) -> None:
        super().__init__()
        self.masks_by_id, self.replaces_id = masks_by_id, replaces_id
        self.tables = nn.ModuleDict({name: nn.Embedding(rows, 8) for name, rows in FIELDS.items()})
        self.wide = nn.Embedding(12, 5)
        self.out = nn.Linear(3 * 8 + 5, 1)

    def forward(self, wide: Tensor, **ids: Tensor) -> Tensor:
        if self.replaces_id:  # one of 300 ids, which random inputs rarely contain
            ids["item"] = ids["item"].masked_fill(ids["item"] == 7, 0)
        parts = [table(ids[name]) for name, table in self.tables.items()]  # (rows, 8) each
        if self.masks_by_id:
            parts[0] = parts[0] * (ids["user"] > 0).unsqueeze(1)
        logit: Tensor = self.out(torch.cat([*parts, self.wide(wide)], dim=1))
        return logit.squeeze(1)


def reference_of_fields(policy: str = "clamp", **options: bool) -> Reference:
    """Return ``ThreeTables`` with these options, and this policy for ids out of range.

    With the policy "default_row", each of the three tables has another default row.
    """
    inputs = [
        IdInput(name=name, table=f"tables.{name}", out_of_range=policy, default_row=index + 1)
        for index, name in enumerate(FIELDS)
    ]
    return Reference(
        ThreeTables,
        Signature(
            inputs=(*inputs, IdInput(name="wide", table="wide", out_of_range=policy)),
            outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
        ),
        options,
    )


def compress(reference: Reference, step: AnyStep, folder: Path) -> Model:
    return run(step, reference.model(), reference.bench(folder / "data"), folder / "out")


def lower_model(
    reference: Reference, model: Model, folder: Path, target: TargetName = "onnxruntime"
) -> tuple[Lowered, Path]:
    path = folder / f"{target}.onnx"
    return lower(model.module, served_graphs(reference.signature)[0], target, path), path


@functools.cache
def compress_and_lower(step: AnyStep, policy: str) -> tuple[Model, Lowered, Path]:
    """Return the network after a step, and its graph for ONNX Runtime."""
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    reference = reference_of_fields(policy)
    model = compress(reference, step, folder)
    return (model, *lower_model(reference, model, folder))


def check_scores(reference: Reference, lowered: Lowered, path: Path) -> None:
    """Compare the scores of graph and module, up to the rounding of float32 sums."""
    inputs = generate_inputs(reference.signature, reference.rows_of_tables(), 50)
    if "item" in inputs:
        inputs["item"][:10] = 7
    expected = lowered.wrapper(*(inputs[name] for name in input_names(reference.signature)))
    result = Session(path, threads=1).scores({k: v.numpy() for k, v in inputs.items()})
    np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def count_operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("step", "policy"),
    [
        (RowwiseInt8(), "clamp"),
        (RowwiseInt4(symmetric=False), "default_row"),
        pytest.param(BFloat16(), "error", marks=pytest.mark.nightly),
        pytest.param(KMeans(bits=2), "clamp", marks=pytest.mark.nightly),
        (KMeans(bits=4, scale="none"), "error"),
        (ProductCodes(parts=3, bits=1), "default_row"),  # 8 columns in parts of different widths
        (ResidualCodes(bits=1, codebooks=3, codebook_type="float16"), "clamp"),
        pytest.param(AdditiveCodes(bits=1, rounds=2), "error", marks=pytest.mark.nightly),
    ],
)
def test_tables_with_the_same_layout_share_one_lookup_with_unchanged_scores(step, policy):
    reference = reference_of_fields(policy)
    model, lowered, path = compress_and_lower(step, policy)
    tensors, tensors_of_wide = (
        len(dict(table.named_buffers()))
        for table in (model.module.tables["user"], model.module.wide)
    )
    # One Gather for each stored tensor of the three tables, and of the table of another width.
    names = {name for table in lowered.tables for name in table.names}
    consumers = [node for node in onnx.load(path).graph.node if names.intersection(node.input)]
    assert [node.op_type for node in consumers] == ["Gather"] * (tensors + tensors_of_wide)
    session = Session(path, threads=1)
    tables = reference.rows_of_tables()
    for inputs in (
        generate_inputs(reference.signature, tables, 50),
        generate_edge_inputs(reference.signature, tables, 50),
    ):
        expected = lowered.wrapper(*(inputs[name] for name in input_names(reference.signature)))
        result = session.scores({name: tensor.numpy() for name, tensor in inputs.items()})
        # With the policy "error", a row with an id out of range has the score NaN.
        has_invalid_id = np.isnan(expected.detach().numpy())
        assert np.array_equal(np.isnan(result), has_invalid_id)
        assert has_invalid_id.any() == (policy == "error" and inputs["user"].min() < 0)
        # Only the Gemm is rounded differently.
        np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_audit_accepts_merged_tables_which_store_every_row_once():
    model, lowered, path = compress_and_lower(RowwiseInt8(), "clamp")
    result = audit(optimized_graph(path), model.plan, lowered.tables)
    assert result.packed_tables == 2  # one of 40 + 300 + 9 rows, and ``wide``
    rows = {table.module: table.rows for table in lowered.tables}
    assert rows == {"tables.user, tables.item, tables.city": 349, "wide": 12}
    dims = {item.name: item.dims for item in onnx.load(path).graph.initializer}
    (merged,) = [table for table in lowered.tables if table.rows == 349]
    assert [dims[name][0] for name in merged.names] == [349, 349]  # codes and scales


def test_graph_has_no_split_if_the_network_concatenates_the_rows():
    _, _, path = compress_and_lower(RowwiseInt8(), "clamp")
    assert count_operators(path)["Split"] == 0


def test_lookups_are_merged_if_the_network_also_uses_an_id_elsewhere(tmp_path):
    reference = reference_of_fields(masks_by_id=True)
    model = compress(reference, RowwiseInt8(), tmp_path)
    lowered, path = lower_model(reference, model, tmp_path)
    assert {table.rows for table in lowered.tables} == {349, 12}
    check_scores(reference, lowered, path)


def test_lookup_of_ids_that_the_network_changes_is_not_merged(tmp_path):
    reference = reference_of_fields(replaces_id=True)
    model = compress(reference, RowwiseInt8(), tmp_path)
    lowered, path = lower_model(reference, model, tmp_path)
    assert {table.module: table.rows for table in lowered.tables} == {
        "tables.user, tables.city": 49,
        "tables.item": 300,
        "wide": 12,
    }
    check_scores(reference, lowered, path)


def test_tables_over_the_limit_of_a_group_stay_separate(tmp_path, monkeypatch):
    # With a limit of 1,000 bytes, the table "item", 300 rows of 8 codes and a scale, is too large.
    monkeypatch.setattr(merged_tables, "MAX_BYTES", 1000)
    reference = reference_of_fields()
    model = compress(reference, RowwiseInt8(), tmp_path)
    lowered, path = lower_model(reference, model, tmp_path)
    assert {table.module for table in lowered.tables} == {
        "tables.user, tables.city",
        "tables.item",
        "wide",
    }
    check_scores(reference, lowered, path)


def test_graph_of_a_large_network_copies_only_small_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(merged_tables, "LARGE_NETWORK", 1000)
    monkeypatch.setattr(merged_tables, "MAX_BYTES_OF_LARGE", 500)
    reference = reference_of_fields()
    model = compress(reference, RowwiseInt8(rows_per_scale=0), tmp_path)
    lowered, path = lower_model(reference, model, tmp_path)
    stored = {table.module: table.names for table in lowered.tables}
    assert stored["tables.item"] == ("model.tables.item.codes", "model.tables.item.scale")
    assert stored["tables.user, tables.city"][0].startswith("together.")
    check_scores(reference, lowered, path)


def test_tables_with_codebooks_of_different_sizes_are_not_merged(tmp_path):
    # The limit on a codebook's share of the bytes results in a different size for each table.
    reference = reference_of_fields()
    lowered, _ = lower_model(
        reference, compress(reference, ResidualCodes(bits=8), tmp_path), tmp_path
    )
    assert {table.module for table in lowered.tables} == {
        *(f"tables.{name}" for name in FIELDS),
        "wide",
    }


def test_lookups_of_uncompressed_models_and_for_tensorrt_are_not_merged(tmp_path):
    reference = reference_of_fields()
    _, uncompressed = lower_model(reference, reference.model(), tmp_path)
    assert count_operators(uncompressed)["Gather"] == 4
    model, _, _ = compress_and_lower(RowwiseInt8(), "clamp")
    _, for_tensorrt = lower_model(reference, model, tmp_path, "tensorrt")
    # TensorRT's graph dequantizes a table before it looks up rows, so one Gather reads it.
    assert count_operators(for_tensorrt)["Gather"] == 4


class ConcatenatingTowers(nn.Module):
    """Two towers that only concatenate rows."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.item = ConcatenatedRows("user", "city"), ConcatenatedRows("item", "kind")

    def forward(self, user: Tensor, city: Tensor, item: Tensor, kind: Tensor) -> Tensor:
        score: Tensor = (self.query(user=user, city=city) * self.item(item=item, kind=kind)).sum(1)
        return score


class ConcatenatedRows(nn.Module):
    """Concatenates the rows of two tables."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.tables = nn.ModuleDict({name: nn.Embedding(20, 4) for name in names})

    def forward(self, **ids: Tensor) -> Tensor:
        return torch.cat([self.tables[name](ids[name]) for name in self.names], dim=1)


def test_tower_that_only_concatenates_rows_has_the_scores_of_the_module(tmp_path):
    inputs = {"query": ["user", "city"], "item": ["item", "kind"]}
    signature = Signature.model_validate(
        {
            "inputs": [
                {
                    "kind": "id",
                    "name": name,
                    "table": f"{tower}.tables.{name}",
                    "out_of_range": "clamp",
                }
                for tower, names in inputs.items()
                for name in names
            ],
            "outputs": [
                {"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}
            ],
            "group": "user",
            "item": "item",
            "towers": {name: {"module": name, "inputs": names} for name, names in inputs.items()},
        }
    )
    reference = Reference(ConcatenatingTowers, signature)
    model = run(
        RowwiseInt8(), reference.model(), reference.bench(tmp_path / "data"), tmp_path / "out"
    )
    for served_graph in served_graphs(signature):
        path = tmp_path / f"{served_graph.name}.onnx"
        lowered = lower(model.module, served_graph, "onnxruntime", path)
        ids = {name: torch.arange(20) for name in inputs[served_graph.name]}
        result = Session(path, threads=1).scores({k: v.numpy() for k, v in ids.items()})
        np.testing.assert_array_equal(result, lowered.wrapper(*ids.values()).detach().numpy())
