"""The flow with its real tasks: outcomes of orders, repeated and killed runs, targets, retries.

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed. The fixture
``accepted_order`` (``conftest.py``) is an order with preset ``small`` for ONNX Runtime and
TensorRT-RTX. It ran in Prefect, and the result is within its limit. The model is ``ClickNet``
(``tests/draft_network.py``).
"""

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
from error_codes import TextMatching, raises_code
from orders import AcceptedOrder, run_in_prefect, run_recipe, run_without_prefect
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings
from reason_codes import codes_of, require_reason
from sklearn.metrics import roc_auc_score

from compressors.contracts import Limit
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from flows.order import Order
from flows.terms import Preset, Targets
from infra.data.checks import Rules
from infra.errors import BuildRefused, DataRefused, StoreUnavailable
from infra.registry.mlflow_registry import Registry
from infra.settings import load_settings
from tasks import prepare as preparing
from tasks.bundles.packing import pack
from tasks.orchestration.graph_documents import Lowering
from tasks.orchestration.task_calls import call
from tasks.orchestration.workspace import store
from tasks.prepare import prepare
from tasks.promotion.promotions import champion_graph, fetch, promote
from tasks.report.tables import markdown

LOOSE_LIMIT = Limit.parse("auc vs baseline >= -0.02")


def order_with_limits(accepted_order: AcceptedOrder, *limits: str) -> Order:
    """Return the accepted order with other limits.

    All tasks before the gate (the task that compares measurements with limits) are cached.
    """
    return accepted_order.order.model_copy(update={"limits": tuple(map(Limit.parse, limits))})


def registered_versions(model: str) -> list[str]:
    """Return the registered versions of a model."""
    return [item.version for item in Registry(load_settings().registry_uri).versions(model)]


# --- outcomes --------------------------------------------------------------------------------


def test_order_within_its_limits_is_measured_accepted_and_registered(
    accepted_order: AcceptedOrder,
) -> None:
    result = accepted_order.result
    report = result.finished.report
    assert (result.state, report.outcome) == ("Completed", "accepted")
    assert [(item.target, item.verdict.outcome) for item in report.targets] == [
        ("onnxruntime", "accepted"),
        ("tensorrt-rtx", "built-unmeasured"),
    ]
    measured = report.measurement
    assert measured is not None
    assert measured.rows == ROWS["test"]
    baseline_auc = measured.baseline.of("auc", "absolute")
    assert baseline_auc is not None
    # ``planted_auc`` computes the AUC without recpress. Another sequence of float32 additions may
    # swap a few of the 2 million pairs of a positive and a negative row.
    assert baseline_auc.point == pytest.approx(planted_auc(accepted_order.draft), abs=1e-6)
    # int8 rows with their scales and int8 layers have 0.28 of the bytes of float32: a row of 16
    # weights has 18 bytes instead of 64. The graph adds some. int4 rows exceed the preset's budget
    # on the few validation rows.
    assert report.targets[0].bytes < 0.35 * report.baseline_bytes
    assert report.idle_reasons["rowwise_int4"].code == "over_budget"
    lines = {line.module: line.format for line in report.plan.lines}
    assert {"user", "item", "tags", "cross", "first", "second", "out"} <= set(lines)
    assert {lines[table] for table in ("user", "item", "tags")} == {"rowwise_int8"}
    version = Registry(load_settings().registry_uri).version("clicks", result.finished.version)
    assert version.source == result.finished.release.uri
    assert version.tags["recpress.outcome"] == "accepted"
    assert version.tags["recpress.verdict.tensorrt-rtx"] == "built-unmeasured"


def test_prefect_has_report_table_and_progress_artifacts_of_the_run(
    accepted_order: AcceptedOrder,
) -> None:
    with get_client(sync_client=True) as client:
        kinds = {item.type: item for item in client.read_artifacts()}
    assert {"markdown", "table", "progress"} <= set(kinds)
    assert "recpress registry fetch clicks" in str(kinds["markdown"].data)


