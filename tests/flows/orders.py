"""Carrying out orders in tests: how a run ended, and the home it ended in."""

import functools
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from drafts import ALLOWED
from prefect import Task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun

from compressors.contracts import Artifact, Limit, Plan
from compressors.contracts.reasons import Reason
from compressors.core.registries import AnyStep
from flows import recipe
from flows.compress import compress
from flows.order import Order
from flows.run import Run
from flows.terms import Targets
from infra.bundle.bundle_folder import read
from infra.registry.mlflow_registry import Registry
from tasks.bundles.bundle_ref import find
from tasks.bundles.packing import Packed
from tasks.orchestration import policy, progress
from tasks.orchestration.documents import STAGES, Finished, Stage, Stages
from tasks.orchestration.workspace import local

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


@contextmanager
def without_engine() -> Iterator[list[tuple[str, str]]]:
    """Call the functions of tasks, without Prefect's engine and without a server.

    All is real but what Prefect adds: task runs with their retries, and the pages of a run.

    Yields:
        Name and state of every task so far, as Prefect would show them.
    """
    tasks: list[tuple[str, str]] = []

    def ran(task: Task[..., Any], arguments: dict[str, Any]) -> Any:
        result = task.fn(**arguments)
        tasks.append((_name(task, arguments), "Completed"))
        return result

    def found(task: Task[..., Any], arguments: dict[str, Any]) -> None:
        tasks.append((_name(task, arguments), "Cached"))

    def shown(*_: Any, **__: Any) -> UUID:
        return uuid4()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "run_task", ran)
        patch.setattr(policy, "show_cached", found)
        for kind in ("markdown", "table", "progress"):
            patch.setattr(progress, f"create_{kind}_artifact", shown)
        patch.setattr(progress, "update_progress_artifact", shown)
        yield tasks


def carry_out(order: Order) -> Ran:
    """Run the flow's own function, without Prefect's engine."""
    with without_engine() as tasks:
        outcome = compress.fn(order)
    state, message = "Completed", ""
    if isinstance(outcome, State):
        state, message, outcome = outcome.name or "", outcome.message or "", outcome.data
    return Ran(state, message, Finished.model_validate(outcome), tuple(tasks))


@dataclass(frozen=True)
class RecipeRun:
    """The result of a recipe, with the names of a report's fields, and the state of every task."""

    source: Artifact
    compressed: Artifact
    plan: Plan
    stages: tuple[Stage, ...]
    idle_reasons: dict[str, Reason]
    remark_reasons: tuple[Reason, ...]
    recipe: tuple[AnyStep, ...]
    tasks: tuple[tuple[str, str], ...]


def carry_out_recipe(order: Order) -> RecipeRun:
    """Carry out the recipe of an order and nothing else: no graph is made and nothing is judged."""
    with without_engine() as tasks:
        run = Run(order, find(order.model), (), {}, progress.Progress(stages=1))
        result = recipe.apply_recipe(run)
        stages = recipe.measure_recipe_stages(run, result, run.prepared("test"), run.ranking())
    plan = read(local(result.bundle)).plan
    assert plan is not None
    return RecipeRun(
        run.model.artifact,
        result.bundle,
        plan,
        Stages.validate_json((local(stages) / STAGES).read_bytes()),
        result.skip_reasons_by_step(),
        result.remarks,
        result.recipe(),
        tuple(tasks),
    )


def _name(task: Task[..., Any], arguments: dict[str, Any]) -> str:
    """What Prefect names a run of this task."""
    assert isinstance(task.task_run_name, str)
    return task.task_run_name.format(**arguments)


def carry_out_in_prefect(order: Order) -> Ran:
    """Run the flow as Prefect does, and read the state of every task from the server."""
    state = compress(order, return_state=True)
    outcome = state.result()
    while isinstance(outcome, State):
        outcome = outcome.result()
    run = state.state_details.flow_run_id
    assert run is not None
    with get_client(sync_client=True) as client:
        flow_state = client.read_flow_run(run).state
        of_this_run = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
        found = client.read_task_runs(flow_run_filter=of_this_run, limit=200)
        late = time.monotonic() + PATIENCE
        # The server learns a task run's end from an event, which may arrive after the flow's end.
        while time.monotonic() < late and any(not has_ended(task) for task in found):
            time.sleep(0.2)
            found = client.read_task_runs(flow_run_filter=of_this_run, limit=200)
    assert flow_state is not None
    return Ran(
        state=flow_state.name or "",
        message=flow_state.message or "",
        finished=Finished.model_validate(outcome),
        tasks=tuple((task.name, task.state_name or "") for task in found),
    )


def has_ended(task: TaskRun) -> bool:
    return task.state is not None and task.state.is_final()


@functools.cache
def _empty_registry() -> bytes:
    """A registry's database as it is created; its tables take most of a second."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "registry.db"
        Registry(f"sqlite:///{file}").check()
        return file.read_bytes()


def surroundings(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Work in this home, with the drafts' network allowed; a new one gets an empty registry."""
    if not home.exists():
        home.mkdir(parents=True)
        (home / "registry.db").write_bytes(_empty_registry())
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
