"""Orders for a model with three outputs, of which one has labels only for clicked rows."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
from error_codes import raises_code
from multi_task_draft import NETWORK_MODULE, SIGNATURE, write_multi_task_draft
from orders import BOTH_TARGETS, run_without_prefect
from sklearn.metrics import roc_auc_score

from compressors.contracts import Limit
from compressors.errors.metrics import LimitRefused
from flows.order import Order
from infra.registry.mlflow_registry import Registry
from infra.settings import load_settings
from tasks.bundles.bundle_ref import find_bundle, require_measurable
from tasks.bundles.packing import pack
from tasks.orchestration.workspace import local
from tasks.report.page import page, read_validation
from tasks.report.tables import markdown

AUCS = ("auc[click]", "auc[like]", "auc[buy]")


@pytest.fixture
def draft(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a draft (the folder of a bundle before it is packed) and pack it; return its folder."""
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", NETWORK_MODULE)
    folder = write_multi_task_draft(work_folder / "draft")
    pack(folder)
    return folder


def test_each_output_is_measured_judged_and_served(draft: Path) -> None:
    limits = (
        Limit.parse("auc vs baseline >= -0.02"),  # applies to each output
        Limit.parse("logloss[like] vs baseline <= 0.02"),
        Limit.parse("bytes vs baseline <= 0.5"),
    )
    # ``BOTH_TARGETS`` are ONNX Runtime and TensorRT-RTX, whose engine is built but not run.
    order = Order(model="feed", preset="fast", limits=limits, targets=BOTH_TARGETS)
    finished = run_without_prefect(order).finished
    report = finished.report
    served = report.targets[0]
    assert served.verdict.outcome == "accepted", served.verdict.reason
    assert [str(item.limit) for item in served.verdict.judgements] == [
        *(f"{name} vs baseline >= -0.02" for name in AUCS),
        "logloss[like] vs baseline <= 0.02",
        "bytes vs baseline <= 0.5",
    ]
    assert report.targets[1].verdict.outcome == "built-unmeasured"
    assert report.metrics == AUCS
    (graph,) = served.lowering.graphs
    assert graph.outputs == ("click", "like", "buy")

    # The measured AUC is that of the graph's output on the rows that have the label.
    table = pq.read_table(draft / "test.parquet").to_pandas()
    session = onnxruntime.InferenceSession(local(served.artifact) / "model.onnx")
    inputs = {name: table[name].to_numpy() for name in ("user", "item")}
    inputs["price"] = table[["price", "age"]].to_numpy()
    scores = dict(zip(graph.outputs, session.run(list(graph.outputs), inputs), strict=True))
    assert report.measurement is not None
    has_label, expected = {}, {}
    for output in SIGNATURE["outputs"]:
        name, label = output["name"], table[output["label"]].to_numpy()
        has_label[name] = ~np.isnan(label)
        measured = report.measurement.numbers.of(f"auc[{name}]", "absolute")
        assert measured is not None
        assert measured.rows == has_label[name].sum()
        expected[name] = roc_auc_score(label[has_label[name]], scores[name][has_label[name]])
        assert measured.point == pytest.approx(expected[name], abs=1e-9)
    assert has_label["buy"].all()
    # The label of ``like`` is missing in rows without a click.
    assert table["liked"].isna().mean() > 0.3

    # The registry has each output's quality.
    version = Registry(load_settings().registry_uri).version("feed", finished.version)
    outputs = json.loads(version.tags["recpress.outputs"])
    assert tuple(outputs) == AUCS
    assert outputs["auc[buy]"]["value"] == pytest.approx(expected["buy"], abs=1e-9)

    # The report has each output's quality, and its change by each step.
    for stage in report.stages:
        assert tuple(stage.other_outputs) == AUCS[1:]
    for text in (markdown(report), page(report, read_validation(report.validation))):
        for name in ("AUC of click", "AUC of like", "AUC of buy"):
            assert name in text
        assert "scores of like against the baseline" in text


@pytest.mark.slow
def test_training_recovers_the_quality_of_all_outputs(draft: Path) -> None:
    steps = (
        {"kind": "channels", "keep": 0.5},
        {"kind": "distill", "training": {"epochs": 8, "learning_rate": 0.01}},
    )
    limits = (Limit.parse("bytes vs baseline <= 1"),)
    order = Order(model="feed", preset="custom", steps=steps, limits=limits)
    report = run_without_prefect(order).finished.report
    assert report.outcome == "accepted", report.targets[0].verdict.reason
    original, narrow, distilled = report.stages
    losses = [
        {name: original.of(name).quality.point - stage.of(name).quality.point for name in AUCS}
        for stage in (narrow, distilled)
    ]
    # Half of the channels lose much; training on soft labels recovers a part of it.
    assert sum(losses[0].values()) > 0.03, losses
    assert all(losses[1][name] < 0.8 * losses[0][name] for name in AUCS), losses


@pytest.mark.parametrize(
    ("limit", "code"),
    [
        ("auc[unknown] vs baseline >= -0.01", "limit_output_unknown"),
        ("gauc vs baseline >= -0.01", "limit_not_measured_without_groups"),
        ("ndcg@10[like] vs baseline >= -0.01", "limit_not_measured_without_groups"),
    ],
)
def test_limit_on_an_unknown_output_or_metric_is_refused(
    draft: Path, limit: str, code: str
) -> None:
    with raises_code(LimitRefused, code):
        require_measurable(find_bundle("feed"), (Limit.parse(limit),))