def test_fetched_graph_has_the_reported_auc_in_a_plain_onnxruntime_session(
    accepted_order: AcceptedOrder, tmp_path: Path
) -> None:
    """Uses only the fetched files, model.onnx and lowering.json, and the test data."""
    into = tmp_path / "served"
    fetch("clicks", accepted_order.result.finished.version, "onnxruntime", into)
    rows = pq.read_table(accepted_order.draft / "test.parquet")
    bags = rows["tags"].to_pylist()
    lengths = np.array([len(ids) for ids in bags])
    columns: dict[str, Any] = {
        "user": rows["user"].to_numpy(),
        "item": rows["item"].to_numpy(),
        "tags": np.concatenate([np.array(ids, np.int64) for ids in bags]),
        "tags_offsets": np.cumsum(lengths) - lengths,
        "dense": np.stack([rows[f"d{index}"].to_numpy() for index in range(DENSE)], axis=1),
    }
    (graph,) = Lowering.model_validate_json((into / "lowering.json").read_text()).graphs
    assert [item.name for item in graph.inputs] == list(columns)
    session = onnxruntime.InferenceSession(str(into / "model.onnx"))
    inputs = {item.name: columns[item.name].astype(item.dtype) for item in graph.inputs}
    (scores,) = session.run([graph.output], inputs)
    measured = accepted_order.result.finished.report.measurement
    assert measured is not None
    reported = measured.numbers.of("auc", "absolute")
    assert reported is not None
    # The report scores blocks of rows, this test one batch: last digits may swap a few pairs.
    auc = roc_auc_score(rows["label"].to_numpy(), scores)
    assert auc == pytest.approx(reported.point, abs=1e-5)
    assert (scores > 0).all()
    assert (scores < 1).all()


def test_order_over_a_limit_completes_with_state_rejected_and_the_numbers(
    accepted_order: AcceptedOrder,
) -> None:
    result = run_in_prefect(order_with_limits(accepted_order, "bytes vs baseline <= 0.01"))
    assert result.state == "Rejected"
    assert "the limit is <= 0.010 times; rejected" in result.message
    assert result.finished.report.outcome == "rejected"
    version = Registry(load_settings().registry_uri).version("clicks", result.finished.version)
    assert version.tags["recpress.outcome"] == "rejected"
    assert "candidate" not in version.aliases


def test_order_over_a_score_change_limit_is_rejected_with_the_change(
    accepted_order: AcceptedOrder,
) -> None:
    result = run_without_prefect(
        order_with_limits(accepted_order, "max_score_change <= 0.0001", "score_correlation >= 0.5")
    )
    assert result.state == "Rejected"
    assert "largest score change is" in result.message
    assert (
        "test rows (other rows may change more); the limit is <= 0.0001; rejected" in result.message
    )


def test_accepted_order_reports_the_score_changes(accepted_order: AcceptedOrder) -> None:
    report = accepted_order.result.finished.report
    changes = require_reason(report.targets[0].verdict.reasons, "score_changes")
    assert 0.9 <= require_reason([changes], "correlation").fields["correlation"] < 1
    text = markdown(report)
    for what in ("score correlation", "mean score change", "largest score change"):
        assert f"| {what} |" in text


def test_limit_inside_the_interval_is_undecided_and_reports_rows_to_decide(
    accepted_order: AcceptedOrder,
) -> None:
    measured = accepted_order.result.finished.report.measurement
    assert measured is not None
    change = measured.numbers.of("auc", "baseline")
    assert change is not None
    assert change.low < change.point
    limit_in_interval = (change.point + change.low) / 2
    result = run_without_prefect(
        order_with_limits(accepted_order, f"auc vs baseline >= {limit_in_interval!r}")
    )
    assert result.state == "Undecided"
    (judgement,) = result.finished.report.targets[0].verdict.judgements
    assert judgement.outcome == "undecided"
    assert judgement.rows_to_decide is not None
    assert judgement.rows_to_decide > ROWS["test"]
    assert "rows would decide" in result.message


def test_data_that_violates_a_rule_stops_the_flow(
    accepted_order: AcceptedOrder,
) -> None:
    order = accepted_order.order.model_copy(update={"rules": Rules(min_rows={"test": 100_000})})
    with raises_code(DataRefused, "checks_failed", problems=TextMatching(r"test.*100,?000")):
        run_without_prefect(order)


# --- repeated and killed runs ----------------------------------------------------------------


def test_repeated_order_reads_every_task_from_the_cache_and_registers_nothing(
    accepted_order: AcceptedOrder,
) -> None:
    versions = registered_versions("clicks")
    result = run_in_prefect(accepted_order.order)
    assert {state for _, state in result.tasks} == {"Cached"}, result.tasks
    assert len(result.tasks) == len(accepted_order.result.tasks)
    assert result.finished == accepted_order.result.finished
    assert registered_versions("clicks") == versions
    # Without Prefect's engine, as in most tests, the same tasks are called under the same names;
    # ``run_without_prefect`` reads the same cache.
    assert sorted(run_without_prefect(accepted_order.order).tasks) == sorted(result.tasks)


