"""An order for a two-tower retrieval model: two graphs, evaluated by ranking all items.

The query tower ``of_user`` reads the user and the tags of recently used items (``lately``), the
item tower ``of_item`` the item, its tags and dense features. ``planted_recall`` computes the recall
without recpress; its argument ``mask`` excludes the items of a user's rows in other splits. A home
is the folder with everything that recpress stores (``RECPRESS_HOME``). A draft is the folder of a
bundle before it is packed.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
from orders import BOTH_TARGETS, FlowResult, run_without_prefect, use_home
from reason_codes import require_reason
from retrieval_draft import ITEMS, USERS, planted_recall, write_retrieval_draft

from compressors.contracts import Limit
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from flows.order import Order
from infra.registry.mlflow_registry import Registry
from infra.settings import load_settings
from tasks.bundles.packing import pack
from tasks.orchestration.graph_documents import read_lowering
from tasks.orchestration.workspace import local
from tasks.promotion.promotions import fetch

LIMITS = (
    Limit.parse("recall@20 vs baseline >= -0.05"),
    Limit.parse("mrr@10 vs baseline >= -0.1"),
    Limit.parse("bytes vs baseline <= 0.9"),
)
STEPS = (RowwiseInt4(), StaticInt8())


@pytest.fixture(scope="module")
def retrieval_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FlowResult]:
    """Run an order for a retrieval model; return the folder with draft and home, and the result."""
    home = tmp_path_factory.mktemp("retrieval")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home / "recpress")
        pack(write_retrieval_draft(home / "draft"))
        order = Order(
            model="finder", preset="custom", steps=STEPS, limits=LIMITS, targets=BOTH_TARGETS
        )
        return home, run_without_prefect(order)


@pytest.fixture(autouse=True)
def _use_home(retrieval_run: tuple[Path, FlowResult], monkeypatch: pytest.MonkeyPatch) -> None:
    use_home(monkeypatch, retrieval_run[0] / "recpress")


def test_retrieval_order_is_accepted_with_all_tables_and_layers_quantized(
    retrieval_run: tuple[Path, FlowResult],
) -> None:
    report = retrieval_run[1].finished.report
    assert report.outcome == "accepted", report.targets[0].verdict.reason
    formats = {line.module: line.format for line in report.plan.lines if line.role != "other"}
    assert formats == {
        "of_user.user": "rowwise_int4",
        "of_user.lately": "rowwise_int4",
        "of_user.first": "static_int8",
        "of_user.second": "static_int8",
        "of_item.item": "rowwise_int4",
        "of_item.tags": "rowwise_int4",
        "of_item.out": "static_int8",
    }
    served = report.targets[0].lowering.graphs  # of the query tower and of the item tower
    assert [graph.audit.int8_products for graph in served if graph.audit] == [2, 1]
    assert [graph.audit.packed_tables for graph in served if graph.audit] == [2, 2]


def test_baseline_recall_excludes_items_that_the_query_has_seen(
    retrieval_run: tuple[Path, FlowResult],
) -> None:
    """Without the mask, items that users have seen before would have the first ranks."""
    home, result = retrieval_run
    assert result.finished.report.measurement is not None
    recall = result.finished.report.measurement.baseline.of("recall@20", "absolute")
    assert recall is not None
    assert recall.point == pytest.approx(planted_recall(home / "draft"), abs=1e-6)
    assert recall.low < recall.point < recall.high
    # A clear difference, so that the comparison above would detect a missing mask.
    assert planted_recall(home / "draft", mask=False) < recall.point - 0.1


def test_fetched_graphs_have_the_reported_recall_in_plain_onnxruntime_sessions(
    retrieval_run: tuple[Path, FlowResult], tmp_path: Path
) -> None:
    """Uses only the fetched graphs and the test data."""
    home, result = retrieval_run
    into = tmp_path / "served"
    fetch("finder", result.finished.version, "onnxruntime", into)
    assert {path.name for path in into.iterdir()} == {"query.onnx", "item.onnx", "lowering.json"}
    graphs = read_lowering(into).graphs
    assert [(graph.name, graph.output, graph.width) for graph in graphs] == [
        ("query", "vector", 16),
        ("item", "vector", 16),
    ]
    items = pq.read_table(home / "draft" / "items.parquet")
    test = pq.read_table(home / "draft" / "test.parquet").to_pylist()
    bags = {row["user"]: row["lately"] for row in test}

    def flatten(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return all ids in one array, and the index of the first id of each list."""
        lengths = np.array([len(ids) for ids in lists])
        all_ids = np.concatenate([np.array(ids, np.int64) for ids in lists])
        return all_ids, np.cumsum(lengths) - lengths

    lately = flatten([bags[user] for user in range(USERS)])
    tags = flatten(items["tags"].to_pylist())
    inputs_by_graph = {
        "query": {"user": np.arange(USERS), "lately": lately[0], "lately_offsets": lately[1]},
        "item": {
            "item": items["item"].to_numpy(),
            "tags": tags[0],
            "tags_offsets": tags[1],
            "dense": np.stack([items[f"d{n}"].to_numpy() for n in range(3)], 1).astype("f"),
        },
    }
    vectors = {
        name: onnxruntime.InferenceSession(str(into / f"{name}.onnx")).run(["vector"], inputs)[0]
        for name, inputs in inputs_by_graph.items()
    }
    scores = vectors["query"] @ vectors["item"].T
    assert scores.shape == (USERS, ITEMS)
    item_index = {int(item): index for index, item in enumerate(inputs_by_graph["item"]["item"])}
    for split in ("train", "validation"):
        for row in pq.read_table(home / "draft" / f"{split}.parquet").to_pylist():
            scores[row["user"], item_index[row["item"]]] = -np.inf
    top = np.argsort(-scores, axis=1)[:, :20]
    hits: dict[int, list[bool]] = {}
    for row in test:
        hits.setdefault(row["user"], []).append(item_index[row["item"]] in top[row["user"]])
    recall = np.mean([np.mean(user_hits) for user_hits in hits.values()])
    assert result.finished.report.measurement is not None
    reported = result.finished.report.measurement.numbers.of("recall@20", "absolute")
    assert reported is not None
    assert recall == pytest.approx(reported.point, abs=1e-3)  # last digits may swap a few pairs


