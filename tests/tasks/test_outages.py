"""Retries during an outage: which faults count as one, the deadline, and the log messages.

A fault is an exception. An outage is a series of faults of a service that is unavailable for a
time; calls are repeated after ``DELAYS`` (2, 5, 10, 20, then 30 s) until ``DEADLINE_SECONDS``.
"""

import time
from collections.abc import Callable
from datetime import datetime
from uuid import uuid4

import httpx
import pytest

from infra import errors
from infra.registry.mlflow_registry import Registry
from tasks.orchestration import outages, task_calls
from tasks.orchestration.outages import (
    DEADLINE_SECONDS,
    DELAYS,
    TaskOutages,
    find_service,
    wait_out,
)

REQUEST = httpx.Request("GET", "http://127.0.0.1/api")


def api_fault(status: int) -> httpx.HTTPStatusError:
    """The exception of Prefect's client for a response with this HTTP status."""
    return httpx.HTTPStatusError(
        "no", request=REQUEST, response=httpx.Response(status, request=REQUEST)
    )


class Clock:
    """Replaces the time of ``outages``: it passes only in ``sleep`` and ``advance``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._began = time.time()
        monkeypatch.setattr(outages.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(outages.time, "time", lambda: self._began + self.now)
        monkeypatch.setattr(outages.time, "sleep", self.advance)

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def fail_until(
    clock: Clock, end: float, fault: Exception, seconds_per_call: float = 0.0
) -> Callable[[], str]:
    """Return a function that raises ``fault`` until the time ``end``, and then returns "done".

    Args:
        clock: the replaced time.
        end: end of the outage, in seconds from the start.
        fault: the exception.
        seconds_per_call: duration of each call.
    """

    def call() -> str:
        clock.advance(seconds_per_call)
        if clock.now < end:
            raise fault
        return "done"

    return call


@pytest.mark.parametrize(
    ("fault", "service"),
    [
        (errors.RegistryOutage("registry_no_answer", problem="x"), "The registry"),
        (errors.StoreOutage("store_failed", place="p", problem="x"), "The object store"),
        (httpx.ConnectError("x"), "Prefect's API"),
        (httpx.ReadTimeout("x"), "Prefect's API"),
        (api_fault(503), "Prefect's API"),
        (api_fault(500), "Prefect's API"),
        (api_fault(404), None),
        (api_fault(401), None),
        (errors.RegistryUnavailable("registry_file_unreadable", file="f", problem="x"), None),
        (errors.StoreUnavailable("disk_full", path="p"), None),
        (errors.ChildFailed("reader_not_started"), None),
        (errors.SettingRefused("registry_credentials_refused", problem="x"), None),
        (ValueError("x"), None),
    ],
)
def test_find_service_returns_a_name_only_for_faults_of_unavailable_services(
    fault: Exception, service: str | None
) -> None:
    assert find_service(fault) == service


@pytest.mark.parametrize("seconds", [1, 60, 300, 560])  # the deadline is 600 s
def test_wait_out_returns_after_an_outage_shorter_than_the_deadline(
    clock: Clock, seconds: float
) -> None:
    fault = errors.RegistryOutage("registry_no_answer", problem="x")
    assert wait_out(fail_until(clock, seconds, fault)) == "done"
    assert clock.now <= seconds + max(DELAYS)


@pytest.mark.parametrize("seconds_per_call", [0.0, 20.0, 61.0])
def test_wait_out_raises_the_exception_of_the_call_at_the_deadline(
    clock: Clock, seconds_per_call: float
) -> None:
    fault = errors.StoreOutage("store_failed", place="p", problem="x")
    with pytest.raises(errors.StoreOutage) as raised:
        wait_out(fail_until(clock, float("inf"), fault, seconds_per_call))
    assert raised.value is fault
    # The last try begins before the deadline and may end after it.
    last_try = clock.now - seconds_per_call
    assert last_try >= DEADLINE_SECONDS - max(DELAYS) - seconds_per_call
    assert last_try <= DEADLINE_SECONDS + seconds_per_call


def test_wait_out_raises_a_fault_that_is_no_outage_without_waiting(clock: Clock) -> None:
    with pytest.raises(errors.SettingRefused):
        wait_out(fail_until(clock, 1, errors.SettingRefused("registry_address_malformed")))
    assert clock.now == 0


def test_log_names_the_unavailable_service_and_the_deadline(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    until = datetime.fromtimestamp(outages.time.time() + DEADLINE_SECONDS).strftime("%H:%M")
    fault = errors.RegistryOutage("registry_no_answer", problem="connection refused")
    wait_out(fail_until(clock, 30, fault))
    lines = [record.getMessage() for record in caplog.records]
    retries = [line for line in lines if line != str(fault)]
    # The fourth delay is 20 s.
    assert retries[3] == f"The registry did not respond; trying again in 20 s, until {until}"
    assert len(retries) == len(lines) - 1  # the cause is in the log once


def test_deadline_of_a_task_run_begins_at_its_first_fault(
    clock: Clock,
) -> None:
    task_outages, run = TaskOutages(), uuid4()
    fault = errors.RegistryOutage("registry_no_answer", problem="x")
    clock.advance(7_200)  # the duration of a task before its first fault does not matter
    assert task_outages.may_try_again(run, fault)
    clock.advance(DEADLINE_SECONDS - 20)
    assert task_outages.may_try_again(run, fault)  # the next delay is 5 s
    clock.advance(15)
    assert not task_outages.may_try_again(run, fault)  # the next delay is 10 s
    assert task_outages.may_try_again(uuid4(), fault)  # another task run has another deadline
    assert not task_outages.may_try_again(run, ValueError("x"))


def test_delays_add_up_to_the_deadline_and_are_within_prefects_limit() -> None:
    assert sum(DELAYS) >= DEADLINE_SECONDS
    assert task_calls.TASK_OPTIONS["retries"] == len(DELAYS) <= 50  # Prefect refuses more delays


def test_fault_of_a_registry_file_is_no_outage(tmp_path: object) -> None:
    server_registry = Registry("http://127.0.0.1:9")  # no server uses this port
    with pytest.raises(errors.RegistryOutage):
        server_registry.check()
    file_registry = Registry(f"sqlite:////proc/recpress/{uuid4()}.db")  # cannot be created
    with pytest.raises((errors.InfraError, errors.Refused)) as raised:
        file_registry.check()
    assert not isinstance(raised.value, errors.RegistryOutage)