def test_order_with_other_limits_runs_only_gate_and_publish_again(
    accepted_order: AcceptedOrder,
) -> None:
    result = run_without_prefect(order_with_limits(accepted_order, "auc vs baseline >= -0.03"))
    executed = [name for name, state in result.tasks if state != "Cached"]
    assert {name.split()[0] for name in executed} == {"gate", "publish"}, executed


def test_artifact_deleted_from_the_store_is_created_again(
    accepted_order: AcceptedOrder,
) -> None:
    compressed = accepted_order.result.finished.report.compressed
    shutil.rmtree(accepted_order.home / "store" / "artifacts" / compressed.sha256)
    result = run_without_prefect(accepted_order.order)
    assert result.finished == accepted_order.result.finished  # the same bits have the same hash
    assert store().find(compressed.sha256) == compressed
    assert result.states_of("static_int8") == ["Completed"]
    assert result.states_of("rowwise_int4") == ["Cached"]
    assert set(result.states_of("measure")) == {"Cached"}


@pytest.mark.slow
def test_order_missing_in_another_registry_is_registered_there(
    accepted_order: AcceptedOrder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    result = run_without_prefect(accepted_order.order)
    assert result.states_of("publish") == ["Completed"]
    assert registered_versions("clicks") == ["1"]
    assert "other.db" in result.finished.registry
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    versions = registered_versions("clicks")
    # The version in the other registry does not replace the version in the first one.
    assert run_without_prefect(accepted_order.order).finished == accepted_order.result.finished
    assert registered_versions("clicks") == versions


def prefect_variables() -> dict[str, str]:
    """Return the environment variables that select the Prefect server of the tests."""
    api = get_current_settings().api
    assert api.url is not None
    assert api.auth_string is not None
    secret = api.auth_string.get_secret_value()
    return {"PREFECT_API_URL": api.url, "PREFECT_API_AUTH_STRING": secret}


class ProcessEnd(BaseException):
    """Raised where the process is assumed to end."""


def test_order_that_ends_in_a_step_resumes_after_its_last_completed_task(
    accepted_order: AcceptedOrder,
) -> None:
    order = Order(
        model="clicks@1",
        preset="custom",
        steps=(RowwiseInt4(), StaticInt8()),
        limits=(LOOSE_LIMIT,),
    )

    def end(*_: object) -> None:
        raise ProcessEnd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StaticInt8, "apply", end)
        with pytest.raises(ProcessEnd):
            run_recipe(order)
    states = dict(run_recipe(order).tasks)
    assert (states["rowwise_int4"], states["static_int8"]) == ("Cached", "Completed")


