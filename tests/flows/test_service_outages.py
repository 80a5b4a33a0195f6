"""Orders wait for services that are unavailable for a time, and then complete.

The tests with real services take minutes each: ``make test ARGS="-m nightly -k service_outages"``.

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import itertools
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
from infra.services.http_probe import send_request
from tasks.orchestration import outages, task_calls

MAX_SECONDS = 600
ORDER: dict[str, Any] = {
    "model": "outages@1",
    "preset": "fast",
    "limits": [{"metric": "auc", "against": "baseline", "at_least": -0.02}],
}
OUTAGE_SECONDS = 60


# --- a task, without services ---------------------------------------------------------------


def retried_task(call: Callable[[], int]) -> Any:
    """Return a task with the retries of the project's tasks, but short delays."""
    # Options with "retr" in their names: retries, retry_delay_seconds and retry_condition_fn.
    options = {name: value for name, value in task_calls.TASK_OPTIONS.items() if "retr" in name}
    options["retry_delay_seconds"] = [0.2] * len(outages.DELAYS)
    return task(call, **options)


def test_task_waits_for_an_unavailable_registry_and_completes(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "DEADLINE_SECONDS", 600.0)  # the real value; a fixture shortens it
    tries = itertools.count(1)

    def publish() -> int:
        attempt = next(tries)
        if attempt < 4:  # other errors have at most 2 retries
            raise errors.RegistryOutage("registry_no_answer", problem="connection refused")
        return attempt

    retried = retried_task(publish)

    @flow
    def order() -> int:
        return int(retried())

    assert order() == 4


