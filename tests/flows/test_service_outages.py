"""Services that stop in the middle of an order: it waits, continues, and ends as ordered.

The tests with real services take minutes each: ``make test ARGS="-m nightly -k service_outages"``.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from drafts import ROOT, environment, recpress, write_draft
from local_services import LocalServices
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from infra import errors
from infra.errors import NoAnswer
from infra.services.http_probe import get
from tasks.orchestration import outages, policy

SECONDS = 600
ORDER: dict[str, Any] = {
    "model": "outages@1",
    "preset": "fast",
    "limits": [{"metric": "auc", "against": "baseline", "at_least": -0.02}],
}
AWAY_SECONDS = 60


# --- a task, without services ---------------------------------------------------------------


def retried_task(call: Callable[[], int]) -> Any:
    """A task with the retries of ours, and delays that a test can wait for."""
    options = {name: value for name, value in policy.KEPT.items() if "retr" in name}
    options["retry_delay_seconds"] = [0.2] * len(outages.DELAYS)
    return task(call, **options)


def test_a_task_waits_while_the_registry_is_away_and_then_completes(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "DEADLINE_SECONDS", 600.0)  # its own value, shorter in other tests
    began: list[float] = []

    def publish() -> int:
        began.append(time.monotonic())
        if time.monotonic() - began[0] < 1.5:
            raise errors.RegistryOutage("registry_no_answer", problem="connection refused")
        return len(began)

    waiting = retried_task(publish)

    @flow
    def order() -> int:
        return int(waiting())

    assert order() >= 4  # more than the 2 retries of other faults


def test_a_task_gives_up_at_the_deadline_with_the_outage_as_its_fault(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "DEADLINE_SECONDS", 12.0)  # the first two delays of 2 and 5 s fit
    tries: list[float] = []

    def publish() -> int:
        tries.append(time.monotonic())
        raise errors.RegistryOutage("registry_no_answer", problem="connection refused")

    waiting = retried_task(publish)

    @flow
    def order() -> int:
        return int(waiting())

    with pytest.raises(errors.RegistryOutage):
        order()
    assert 3 <= len(tries) < len(outages.DELAYS)


# --- an order and real services -------------------------------------------------------------


@pytest.fixture
def client(local_services: LocalServices) -> Iterator[dict[str, str]]:
    found = local_services.client
    settings = {
        PREFECT_API_URL: found["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: found["PREFECT_API_AUTH_STRING"],
    }
    with temporary_settings(settings):
        yield found


@pytest.fixture
def packed(client: dict[str, str], tmp_path: Path) -> None:
    """The bundle of the orders, in the store of the services."""
    env = environment(tmp_path, **client)
    packing = recpress(
        "bundle", "pack", str(write_draft(tmp_path / "draft", name="outages")), env=env
    )
    assert packing.returncode == 0, packing.stderr


def child_of(parent: int, words: str) -> int:
    """The child process whose command has these words."""
    lists = Path(f"/proc/{parent}/task").glob("*/children")
    children = [int(pid) for found in lists for pid in found.read_text().split()]
    commands = [(pid, Path(f"/proc/{pid}/cmdline").read_text()) for pid in children]
    (pid,) = [pid for pid, command in commands if words in command.replace("\0", " ")]
    return pid


def process_of(services: LocalServices, words: str) -> int:
    """The process of one of these services, by words of its command."""
    return child_of(services.pid, words)


def run_process_of(services: LocalServices) -> int:
    """The process that carries out a run: the worker's child."""
    return child_of(process_of(services, "worker start"), "prefect.engine")


def messages(run: UUID) -> list[str]:
    with get_client(sync_client=True) as prefect:
        of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
        return [line.message for line in prefect.read_logs(of_run, limit=200)]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(1)


def begun(seed: int, stage: str) -> UUID:
    """Submit an order and wait until it has reached a stage."""
    run: UUID = run_deployment(
        "compress/compress", parameters={"order": {**ORDER, "seed": seed}}, timeout=0
    ).id
    wait_until(lambda: any(line.endswith(f"] {stage}") for line in messages(run)))
    return run