@pytest.mark.parametrize(
    ("preset", "first_step", "server"),
    [
        pytest.param("fast", "rowwise_int8", "shared", marks=pytest.mark.slow),
        # An embedded server doubles the time of the test.
        pytest.param("small", "rowwise_int4", "embedded", marks=pytest.mark.nightly),
    ],
)
def test_killed_flow_resumes_after_its_last_completed_task(
    preset: Preset,
    first_step: str,
    server: str,
    work_folder: Path,
    prefect_server: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kill the process, and its server if that is embedded, in the step static_int8."""
    pack(write_draft(work_folder / "draft", name="killed"))
    limit = str(LOOSE_LIMIT)
    environ = environment(work_folder, **(prefect_variables() if server == "shared" else {}))
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
        with suppress(ProcessLookupError):  # it has ended; the exit code is checked below
            os.killpg(process.pid, signal.SIGKILL)
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL, lines
    assert Registry(load_settings().registry_uri).models() == ()

    order = Order(model="killed", preset=preset, limits=(LOOSE_LIMIT,))
    result = run_without_prefect(order)
    assert result.state == "Completed"
    for task in ("pull", "validate", "prepare", first_step):
        assert set(result.states_of(task)) == {"Cached"}, (task, result.tasks)
    assert result.states_of("measure onnxruntime") == ["Completed"]
    assert registered_versions("killed") == ["1"]

    # The command without "python -m flows.cli.app".
    code, output = run_main(monkeypatch, capsys, *command[3:], "--limit", limit)
    assert code == 0, output
    assert "was completed before" in output


# --- targets ---------------------------------------------------------------------------------


@pytest.fixture
def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the import of tensorrt fail, as on a machine without that package."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def test_optional_target_that_cannot_be_built_is_skipped_with_a_reason(
    accepted_order: AcceptedOrder, without_tensorrt: None
) -> None:
    targets = accepted_order.order.targets.model_copy(update={"tensorrt": "optional"})
    result = run_without_prefect(accepted_order.order.model_copy(update={"targets": targets}))
    report = result.finished.report
    assert (result.state, report.outcome) == ("Completed", "accepted")
    assert [item.target for item in report.targets] == ["onnxruntime", "tensorrt-rtx"]
    assert "pip install 'recpress[tensorrt]'" in report.skipped["tensorrt"]


def test_required_target_that_cannot_be_built_is_refused(
    accepted_order: AcceptedOrder, without_tensorrt: None
) -> None:
    # The seed differs from that of the accepted order, so no task is cached.
    order = accepted_order.order.model_copy(
        update={"targets": Targets(tensorrt="required"), "seed": 5}
    )
    with raises_code(BuildRefused, "tensorrt_missing", target="tensorrt"):
        run_without_prefect(order)


# --- the champion ----------------------------------------------------------------------------


def test_champion_limit_holds_without_a_champion_and_is_measured_with_one(
    accepted_order: AcceptedOrder, without_champion: None
) -> None:
    order = order_with_limits(
        accepted_order, "bytes vs champion <= 1.01", "auc vs champion >= -0.0001"
    )
    assert champion_graph("clicks", "onnxruntime") is None

    result = run_without_prefect(order)
    judgements = result.finished.report.targets[0].verdict.judgements
    assert result.finished.report.outcome == "accepted"
    assert all(codes_of(judgement.reasons) == ["no_champion"] for judgement in judgements)

    promote("clicks", accepted_order.result.finished.version, reason="the first")
    result = run_without_prefect(order)
    size, quality = result.finished.report.targets[0].verdict.judgements
    assert result.states_of("measure onnxruntime") == ["Completed"]
    assert size.measured is not None
    assert quality.measured is not None
    # The champion is the same graph: same bytes and same scores.
    assert (size.measured.point, quality.measured.point) == (1.0, 0.0)
    assert result.state == "Completed"


# --- retries ---------------------------------------------------------------------------------


@flow
def run_prepare(bundle: Any) -> Any:
    """Run the task ``prepare``, with a cache key that was never used.

    The second argument of ``call`` is a part of the key.
    """
    return call(prepare, f"retries {time.time_ns()}", bundle=bundle, split="validation")


def run_counts_of_newest_flow() -> list[int]:
    """Return how often each task run of the newest flow run was started."""
    with get_client(sync_client=True) as client:
        task_runs = client.read_task_runs(limit=200)
    newest = max(task_runs, key=lambda run: run.created or 0)
    return [run.run_count for run in task_runs if run.flow_run_id == newest.flow_run_id]


def test_task_is_retried_once_after_a_store_failure(
    accepted_order: AcceptedOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_once() -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise StoreUnavailable("disk_full", path="store")
        return store()

    monkeypatch.setattr(preparing, "store", fail_once)
    assert run_prepare(accepted_order.packed.artifact).bytes > 0
    assert run_counts_of_newest_flow() == [2]


def test_task_that_refuses_its_input_is_not_retried(
    accepted_order: AcceptedOrder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refuse() -> Any:
        calls.append(1)
        raise DataRefused("checks_missing")

    monkeypatch.setattr(preparing, "store", refuse)
    with raises_code(DataRefused, "checks_missing"):
        run_prepare(accepted_order.packed.artifact)
    assert len(calls) == 1


def test_unreachable_store_exits_with_code_1_and_one_sentence_within_a_minute(
    tmp_path: Path,
) -> None:
    with socket.socket() as listener:  # bound but not listening, so connections are refused
        listener.bind(("127.0.0.1", 0))
        environ = environment(
            tmp_path,
            RECPRESS_STORE="s3://models",
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{listener.getsockname()[1]}",
            AWS_ACCESS_KEY_ID="key",
            AWS_SECRET_ACCESS_KEY="canary-of-a-secret",
            AWS_DEFAULT_REGION="us-east-1",
        )
        start = time.monotonic()
        process = recpress("compress", "clicks", "--limit", str(LOOSE_LIMIT), env=environ)
    assert time.monotonic() - start < 60
    assert process.returncode == 1
    assert "s3://models" in process.stderr
    assert "Traceback" not in process.stderr
    assert "canary" not in process.stdout + process.stderr
