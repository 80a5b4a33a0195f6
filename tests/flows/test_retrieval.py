"""A retrieval model through the same flow: two graphs, judged by a full ranking."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
from orders import BOTH_TARGETS, FlowResult, run_without_prefect, use_home
from reason_codes import with_code
from retrieval_draft import ITEMS, USERS, planted_recall, write_retrieval_draft

from compressors.contracts import Limit
from compressors.contracts.reasons import Reason
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from flows.order import Order
from infra.registry.mlflow_registry import Registry
from infra.settings import load_settings
from tasks.bundles.packing import pack
from tasks.orchestration.documents import lowering_of
from tasks.orchestration.workspace import local
from tasks.promotion.promotions import fetch

LIMITS = (Limit.parse("recall@20 vs baseline >= -0.05"), Limit.parse("bytes vs baseline <= 0.9"))
STEPS = (RowwiseInt4(), StaticInt8())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FlowResult]:
    home = tmp_path_factory.mktemp("retrieval")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home / "recpress")
        pack(write_retrieval_draft(home / "draft"))
        order = Order(
            model="finder", preset="custom", steps=STEPS, limits=LIMITS, targets=BOTH_TARGETS
        )
        return home, run_without_prefect(order)


@pytest.fixture(autouse=True)
def _here(ran: tuple[Path, FlowResult], monkeypatch: pytest.MonkeyPatch) -> None:
    use_home(monkeypatch, ran[0] / "recpress")


def test_it_is_accepted_with_every_table_and_layer_of_both_towers_packed(
    ran: tuple[Path, FlowResult],
) -> None:
    report = ran[1].finished.report
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
    served = report.targets[0].lowering.graphs
    assert [graph.audit.int8_products for graph in served if graph.audit] == [2, 1]
    assert [graph.audit.packed_tables for graph in served if graph.audit] == [2, 2]


def test_the_baselines_recall_is_the_networks_own_with_seen_items_masked(
    ran: tuple[Path, FlowResult],
) -> None:
    """Without the mask the best places would be taken by what users had before."""
    home, made = ran
    assert made.finished.report.measurement is not None
    found = made.finished.report.measurement.baseline.of("recall@20", "absolute")
    assert found is not None
    assert found.point == pytest.approx(planted_recall(home / "draft"), abs=1e-6)
    assert found.low < found.point < found.high
    assert planted_recall(home / "draft", mask=False) < found.point - 0.1


def test_the_fetched_graphs_give_the_reported_recall_in_plain_sessions(
    ran: tuple[Path, FlowResult], tmp_path: Path
) -> None:
    """With nothing but query.onnx, item.onnx, and the data."""
    home, made = ran
    into = tmp_path / "served"
    fetch("finder", made.finished.version, "onnxruntime", into)
    assert {path.name for path in into.iterdir()} == {"query.onnx", "item.onnx", "lowering.json"}
    described = lowering_of(into).graphs
    assert [(graph.name, graph.output, graph.width) for graph in described] == [
        ("query", "vector", 16),
        ("item", "vector", 16),
    ]
    items = pq.read_table(home / "draft" / "items.parquet")
    test = pq.read_table(home / "draft" / "test.parquet").to_pylist()
    bags = {row["user"]: row["lately"] for row in test}

    def bag(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(ids) for ids in lists])
        flat = np.concatenate([np.array(ids, np.int64) for ids in lists])
        return flat, np.cumsum(lengths) - lengths

    lately, tags = bag([bags[user] for user in range(USERS)]), bag(items["tags"].to_pylist())
    given = {
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
        for name, inputs in given.items()
    }
    scores = vectors["query"] @ vectors["item"].T
    assert scores.shape == (USERS, ITEMS)
    place = {int(item): at for at, item in enumerate(given["item"]["item"])}
    for split in ("train", "validation"):
        for row in pq.read_table(home / "draft" / f"{split}.parquet").to_pylist():
            scores[row["user"], place[row["item"]]] = -np.inf
    top = np.argsort(-scores, axis=1)[:, :20]
    hits: dict[int, list[bool]] = {}
    for row in test:
        hits.setdefault(row["user"], []).append(place[row["item"]] in top[row["user"]])
    recall = np.mean([np.mean(found) for found in hits.values()])
    assert made.finished.report.measurement is not None
    reported = made.finished.report.measurement.numbers.of("recall@20", "absolute")
    assert reported is not None
    assert recall == pytest.approx(reported.point, abs=1e-3)  # last digits move single pairs


def test_both_graphs_are_served_and_counted_and_published_by_name(
    ran: tuple[Path, FlowResult],
) -> None:
    finished = ran[1].finished
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
    # Each graph holds its own tower's tables and no others.
    held = {i.name for i in onnx.load(folder / "query.onnx").graph.initializer}
    assert not any("of_item" in name for name in held), held


def test_the_report_says_what_was_timed_and_measured(ran: tuple[Path, FlowResult]) -> None:
    finished = ran[1].finished
    metrics = [number.metric for number in finished.report.measurement.baseline.numbers]  # type: ignore[union-attr]
    assert metrics[:3] == ["recall@20", "ndcg@20", "bytes"]
    numbers = finished.report.measurement.numbers  # type: ignore[union-attr]
    for metric, least in (("score_correlation", 0.9), ("top20_overlap", 0.5)):
        found = numbers.of(metric, "absolute")
        assert found is not None
        assert least < found.point < 1, metric
    with_code(finished.report.targets[0].verdict.reasons, "top20_overlap")
    text = (local(finished.release) / "report.md").read_text()
    assert "Recall@20" in text
    assert "latency is of the query graph" in text
    assert "onnxruntime, item: vectors differ from torch by at most" in text
    stages = finished.report.stages
    assert [stage.step for stage in stages] == ["as trained", "rowwise_int4", "static_int8"]
    assert stages[0].quality.point == pytest.approx(planted_recall(ran[0] / "draft"), abs=1e-6)
    assert (
        json.loads((local(finished.release) / "report.json").read_text())["metric"] == "recall@20"
    )


def test_steps_that_train_have_nothing_to_do_and_say_so(ran: tuple[Path, FlowResult]) -> None:
    made = run_without_prefect(Order(model="finder", preset="small", limits=LIMITS))
    report = made.finished.report
    assert {"channels", "distill"} <= set(report.idle_reasons)
    assert report.idle_reasons["distill"] == Reason("no_loss", step="distill", task="retrieval")
    assert "static_int8" not in report.idle_reasons
