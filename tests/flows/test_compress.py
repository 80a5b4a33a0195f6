"""The way of one model, with the real tasks: what becomes of it, and what a second run costs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
from command_line import run_main
from drafts import DENSE, ROOT, ROWS, environment, planted_auc, recpress, write_draft
from error_codes import Text, raises_code
from orders import AcceptedOrder, run_in_prefect, run_without_prefect
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings
from reason_codes import codes_of, with_code
from sklearn.metrics import roc_auc_score

from compressors.contracts import Limit
from flows.order import Order
from flows.terms import Preset, Targets
from infra.data.checks import Rules
from infra.errors import BuildRefused, DataRefused, StoreUnavailable
from infra.registry.mlflow_registry import Registry
from infra.settings import load_settings
from tasks import prepare as preparing
from tasks.bundles.packing import pack
from tasks.orchestration.documents import Lowering
from tasks.orchestration.policy import call
from tasks.orchestration.workspace import store
from tasks.prepare import prepare
from tasks.promotion.promotions import champion_graph, fetch, promote
from tasks.report.tables import markdown

ANY = Limit.parse("auc vs baseline >= -0.02")


def with_limits(accepted_order: AcceptedOrder, *limits: str) -> Order:
    """The world's order with other limits: everything but the gate is remembered."""
    return accepted_order.order.model_copy(update={"limits": tuple(map(Limit.parse, limits))})


def registered(model: str) -> list[str]:
    return [item.version for item in Registry(load_settings().registry_uri).versions(model)]


# --- what becomes of an order ----------------------------------------------------------------


def test_an_order_within_its_limits_is_accepted_registered_and_measured(
    accepted_order: AcceptedOrder,
) -> None:
    ran = accepted_order.result
    report = ran.finished.report
    assert (ran.state, report.outcome) == ("Completed", "accepted")
    assert [(t.target, t.verdict.outcome) for t in report.targets] == [
        ("onnxruntime", "accepted"),
        ("tensorrt-rtx", "built-unmeasured"),
    ]
    measured = report.measurement
    assert measured is not None
    assert measured.rows == ROWS["test"]
    before = measured.baseline.of("auc", "absolute")
    assert before is not None
    # Float32 sums in another order swap hardly any of 2 million pairs of scores.
    assert before.point == pytest.approx(planted_auc(accepted_order.draft), abs=1e-6)
    # int8 rows with their scales and int8 layers: 0.28 of the weights, and the graph around it.
    # int4 rows cost more than the preset's budget on the few validation rows.
    assert report.targets[0].bytes < 0.35 * report.baseline_bytes
    assert report.idle_reasons["rowwise_int4"].code == "over_budget"
    lines = {line.module: line.format for line in report.plan.lines}
    assert {"user", "item", "tags", "cross", "first", "second", "out"} <= set(lines)
    assert {lines[table] for table in ("user", "item", "tags")} == {"rowwise_int8"}
    version = Registry(load_settings().registry_uri).version("clicks", ran.finished.version)
    assert version.source == ran.finished.release.uri
    assert version.tags["recpress.outcome"] == "accepted"
    assert version.tags["recpress.verdict.tensorrt-rtx"] == "built-unmeasured"


def test_what_was_found_is_on_the_runs_pages(accepted_order: AcceptedOrder) -> None:
    with get_client(sync_client=True) as client:
        kinds = {item.type: item for item in client.read_artifacts()}
    assert {"markdown", "table", "progress"} <= set(kinds)
    assert "recpress registry fetch clicks" in str(kinds["markdown"].data)


def test_the_fetched_graph_gives_the_reported_auc_in_a_plain_session(
    accepted_order: AcceptedOrder, tmp_path: Path
) -> None:
    """With nothing but what lies in the folder: model.onnx, lowering.json, and the test data."""
    into = tmp_path / "served"
    fetch("clicks", accepted_order.result.finished.version, "onnxruntime", into)
    rows = pq.read_table(accepted_order.draft / "test.parquet")
    bags = rows["tags"].to_pylist()
    lengths = np.array([len(ids) for ids in bags])
    given: dict[str, Any] = {
        "user": rows["user"].to_numpy(),
        "item": rows["item"].to_numpy(),
        "tags": np.concatenate([np.array(ids, np.int64) for ids in bags]),
        "tags_offsets": np.cumsum(lengths) - lengths,
        "dense": np.stack([rows[f"d{place}"].to_numpy() for place in range(DENSE)], axis=1),
    }
    (described,) = Lowering.model_validate_json((into / "lowering.json").read_text()).graphs
    assert [item.name for item in described.inputs] == list(given)
    session = onnxruntime.InferenceSession(str(into / "model.onnx"))
    inputs = {item.name: given[item.name].astype(item.dtype) for item in described.inputs}
    (scores,) = session.run([described.output], inputs)
    measured = accepted_order.result.finished.report.measurement
    assert measured is not None
    reported = measured.numbers.of("auc", "absolute")
    assert reported is not None
    # Scored in one batch here and in blocks there; ties and last digits move single pairs.
    found = roc_auc_score(rows["label"].to_numpy(), scores)
    assert found == pytest.approx(reported.point, abs=1e-5)
    assert (scores > 0).all()
    assert (scores < 1).all()


