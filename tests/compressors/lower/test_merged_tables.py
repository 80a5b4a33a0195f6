"""Tables that are stored alike are looked up together in ONNX Runtime's graph."""

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
from compressors.core.batches import edge_example, example
from compressors.core.model import Model
from compressors.core.registries import AnyStep
from compressors.core.runner import run
from compressors.lower.audit import audit
from compressors.lower.export import Lowered, lower
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


class Fields(nn.Module):
    """Three fields side by side, and one of another width.

    ``masked`` and ``moved`` also use an id outside its lookup, for one id alone.
    """

    def __init__(self, *, masked: bool = False, moved: bool = False) -> None:
        super().__init__()
        self.masked, self.moved = masked, moved
        self.tables = nn.ModuleDict({name: nn.Embedding(rows, 8) for name, rows in FIELDS.items()})
        self.wide = nn.Embedding(12, 5)
        self.out = nn.Linear(29, 1)

    def forward(self, wide: Tensor, **ids: Tensor) -> Tensor:
        if self.moved:  # of 300 rows, so that rows drawn by chance seldom show it
            ids["item"] = ids["item"].masked_fill(ids["item"] == 7, 0)
        parts = [table(ids[name]) for name, table in self.tables.items()]  # (rows, 8) each
        if self.masked:
            parts[0] = parts[0] * (ids["user"] > 0).unsqueeze(1)
        logit: Tensor = self.out(torch.cat([*parts, self.wide(wide)], dim=1))
        return logit.squeeze(1)


def reference_of_fields(policy: str = "clamp", **what: bool) -> Reference:
    inputs = [
        IdInput(name=name, table=f"tables.{name}", out_of_range=policy, default_row=place + 1)
        for place, name in enumerate(FIELDS)
    ]
    return Reference(
        Fields,
        Signature(
            inputs=(*inputs, IdInput(name="wide", table="wide", out_of_range=policy)),
            outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
        ),
        what,
    )


def packed(reference: Reference, step: AnyStep, folder: Path) -> Model:
    return run(step, reference.model(), reference.bench(folder / "data"), folder / "out")


def lowered(
    reference: Reference, model: Model, folder: Path, target: TargetName = "onnxruntime"
) -> tuple[Lowered, Path]:
    path = folder / f"{target}.onnx"
    return lower(model.module, served_graphs(reference.signature)[0], target, path), path


@functools.cache
def written(step: AnyStep, policy: str) -> tuple[Model, Lowered, Path]:
    """The fields after a step, and their graph for ONNX Runtime."""
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    reference = reference_of_fields(policy)
    model = packed(reference, step, folder)
    return (model, *lowered(reference, model, folder))


def nodes(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("step", "policy"),
    [
        (RowwiseInt8(), "clamp"),
        (RowwiseInt4(symmetric=False), "default_row"),
        pytest.param(BFloat16(), "error", marks=pytest.mark.nightly),
        pytest.param(KMeans(bits=2), "clamp", marks=pytest.mark.nightly),
        (KMeans(bits=4, scale="none"), "error"),
        (ProductCodes(parts=3, bits=1), "default_row"),  # 8 columns: parts of two widths
        (ResidualCodes(bits=1, codebooks=3, codebook_type="float16"), "clamp"),
        pytest.param(AdditiveCodes(bits=1, rounds=2), "error", marks=pytest.mark.nightly),
    ],
)
def test_tables_with_the_same_layout_share_one_lookup_with_unchanged_scores(step, policy):
    reference = reference_of_fields(policy)
    model, made, path = written(step, policy)
    tensors, of_wide = (
        len(dict(table.named_buffers()))
        for table in (model.module.tables["user"], model.module.wide)
    )
    # One Gather a stored tensor for the three, and one for the table of another width.
    stored = {name for table in made.tables for name in table.names}
    reads = [node for node in onnx.load(path).graph.node if stored.intersection(node.input)]
    assert [node.op_type for node in reads] == ["Gather"] * (tensors + of_wide)
    session = Session(path, threads=1)
    tables = reference.rows_of_tables()
    for inputs in (
        example(reference.signature, tables, 50),
        edge_example(reference.signature, tables, 50),
    ):
        expected = made.served(*(inputs[name] for name in input_names(reference.signature)))
        found = session.scores({name: tensor.numpy() for name, tensor in inputs.items()})
        refused = np.isnan(expected.detach().numpy())
        assert np.array_equal(np.isnan(found), refused)
        assert refused.any() == (policy == "error" and inputs["user"].min() < 0)
        # The same float32 products in the same order, but for the Gemm's own rounding.
        np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_what_is_merged_passes_the_audit_and_holds_every_row_once():
    model, made, path = written(RowwiseInt8(), "clamp")
    found = audit(optimized_graph(path), model.plan, made.tables)
    assert found.packed_tables == 2
    rows = {table.module: table.rows for table in made.tables}
    assert rows == {"tables.user, tables.item, tables.city": 349, "wide": 12}
    held = {item.name: item.dims for item in onnx.load(path).graph.initializer}
    (merged,) = [table for table in made.tables if table.rows == 349]
    assert [held[name][0] for name in merged.names] == [349, 349]