def ended(run: UUID) -> FlowRun:
    """Wait for the end of a run, while its server may be away."""

    def state() -> FlowRun | None:
        try:
            with get_client(sync_client=True) as prefect:
                return prefect.read_flow_run(run)
        except Exception as fault:
            if outages.service_of(fault) is None:
                raise
            return None

    def is_over() -> bool:
        found = state()
        is_final = found is not None and found.state is not None and found.state.is_final()
        # A crashed run may be scheduled again in the next second.
        return is_final and found is not None and found.state_name != "Crashed"

    wait_until(is_over)
    found = state()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("seed", "words"),
    [(1, "server start"), (2, "weed"), (3, "mlflow server")],
    ids=["prefect", "store", "registry"],
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_an_order_completes_although_a_service_is_away_in_the_middle(
    packed: None, local_services: LocalServices, seed: int, words: str, how: signal.Signals
) -> None:
    """One that was killed is started again by ``make up-local``; one that hangs, after 60 s."""
    run = begun(seed=100 * how + seed, stage="static_int8")
    pid = process_of(local_services, words)
    os.kill(pid, how)
    if how == signal.SIGSTOP:
        time.sleep(AWAY_SECONDS)
        os.kill(pid, signal.SIGCONT)
    found = ended(run)
    assert (found.state_name, found.run_count) == ("Completed", 1), messages(run)


@pytest.mark.parametrize("which", ["worker", "run", "both"])
@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_an_order_continues_after_its_process_was_killed(
    packed: None, local_services: LocalServices, which: str
) -> None:
    run = begun(seed=20_000 + len(which), stage="static_int8")
    worker, process = process_of(local_services, "worker start"), run_process_of(local_services)
    killed = time.monotonic()
    for pid in {"worker": [worker], "run": [process], "both": [worker, process]}[which]:
        os.kill(pid, signal.SIGKILL)

    def is_noticed() -> bool:
        with get_client(sync_client=True) as prefect:
            return prefect.read_flow_run(run).state_name not in {"Running", "Crashed"}

    wait_until(is_noticed)
    assert time.monotonic() - killed < 180
    found = ended(run)
    assert (found.state_name, found.run_count) == ("Completed", 2), messages(run)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_waiting_orders_keep_their_sequence_although_the_worker_is_restarted(
    packed: None, local_services: LocalServices, how: signal.Signals
) -> None:
    """The waiting ones name models that do not exist, so each ends soon after its start."""
    running = begun(seed=40_000 + how, stage="static_int8")
    waiting = [
        run_deployment(
            "compress/compress", parameters={"order": {**ORDER, "model": f"none{n}@1"}}, timeout=0
        ).id
        for n in range(3)
    ]
    os.kill(process_of(local_services, "worker start"), how)
    assert ended(running).state_name == "Completed", messages(running)
    runs = [ended(run) for run in waiting]
    assert {run.state_name for run in runs} == {"Failed"}
    for earlier, later in pairwise(runs):
        assert earlier.end_time is not None
        assert later.start_time is not None
        assert earlier.end_time <= later.start_time


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_a_run_that_loses_its_process_each_time_stays_crashed_after_3_starts(
    packed: None, local_services: LocalServices
) -> None:
    run = begun(seed=30_000, stage="pull outages 1")

    def starts() -> int:
        with get_client(sync_client=True) as prefect:
            found = prefect.read_flow_run(run)
            return found.run_count if found.state_name == "Running" else 0

    for start in (1, 2, 3):
        wait_until(lambda start=start: starts() == start)  # type: ignore[misc]
        os.kill(run_process_of(local_services), signal.SIGKILL)
    time.sleep(60)
    with get_client(sync_client=True) as prefect:
        found = prefect.read_flow_run(run)
    assert (found.state_name, found.run_count) == ("Crashed", 3)
    assert found.state is not None
    assert "SIGKILL" in str(found.state.message)


@contextmanager
def registry_server(port: int, folder: Path) -> Iterator[None]:
    """An MLflow server without workers of its own, killed at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/registry.db"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: is_healthy(port))
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def is_healthy(port: int) -> bool:
    try:
        return get(f"http://127.0.0.1:{port}/health").status == 200
    except NoAnswer:
        return False


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_an_order_completes_although_the_registry_is_down_for_60_s_when_it_publishes(
    local_services: LocalServices, packed: None, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    registry = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    env = environment(tmp_path, **{**local_services.client, **registry})
    printed = tmp_path / "printed"
    limit = ["--limit", "auc vs baseline >= -0.02"]
    with registry_server(port, tmp_path), printed.open("wb") as out:
        order = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "flows.cli.app",
                "compress",
                "outages@1",
                "--preset",
                "fast",
                *limit,
            ],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        wait_until(lambda: "] measure" in printed.read_text() or order.poll() is not None)
    time.sleep(AWAY_SECONDS)
    with registry_server(port, tmp_path):
        assert order.wait(SECONDS) == 0, printed.read_text()
    assert "The registry did not answer; trying again in 20 s, until" in printed.read_text()
