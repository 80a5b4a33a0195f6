"""Bytes of weights that two towers share (ties), before and after compression.

``packed_bytes`` of a lowering are the bytes of its weights, each counted once; ``repeated_bytes``
are those of weights that a further graph contains, too. A draft is the folder of a bundle before it
is packed.
"""

from pathlib import Path

import pytest
import torch
from drafts import ALLOWED
from error_codes import raises_code
from reason_codes import require_reason
from reports import create_report
from retrieval_draft import CONFIG, INTERACTIONS_PER_USER, SIGNATURE, USERS, write_retrieval_draft
from safetensors.torch import load_file, save_file

from compressors.contracts import Artifact, Limit
from compressors.core.units import stored_bytes
from compressors.errors.compression import ModelRefused
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.explain import explain
from flows.order import Order
from tasks.bundles.loading import load_bundle
from tasks.bundles.packing import pack
from tasks.compress import compress
from tasks.lower import lower_model
from tasks.orchestration.graph_documents import Lowering, read_lowering, served_bytes
from tasks.orchestration.workspace import local
from tasks.prepare import prepare
from tasks.report.tables import markdown, number_rows

TABLE_BYTES = CONFIG["tags"] * CONFIG["dim"] * 4  # of the table that both towers read
TEST_ROWS = USERS * INTERACTIONS_PER_USER["test"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)


def write_tied_draft(folder: Path, share: str) -> Path:
    """Write a retrieval draft whose towers share a table.

    Args:
        folder: folder of the draft.
        share: ``module`` if the towers have the same embedding, ``weight`` if two embeddings have
            the same weight.
    """
    inputs = [dict(item) for item in SIGNATURE["inputs"]]
    if share == "module":  # PyTorch lists a shared module only under its first name
        (tags,) = (item for item in inputs if item["name"] == "tags")
        tags["table"] = "of_user.lately"
    return write_retrieval_draft(folder, share=share, inputs=inputs)


def lower_bundle(bundle: Artifact, rows: Artifact) -> tuple[Lowering, Path]:
    """Lower a bundle for ONNX Runtime; return the description and the folder of its graphs."""
    graphs = lower_model.fn(
        bundle,
        "onnxruntime",
        rows,
        probe_rows=TEST_ROWS,  # number of rows of ``rows``
        most_rows=65_536,  # the largest batch that a graph must accept
    )
    folder = local(graphs)
    return read_lowering(folder), folder


@pytest.mark.parametrize(
    ("share", "lowers_both"),
    [
        ("weight", True),
        pytest.param("module", False, marks=pytest.mark.nightly),
        pytest.param("module", True, marks=pytest.mark.nightly),
    ],
)
def test_table_of_both_towers_counts_once_in_weights_and_twice_in_served_files(
    share, lowers_both, tmp_path
):
    """``lowers_both`` is False if only the compressed model is lowered, to save time."""
    bundle = pack(write_tied_draft(tmp_path / "draft", share)).artifact
    rows = prepare.fn(bundle, "test")
    assert isinstance(rows, Artifact)
    quantized = compress.fn(
        bundle,
        RowwiseInt8(),
        splits={},
        original=bundle,
        teachers=(),
        seed=0,
        device="cpu",
        context_digest="c",  # only a part of a cache key; here any text
    )
    assert isinstance(quantized, Artifact)
    untouched, compressed = load_bundle(bundle), load_bundle(quantized)
    plan = compressed.model.plan
    assert plan is not None
    before = sum(line.bytes_before for line in plan.lines)
    after = sum(line.bytes_after for line in plan.lines)
    assert before == stored_bytes(untouched.model.module)
    assert after == stored_bytes(compressed.model.module)

    table = plan.of("of_user.lately")
    assert table is not None
    # A shared module has one line. Of two modules with one weight, the second has 0 bytes.
    tags = plan.of("of_item.tags")
    assert (tags is None) == (share == "module")
    if tags is not None:
        assert (tags.bytes_before, tags.bytes_after) == (0, 0)
        require_reason(tags.reasons, "shares_weight")

    models = ((quantized, after, table.bytes_after), (bundle, before, TABLE_BYTES))
    for artifact, weight_bytes, table_bytes in models if lowers_both else models[:1]:
        lowering, folder = lower_bundle(artifact, rows)
        assert lowering.packed_bytes == weight_bytes
        assert lowering.repeated_bytes == table_bytes
        assert lowering.served_packed_bytes == weight_bytes + table_bytes
        # A target loads both files, each with the table.
        graphs = [folder / graph.file for graph in lowering.graphs]
        assert served_bytes(folder) == sum(path.stat().st_size for path in graphs)
        assert served_bytes(folder) > lowering.served_packed_bytes

    explained = explain(
        Order(
            model="finder",
            preset="custom",
            steps=(RowwiseInt8(),),
            limits=(Limit.parse("bytes vs baseline <= 0.9"),),
        )
    )
    assert [step.bytes for step in explained.steps] == [before, after]


def test_report_counts_weights_once_and_mentions_the_bytes_that_graphs_share(work_folder, tmp_path):
    one_graph = create_report(tmp_path, "a" * 64, {"onnxruntime": "accepted"})
    (target,) = one_graph.targets
    (graph,) = target.lowering.graphs
    both = tuple(graph.model_copy(update={"name": name}) for name in ("query", "item"))
    # Earlier versions stored the sum over the graphs as packed_bytes.
    fields = {"graphs": both, "packed_bytes": 600, "repeated_bytes": 300}
    lowering = target.lowering.model_copy(update=fields)
    targets = (target.model_copy(update={"lowering": lowering}),)
    two_graphs = one_graph.model_copy(update={"targets": targets})
    (row,) = (line for line in number_rows(two_graphs) if line["what"] == "bytes of weights")
    assert (row["before"], row["onnxruntime"], row["change"]) == ("1,000", "300", "0.30x")
    assert "The graphs query and item share 300 bytes of weights." in markdown(two_graphs)
    assert "share" not in markdown(one_graph).split("## Plan")[0]


def test_two_equal_stored_copies_of_a_tied_weight_are_loaded_as_one(tmp_path):
    draft = write_tied_draft(tmp_path / "draft", "weight")
    store_undeclared_tie(draft, equal=True)
    module = load_bundle(pack(draft).artifact).model.module
    assert module.of_item.tags.weight is module.of_user.lately.weight
    assert stored_bytes(module) == sum(p.nbytes for p in module.parameters())


def test_two_different_stored_copies_of_a_tied_weight_are_refused(tmp_path):
    draft = write_tied_draft(tmp_path / "draft", "weight")
    store_undeclared_tie(draft, equal=False)
    with raises_code(ModelRefused, "shared_tensor_differs"):
        pack(draft)


def store_undeclared_tie(draft: Path, *, equal: bool) -> None:
    """Store a tied weight under both names, and remove the tie from ``model.json``.

    Args:
        draft: folder of the draft.
        equal: whether the two stored tensors are equal.
    """
    document = (draft / "model.json").read_text()
    tie = '"of_item.tags.weight": "of_user.lately.weight"'
    assert tie in document
    (draft / "model.json").write_text(document.replace(tie, ""))
    weights = load_file(draft / "model.safetensors")
    copy = weights["of_user.lately.weight"].clone()
    weights["of_item.tags.weight"] = copy if equal else copy + torch.ones(())
    save_file(weights, draft / "model.safetensors")
