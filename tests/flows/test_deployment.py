"""A deployment that a worker runs, with the real services of docker-compose.yml."""

import json
import logging
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError
from drafts import environment, recpress, write_draft
from local_services import LocalServices
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, Log
from prefect.deployments import run_deployment
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RUN_SECONDS = 300
"""Longest time that a run may take, including its time in the queue."""

LOG_SECONDS = 60
"""Longest time in which the last log lines of a completed run arrive at the server."""

ORDER = {
    "model": "clicks@1",
    "preset": "fast",
    "limits": [{"metric": "auc", "against": "baseline", "at_least": -0.02}],
}


@pytest.fixture(scope="module")
def client(local_services: LocalServices) -> Iterator[dict[str, str]]:
    """Return a client's environment variables, and configure Prefect's client with them."""
    variables = local_services.client
    with temporary_settings(
        {
            PREFECT_API_URL: variables["PREFECT_API_URL"],
            PREFECT_API_AUTH_STRING: variables["PREFECT_API_AUTH_STRING"],
        }
    ):
        yield variables


@pytest.fixture(scope="module")
def flow_run(client: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> FlowRun:
    """Pack a draft (the folder that a user writes) into the store; the worker runs the order."""
    folder = tmp_path_factory.mktemp("services")
    env = environment(folder, **client)
    packing = recpress("bundle", "pack", str(write_draft(folder / "draft")), env=env)
    assert packing.returncode == 0, packing.stderr
    return run_deployment(
        "compress/compress", parameters={"order": ORDER}, timeout=RUN_SECONDS, poll_interval=1
    )


def s3(client: dict[str, str], **options: Any) -> Any:
    """Return a boto3 client of the store, which the project itself does not use."""
    return boto3.client(
        "s3",
        **{
            "endpoint_url": client["AWS_ENDPOINT_URL"],
            "aws_access_key_id": client["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": client["AWS_SECRET_ACCESS_KEY"],
            "region_name": "us-east-1",
        }
        | options,
    )


def test_run_of_the_worker_completes_with_a_report_artifact_in_prefect(flow_run: FlowRun) -> None:
    assert flow_run.state is not None
    assert (flow_run.state.name, flow_run.work_pool_name) == ("Completed", "recpress-cpu")
    with get_client(sync_client=True) as prefect:
        artifacts = prefect.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]))
        )
    reports = [item for item in artifacts if item.type == "markdown"]
    assert [item.key for item in reports] == ["recpress-clicks"]
    text = str(reports[0].data)
    assert text.startswith("# clicks 1: accepted")
    assert "recpress registry fetch clicks" in text


def test_server_receives_the_events_of_task_runs(flow_run: FlowRun) -> None:
    with get_client(sync_client=True) as prefect:
        # A client reports the state of a task run as an event, over the authenticated socket.
        tasks = prefect.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])), limit=200
        )
    # The order has more than five tasks. Without events, the server would have none.
    assert len(tasks) > 5
    assert {task.state_name for task in tasks} <= {"Completed", "Cached"}


def logged_lines(flow_run: FlowRun) -> list[Log]:
    """Wait for the line of the last phase; return the log lines of the run, at most 200.

    A worker sends its last lines after the state ``Completed``. The line of a phase has its number,
    the number of all phases, and its name, as in ``[1/9] pull clicks 1``.
    """
    log_filter = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id]))
    deadline = time.monotonic() + LOG_SECONDS
    with get_client(sync_client=True) as prefect:
        while True:
            lines = prefect.read_logs(log_filter, limit=200)
            arrived = any(line.message.endswith("] publish") for line in lines)
            if arrived or time.monotonic() > deadline:
                return lines
            time.sleep(0.5)


def test_log_of_the_run_has_its_phases_and_warnings(
    client: dict[str, str], flow_run: FlowRun
) -> None:
    lines = logged_lines(flow_run)
    phases = [line.message for line in lines if line.message.startswith("[")]
    assert phases[0].endswith("] pull clicks 1")
    assert phases[-1].endswith("] publish")
    numbers = [int(phase[1:].partition("/")[0]) for phase in phases]
    assert numbers == list(range(1, len(phases) + 1))
    # This model has no layer for the step 'fold', which logs a warning.
    warnings = [line.message for line in lines if line.level == logging.WARNING]
    assert any(text.startswith("fold has nothing to do") for text in warnings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"preset": "custom"}, "'steps' is a required property"),
        ({"limits": [{"metric": "auc", "at_least": -3}]}, "-3 is less than"),
        # 65 is more than 64, the default of best_batch, so the order has to set a larger one.
        ({"targets": {"smallest_batch": 65}}, "'best_batch' is a required property"),
        ({"promot": True}, "'promot' was unexpected"),
    ],
)
def test_invalid_order_is_refused_on_submission(
    client: dict[str, str], change: dict[str, Any], reason: str
) -> None:
    order = {**ORDER, **change}
    with pytest.raises(PrefectHTTPStatusError) as raised:
        run_deployment("compress/compress", parameters={"order": order}, timeout=0)
    assert raised.value.response.status_code == 409
    assert reason in raised.value.response.json()["detail"]