def test_an_order_over_a_limit_completes_as_rejected_with_the_numbers(
    accepted_order: AcceptedOrder,
) -> None:
    ran = run_in_prefect(with_limits(accepted_order, "bytes vs baseline <= 0.01"))
    assert ran.state == "Rejected"
    assert "the limit is <= 0.010 times; rejected" in ran.message
    assert ran.finished.report.outcome == "rejected"
    version = Registry(load_settings().registry_uri).version("clicks", ran.finished.version)
    assert version.tags["recpress.outcome"] == "rejected"
    assert "candidate" not in version.aliases


def test_an_order_over_a_limit_on_score_change_is_rejected_with_the_change(
    accepted_order: AcceptedOrder,
) -> None:
    ran = run_without_prefect(
        with_limits(accepted_order, "max_score_change <= 0.0001", "score_correlation >= 0.5")
    )
    assert ran.state == "Rejected"
    assert "largest score change is" in ran.message
    assert "test rows (other rows may change more); the limit is <= 0.0001; rejected" in ran.message


def test_an_accepted_order_reports_how_much_scores_changed(accepted_order: AcceptedOrder) -> None:
    report = accepted_order.result.finished.report
    changes = with_code(report.targets[0].verdict.reasons, "score_changes")
    assert 0.9 <= with_code([changes], "correlation").fields["correlation"] < 1
    text = markdown(report)
    for what in ("score correlation", "mean score change", "largest score change"):
        assert f"| {what} |" in text


def test_a_limit_inside_the_interval_is_undecided_and_says_how_many_rows_would_decide(
    accepted_order: AcceptedOrder,
) -> None:
    measured = accepted_order.result.finished.report.measurement
    assert measured is not None
    change = measured.numbers.of("auc", "baseline")
    assert change is not None
    assert change.low < change.point
    between = (change.point + change.low) / 2
    ran = run_without_prefect(with_limits(accepted_order, f"auc vs baseline >= {between!r}"))
    assert ran.state == "Undecided"
    (judgement,) = ran.finished.report.targets[0].verdict.judgements
    assert judgement.outcome == "undecided"
    assert judgement.rows_to_decide is not None
    assert judgement.rows_to_decide > ROWS["test"]
    assert "rows would decide" in ran.message


def test_data_that_breaks_a_rule_stops_the_flow_before_anything_is_compressed(
    accepted_order: AcceptedOrder,
) -> None:
    order = accepted_order.order.model_copy(update={"rules": Rules(min_rows={"test": 100_000})})
    with raises_code(DataRefused, "checks_failed", problems=Text(r"test.*100,?000")):
        run_without_prefect(order)


# --- what is made twice ----------------------------------------------------------------------


def test_the_same_order_again_takes_every_task_from_the_cache_and_registers_nothing(
    accepted_order: AcceptedOrder,
) -> None:
    versions = registered("clicks")
    ran = run_in_prefect(accepted_order.order)
    assert {state for _, state in ran.tasks} == {"Cached"}, ran.tasks
    assert len(ran.tasks) == len(accepted_order.result.tasks)
    assert ran.finished == accepted_order.result.finished
    assert registered("clicks") == versions
    # Other tests run orders without the engine: the same tasks under the same names.
    assert sorted(run_without_prefect(accepted_order.order).tasks) == sorted(ran.tasks)


def test_an_order_with_other_limits_runs_only_gate_and_publish_again(
    accepted_order: AcceptedOrder,
) -> None:
    ran = run_without_prefect(with_limits(accepted_order, "auc vs baseline >= -0.03"))
    made = [name for name, state in ran.tasks if state != "Cached"]
    assert {name.split()[0] for name in made} == {"gate", "publish"}, made


