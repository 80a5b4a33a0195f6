"""The task ``measure`` on the lowered graph of a packed bundle, without a flow.

A home is the folder with everything that recpress stores (``RECPRESS_HOME``). A draft is the folder
of a bundle before it is packed. ``write_draft`` writes a click model with four dense numbers as
input and a table of 3,000 users (``tests/drafts.py``).
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import page_reports
import pyarrow.parquet as pq
import pytest
from drafts import ALLOWED, ROWS, planted_auc, write_draft
from error_codes import raises_code

from compressors.contracts import Artifact
from compressors.contracts.metrics import default_batch_sizes
from compressors.contracts.metrics.serving import QUANTILES
from compressors.errors.metrics import MetricRefused
from compressors.metrics.measured import exact_estimate
from tasks import measure as measuring
from tasks.bundles.packing import pack
from tasks.evaluation import latency
from tasks.lower import PROBE_ROWS, lower_model
from tasks.orchestration.documents import Measurement, read_measurement
from tasks.orchestration.graph_documents import read_lowering, served_bytes
from tasks.orchestration.workspace import local, store
from tasks.prepare import prepare
from tasks.report.tables import latency_remarks

QUALITY_METRICS = {"auc", "logloss", "normalized_entropy"}
SCORE_CHANGE_METRICS = {"score_correlation", "mean_score_change", "max_score_change"}


@dataclass(frozen=True)
class Graphs:
    """A bundle and what is derived from it.

    Attributes:
        home: folder of the store.
        bundle: the packed bundle.
        graph: its graph for ONNX Runtime.
        test: its prepared test rows.
        draft: folder with the draft of the bundle.
        with_itself: measurement of the graph as candidate, with the same graph as baseline.
    """

    home: Path
    bundle: Artifact
    graph: Artifact
    test: Artifact
    draft: Path
    with_itself: Measurement


def set_environment(patch: pytest.MonkeyPatch, home: Path) -> None:
    patch.setenv("RECPRESS_HOME", str(home))
    patch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)


def measure_graph(
    graphs: Graphs, champion: Artifact | None = None, **changes: object
) -> Measurement:
    """Measure the graph as candidate and as baseline.

    Args:
        graphs: the graph and the data.
        champion: the champion's graph; None for no champion.
        changes: arguments of the task ``measure`` to replace.
    """
    arguments = {
        "target": "onnxruntime",
        "bundle": graphs.bundle,
        "baseline": graphs.graph,
        "candidate": graphs.graph,
        "champion": champion,
        "test": graphs.test,
        "test_rows": ROWS["test"],
        "ranking": None,  # this and the vectors are for retrieval models
        "item_vectors": {},
        "metrics": (),  # the metrics of limits
        "seed": 0,
    }
    return read_measurement(measuring.measure.fn(**(arguments | changes)))


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """A draft that is packed, lowered for ONNX Runtime, and measured."""
    home = tmp_path_factory.mktemp("measure")
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, home)
        draft = write_draft(home / "draft")
        bundle = pack(draft).artifact
        test = prepare.fn(bundle, "test")
        graph = lower_model.fn(
            bundle,
            "onnxruntime",
            test,
            probe_rows=ROWS["test"],  # number of rows of ``test``
            most_rows=65_536,  # the largest batch that the graph must accept
        )
        not_measured = Measurement.model_construct()  # without fields
        graphs = Graphs(home, bundle, graph, test, draft, with_itself=not_measured)
        return replace(graphs, with_itself=measure_graph(graphs))


@pytest.fixture(autouse=True)
def _use_home(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, graphs.home)


def test_lowering_describes_the_inputs_and_the_parity_of_its_graph(
    graphs: Graphs,
) -> None:
    (graph,) = read_lowering(local(graphs.graph)).graphs
    # The width is that of output vectors; this output is one number per row.
    assert (graph.name, graph.output, graph.width) == ("model", "score", None)
    inputs = {item.name: (item.dtype, item.shape) for item in graph.inputs}
    assert inputs == {
        "user": ("int64", ()),
        "item": ("int64", ()),
        "tags": ("int64", ()),
        "tags_offsets": ("int64", ()),
        "dense": ("float32", (4,)),
    }
    # Nothing is quantized, so graph and module differ only in the sequence of float32 additions.
    assert graph.rows_parity.largest < 1e-5
    assert graph.rows_parity.rows == PROBE_ROWS


def test_auc_of_the_served_graph_is_the_auc_of_the_module(graphs: Graphs) -> None:
    auc = graphs.with_itself.numbers.of("auc", "absolute")
    assert auc is not None
    # planted_auc computes the AUC of the draft's network with torch and scikit-learn alone.
    assert auc.point == pytest.approx(planted_auc(graphs.draft), abs=1e-6)
    assert auc.low < auc.point < auc.high
    assert auc.rows == graphs.with_itself.rows == ROWS["test"]


def test_model_compared_with_itself_differs_only_in_latency(graphs: Graphs) -> None:
    for metric in QUALITY_METRICS:
        change = graphs.with_itself.numbers.of(metric, "baseline")
        assert change is not None
        assert (change.low, change.point, change.high) == (0.0, 0.0, 0.0), metric
    assert graphs.with_itself.numbers.of("bytes", "baseline") == exact_estimate(1.0)
    for size in default_batch_sizes("ctr"):
        ratio = graphs.with_itself.numbers.of(f"p50_ms@{size}", "baseline")
        assert ratio is not None
        # Both are medians of up to a thousand calls of the same graph, in turn, so they are close
        # together even on a busy machine.
        assert 0.7 < ratio.point < 1.4, size


def test_measurement_has_all_metrics_of_candidate_and_baseline(
    graphs: Graphs,
) -> None:
    expected = QUALITY_METRICS | {"bytes"}
    expected |= {f"{name}_ms@{size}" for name in QUANTILES for size in (1, 64, 1024)}
    for against in ("absolute", "baseline"):
        metrics = {n.metric for n in graphs.with_itself.numbers.numbers if n.against == against}
        assert metrics == expected | (SCORE_CHANGE_METRICS if against == "absolute" else set())
    assert {n.metric for n in graphs.with_itself.baseline.numbers} == expected
    # The smallest detectable change is known for each quality metric.
    assert graphs.with_itself.resolves.keys() == QUALITY_METRICS
    assert not graphs.with_itself.numbers.has_champion


def test_score_changes_of_a_model_compared_with_itself_are_zero(graphs: Graphs) -> None:
    changes = {
        metric: graphs.with_itself.numbers.of(metric, "absolute") for metric in SCORE_CHANGE_METRICS
    }
    assert {metric: change.point for metric, change in changes.items() if change is not None} == {
        "score_correlation": 1.0,
        "mean_score_change": 0.0,
        "max_score_change": 0.0,
    }
    assert graphs.with_itself.numbers.score_unit == "probability"


def test_bytes_are_the_size_of_the_served_graph_file(graphs: Graphs) -> None:
    folder = local(graphs.graph)
    measured = graphs.with_itself.numbers.of("bytes", "absolute")
    assert measured is not None
    assert measured.point == served_bytes(folder) == (folder / "model.onnx").stat().st_size


def test_champion_adds_changes_from_the_champion(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "default_batch_sizes_of_outputs", lambda _: (1,))
    measurement = measure_graph(graphs, champion=graphs.graph)
    assert measurement.numbers.has_champion
    for metric in (*QUALITY_METRICS, "bytes", "p99_ms@1"):
        assert measurement.numbers.of(metric, "champion") is not None, metric


def test_latency_at_a_batch_larger_than_the_test_data_is_left_out(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "default_batch_sizes_of_outputs", lambda _: (ROWS["test"] + 1,))
    measurement = measure_graph(graphs)
    assert {
        number.metric for number in measurement.numbers.numbers
    } == QUALITY_METRICS | SCORE_CHANGE_METRICS | {"bytes"}


# The duration of a round is estimated from the first round if that takes more milliseconds than
# this, else from five further rounds.
@pytest.mark.parametrize("slow_round_ms", [0.0, 1000.0])
def test_quantile_that_would_take_too_long_is_measured_only_if_a_limit_names_it(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch, slow_round_ms: float
) -> None:
    monkeypatch.setattr(latency, "MAX_TIMING_MS", 0.0)
    monkeypatch.setattr(latency, "TIMING_BUDGET_MS", 1.0)
    monkeypatch.setattr(latency, "SLOW_ROUND_MS", slow_round_ms)
    measurement = measure_graph(graphs, metrics=("p99_ms@64",))
    names = {number.metric for number in measurement.numbers.numbers}
    assert {"p50_ms@1", "p50_ms@64", "p50_ms@1024", "p99_ms@64"} <= names
    assert names.isdisjoint({"p99_ms@1", "p99_ms@1024"})
    assert measurement.not_timed.keys() == {"p99_ms@1", "p99_ms@1024"}
    assert all(seconds > 0 for seconds in measurement.not_timed.values())
    report = page_reports.create_report().model_copy(update={"measurement": measurement})
    text = " ".join(latency_remarks(report))
    assert "p99 ms, batch 1024 was not measured for ONNX Runtime: it would have taken" in text
    assert "p99 ms, batch 64 was not measured" not in text


def test_champion_with_other_inputs_or_graphs_is_refused(
    graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A champion with an earlier signature cannot score the test rows."""
    import onnx

    model = onnx.load(local(graphs.graph) / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["person" if name == "user" else name for name in node.input]
    next(item for item in model.graph.input if item.name == "user").name = "person"
    other = tmp_path / "other"
    other.mkdir()
    onnx.save(model, other / "model.onnx")
    lowering = read_lowering(local(graphs.graph))
    (other / "lowering.json").write_text(lowering.model_dump_json())
    with raises_code(MetricRefused, "inputs_differ", model="champion"):
        measure_graph(graphs, champion=store().put(other))

    towers = tuple(lowering.graphs[0].model_copy(update={"name": n}) for n in ("query", "item"))
    several = lowering.model_copy(update={"graphs": towers})
    (other / "lowering.json").write_text(several.model_dump_json())
    with raises_code(MetricRefused, "graphs_differ", expected=("model",), got=("query", "item")):
        measure_graph(graphs, champion=store().put(other))


@pytest.mark.parametrize("outputs", [("click", "like"), ("like",)])
def test_champion_with_other_outputs_is_refused(
    graphs: Graphs, tmp_path: Path, outputs: tuple[str, ...]
) -> None:
    """Scores of two models are compared by the position of the output."""
    other = tmp_path / "other"
    shutil.copytree(local(graphs.graph), other)
    lowering = read_lowering(other)
    graph = lowering.graphs[0].model_copy(update={"several_outputs": outputs})
    text = lowering.model_copy(update={"graphs": (graph,)}).model_dump_json()
    (other / "lowering.json").unlink()
    (other / "lowering.json").write_text(text)
    with raises_code(MetricRefused, "outputs_differ", expected=("score",), got=outputs):
        measure_graph(graphs, champion=store().put(other))


def test_scores_that_are_not_finite_are_refused_with_their_count_and_first_row(
    graphs: Graphs, tmp_path: Path
) -> None:
    """An id outside a table with the policy "error" has the score NaN, which AUC cannot rank."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(local(graphs.test) / "data.safetensors")
    tensors["user"] = tensors["user"].copy()
    tensors["user"][[5, 9]] = 3_000  # the table has 3,000 rows
    folder = tmp_path / "with_wrong_ids"
    folder.mkdir()
    save_file(tensors, folder / "data.safetensors")
    with raises_code(MetricRefused, "graph_scores_not_finite", count=2, row=5):
        measure_graph(graphs, test=store().put(folder))


def test_synthetic_clicks_have_a_base_rate_and_an_auc_away_from_the_extremes(
    graphs: Graphs,
) -> None:
    """With an AUC near 0.5 or 1, the tests above would detect less."""
    clicks = pq.read_table(graphs.draft / "test.parquet")["label"].to_numpy()
    assert 0.25 < np.mean(clicks) < 0.55
    assert 0.7 < planted_auc(graphs.draft) < 0.8
