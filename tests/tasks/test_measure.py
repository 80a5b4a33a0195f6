"""Measuring what is served: real graphs of a real bundle, without the flow around them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from drafts import ALLOWED, ROWS, planted_auc, write_draft
from error_codes import raises_code

from compressors.contracts import Artifact
from compressors.contracts.metrics import usual_batches
from compressors.errors.metrics import MetricRefused
from compressors.metrics import judge
from tasks import measure as measuring
from tasks.bundles.packing import pack
from tasks.lower import lower_model
from tasks.orchestration.documents import Measurement, lowering_of, measurement_of, served_bytes
from tasks.orchestration.workspace import local, store
from tasks.prepare import prepare

QUALITY = {"auc", "logloss", "normalized_entropy"}
SCORES = {"score_correlation", "mean_score_change", "max_score_change"}


@dataclass(frozen=True)
class Graphs:
    """One bundle, its graph, its prepared test rows, and what measuring it against itself said."""

    home: Path
    bundle: Artifact
    graph: Artifact
    test: Artifact
    draft: Path
    itself: Measurement


def surroundings(patch: pytest.MonkeyPatch, home: Path) -> None:
    patch.setenv("RECPRESS_HOME", str(home))
    patch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)


def measured(made: Graphs, champion: Artifact | None = None, **changes: object) -> Measurement:
    arguments = {
        "target": "onnxruntime",
        "bundle": made.bundle,
        "baseline": made.graph,
        "candidate": made.graph,
        "champion": champion,
        "test": made.test,
        "test_rows": ROWS["test"],
        "ranking": None,
        "metrics": (),
        "seed": 0,
    }
    return measurement_of(measuring.measure.fn(**(arguments | changes)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    home = tmp_path_factory.mktemp("measure")
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, home)
        draft = write_draft(home / "draft")
        bundle = pack(draft).artifact
        test = prepare.fn(bundle, "test")
        graph = lower_model.fn(bundle, "onnxruntime", test, ROWS["test"], 65_536)
        unmeasured = Graphs(home, bundle, graph, test, draft, Measurement.model_construct())
        itself = measured(unmeasured)
    return Graphs(home, bundle, graph, test, draft, itself)


@pytest.fixture(autouse=True)
def _here(made: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings(monkeypatch, made.home)


def test_lowering_describes_the_inputs_and_the_parity_of_its_graph(
    made: Graphs,
) -> None:
    (found,) = lowering_of(local(made.graph)).graphs
    assert (found.name, found.output, found.width) == ("model", "score", None)
    sent = {item.name: (item.dtype, item.shape) for item in found.inputs}
    assert sent == {
        "user": ("int64", ()),
        "item": ("int64", ()),
        "tags": ("int64", ()),
        "tags_offsets": ("int64", ()),
        "dense": ("float32", (4,)),
    }
    # Nothing is quantized: what is left is the order of float32 sums.
    assert found.rows_parity.largest < 1e-5
    assert found.rows_parity.rows == 2048


def test_auc_of_the_served_graph_is_the_auc_of_the_module(made: Graphs) -> None:
    auc = made.itself.numbers.of("auc", "absolute")
    assert auc is not None
    assert auc.point == pytest.approx(planted_auc(made.draft), abs=1e-6)
    assert auc.low < auc.point < auc.high
    assert auc.rows == made.itself.rows == ROWS["test"]


def test_model_compared_with_itself_differs_only_in_latency(made: Graphs) -> None:
    for metric in QUALITY:
        change = made.itself.numbers.of(metric, "baseline")
        assert change is not None
        assert (change.low, change.point, change.high) == (0.0, 0.0, 0.0), metric
    assert made.itself.numbers.of("bytes", "baseline") == judge.exact(1.0)
    for size in usual_batches("ctr"):
        ratio = made.itself.numbers.of(f"p50_ms@{size}", "baseline")
        assert ratio is not None
        # The same graph, timed in turn: medians of a thousand calls lie close together even on
        # a busy machine.
        assert 0.7 < ratio.point < 1.4, size


def test_measurement_has_all_metrics_of_candidate_and_baseline(
    made: Graphs,
) -> None:
    wanted = QUALITY | {"bytes"}
    wanted |= {f"{name}_ms@{size}" for name in measuring.QUANTILES for size in (1, 64, 1024)}
    for against in ("absolute", "baseline"):
        found = {n.metric for n in made.itself.numbers.numbers if n.against == against}
        assert found == wanted | (SCORES if against == "absolute" else set())
    assert {n.metric for n in made.itself.baseline.numbers} == wanted
    assert made.itself.resolves.keys() == QUALITY
    assert not made.itself.numbers.has_champion


def test_score_changes_of_a_model_compared_with_itself_are_zero(made: Graphs) -> None:
    changes = {metric: made.itself.numbers.of(metric, "absolute") for metric in SCORES}
    assert {metric: found.point for metric, found in changes.items() if found is not None} == {
        "score_correlation": 1.0,
        "mean_score_change": 0.0,
        "max_score_change": 0.0,
    }
    assert made.itself.numbers.score_unit == "probability"


def test_bytes_are_the_size_of_the_served_graph_file(made: Graphs) -> None:
    folder = local(made.graph)
    found = made.itself.numbers.of("bytes", "absolute")
    assert found is not None
    assert found.point == served_bytes(folder) == (folder / "model.onnx").stat().st_size


def test_champion_adds_changes_from_the_champion(
    made: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "usual_batches", lambda _: (1,))
    found = measured(made, champion=made.graph)
    assert found.numbers.has_champion
    for metric in (*QUALITY, "bytes", "p99_ms@1"):
        assert found.numbers.of(metric, "champion") is not None, metric


def test_latency_at_a_batch_larger_than_the_test_data_is_left_out(
    made: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "usual_batches", lambda _: (ROWS["test"] + 1,))
    found = measured(made)
    assert {number.metric for number in found.numbers.numbers} == QUALITY | SCORES | {"bytes"}


def test_champion_with_other_inputs_or_graphs_is_refused(
    made: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A champion of an earlier signature cannot be scored on these rows."""
    import onnx

    model = onnx.load(local(made.graph) / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["person" if name == "user" else name for name in node.input]
    next(item for item in model.graph.input if item.name == "user").name = "person"
    other = tmp_path / "other"
    other.mkdir()
    onnx.save(model, other / "model.onnx")
    lowering = lowering_of(local(made.graph))
    (other / "lowering.json").write_text(lowering.model_dump_json())
    with raises_code(MetricRefused, "inputs_differ", model="champion"):
        measured(made, champion=store().put(other))

    towers = tuple(lowering.graphs[0].model_copy(update={"name": n}) for n in ("query", "item"))
    several = lowering.model_copy(update={"graphs": towers})
    (other / "lowering.json").write_text(several.model_dump_json())
    with raises_code(MetricRefused, "graphs_differ", expected=("model",), got=("query", "item")):
        measured(made, champion=store().put(other))


def test_scores_that_are_not_finite_are_refused_with_their_count_and_first_row(
    made: Graphs, tmp_path: Path
) -> None:
    """An id outside a table whose policy is 'error' scores NaN; a NaN must not reach the AUC."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(local(made.test) / "data.safetensors")
    tensors["user"] = tensors["user"].copy()
    tensors["user"][[5, 9]] = 3_000
    spoiled = tmp_path / "spoiled"
    spoiled.mkdir()
    save_file(tensors, spoiled / "data.safetensors")
    with raises_code(MetricRefused, "graph_scores_not_finite", count=2, row=5):
        measured(made, test=store().put(spoiled))


def test_synthetic_clicks_have_a_base_rate_and_an_auc_away_from_the_extremes(made: Graphs) -> None:
    """An AUC near a half or near one would make every comparison above easy."""
    clicks = pq.read_table(made.draft / "test.parquet")["label"].to_numpy()
    assert 0.25 < np.mean(clicks) < 0.55
    assert 0.7 < planted_auc(made.draft) < 0.8
