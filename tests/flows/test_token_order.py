"""An order for a retrieval model over texts, whose two towers are one encoder.

A home is the folder with everything that recpress stores (``RECPRESS_HOME``). A draft is the folder
of a bundle before it is packed.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import pytrec_eval
from error_codes import raises_code
from orders import BOTH_TARGETS, FlowResult, run_without_prefect, use_home
from token_draft import LONGEST_DOCUMENT, LONGEST_QUERY, write_token_draft

from compressors.contracts import Limit
from compressors.errors.metrics import MetricRefused
from examples.search_texts import load_towers
from flows.order import Order
from tasks.bundles.packing import pack
from tasks.evaluation.graph_sessions import require_same_tokenizers
from tasks.orchestration.workspace import local
from tasks.promotion.promotions import fetch

LIMITS = (Limit.parse("ndcg@10 vs baseline >= -0.05"),)


@pytest.fixture(scope="module")
def token_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FlowResult]:
    """Run an order for an encoder; return the folder with draft and home, and the result."""
    home = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home / "recpress")
        pack(write_token_draft(home / "draft"))
        order = Order(model="texts", preset="fast", limits=LIMITS, targets=BOTH_TARGETS)
        return home, run_without_prefect(order)


@pytest.fixture(autouse=True)
def _use_home(token_run: tuple[Path, FlowResult], monkeypatch: pytest.MonkeyPatch) -> None:
    use_home(monkeypatch, token_run[0] / "recpress")


def test_order_for_texts_is_accepted_with_one_graph_of_both_towers(
    token_run: tuple[Path, FlowResult],
) -> None:
    report = token_run[1].finished.report
    assert report.outcome == "accepted", report.targets[0].verdict.reason
    (graph,) = report.targets[0].lowering.graphs
    assert [(item.name, item.shape, item.shortest) for item in graph.inputs] == [
        ("input_ids", (LONGEST_DOCUMENT,), 2),
        ("attention_mask", (LONGEST_DOCUMENT,), 2),
    ]
    assert (graph.name, graph.output) == ("encoder", "vector")
    # The weights of the encoder are in one file and count once.
    assert report.targets[0].lowering.repeated_bytes == 0
    folder = local(report.targets[0].artifact)
    assert [path.name for path in folder.glob("*.onnx")] == ["encoder.onnx"]
    formats = {line.module: line.format for line in report.plan.lines if line.role != "other"}
    assert formats["encoder.word"] == "rowwise_int8"
    layers = [name for name in formats if "layer" in name and "norm" not in name]
    assert {formats[name] for name in layers} == {"static_int8"}
    assert graph.audit is not None
    # Two transformer layers with six dense layers each (``tests/token_draft.py``).
    assert graph.audit.int8_products == 12


def rank(folder: Path, draft: Path) -> dict[str, dict[str, float]]:
    """Score all documents for all test queries with the sample script and the fetched files."""
    items = pq.read_table(draft / "items.parquet").to_pydict()
    queries = {
        row["query_id"]: row["query"] for row in pq.read_table(draft / "test.parquet").to_pylist()
    }
    query_tower, document_tower = load_towers(folder)
    scores = query_tower.compute_vectors(list(queries.values())) @ (
        document_tower.compute_vectors(items["text"]).T
    )
    return {
        str(query): {
            str(document): float(score)
            for document, score in zip(items["document"], row, strict=True)
        }
        for query, row in zip(queries, scores, strict=True)
    }


def test_graded_ndcg_of_the_released_graph_is_that_of_trec_eval(
    token_run: tuple[Path, FlowResult], tmp_path: Path
) -> None:
    home, result = token_run
    draft = home / "draft"
    fetch("texts", result.finished.version, "onnxruntime", tmp_path / "served")
    run = rank(tmp_path / "served", draft)
    for split in ("train", "validation"):  # documents of earlier rows are not ranked again
        for row in pq.read_table(draft / f"{split}.parquet").to_pylist():
            del run[str(row["query_id"])][str(row["document"])]
    judged: dict[str, dict[str, int]] = {}
    for row in pq.read_table(draft / "test.parquet").to_pylist():
        judged.setdefault(str(row["query_id"]), {})[str(row["document"])] = row["relevance"]
    assert {grade for grades in judged.values() for grade in grades.values()} == {1, 2}
    values = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut_10"}).evaluate(run)
    expected = np.mean([value["ndcg_cut_10"] for value in values.values()])
    assert result.finished.report.measurement is not None
    reported = result.finished.report.measurement.numbers.of("ndcg@10", "absolute")
    assert reported is not None
    assert reported.point == pytest.approx(expected, abs=1e-3)  # last digits may swap a few pairs


def test_sample_script_prints_the_best_document_without_importing_torch(
    token_run: tuple[Path, FlowResult], tmp_path: Path
) -> None:
    home, result = token_run
    fetch("texts", result.finished.version, "onnxruntime", tmp_path / "served")
    documents = pq.read_table(home / "draft" / "items.parquet")["text"].to_pylist()
    (tmp_path / "documents.txt").write_text("\n".join(documents))
    # Short enough for both towers, which then give the text the same vector.
    query = next(text for text in documents if 0 < len(text.split()) <= LONGEST_QUERY - 2)
    code = (
        "import sys; sys.modules['torch'] = None; from examples.search_texts import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    paths = [str(tmp_path / name) for name in ("served", "documents.txt")]
    found = subprocess.run(
        [sys.executable, "-c", code, *paths, query, "--count", "1"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout.splitlines()
    assert found[0] == query
    score, _, text = found[1].strip().partition("  ")
    assert text == query[:90]
    assert float(score) == pytest.approx(1, abs=0.05)  # cosine of two int8 encodings of one text


def test_champion_with_another_tokenizer_is_refused(
    token_run: tuple[Path, FlowResult], tmp_path: Path
) -> None:
    candidate = local(token_run[1].finished.report.targets[0].artifact)
    require_same_tokenizers({"candidate": candidate, "champion": candidate})
    champion = tmp_path / "champion"
    shutil.copytree(candidate, champion)
    file = champion / "document_ids.tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = {"type": "Lowercase"}
    file.chmod(0o644)  # stored files are read-only
    file.write_text(json.dumps(content))
    with raises_code(MetricRefused, "tokenizers_differ", model="champion", column="text"):
        require_same_tokenizers({"candidate": candidate, "champion": champion})


def test_engine_has_the_tokenizers_of_its_texts(token_run: tuple[Path, FlowResult]) -> None:
    served, engines = token_run[1].finished.report.targets
    names = {text.tokenizer for text in served.lowering.texts}
    assert names == {"input_ids.tokenizer.json", "document_ids.tokenizer.json"}
    files = {path.name for path in local(engines.artifact).iterdir()}
    assert names | {"encoder.engine", "encoder.build.json", "lowering.json"} <= files
