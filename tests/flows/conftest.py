"""Fixtures for tests of flows: a Prefect server, one accepted order, and an empty home folder.

A home is the folder with the object store, the registry and caches (``RECPRESS_HOME``). A draft is
the folder that a user writes and ``pack`` stores as a bundle. An order is accepted if its verdict
is: the compressed model is within all limits.

The accepted order runs in Prefect once per session. Tests that do not concern Prefect run the
flow's function without Prefect's engine, which is faster (``orders.py``). The ledger is the list of
a model's promotions and rollbacks in the store.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from added_order import AddedOrder, run_added_order
from drafts import write_draft
from local_services import LocalServices, missing_programs, running_services
from orders import ACCEPTED, BOTH_TARGETS, AcceptedOrder, run_in_prefect, use_home
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows.order import Order
from tasks.bundles.packing import pack
from tasks.evaluation import latency
from tasks.orchestration import outages
from tasks.promotion.promotions import repair

# Background services of the Prefect server that these tests do not need: they handle schedules,
# deployments, automations and lost runs. The service that records task runs stays on.
UNUSED_SERVICES = (
    "CANCELLATION_CLEANUP",
    "EVENT_PERSISTER",
    "FOREMAN",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "REPOSSESSOR",
    "SCHEDULER",
    "TRIGGERS",
)


@pytest.fixture(autouse=True)
def _short_outage_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait 3 s, not ten minutes, for services that a test stops."""
    monkeypatch.setattr(outages, "DEADLINE_SECONDS", 3.0)


@pytest.fixture(scope="session", autouse=True)
def _one_latency_round() -> Iterator[None]:
    """Measure latency in one round: no test of flows checks a time in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "MAX_ROUNDS", 1)
        yield


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server for the session, with an empty database."""
    with pytest.MonkeyPatch.context() as patch:
        for service in UNUSED_SERVICES:
            patch.setenv(f"PREFECT_SERVER_SERVICES_{service}_ENABLED", "false")
        # With heartbeats, each run waits at its end for the thread that sends them, up to a second.
        no_heartbeats = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with prefect_test_harness(server_startup_timeout=90), no_heartbeats:
            yield


@pytest.fixture(scope="session")
def session_order(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> AcceptedOrder:
    """Pack the draft ``clicks`` in a new home, and run one order in Prefect, which is accepted."""
    home = tmp_path_factory.mktemp("accepted_order")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home / "recpress")
        draft = write_draft(home / "draft")
        packed = pack(draft)
        order = Order(model="clicks@1", preset="small", limits=(ACCEPTED,), targets=BOTH_TARGETS)
        return AcceptedOrder(home / "recpress", draft, packed, order, run_in_prefect(order))


@pytest.fixture
def accepted_order(session_order: AcceptedOrder, monkeypatch: pytest.MonkeyPatch) -> AcceptedOrder:
    """The accepted order of the session; sets the environment of this test to its home."""
    use_home(monkeypatch, session_order.home)
    return session_order


@pytest.fixture
def without_champion(accepted_order: AcceptedOrder) -> Iterator[None]:
    """Remove the champion of the accepted order's home, before and after this test.

    The ledger decides which version is champion; ``repair`` updates the registry's alias to it.
    """
    ledger = accepted_order.home / "store" / "ledger"
    shutil.rmtree(ledger, ignore_errors=True)
    repair("clicks")
    yield
    shutil.rmtree(ledger, ignore_errors=True)
    repair("clicks")


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the home ``recpress``, whose store and registry are empty; it is used."""
    use_home(monkeypatch, tmp_path / "recpress")
    return tmp_path


@pytest.fixture(scope="session")
def local_services() -> Iterator[LocalServices]:
    """Run Prefect, MLflow, Postgres, an S3 store and a worker, as `make up-local` does."""
    if reason := missing_programs():
        pytest.skip(reason)
    with running_services() as services:
        yield services


@pytest.fixture(scope="session")
def added_order(tmp_path_factory: pytest.TempPathFactory) -> AddedOrder:
    """Run one order with a task kind, a metric and a table format that only tests define."""
    return run_added_order(tmp_path_factory.mktemp("added"))
