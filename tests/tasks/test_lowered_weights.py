"""Weights of a large graph are hard links to the bundle's files, so that both are stored once.

A home is the folder with everything that recpress stores (``RECPRESS_HOME``).

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

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
from tasks.orchestration.graph_documents import read_lowering
from tasks.orchestration.workspace import local, store
from tasks.prepare import prepare

SPLIT_ROWS = {"train": 300, "calibration": 100, "validation": 100, "test": 300}
TABLE_ROWS = {"users": 320_000}  # of 16 float32: 20.5 MB; the other tables are small
LARGE_GRAPH_BYTES = 2**20


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A packed bundle ("float"), the same with int8 tables ("int8"), and its prepared test rows.

    The entry "home" is the path of the home's parent.
    """
    root = tmp_path_factory.mktemp("lowered")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RECPRESS_HOME", str(root / "home"))
        monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
        source = pack(write_draft(root / "draft", rows=SPLIT_ROWS, sizes=TABLE_ROWS)).artifact
        quantized = compress.fn(
            source,
            RowwiseInt8(),
            splits={},
            original=source,
            teachers=(),
            seed=0,
            device="cpu",
            context_digest="c",  # only a part of a cache key; here any text
        )
        rows = prepare.fn(source, "test")
    assert isinstance(quantized, Artifact)
    assert isinstance(rows, Artifact)
    return {"float": source, "int8": quantized, "rows": rows, "home": root}  # type: ignore[dict-item]


@pytest.fixture
def large_bundles(
    bundles: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Artifact]:
    """The bundles, with settings by which graphs of more than a megabyte count as large.

    The weights of a large graph are stored in separate files.
    """
    monkeypatch.setenv("RECPRESS_HOME", f"{bundles['home']}/home")
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    monkeypatch.setattr(export, "EXTERNAL_BYTES", LARGE_GRAPH_BYTES)
    return bundles


def lower_bundle(bundles: dict[str, Artifact], kind: str, target: str = "onnxruntime") -> Artifact:
    """Lower one bundle of the fixture ``bundles``, and return the artifact of its graph.

    Args:
        bundles: the fixture.
        kind: ``float`` or ``int8``.
        target: the target of the graph.
    """
    return lower_model.fn(
        bundles[kind],
        target,
        bundles["rows"],
        probe_rows=SPLIT_ROWS["test"],
        most_rows=65_536,  # the largest batch that the graph must accept
    )


def hashes_by_path(artifact: Artifact) -> dict[str, str]:
    """Return the content hash of each file of an artifact. Equal files are stored once."""
    manifest = store().manifest(artifact)
    return dict(zip((file.path for file in manifest.files), manifest.blobs, strict=True))


@pytest.mark.parametrize(("kind", "tensor"), [("float", "user.weight"), ("int8", "user.codes")])
def test_large_graph_and_its_bundle_share_the_file_of_a_table(
    kind, tensor, large_bundles, tmp_path
):
    before = set(store().sizes("blobs/"))
    artifact = lower_bundle(large_bundles, kind)
    (shared,) = (path for path in hashes_by_path(artifact) if tensor in path)
    assert shared.startswith("model.onnx."), "a promotion copies only such files to Triton"
    assert hashes_by_path(artifact)[shared] in hashes_by_path(large_bundles[kind]).values()
    sizes = store().sizes("blobs/")
    # Lowering stores less than a megabyte: all but the table, which are the graph, the small tables
    # and the description of the graph.
    assert sum(size for key, size in sizes.items() if key not in before) < 2**20
    copied = store().get(artifact, tmp_path / "served")  # onnx.load refuses links
    graph = onnx.load(copied / "model.onnx").graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    expected = map_tensors(local(large_bundles[kind]))[tensor].numpy()
    assert any(
        value.shape == expected.shape and np.array_equal(value, expected)
        for value in values.values()
    )


def test_graph_that_is_not_large_is_one_file(large_bundles, monkeypatch):
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 2**29)
    assert sorted(hashes_by_path(lower_bundle(large_bundles, "int8"))) == [
        "lowering.json",
        "model.onnx",
    ]


def test_large_graph_without_links_has_its_weights_in_one_file(large_bundles, monkeypatch):
    monkeypatch.setattr(export, "link_weights", lambda *_: ())  # as on disks without hard links
    names = sorted(hashes_by_path(lower_bundle(large_bundles, "float")))
    assert names == ["lowering.json", "model.onnx", "model.onnx.data"]


def test_graph_that_is_large_without_the_linked_table_has_no_link(large_bundles, monkeypatch):
    monkeypatch.setattr(export, "EXTERNAL_BYTES", 1)  # less than the small tables have
    names = sorted(hashes_by_path(lower_bundle(large_bundles, "float")))
    assert names == ["lowering.json", "model.onnx", "model.onnx.data"]


def test_engine_is_built_from_a_graph_without_links(large_bundles):
    names = sorted(hashes_by_path(lower_bundle(large_bundles, "float", "tensorrt-rtx")))
    assert names == ["lowering.json", "model.onnx", "model.onnx.data"]


def test_tensor_that_is_not_mapped_from_its_file_is_not_linked(large_bundles, monkeypatch):
    link_weights = export.link_weights

    def link_with_other_addresses(model, path: Path, files):
        """Call ``link_weights`` with files that are mapped to other addresses than the tensors."""
        changed = {name: file._replace(address=file.address + 64) for name, file in files.items()}
        return link_weights(model, path, changed)

    monkeypatch.setattr(export, "link_weights", link_with_other_addresses)
    assert "model.onnx.data" in hashes_by_path(lower_bundle(large_bundles, "float"))


@pytest.mark.parametrize(("kind", "is_audited"), [("float", False), ("int8", True)])
def test_only_a_compressed_model_is_audited(kind, is_audited, large_bundles):
    # An audit counts the quantized operators in the graph that ONNX Runtime has optimized. It takes
    # memory, since ONNX Runtime copies every tensor to write that graph. In the graph of an
    # untouched model nothing is quantized, so there is nothing to audit.
    (graph,) = read_lowering(local(lower_bundle(large_bundles, kind))).graphs
    assert (graph.audit is not None) == is_audited
