"""An order for a two-tower retrieval model: two graphs, evaluated by ranking all items.

The model is ``TowerNet`` (``tests/draft_network.py``), with the data of
``tests/retrieval_draft.py``: 300 users and 400 items. The query tower ``of_user`` reads the user
and the tags of recent purchases (``lately``), the item tower ``of_item`` the item, its tags and
dense features. ``planted_recall`` computes the recall without recpress; its argument ``mask``
excludes the items of a user's rows in other splits. A home is the folder with everything that
recpress stores (``RECPRESS_HOME``). A draft is the folder of a bundle before it is packed.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
from error_codes import raises_code
from orders import (
    BOTH_TARGETS,
    FlowResult,
    run_recipe,
    run_without_prefect,
    use_home,
    without_prefect_engine,
)
from reason_codes import require_reason
from retrieval_draft import (
    INTERACTIONS_PER_USER,
    ITEMS,
    USERS,
    planted_recall,
    write_retrieval_draft,
)
from safetensors.numpy import load_file
from safetensors.torch import save_file

from compressors.contracts import Limit
from compressors.core.batches import SampledItems
from compressors.distill.fine_tune import FineTune
from compressors.distill.training.item_sampler import ItemSampler
from compressors.distill.training.settings import Training
from compressors.errors.metrics import MetricRefused
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from flows.order import Order
from infra.bundle.bundle_folder import read
from infra.onnxruntime.sessions import OnnxRuntime
from infra.registry.mlflow_registry import Registry
from infra.settings import load_settings
from tasks.bundles.packing import pack
from tasks.measure import measure
from tasks.orchestration import row_progress
from tasks.orchestration.documents import PreparedRows, Ranking, Report
from tasks.orchestration.graph_documents import read_lowering
from tasks.orchestration.task_calls import call, content_key
from tasks.orchestration.workspace import local, store
from tasks.prepare import prepare
from tasks.promotion.promotions import fetch, promote
from tasks.retrieval import towers
from tasks.retrieval.encode_items import encode_items, read_item_vectors
from tasks.target_adapters import machine_of

LIMITS = (
    Limit.parse("recall@20 vs baseline >= -0.05"),
    Limit.parse("mrr@10 vs baseline >= -0.1"),
    Limit.parse("bytes vs baseline <= 0.9"),
)
STEPS = (RowwiseInt4(), StaticInt8())
LOGGER = row_progress.__name__


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


@pytest.fixture(scope="module")
def later_result(retrieval_run: tuple[Path, FlowResult]) -> FlowResult:
    """The result of a second order for this model: another recipe, and the first as champion."""
    home, first = retrieval_run
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home / "recpress")
        promote("finder", first.finished.version, "test")
        limits = (*LIMITS, Limit.parse("recall@20 vs champion >= -0.5"))
        return run_without_prefect(Order(model="finder", preset="small", limits=limits))


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


@pytest.mark.slow
def test_preset_small_trains_towers_within_a_budget_on_validation_rankings(
    later_result: FlowResult,
) -> None:
    report = later_result.finished.report
    budget = next(reason for reason in report.remark_reasons if "budget" in reason.fields)
    assert (budget.fields["budget"], budget.fields["metric"]) == (0.001, "recall@20")
    # With a quarter of the channels, the small towers lose far more, also after distillation.
    assert report.idle_reasons["distill"].code == "over_budget"
    assert report.idle_reasons["distill"].fields["loss"] > 0.01


def test_later_order_encodes_only_the_items_of_its_own_candidate(
    retrieval_run: tuple[Path, FlowResult], later_result: FlowResult
) -> None:
    """Its baseline is that of the first order, and its champion the candidate of that order."""
    # For each order: the untouched model, the candidate, the champion.
    assert retrieval_run[1].states_of("encode items") == ["Completed", "Completed"]
    assert later_result.states_of("encode items") == ["Cached", "Completed", "Cached"]


def arguments_of_encoding(report: Report) -> dict[str, Any]:
    """Return the arguments of the task ``encode_items`` for the candidate of an order."""
    bundle = report.source
    return {
        "target": "onnxruntime",
        "model": report.targets[0].artifact,
        "signature": read(local(bundle)).signature,
        "items": PreparedRows(artifact=prepare.fn(bundle, "items"), rows=ITEMS),
        "machine": machine_of("onnxruntime"),
    }


def reversed_catalogue(draft: Path, folder: Path) -> PreparedRows:
    """Store the prepared catalogue of a draft with its items in reverse order."""
    shutil.copytree(draft, folder)
    table = pq.read_table(draft / "items.parquet")
    pq.write_table(table.take(np.arange(ITEMS)[::-1]), folder / "items.parquet")
    document = json.loads((draft / "model.json").read_text()) | {"name": "reversed"}
    (folder / "model.json").write_text(json.dumps(document))
    return PreparedRows(artifact=prepare.fn(pack(folder).artifact, "items"), rows=ITEMS)


def test_stored_item_vectors_are_those_of_the_graph_and_follow_the_catalogue(
    retrieval_run: tuple[Path, FlowResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = arguments_of_encoding(retrieval_run[1].finished.report)
    columns = load_file(local(arguments["items"].artifact) / "data.safetensors")
    inputs = {name: columns[name] for name in ("item", "tags", "dense")}
    inputs["tags_offsets"] = columns["@bounds/tags"][:-1]
    graph = local(arguments["model"]) / "item.onnx"
    expected = OnnxRuntime().open(graph, threads=1).scores(inputs)
    monkeypatch.setattr(row_progress, "SECONDS_PER_LINE", 0.0)
    monkeypatch.setattr(towers, "SCORING_ROWS", 150)
    # The empty text is the digest of inputs other than the arguments.
    with caplog.at_level("INFO", LOGGER), without_prefect_engine() as tasks:
        stored = read_item_vectors(call(encode_items, "", **arguments))
        # The graph computes each row separately, so vectors do not depend on the batch size.
        np.testing.assert_array_equal(stored, expected)
        items = reversed_catalogue(retrieval_run[0] / "draft", tmp_path / "draft")
        stored = read_item_vectors(call(encode_items, "", **arguments | {"items": items}))
        np.testing.assert_array_equal(stored, expected[::-1])
    assert [state for _, state in tasks] == ["Completed", "Completed"]
    lines = [f"encode items for onnxruntime: {done} of 400" for done in (150, 300, 400)]
    names = [record.name for record in caplog.records]
    messages = [text for name, text in zip(names, caplog.messages, strict=True) if name == LOGGER]
    assert messages == lines * 2


def test_item_vectors_are_encoded_again_for_another_graph_target_or_version_of_the_runtime(
    retrieval_run: tuple[Path, FlowResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = retrieval_run[1].finished.report
    arguments = arguments_of_encoding(report)  # with the installed version of the runtime
    monkeypatch.setattr(onnxruntime, "__version__", "99.0")
    changes = (
        {},
        {"model": report.targets[1].artifact},  # the engines for TensorRT-RTX
        {"target": "tensorrt-rtx"},
        {"items": arguments["items"].model_copy(update={"artifact": report.source})},
        {"machine": machine_of("onnxruntime")},
    )
    keys = {content_key(encode_items, "", arguments | change) for change in changes}
    assert len(keys) == len(changes)


def test_vectors_that_are_not_finite_are_refused(
    retrieval_run: tuple[Path, FlowResult], tmp_path: Path
) -> None:
    report = retrieval_run[1].finished.report
    arguments = arguments_of_encoding(report)
    vectors = torch.zeros(ITEMS, 16)
    vectors[3] = torch.nan
    save_file({"vector": vectors}, tmp_path / "data.safetensors")
    stored = store().put(tmp_path)
    graphs = report.targets[0].artifact
    with raises_code(MetricRefused, "vectors_not_finite", side="item", count=1, first=3):
        measure.fn(
            "onnxruntime",
            report.source,
            baseline=graphs,
            candidate=graphs,
            champion=None,
            test=prepare.fn(report.source, "test"),
            test_rows=USERS * INTERACTIONS_PER_USER["test"],
            ranking=Ranking(items=arguments["items"], seen=()),
            item_vectors={"baseline": stored, "candidate": stored},
            metrics=(),
            seed=0,
        )


def test_item_tower_with_other_inputs_than_the_catalogue_is_refused(
    retrieval_run: tuple[Path, FlowResult], tmp_path: Path
) -> None:
    """A champion of an earlier signature cannot encode the items."""
    arguments = arguments_of_encoding(retrieval_run[1].finished.report)
    shutil.copytree(local(arguments["model"]), tmp_path / "other")
    file = tmp_path / "other" / "lowering.json"
    lowering = file.read_text().replace('"name": "dense"', '"name": "price"')
    file.unlink()  # stored files cannot be written, and neither can their copies
    file.write_text(lowering)
    arguments["model"] = store().put(tmp_path / "other")
    inputs = ("item", "tags", "tags_offsets", "price")
    with raises_code(MetricRefused, "item_inputs_differ", name="finder@1", got=inputs):
        encode_items.fn(**arguments)


def test_fine_tune_in_an_order_draws_negatives_from_the_catalogue(
    retrieval_run: tuple[Path, FlowResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is that of the first order, so its result is cached."""
    sizes = []

    def draw(sampler: ItemSampler) -> SampledItems:
        sampled = draw_items(sampler)
        sizes.append((len(sampled.item), sampled.drawn_share))
        return sampled

    draw_items = ItemSampler.draw
    monkeypatch.setattr(ItemSampler, "draw", draw)
    training = Training(epochs=1, negatives=100, learning_rate=1e-4)
    steps = (RowwiseInt4(), FineTune(training=training))
    result = run_recipe(Order(model="finder", preset="custom", steps=steps, limits=LIMITS))
    batches = math.ceil(USERS * INTERACTIONS_PER_USER["train"] / training.batch)
    assert sizes == [(100, 100 / ITEMS)] * batches
    before, _, after = result.stages
    assert after.quality.point > before.quality.point - 0.05
