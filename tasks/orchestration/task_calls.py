"""Retries and caching of tasks: which faults are retried, and how cached results are found.

The key of a result consists of the task's name, its arguments (artifacts count by their hash) and a
digest of the sources that the task imports (``code_digest.py``). Results are records in the object
store (``result_records.py``).

Prefect runs and retries tasks, but its cache is disabled and it stores no results. Its cache keys
cover the lines of a task but not the code they call, and its stored results name their decoder,
which may be pickle.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from uuid import UUID

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.filesystems import WritableFileSystem
from prefect.results import (  # type: ignore[attr-defined]  # no explicit exports of this module
    ResultRecord,
    ResultRecordMetadata,
)
from prefect.states import Completed
from pydantic import PrivateAttr

from compressors.contracts import Artifact, digest
from infra.credentials import clean_exceptions, clean_log_records
from infra.errors import (
    ArtifactDamaged,
    ArtifactMissing,
    InfraError,
    OutOfMemory,
    RecordRefused,
    RegistryOutage,
    ServiceFailed,
    StoreOutage,
)
from tasks.orchestration.code_digest import code_digest
from tasks.orchestration.outages import DELAYS, TaskOutages, wait_out
from tasks.orchestration.result_records import find_result, write_result
from tasks.orchestration.workspace import store

log = logging.getLogger(__name__)

R = TypeVar("R")

OTHER_RETRIES = 2
"""Retries after an external fault that is no outage, such as a killed child process."""

_outages = TaskOutages()


clean_log_records()  # removes credentials, before Prefect stores log messages and tracebacks


class NoResultStorage(WritableFileSystem):
    """A result storage for Prefect that stores nothing.

    Without it, Prefect writes the exception of every failed flow to its default storage, even with
    ``persist_result=False``. The id of this storage is zero. No saved block of Prefect has that id,
    so Prefect finds no other storage for a state that names it.
    """

    _block_type_slug = "recpress-no-results"
    _block_document_id: UUID | None = PrivateAttr(UUID(int=0))

    def read_path(self, path: str, **_: Any) -> bytes:  # type: ignore[override]
        """Refuse to read. Not async, since Prefect calls it from synchronous code as well.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"Prefect has no result {path!r}: recpress stores results itself.")

    def write_path(self, path: str, content: bytes, **_: Any) -> None:  # type: ignore[override]
        """Discard the content."""


NO_RESULTS: dict[str, Any] = {
    "persist_result": False,
    "result_storage": NoResultStorage(),
    "result_serializer": "json",  # the default would pickle content that is then discarded
}
"""Options of every flow and task, so that Prefect neither stores nor reads results."""


def local_result(state: State[Any]) -> Any:
    """Return the result of a run of this process from its final state.

    Prefect's ``State.result`` is not safe for a state from Prefect's API: it reads any location,
    with any decoder, that the state names.

    Raises:
        ServiceFailed: the state is from the API, because the server ended the run.
        BaseException: the exception of the run.
    """
    data = state.data.result if isinstance(state.data, ResultRecord) else state.data
    if isinstance(data, State):
        return local_result(data)
    if isinstance(data, BaseException):
        raise data
    if data is None or isinstance(data, ResultRecordMetadata) or not state.is_completed():
        raise ServiceFailed(
            "run_ended_by_prefect", state=state.name, problem=state.message or "no reason given"
        )
    return data


def should_retry(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Return whether Prefect retries a failed task run: only faults that may be temporary.

    If a service is down, retries continue until a deadline (``outages.py``). Errors in an order or
    in our code are never retried.
    """
    fault = state.data.result if isinstance(state.data, ResultRecord) else state.data
    if isinstance(fault, StoreOutage | RegistryOutage):
        return _outages.may_try_again(run.id, fault)
    if isinstance(fault, OutOfMemory):
        return False  # an immediate retry has no more memory
    return isinstance(fault, InfraError) and run.run_count <= OTHER_RETRIES


TASK_OPTIONS: dict[str, Any] = {
    **NO_RESULTS,
    "cache_policy": NO_CACHE,
    "retries": len(DELAYS),
    "retry_delay_seconds": list(DELAYS),
    "retry_condition_fn": should_retry,
}
"""Options of every task."""


def content_key(task: Task[..., Any], context_digest: str, arguments: Mapping[str, Any]) -> str:
    """Compute the cache key of a result: task's sources, ``context_digest`` and all arguments.

    Args:
        task: the task of the result.
        context_digest: digest of other inputs, such as the source code of the model's class
            (``Run.context_digest`` in ``flows/run.py``).
        arguments: the arguments of the task by name; missing ones have their defaults.

    Raises:
        TypeError: an argument has no canonical JSON form.
    """
    bound = inspect.signature(task.fn).bind(**arguments)
    bound.apply_defaults()
    return digest([code_digest(task.fn), context_digest, dict(bound.arguments)])


def require_stored(result: object) -> None:
    """Raise if a result is an artifact that is no longer stored; accept any other result.

    An object store with expiry rules may delete artifacts before the records that refer to them.

    Raises:
        ArtifactMissing, ArtifactDamaged: the artifact is not stored, or its manifest is damaged.
    """
    if isinstance(result, Artifact):
        store().manifest(result)


def call(
    task: Task[..., R],
    context_digest: str,
    /,
    check: Callable[[R], object] = require_stored,
    **arguments: Any,
) -> R:
    """Return the recorded result of a task if ``check`` accepts it; otherwise run the task.

    Args:
        task: a task with the options ``TASK_OPTIONS``.
        context_digest: digest of inputs other than the arguments; part of the cache key.
        check: raises ``ArtifactMissing`` or ``ArtifactDamaged`` for a result that cannot be used,
            so that the task runs again.
        arguments: the arguments of the task, by name.

    Raises:
        StoreOutage, RegistryOutage: the service is still down at the deadline.
        Exception: the exception of the task.
    """
    key = content_key(task, context_digest, arguments)

    def find_recorded_result() -> R:
        recorded: R = find_result(store(), task.name, key, task.fn)
        check(recorded)
        return recorded

    try:
        result = wait_out(find_recorded_result)
    except (StoreOutage, RegistryOutage):
        raise
    except ArtifactMissing as fault:
        log.debug("%s: %s", task.name, fault)
    except (ArtifactDamaged, RecordRefused, InfraError) as fault:
        log.warning("%s: %s The task runs again.", task.name, fault)
    else:
        show_cached(task, arguments)
        return result
    result = run_task(task, arguments)
    wait_out(lambda: check(result))
    wait_out(lambda: write_result(store(), task.name, key, task.fn, result))
    return result


def run_task(task: Task[..., R], arguments: dict[str, Any]) -> R:
    """Run a task as a task run of this flow run; credentials are removed from its exceptions."""
    task_copy = copy.copy(task)
    task_copy.fn = clean_exceptions()(task.fn)
    result: R = task_copy(**arguments)
    return result


def show_cached(task: Task[..., Any], arguments: dict[str, Any]) -> None:
    """Show a cached result on the flow run's page, as a task run in the state Cached."""

    @functools.wraps(task.fn)
    def return_cached_state(*_: Any, **__: Any) -> State[Any]:
        return Completed(name="Cached", message="Found in the object store.")

    cached_task = Task(
        return_cached_state,
        name=task.name,
        task_run_name=task.task_run_name,
        cache_policy=NO_CACHE,
        **NO_RESULTS,
    )
    cached_task(**arguments)