def test_queued_orders_run_one_at_a_time_in_the_sequence_of_submission(
    client: dict[str, str], flow_run: FlowRun
) -> None:
    """The orders name models that do not exist, so that each fails soon after its start."""
    submitted = [
        run_deployment(
            "compress/compress", parameters={"order": {**ORDER, "model": f"none{n}@1"}}, timeout=0
        ).id
        for n in range(3)
    ]
    deadline = time.monotonic() + RUN_SECONDS
    with get_client(sync_client=True) as prefect:
        runs = [prefect.read_flow_run(run) for run in submitted]
        while not all(run.state and run.state.is_final() for run in runs):
            assert time.monotonic() < deadline
            time.sleep(1)
            runs = [prefect.read_flow_run(run) for run in submitted]
    assert {run.state_name for run in runs} == {"Failed"}
    for earlier, later in pairwise(runs):
        assert earlier.end_time is not None
        assert later.start_time is not None
        assert earlier.end_time <= later.start_time


def test_mlflow_server_has_the_version_with_its_tags_and_alias(
    client: dict[str, str], flow_run: FlowRun
) -> None:
    mlflow = MlflowClient(client["MLFLOW_TRACKING_URI"], client["MLFLOW_TRACKING_URI"])
    version = mlflow.get_model_version_by_alias("clicks", "candidate")
    assert version.tags["recpress.outcome"] == "accepted"
    assert version.tags["recpress.bundle"] == "clicks@1"
    assert version.tags["recpress.report"].startswith("s3://recpress/store/blobs/")
    assert [step["kind"] for step in json.loads(version.tags["recpress.recipe"])] == [
        "rowwise_int8",
        "fold",
        "static_int8",
    ]
    assert version.source.startswith("s3://recpress/store/artifacts/")


def test_release_is_fetched_from_the_s3_store(
    client: dict[str, str], flow_run: FlowRun, tmp_path: Path
) -> None:
    into = tmp_path / "served"
    process = recpress(
        *("registry", "fetch", "clicks", "--version", "@candidate", "--into", str(into)),
        env=environment(tmp_path, **client),
    )
    assert process.returncode == 0, process.stderr
    assert (into / "model.onnx").stat().st_size > 0
    listing = s3(client).list_objects_v2(Bucket="recpress", Prefix="store/bundles/clicks/")
    assert [entry["Key"] for entry in listing["Contents"]] == ["store/bundles/clicks/1.json"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"aws_secret_access_key": "wrong"}, "SignatureDoesNotMatch"),
        ({"aws_access_key_id": "unknown"}, "InvalidAccessKeyId"),
        ({"config": Config(signature_version=UNSIGNED)}, "AccessDenied"),
    ],
    ids=["secret", "key", "anonymous"],
)
def test_s3_store_refuses_requests_without_the_key(
    client: dict[str, str], options: dict[str, Any], code: str
) -> None:
    with pytest.raises(ClientError) as raised:
        s3(client, **options).list_objects_v2(Bucket="recpress")
    assert raised.value.response["Error"]["Code"] == code


def test_key_of_clients_and_worker_cannot_create_buckets(
    client: dict[str, str], local_services: LocalServices
) -> None:
    with pytest.raises(ClientError) as raised:
        s3(client).create_bucket(Bucket="another")
    assert raised.value.response["Error"]["Code"] == "AccessDenied"
    # Another key creates buckets: that of the service ``setup``, which is not in client.env.
    secrets = (local_services.home / "services" / "secrets.env").read_text()
    assert client["AWS_SECRET_ACCESS_KEY"] in secrets
    assert "S3_SETUP_SECRET_KEY" in secrets


def test_doctor_reports_that_all_services_work(client: dict[str, str], tmp_path: Path) -> None:
    process = recpress("doctor", "--json", env=environment(tmp_path, **client))
    assert process.returncode == 0, process.stdout
    descriptions = {item["what"]: item["found"] for item in json.loads(process.stdout)}
    assert "writable" in descriptions["object store"]
    assert descriptions["registry"].startswith("MLflow 3.")
    assert "workers of recpress-cpu" in descriptions["Prefect"]
    assert client["AWS_SECRET_ACCESS_KEY"] not in process.stdout + process.stderr


def test_files_with_secrets_are_private_and_logs_have_no_secret(
    local_services: LocalServices, flow_run: FlowRun
) -> None:
    state = local_services.home / "services"
    private = [state / "secrets.env", state / "client.env", state / "configs" / "identities"]
    assert [path.stat().st_mode & 0o777 for path in private] == [0o600] * 3
    lines = (state / "secrets.env").read_text().splitlines()
    values = [line.partition("=")[2] for line in lines]
    assert len(set(values)) == len(values) == 6  # three passwords and three keys
    logs = {path.name: path.read_text(errors="replace") for path in state.glob("logs/*.log")}
    assert logs.keys() >= {"prefect.log", "mlflow.log", "s3.log", "worker.log"}
    assert [name for name, text in logs.items() for value in values if value in text] == []
