"""Wait while a service is down: which faults mean that, how long to wait, and the log messages.

``task_calls.py`` uses this file for tasks, flows use it for calls between tasks. The deadline is
ten minutes: a restarted service responds after about one, but its migration to another node takes
longer.
"""

import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar
from uuid import UUID

import httpx

from infra.errors import RegistryOutage, StoreOutage

log = logging.getLogger(__name__)

T = TypeVar("T")

DEADLINE_SECONDS = 600.0
"""Longest wait for one outage, from the first failed call."""

DELAYS = (2.0, 5.0, 10.0, 20.0, *[30.0] * 20)
"""Seconds before each retry; their sum is a little more than the deadline."""

_SERVER_FAULTS = 500
"""Lowest HTTP status code of a fault of the server."""


class Outage:
    """The outage of one service, starting with the first failed call."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._until = time.time() + DEADLINE_SECONDS

    def may_try_again(self, service: str, fault: BaseException, tries: int) -> bool:
        """Return whether the next retry begins before the deadline; logs the decision.

        Args:
            service: the service that does not respond, as the beginning of a sentence.
            fault: the exception of the call.
            tries: number of failed tries.
        """
        delay = DELAYS[min(tries, len(DELAYS)) - 1]
        until = datetime.fromtimestamp(self._until).astimezone().strftime("%H:%M")
        if time.monotonic() - self._began + delay > DEADLINE_SECONDS:
            log.warning(
                "%s did not respond until %s (%g s); giving up", service, until, DEADLINE_SECONDS
            )
            return False
        log.warning("%s did not respond; trying again in %g s, until %s", service, delay, until)
        if tries == 1:
            log.info("%s", fault)
        return True


def find_service(fault: BaseException) -> str | None:
    """Return the name of the service that is down; None if the fault has another cause.

    The name is the beginning of a sentence. Prefect's API counts as a service.
    """
    match fault:
        case RegistryOutage():
            return "The registry"
        case StoreOutage():
            return "The object store"
        case httpx.TransportError():
            return "Prefect's API"
        case httpx.HTTPStatusError() if fault.response.status_code >= _SERVER_FAULTS:
            return "Prefect's API"
    return None


def wait_out(call: Callable[[], T]) -> T:
    """Call a function, with retries while a service is down. For calls between tasks.

    Args:
        call: the function. It must allow repeated calls, also after a partial run.

    Raises:
        Exception: the exception of ``call``, if no service is down or the deadline has passed.
    """
    outage: Outage | None = None
    tries = 0
    while True:
        try:
            return call()
        except Exception as fault:
            service = find_service(fault)
            if service is None:
                raise
            tries += 1
            outage = outage or Outage()
            if not outage.may_try_again(service, fault, tries):
                raise
        time.sleep(DELAYS[min(tries, len(DELAYS)) - 1])


class TaskOutages:
    """The outages of this process's task runs; Prefect does the waiting and the retries."""

    def __init__(self) -> None:
        self._outages: dict[UUID, tuple[Outage, int]] = {}

    def may_try_again(self, run: UUID, fault: BaseException) -> bool:
        """Return whether Prefect retries a task run whose service is down."""
        service = find_service(fault)
        if service is None:
            return False
        outage, tries = self._outages.get(run) or (Outage(), 0)
        self._outages[run] = outage, tries + 1
        return outage.may_try_again(service, fault, tries + 1)