def test_an_artifact_that_was_deleted_from_the_store_is_made_again(
    accepted_order: AcceptedOrder,
) -> None:
    compressed = accepted_order.result.finished.report.compressed
    shutil.rmtree(accepted_order.home / "store" / "artifacts" / compressed.sha256)
    ran = run_without_prefect(accepted_order.order)
    assert ran.finished == accepted_order.result.finished  # the same bits, so the same name
    assert store().find(compressed.sha256) == compressed
    assert ran.of("static_int8") == ["Completed"]
    assert ran.of("rowwise_int4") == ["Cached"]
    assert set(ran.of("measure")) == {"Cached"}


def test_an_order_forgotten_by_the_registry_is_registered_again(
    accepted_order: AcceptedOrder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    ran = run_without_prefect(accepted_order.order)
    assert ran.of("publish") == ["Completed"]
    assert registered("clicks") == ["1"]
    assert "other.db" in ran.finished.registry
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    versions = registered("clicks")
    back = run_without_prefect(
        accepted_order.order
    ).finished  # what it was registered as elsewhere is not its name
    assert back == accepted_order.result.finished
    assert registered("clicks") == versions


def access() -> dict[str, str]:
    """Environment variables for the Prefect server of the tests."""
    api = get_current_settings().api
    assert api.url is not None
    assert api.auth_string is not None
    secret = api.auth_string.get_secret_value()
    return {"PREFECT_API_URL": api.url, "PREFECT_API_AUTH_STRING": secret}


@pytest.mark.parametrize(
    ("preset", "first_step", "server"),
    [
        ("fast", "rowwise_int8", "shared"),
        # Its own server takes as long to start as all the rest, and keeps nothing that is needed.
        pytest.param("small", "rowwise_int4", "embedded", marks=pytest.mark.nightly),
    ],
)
def test_a_killed_flow_goes_on_where_it_was(
    preset: Preset,
    first_step: str,
    server: str,
    empty_home: Path,
    prefect_server: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """kill -9 of the process and of its server if it is embedded, in the second of the steps."""
    pack(write_draft(empty_home / "draft", name="killed"))
    limit = str(ANY)
    environ = environment(empty_home, **(access() if server == "shared" else {}))
    command = [sys.executable, "-m", "flows.cli.app", "compress", "killed", "--preset", preset]
    process = subprocess.Popen(
        [*command, "--limit", limit],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    lines = [""]
    try:
        while "static_int8" not in lines[-1] and (line := process.stderr.readline()):
            lines.append(line)
    finally:
        with suppress(ProcessLookupError):  # it ended by itself: the exit code below shows it
            os.killpg(process.pid, signal.SIGKILL)
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL, lines
    assert Registry(load_settings().registry_uri).models() == ()

    order = Order(model="killed", preset=preset, limits=(ANY,))
    ran = run_without_prefect(order)
    assert ran.state == "Completed"
    for task in ("pull", "validate", "prepare", first_step):
        assert set(ran.of(task)) == {"Cached"}, (task, ran.tasks)
    assert ran.of("measure") == ["Completed"]
    assert registered("killed") == ["1"]

    # What the resumed run made is what the command line now finds.
    code, said = run_main(monkeypatch, capsys, *command[3:], "--limit", limit)
    assert code == 0, said
    assert "was carried out before" in said


# --- targets ---------------------------------------------------------------------------------


@pytest.fixture
def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the datacenter package is not installed."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def test_an_optional_target_that_cannot_be_built_is_left_out_with_its_reason(
    accepted_order: AcceptedOrder, without_tensorrt: None
) -> None:
    targets = accepted_order.order.targets.model_copy(update={"tensorrt": "optional"})
    ran = run_without_prefect(accepted_order.order.model_copy(update={"targets": targets}))
    report = ran.finished.report
    assert (ran.state, report.outcome) == ("Completed", "accepted")
    assert [item.target for item in report.targets] == ["onnxruntime", "tensorrt-rtx"]
    assert "pip install 'recpress[tensorrt]'" in report.skipped["tensorrt"]


def test_a_required_target_that_cannot_be_built_is_refused_before_anything_is_done(
    accepted_order: AcceptedOrder, without_tensorrt: None
) -> None:
    order = accepted_order.order.model_copy(
        update={"model": "clicks", "targets": Targets(tensorrt="required"), "seed": 5}
    )
    with raises_code(BuildRefused, "tensorrt_missing", target="tensorrt"):
        run_without_prefect(order)


# --- the champion ----------------------------------------------------------------------------


def test_a_limit_against_the_champion_holds_without_one_and_is_measured_with_one(
    accepted_order: AcceptedOrder, without_champion: None
) -> None:
    order = with_limits(accepted_order, "bytes vs champion <= 1.01", "auc vs champion >= -0.0001")
    assert champion_graph("clicks", "onnxruntime") is None

    ran = run_without_prefect(order)
    judgements = ran.finished.report.targets[0].verdict.judgements
    assert ran.finished.report.outcome == "accepted"
    assert all(codes_of(judgement.reasons) == ["no_champion"] for judgement in judgements)

    promote("clicks", accepted_order.result.finished.version, "the first")
    ran = run_without_prefect(order)
    size, quality = ran.finished.report.targets[0].verdict.judgements
    assert ran.of("measure") == ["Completed"]
    assert size.measured is not None
    assert quality.measured is not None
    # The champion is this very graph: as many bytes, and not one score differs.
    assert (size.measured.point, quality.measured.point) == (1.0, 0.0)
    assert ran.state == "Completed"


# --- retries ---------------------------------------------------------------------------------


@flow
def only_prepare(bundle: Any) -> Any:
    return call(prepare, f"retries {time.time_ns()}", bundle=bundle, split="validation")


def runs_of(name: str) -> list[int]:
    """How often each run of a task was tried, newest flow run first."""
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(limit=200)
    newest = max(found, key=lambda run: run.created or 0)
    return [run.run_count for run in found if run.flow_run_id == newest.flow_run_id]


def test_a_task_is_retried_once_after_a_store_failure(
    accepted_order: AcceptedOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def failing_once() -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise StoreUnavailable("disk_full", path="store")
        return store()

    monkeypatch.setattr(preparing, "store", failing_once)
    assert only_prepare(accepted_order.packed.artifact).bytes > 0
    assert runs_of("prepare") == [2]


def test_a_task_that_raises_a_refusal_is_not_retried(
    accepted_order: AcceptedOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refusing() -> Any:
        calls.append(1)
        raise DataRefused("checks_missing")

    monkeypatch.setattr(preparing, "store", refusing)
    with raises_code(DataRefused, "checks_missing"):
        only_prepare(accepted_order.packed.artifact)
    assert len(calls) == 1


def test_a_store_that_is_down_is_said_in_one_sentence_within_a_minute(tmp_path: Path) -> None:
    with socket.socket() as held:  # bound and never listening: nothing else can answer there
        held.bind(("127.0.0.1", 0))
        environ = environment(
            tmp_path,
            RECPRESS_STORE="s3://models",
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{held.getsockname()[1]}",
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="canary-of-a-secret",
            AWS_DEFAULT_REGION="us-east-1",
        )
        began = time.monotonic()
        ended = recpress("compress", "clicks", "--limit", str(ANY), env=environ)
    assert time.monotonic() - began < 60
    assert ended.returncode == 1
    assert "s3://models" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "canary" not in ended.stdout + ended.stderr


# --- another kind of model -------------------------------------------------------------------


def test_a_ranking_model_is_judged_by_its_groups(empty_home: Path) -> None:
    pack(write_draft(empty_home / "draft", name="ranker", task="ranking"))
    texts = ("ndcg@10 vs baseline >= -0.02", "ndcg@3 vs baseline >= -0.1",
             "bytes vs baseline <= 0.5", "p50_ms@7 vs baseline <= 10")  # fmt: skip
    limits = tuple(map(Limit.parse, texts))
    ran = run_without_prefect(Order(model="ranker", preset="safe", limits=limits))
    report = ran.finished.report
    assert report.outcome == "accepted", report.targets[0].verdict.reason
    assert report.measurement is not None
    found = report.measurement.numbers.of("ndcg@10", "absolute")
    assert found is not None
    assert 0.5 < found.point < 1
    # A depth and a batch that only a limit names are measured too.
    judged = {str(item.limit): item.measured for item in report.targets[0].verdict.judgements}
    assert None not in judged.values()
    shallow = report.measurement.baseline.of("ndcg@3", "absolute")
    assert shallow is not None
    assert shallow.point < found.point
    assert report.measurement.baseline.of("p50_ms@7", "absolute") is not None
    assert report.measurement.numbers.score_unit == "spread"
    top = report.measurement.numbers.of("changed_top1", "absolute")
    assert top is not None
    # Lists without a relevant item have a best row, but no NDCG.
    assert top.groups is not None
    assert found.groups is not None
    assert top.groups >= found.groups
    # int8 tables change which row is first in few lists, perhaps in none.
    assert 0 <= top.point < 0.5