def test_rows_that_stand_side_by_side_again_are_not_taken_apart():
    _, _, path = written(RowwiseInt8(), "clamp")
    assert nodes(path)["Split"] == 0


@pytest.mark.parametrize("what", ["masked", "moved"])
def test_network_that_also_reads_an_id_outside_its_table_keeps_its_lookups(what, tmp_path):
    reference = reference_of_fields(**{what: True})
    model = packed(reference, RowwiseInt8(), tmp_path)
    made, path = lowered(reference, model, tmp_path)
    assert nodes(path)["Gather"] == 8
    inputs = example(reference.signature, reference.rows_of_tables(), 50)
    inputs["item"][:10] = 7
    expected = made.served(*(inputs[name] for name in input_names(reference.signature)))
    found = Session(path, threads=1).scores({k: v.numpy() for k, v in inputs.items()})
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_tables_with_codebooks_of_other_sizes_stay_apart(tmp_path):
    # The share of bytes that codebooks may take gives each table codebooks of another size.
    reference = reference_of_fields()
    made, _ = lowered(reference, packed(reference, ResidualCodes(bits=8), tmp_path), tmp_path)
    assert {table.module for table in made.tables} == {
        *(f"tables.{name}" for name in FIELDS),
        "wide",
    }


def test_tables_as_trained_and_engines_keep_a_lookup_each(tmp_path):
    reference = reference_of_fields()
    _, plain = lowered(reference, reference.model(), tmp_path)
    assert nodes(plain)["Gather"] == 4
    model, _, _ = written(RowwiseInt8(), "clamp")
    _, engine = lowered(reference, model, tmp_path, "tensorrt")
    assert nodes(engine)["Gather"] == 4


class Vectors(nn.Module):
    """A tower that is nothing but rows side by side, and an item's."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.item = Rows("user", "city"), Rows("item", "kind")

    def forward(self, user: Tensor, city: Tensor, item: Tensor, kind: Tensor) -> Tensor:
        score: Tensor = (self.query(user=user, city=city) * self.item(item=item, kind=kind)).sum(1)
        return score


class Rows(nn.Module):
    """Rows of two tables side by side."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.tables = nn.ModuleDict({name: nn.Embedding(20, 4) for name in names})

    def forward(self, **ids: Tensor) -> Tensor:
        return torch.cat([self.tables[name](ids[name]) for name in self.names], dim=1)


def test_rows_side_by_side_may_be_all_that_a_tower_gives(tmp_path):
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
            "towers": {name: {"module": name, "inputs": read} for name, read in inputs.items()},
        }
    )
    reference = Reference(Vectors, signature)
    model = run(
        RowwiseInt8(), reference.model(), reference.bench(tmp_path / "data"), tmp_path / "out"
    )
    for form in served_graphs(signature):
        path = tmp_path / f"{form.name}.onnx"
        made = lower(model.module, form, "onnxruntime", path)
        ids = {name: torch.arange(20) for name in inputs[form.name]}
        found = Session(path, threads=1).scores({k: v.numpy() for k, v in ids.items()})
        np.testing.assert_array_equal(found, made.served(*ids.values()).detach().numpy())