def test_task_fails_with_the_outage_at_its_deadline(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A retry is refused if its delay in outages.DELAYS would exceed the deadline. The first two
    # delays of 2 and 5 s always fit; Prefect waits only the short delays of retried_task.
    monkeypatch.setattr(outages, "DEADLINE_SECONDS", 12.0)
    tries: list[float] = []

    def publish() -> int:
        tries.append(time.monotonic())
        raise errors.RegistryOutage("registry_no_answer", problem="connection refused")

    retried = retried_task(publish)

    @flow
    def order() -> int:
        return int(retried())

    with pytest.raises(errors.RegistryOutage):
        order()
    assert 3 <= len(tries) < len(outages.DELAYS)


# --- orders with real services --------------------------------------------------------------


@pytest.fixture
def client(local_services: LocalServices) -> Iterator[dict[str, str]]:
    """Return a client's environment variables, and configure Prefect's client with them."""
    variables = local_services.client
    settings = {
        PREFECT_API_URL: variables["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: variables["PREFECT_API_AUTH_STRING"],
    }
    with temporary_settings(settings):
        yield variables


@pytest.fixture
def packed(client: dict[str, str], tmp_path: Path) -> None:
    """Pack the bundle of the orders into the store of the services."""
    env = environment(tmp_path, **client)
    packing = recpress(
        "bundle", "pack", str(write_draft(tmp_path / "draft", name="outages")), env=env
    )
    assert packing.returncode == 0, packing.stderr


def find_child(parent: int, words: str) -> int:
    """Return the child process whose command line contains words."""
    lists = Path(f"/proc/{parent}/task").glob("*/children")
    children = [int(pid) for file in lists for pid in file.read_text().split()]
    commands = [(pid, Path(f"/proc/{pid}/cmdline").read_text()) for pid in children]
    (pid,) = [pid for pid, command in commands if words in command.replace("\0", " ")]
    return pid


def find_service_process(services: LocalServices, words: str) -> int:
    """Return the process of a service, by words of its command line."""
    return find_child(services.pid, words)


def find_run_process(services: LocalServices) -> int:
    """Return the process of a flow run, which is a child of the worker."""
    return find_child(find_service_process(services, "worker start"), "prefect.engine")


def read_messages(run: UUID) -> list[str]:
    """Return the log messages of a flow run."""
    with get_client(sync_client=True) as prefect:
        of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
        return [line.message for line in prefect.read_logs(of_run, limit=200)]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` returns true; fail after ``MAX_SECONDS``."""
    deadline = time.monotonic() + MAX_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)


def start_order(seed: int, phase: str) -> UUID:
    """Submit an order and wait until it has reached a phase.

    Args:
        seed: the order's seed. Every test needs another one, since a completed order is not run
            again.
        phase: end of the log message that reports the start of the phase.
    """
    run: UUID = run_deployment(
        "compress/compress", parameters={"order": {**ORDER, "seed": seed}}, timeout=0
    ).id
    wait_until(lambda: any(line.endswith(f"] {phase}") for line in read_messages(run)))
    return run


def wait_for_end(run: UUID) -> FlowRun:
    """Wait for the end of a flow run, although the Prefect server may be unavailable."""

    def read_run() -> FlowRun | None:
        try:
            with get_client(sync_client=True) as prefect:
                return prefect.read_flow_run(run)
        except Exception as fault:
            if outages.find_service(fault) is None:  # the fault is not the outage of a service
                raise
            return None

    def has_ended() -> bool:
        flow_run = read_run()
        is_final = flow_run is not None and flow_run.state is not None and flow_run.state.is_final()
        # An automation may schedule a crashed run again.
        return is_final and flow_run is not None and flow_run.state_name != "Crashed"

    wait_until(has_ended)
    flow_run = read_run()
    assert flow_run is not None
    return flow_run


@pytest.mark.parametrize(
    ("seed", "words"),
    # The store is SeaweedFS, whose program is "weed".
    [(1, "server start"), (2, "weed"), (3, "mlflow server")],
    ids=["prefect", "store", "registry"],
)
@pytest.mark.parametrize("kill_signal", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_order_completes_although_a_service_is_unavailable_for_a_time(
    packed: None, local_services: LocalServices, seed: int, words: str, kill_signal: signal.Signals
) -> None:
    """``make up-local`` restarts a killed service; a suspended one continues after 60 s."""
    # Each pair of a signal and a service has its own seed.
    run = start_order(seed=100 * kill_signal + seed, phase="static_int8")
    pid = find_service_process(local_services, words)
    os.kill(pid, kill_signal)
    if kill_signal == signal.SIGSTOP:
        time.sleep(OUTAGE_SECONDS)
        os.kill(pid, signal.SIGCONT)
    flow_run = wait_for_end(run)
    assert (flow_run.state_name, flow_run.run_count) == ("Completed", 1), read_messages(run)


@pytest.mark.parametrize("killed_processes", ["worker", "run", "both"])
@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_order_continues_after_its_worker_or_process_was_killed(
    packed: None, local_services: LocalServices, killed_processes: str
) -> None:
    # The lengths of the three parameters differ, so each test has another seed.
    run = start_order(seed=20_000 + len(killed_processes), phase="static_int8")
    worker, process = (
        find_service_process(local_services, "worker start"),
        find_run_process(local_services),
    )
    kill_time = time.monotonic()
    for pid in {"worker": [worker], "run": [process], "both": [worker, process]}[killed_processes]:
        os.kill(pid, signal.SIGKILL)

    def is_rescheduled() -> bool:
        with get_client(sync_client=True) as prefect:
            return prefect.read_flow_run(run).state_name not in {"Running", "Crashed"}

    wait_until(is_rescheduled)
    # Prefect marks a run as crashed after 140 s without a heartbeat; 40 s are for a busy machine.
    assert time.monotonic() - kill_time < 180
    flow_run = wait_for_end(run)
    assert (flow_run.state_name, flow_run.run_count) == ("Completed", 2), read_messages(run)


@pytest.mark.parametrize("kill_signal", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_queued_orders_keep_their_sequence_after_the_worker_restarts(
    packed: None, local_services: LocalServices, kill_signal: signal.Signals
) -> None:
    """The queued orders name models that do not exist, so that each fails soon after its start."""
    running = start_order(seed=40_000 + kill_signal, phase="static_int8")
    queued = [
        run_deployment(
            "compress/compress", parameters={"order": {**ORDER, "model": f"none{n}@1"}}, timeout=0
        ).id
        for n in range(3)
    ]
    os.kill(find_service_process(local_services, "worker start"), kill_signal)
    assert wait_for_end(running).state_name == "Completed", read_messages(running)
    runs = [wait_for_end(run) for run in queued]
    assert {run.state_name for run in runs} == {"Failed"}
    for earlier, later in pairwise(runs):
        assert earlier.end_time is not None
        assert later.start_time is not None
        assert earlier.end_time <= later.start_time


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_run_whose_process_is_killed_3_times_stays_crashed(
    packed: None, local_services: LocalServices
) -> None:
    run = start_order(seed=30_000, phase="pull outages 1")

    def run_count() -> int:
        with get_client(sync_client=True) as prefect:
            flow_run = prefect.read_flow_run(run)
            return flow_run.run_count if flow_run.state_name == "Running" else 0

    for start in (1, 2, 3):
        wait_until(lambda start=start: run_count() == start)  # type: ignore[misc]
        os.kill(find_run_process(local_services), signal.SIGKILL)
    time.sleep(60)  # so that the automation could start the run again
    with get_client(sync_client=True) as prefect:
        flow_run = prefect.read_flow_run(run)
    assert (flow_run.state_name, flow_run.run_count) == ("Crashed", 3)
    assert flow_run.state is not None
    assert "SIGKILL" in str(flow_run.state.message)


@contextmanager
def registry_server(port: int, folder: Path) -> Iterator[None]:
    """Run an MLflow server with one worker; kill it at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/registry.db"]
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: is_healthy(port))
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def is_healthy(port: int) -> bool:
    """Return whether the MLflow server on a port responds."""
    try:
        return send_request(f"http://127.0.0.1:{port}/health").status == 200
    except NoAnswer:
        return False


@pytest.mark.nightly
@pytest.mark.timeout(1500)
def test_order_completes_although_the_registry_is_down_for_60_s_when_it_publishes(
    local_services: LocalServices, packed: None, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    registry = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    env = environment(tmp_path, **{**local_services.client, **registry})
    output_file = tmp_path / "printed"
    limit = ["--limit", "auc vs baseline >= -0.02"]
    with registry_server(port, tmp_path), output_file.open("wb") as out:
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
        wait_until(lambda: "] measure" in output_file.read_text() or order.poll() is not None)
    time.sleep(OUTAGE_SECONDS)
    with registry_server(port, tmp_path):
        assert order.wait(MAX_SECONDS) == 0, output_file.read_text()
    assert "The registry did not respond; trying again in 20 s, until" in output_file.read_text()
