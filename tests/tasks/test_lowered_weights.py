"""Weights of a large graph are hard links to the bundle's files, so that both are stored once."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from drafts import ALLOWED, write_draft
from onnx import numpy_helper

from compressors.contracts import Artifact
from compressors.core.state.module_state import map_tensors
from compressors.lower import export
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from tasks.bundles.packing import pack
from tasks.compress import compress
from tasks.lower import lower_model
from tasks.orchestration.documents import lowering_of
from tasks.orchestration.workspace import local, store
from tasks.prepare import prepare

FEW = {"train": 300, "calibration": 100, "validation": 100, "test": 300}  # rows of each split
SIZES = {"users": 320_000}  # rows of 16 float32: 20.5 MB; the other tables are small
LARGE_GRAPH = 2**20


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A packed bundle, its result with int8 tables, the prepared test rows, and the home."""
    root = tmp_path_factory.mktemp("lowered")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RECPRESS_HOME", str(root / "home"))
        monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
        source = pack(write_draft(root / "draft", rows=FEW, sizes=SIZES)).artifact
        quantized = compress.fn(
            source, RowwiseInt8(), {}, original=source, teachers=(), seed=0, device="cpu", code="c"
        )
        rows = prepare.fn(source, "test")
    assert isinstance(quantized, Artifact)
    assert isinstance(rows, Artifact)
    return {"float": source, "int8": quantized, "rows": rows, "home": root}  # type: ignore[dict-item]


@pytest.fixture
def large(bundles: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> dict[str, Artifact]:
    """The bundles; graphs of more than a megabyte have their weights in separate files."""
    monkeypatch.setenv("RECPRESS_HOME", f"{bundles['home']}/home")
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    monkeypatch.setattr(export, "EXTERNAL_BYTES", LARGE_GRAPH)
    return bundles


def lowered(bundles: dict[str, Artifact], kind: str, target: str = "onnxruntime") -> Artifact:
    return lower_model.fn(bundles[kind], target, bundles["rows"], FEW["test"], 65_536)


def blobs(artifact: Artifact) -> dict[str, str]:
    manifest = store().manifest(artifact)
    return dict(zip((e.path for e in manifest.files), manifest.blobs, strict=True))


@pytest.mark.parametrize(("kind", "tensor"), [("float", "user.weight"), ("int8", "user.codes")])
def test_large_graph_and_its_bundle_share_the_file_of_a_table(kind, tensor, large, tmp_path):
    before = set(store().sizes("blobs/"))
    artifact = lowered(large, kind)
    (shared,) = (path for path in blobs(artifact) if tensor in path)
    assert shared.startswith("model.onnx."), "names of files that are copied to Triton"
    assert blobs(artifact)[shared] in blobs(large[kind]).values()
    sizes = store().sizes("blobs/")
    assert sum(size for key, size in sizes.items() if key not in before) < 2**20
    copied = store().get(artifact, tmp_path / "served")  # onnx.load refuses links
    graph = onnx.load(copied / "model.onnx").graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    expected = map_tensors(local(large[kind]))[tensor].numpy()
    assert any(
        value.shape == expected.shape and np.array_equal(value, expected)
        for value in values.values()
    )


def test_graph_that_is_not_large_is_one_file(large, monkeypatch):
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 2**29)
    assert sorted(blobs(lowered(large, "int8"))) == ["lowering.json", "model.onnx"]


def test_large_graph_without_links_has_its_weights_in_one_file(large, monkeypatch):
    monkeypatch.setattr(export, "link_weights", lambda *_: ())
    names = sorted(blobs(lowered(large, "float")))
    assert names == ["lowering.json", "model.onnx", "model.onnx.data"]


def test_graph_that_is_large_without_the_linked_table_has_no_link(large, monkeypatch):
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 1)
    names = sorted(blobs(lowered(large, "float")))
    assert names == ["lowering.json", "model.onnx", "model.onnx.data"]


def test_engine_is_built_from_a_graph_without_links(large):
    names = sorted(blobs(lowered(large, "float", "tensorrt-rtx")))
    assert names == ["lowering.json", "model.onnx", "model.onnx.data"]


def test_tensor_in_other_memory_is_not_linked(large, monkeypatch):
    link_weights = export.link_weights

    def with_other_addresses(model, path: Path, tensors):
        changed = {name: t._replace(address=t.address + 64) for name, t in tensors.items()}
        return link_weights(model, path, changed)

    monkeypatch.setattr(export, "link_weights", with_other_addresses)
    assert "model.onnx.data" in blobs(lowered(large, "float"))


@pytest.mark.parametrize(("kind", "is_audited"), [("float", False), ("int8", True)])
def test_only_a_compressed_model_is_audited(kind, is_audited, large):
    # ONNX Runtime copies every tensor to write its optimized graph.
    (graph,) = lowering_of(local(lowered(large, kind))).graphs
    assert (graph.audit is not None) == is_audited