def test_query_and_item_graphs_are_built_counted_and_published(
    retrieval_run: tuple[Path, FlowResult],
) -> None:
    finished = retrieval_run[1].finished
    served, engines = finished.report.targets
    folder = local(served.artifact)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.onnx")}
    assert served.bytes == sum(sizes.values())
    assert sorted(sizes) == ["item.onnx", "query.onnx"]
    assert sorted(engines.audits) == ["item", "query"]
    built = {path.name for path in local(engines.artifact).iterdir()}
    assert {"query.engine", "item.engine", "query.build.json", "item.build.json"} <= built
    version = Registry(load_settings().registry_uri).version("finder", finished.version)
    assert version.tags["recpress.graphs.onnxruntime"] == "query, item"
    # A graph contains only the tables of its tower.
    initializers = {i.name for i in onnx.load(folder / "query.onnx").graph.initializer}
    assert not any("of_item" in name for name in initializers), initializers


def test_report_contains_retrieval_metrics_latency_and_stages(
    retrieval_run: tuple[Path, FlowResult],
) -> None:
    finished = retrieval_run[1].finished
    metrics = [number.metric for number in finished.report.measurement.baseline.numbers]  # type: ignore[union-attr]
    assert metrics[:4] == ["recall@20", "ndcg@20", "mrr@10", "bytes"]
    numbers = finished.report.measurement.numbers  # type: ignore[union-attr]
    for metric, lower_bound in (("score_correlation", 0.9), ("top20_overlap", 0.5)):
        estimate = numbers.of(metric, "absolute")
        assert estimate is not None
        assert lower_bound < estimate.point < 1, metric
    require_reason(finished.report.targets[0].verdict.reasons, "top20_overlap")
    text = (local(finished.release) / "report.md").read_text()
    assert "Recall@20" in text
    assert "MRR@10" in text
    assert "Latency is of the query graph" in text
    assert "onnxruntime, item: vectors differ from torch by at most" in text
    stages = finished.report.stages
    assert [stage.step for stage in stages] == ["as trained", "rowwise_int4", "static_int8"]
    assert stages[0].quality.point == pytest.approx(
        planted_recall(retrieval_run[0] / "draft"), abs=1e-6
    )
    assert (
        json.loads((local(finished.release) / "report.json").read_text())["metric"] == "recall@20"
    )


def test_preset_small_trains_towers_within_a_budget_on_validation_rankings(
    retrieval_run: tuple[Path, FlowResult],
) -> None:
    result = run_without_prefect(Order(model="finder", preset="small", limits=LIMITS))
    report = result.finished.report
    budget = next(reason for reason in report.remark_reasons if "budget" in reason.fields)
    assert (budget.fields["budget"], budget.fields["metric"]) == (0.001, "recall@20")
    # With a quarter of the channels, the small towers lose far more, also after distillation.
    assert report.idle_reasons["distill"].code == "over_budget"
    assert report.idle_reasons["distill"].fields["loss"] > 0.01
