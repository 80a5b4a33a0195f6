"""Helpers that run orders in tests, with or without Prefect, and return their results.

A home is the folder with the object store, the registry and caches (``RECPRESS_HOME``). A draft is
the folder that a user writes and ``pack`` stores as a bundle.
"""

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
from tasks.bundles.bundle_ref import find_bundle
from tasks.bundles.packing import Packed
from tasks.orchestration import progress, task_calls
from tasks.orchestration.documents import STAGES, Finished, Stage, Stages
from tasks.orchestration.workspace import local

ACCEPTED = Limit(metric="auc", against="baseline", at_least=-0.02)
"""A limit within which every preset stays for the test drafts."""

EVENT_SECONDS = 30.0
"""How long to wait for the events that report task runs as completed."""

BOTH_TARGETS = Targets(onnxruntime="required", tensorrt_rtx="required")
"""A target that can be measured on every machine, and one whose engine is only built."""


@dataclass(frozen=True)
class FlowResult:
    """The end of a flow run.

    Attributes:
        state: name of the final state.
        message: message of the final state.
        finished: the result of the flow.
        tasks: name and final state of each task run.
    """

    state: str
    message: str
    finished: Finished
    tasks: tuple[tuple[str, str], ...]

    def states_of(self, task: str) -> list[str]:
        """Return the final states of the task runs whose name begins with ``task``."""
        return [state for name, state in self.tasks if name.startswith(task)]


@contextmanager
def without_prefect_engine() -> Iterator[list[tuple[str, str]]]:
    """Patch the project so that a task is a plain function call, without a Prefect server.

    Retries of tasks, and artifacts on the page of a run, do not exist then.

    Yields:
        A list to which the name and the state of each task are added when it ends.
    """
    tasks: list[tuple[str, str]] = []

    def run_task(task: Task[..., Any], arguments: dict[str, Any]) -> Any:
        result = task.fn(**arguments)
        tasks.append((_name(task, arguments), "Completed"))
        return result

    def show_cached(task: Task[..., Any], arguments: dict[str, Any]) -> None:
        tasks.append((_name(task, arguments), "Cached"))

    def create_artifact(*_: Any, **__: Any) -> UUID:
        return uuid4()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_calls, "run_task", run_task)
        patch.setattr(task_calls, "show_cached", show_cached)
        for kind in ("markdown", "table", "progress"):
            patch.setattr(progress, f"create_{kind}_artifact", create_artifact)
        patch.setattr(progress, "update_progress_artifact", create_artifact)
        yield tasks


def run_without_prefect(order: Order) -> FlowResult:
    """Run the function of the flow ``compress`` without Prefect's engine."""
    with without_prefect_engine() as tasks:
        result = compress.fn(order)
    state, message = "Completed", ""
    if isinstance(result, State):
        state, message, result = result.name or "", result.message or "", result.data
    return FlowResult(state, message, Finished.model_validate(result), tuple(tasks))


@dataclass(frozen=True)
class RecipeRun:
    """The result of a recipe. Fields that a report has too have the same names as there.

    Attributes:
        source: the bundle of the order.
        compressed: the bundle after the last step.
        plan: the plan of the compressed model.
        stages: bytes and quality of the untouched model and after each applied step.
        idle_reasons: the skipped steps, each with the reason.
        remark_reasons: other decisions, such as those about the quality budget.
        recipe: the applied steps.
        tasks: name and final state of each task.
    """

    source: Artifact
    compressed: Artifact
    plan: Plan
    stages: tuple[Stage, ...]
    idle_reasons: dict[str, Reason]
    remark_reasons: tuple[Reason, ...]
    recipe: tuple[AnyStep, ...]
    tasks: tuple[tuple[str, str], ...]


def run_recipe(order: Order) -> RecipeRun:
    """Apply the steps of an order and measure each stage; lower no graph, and judge no limit."""
    with without_prefect_engine() as tasks:
        run = Run(
            order,
            find_bundle(order.model),
            teachers=(),
            champions={},
            progress=progress.Progress(phases=1),  # only the length of the progress bar
        )
        result = recipe.apply_recipe(run)
        stages = recipe.measure_recipe_stages(
            run, result, run.prepare_split("test"), run.prepare_ranking()
        )
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
    """Return the name that Prefect gives to a run of a task."""
    assert isinstance(task.task_run_name, str)
    return task.task_run_name.format(**arguments)


def run_in_prefect(order: Order) -> FlowResult:
    """Run the flow in Prefect, and read the states of its task runs from the server."""
    state = compress(order, return_state=True)
    result = state.result()
    while isinstance(result, State):
        result = result.result()
    run = state.state_details.flow_run_id
    assert run is not None
    with get_client(sync_client=True) as client:
        flow_state = client.read_flow_run(run).state
        of_this_run = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
        task_runs = client.read_task_runs(flow_run_filter=of_this_run, limit=200)
        deadline = time.monotonic() + EVENT_SECONDS
        # An event reports the end of a task run. It may arrive after the end of the flow run.
        while time.monotonic() < deadline and not all(map(is_final, task_runs)):
            time.sleep(0.2)
            task_runs = client.read_task_runs(flow_run_filter=of_this_run, limit=200)
    assert flow_state is not None
    return FlowResult(
        state=flow_state.name or "",
        message=flow_state.message or "",
        finished=Finished.model_validate(result),
        tasks=tuple((task.name, task.state_name or "") for task in task_runs),
    )


def is_final(task: TaskRun) -> bool:
    """Return whether a task run has ended, according to the server."""
    return task.state is not None and task.state.is_final()


@functools.cache
def _empty_registry() -> bytes:
    """Return the database file of an empty registry; creating its tables takes most of a second."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "registry.db"
        Registry(f"sqlite:///{file}").check()
        return file.read_bytes()


def use_home(patch: pytest.MonkeyPatch, home: Path) -> None:
    """Set the environment variables of a home folder; create it with an empty registry if needed.

    The module with the network of the test drafts is allowed.
    """
    if not home.exists():
        home.mkdir(parents=True)
        (home / "registry.db").write_bytes(_empty_registry())
    patch.setenv("RECPRESS_HOME", str(home))
    patch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    for name in ("RECPRESS_STORE", "MLFLOW_TRACKING_URI"):
        patch.delenv(name, raising=False)


def use_copied_home(patch: pytest.MonkeyPatch, source: Path, home: Path) -> None:
    """Copy a home folder without its champions, and set the environment to the copy.

    The folder ``ledger`` decides which versions are champions.
    """
    shutil.copytree(source, home)
    shutil.rmtree(home / "store" / "ledger", ignore_errors=True)
    use_home(patch, home)


@dataclass(frozen=True)
class AcceptedOrder:
    """A home folder with a packed draft and an accepted order.

    Attributes:
        home: the value of ``RECPRESS_HOME``.
        draft: the folder of the draft.
        packed: the packed bundle.
        order: the order.
        result: the result of the order in Prefect.
    """

    home: Path
    draft: Path
    packed: Packed
    order: Order
    result: FlowResult
