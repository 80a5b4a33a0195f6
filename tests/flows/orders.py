"""Carrying out orders in tests: how a run ended, and the home it ended in."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from drafts import ALLOWED
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun

from compressors.contracts import Limit
from flows.compress import compress
from flows.order import Order
from flows.terms import Targets
from tasks.bundles.packing import Packed
from tasks.orchestration.documents import Finished

ACCEPTED = Limit(metric="auc", against="baseline", at_least=-0.02)
PATIENCE = 30.0  # seconds
BOTH = Targets(onnxruntime="required", tensorrt_rtx="required")


@dataclass(frozen=True)
class Ran:
    """How a flow run ended: its state's name and message, its result, every task run's state."""

    state: str
    message: str
    finished: Finished
    tasks: tuple[tuple[str, str], ...]

    def of(self, task: str) -> list[str]:
        """The states of the runs of one task."""
        return [state for name, state in self.tasks if name.startswith(task)]


def carry_out(order: Order) -> Ran:
    """Run the flow as Prefect would, and ask the server what became of every task."""
    state = compress(order, return_state=True)
    outcome = state.result()
    while isinstance(outcome, State):
        outcome = outcome.result()
    run = state.state_details.flow_run_id
    assert run is not None
    with get_client(sync_client=True) as client:
        held = client.read_flow_run(run).state
        asked = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
        found = client.read_task_runs(flow_run_filter=asked, limit=200)
        late = time.monotonic() + PATIENCE
        # The server hears of a task run's end by an event, which may come after the flow's own.
        while time.monotonic() < late and any(not _ended(task) for task in found):
            time.sleep(0.2)
            found = client.read_task_runs(flow_run_filter=asked, limit=200)
    assert held is not None
    return Ran(
        state=held.name or "",
        message=held.message or "",
        finished=Finished.model_validate(outcome),
        tasks=tuple((task.name, task.state_name or "") for task in found),
    )


def _ended(task: TaskRun) -> bool:
    return task.state is not None and task.state.is_final()


def surroundings(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Work in this home, with the drafts' network allowed."""
    patch.setenv("RECPRESS_HOME", str(home))
    patch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    for name in ("RECPRESS_STORE", "MLFLOW_TRACKING_URI"):
        patch.delenv(name, raising=False)


def copied_home(patch: pytest.MonkeyPatch, source: Path, home: Path) -> None:
    """Work in a copy of a home, without the champions that other tests made."""
    shutil.copytree(source, home)
    shutil.rmtree(home / "store" / "ledger", ignore_errors=True)
    surroundings(patch, home)


@dataclass(frozen=True)
class World:
    """A home in which one draft was packed and one order was carried out, and was accepted."""

    home: Path
    draft: Path
    packed: Packed
    order: Order
    first: Ran
