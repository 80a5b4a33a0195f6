"""One Prefect server and one finished order for the tests of flows that need them.

The finished order ran in Prefect; what is not about Prefect runs without its engine: see
``orders.py``.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from added_order import AddedOrder, carry_out_added
from drafts import write_draft
from local_services import LocalServices, lacking, running_services
from orders import ACCEPTED, BOTH, World, carry_out_in_prefect, surroundings
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from flows.order import Order
from tasks import measure
from tasks.bundles.packing import pack
from tasks.orchestration import outages
from tasks.promotion.promotions import repair

# Of the server's background services a flow here needs the one that records task runs; the others
# work on schedules, deployments, automations and runs that were lost.
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
def _outages_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that a test switches off for good is tried once more, not for ten minutes."""
    monkeypatch.setattr(outages, "DEADLINE_SECONDS", 3.0)


@pytest.fixture(scope="session", autouse=True)
def _few_rounds() -> Iterator[None]:
    """As few rounds of latency as a p99 needs: no test of a flow is about the milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "MOST_ROUNDS", 1)
        yield


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for service in UNUSED_SERVICES:
            patch.setenv(f"PREFECT_SERVER_SERVICES_{service}_ENABLED", "false")
        # The end of a run waits for the thread of its heartbeats, which sleeps a second at a time.
        no_heartbeats = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with prefect_test_harness(server_startup_timeout=90), no_heartbeats:
            yield


@pytest.fixture(scope="session")
def the_world(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    home = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, home / "recpress")
        draft = write_draft(home / "draft")
        packed = pack(draft)
        order = Order(model="clicks@1", preset="small", limits=(ACCEPTED,), targets=BOTH)
        return World(home / "recpress", draft, packed, order, carry_out_in_prefect(order))


@pytest.fixture
def world(the_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The finished order, with this test's environment in its home."""
    surroundings(monkeypatch, the_world.home)
    return the_world


@pytest.fixture
def no_champion(world: World) -> Iterator[None]:
    """Remove the champion that any other test promoted, before and after this test."""
    ledger = world.home / "store" / "ledger"
    shutil.rmtree(ledger, ignore_errors=True)
    repair("clicks")
    yield
    shutil.rmtree(ledger, ignore_errors=True)
    repair("clicks")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nothing happened yet."""
    surroundings(monkeypatch, tmp_path / "recpress")
    return tmp_path


@pytest.fixture(scope="session")
def local_services() -> Iterator[LocalServices]:
    """Prefect, MLflow, Postgres, an S3 store and a worker, as `make up-local` runs them."""
    if reason := lacking():
        pytest.skip(reason)
    with running_services() as services:
        yield services


@pytest.fixture(scope="session")
def added_order(tmp_path_factory: pytest.TempPathFactory) -> AddedOrder:
    """A finished order of a kind of task, a metric and a table format that tests add."""
    return carry_out_added(tmp_path_factory.mktemp("added"))
