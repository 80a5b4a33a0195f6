"""Wait while a service is away: which faults are waited for, how long, and what is logged.

Read by ``policy.py`` for tasks and by flows for the calls between tasks. A service that is
restarted is back after a minute or so; ten minutes also cover a node that is moved.
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
"""How long one outage is waited for, from the first call that failed."""

DELAYS = (2.0, 5.0, 10.0, 20.0, *[30.0] * 20)
"""Seconds before each further try: together a little more than the deadline."""

_SERVER_FAULTS = 500


class Outage:
    """One service that does not answer, from the first failed call on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._until = time.time() + DEADLINE_SECONDS

    def may_try_again(self, service: str, fault: BaseException, tries: int) -> bool:
        """Whether another try begins before the deadline; logs what happens.

        Args:
            service: what did not answer, as a sentence begins with it.
            fault: what the call raised.
            tries: how many have failed.
        """
        delay = DELAYS[min(tries, len(DELAYS)) - 1]
        until = datetime.fromtimestamp(self._until).astimezone().strftime("%H:%M")
        if time.monotonic() - self._began + delay > DEADLINE_SECONDS:
            log.warning(
                "%s did not answer until %s (%g s); giving up", service, until, DEADLINE_SECONDS
            )
            return False
        log.warning("%s did not answer; trying again in %g s, until %s", service, delay, until)
        if tries == 1:
            log.info("%s", fault)
        return True


def service_of(fault: BaseException) -> str | None:
    """The service that a fault says is away; None for any other fault.

    A fault of Prefect's API counts: its server may be restarting.
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
    """Call something between tasks, again and again while a service is away.

    Args:
        call: may be called several times, also after it was carried out in part.

    Raises:
        Exception: what ``call`` raised last, if it is no outage or at the deadline.
    """
    outage: Outage | None = None
    tries = 0
    while True:
        try:
            return call()
        except Exception as fault:
            service = service_of(fault)
            if service is None:
                raise
            tries += 1
            outage = outage or Outage()
            if not outage.may_try_again(service, fault, tries):
                raise
        time.sleep(DELAYS[min(tries, len(DELAYS)) - 1])


class TaskOutages:
    """The outages of the task runs of this process, for Prefect's retries."""

    def __init__(self) -> None:
        self._outages: dict[UUID, tuple[Outage, int]] = {}

    def may_try_again(self, run: UUID, fault: BaseException) -> bool:
        """Whether Prefect retries a task run whose service is away."""
        service = service_of(fault)
        if service is None:
            return False
        outage, tries = self._outages.get(run) or (Outage(), 0)
        self._outages[run] = outage, tries + 1
        return outage.may_try_again(service, fault, tries + 1)
