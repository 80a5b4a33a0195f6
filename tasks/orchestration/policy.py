"""Retry and cache policy of tasks: what is retried, and how cached results are found.

The key of a result is the task, its arguments (stored artifacts are identified by content) and a
digest of the sources the task imports (``code_digest.py``). Prefect's cache is not used: its keys
cover a task's lines but not the code they call, and its records select their decoder, which may be
pickle. Our records are JSON in the object store (``result_records.py``). Prefect runs and retries
tasks, but with any settings it neither stores nor reads a result.
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
from prefect.results import (  # type: ignore[attr-defined]  # imported there, not listed
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
"""Retries after a fault outside that is no outage, such as a child process that was killed."""

_outages = TaskOutages()


clean_log_records()  # before a run begins: Prefect stores its log, with every traceback


class NoResultStorage(WritableFileSystem):
    """A result storage for Prefect that stores nothing.

    Without it, Prefect writes the exception of every failed flow to its default storage, even if
    results are not persisted. No block has this id: a state that refers to this storage cannot be
    read from any other.
    """

    _block_type_slug = "recpress-no-results"
    _block_document_id: UUID | None = PrivateAttr(UUID(int=0))

    def read_path(self, path: str, **_: Any) -> bytes:  # type: ignore[override]
        """Refuse to read; Prefect calls it from synchronous and asynchronous code.

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
"""Options of every flow and task: Prefect stores no result and reads none."""


def local_result(state: State[Any]) -> Any:
    """Return the result of a run of this process.

    For a state from Prefect's API, ``State.result`` would read any location with any decoder that
    the state names.

    Raises:
        ServiceFailed: the state came from the API: the server ended the run.
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


def infra_fault(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Retry only faults that a second try may solve; an invalid order is never retried.

    If a service is down, retries continue until a deadline (``outages.py``).
    """
    fault = state.data.result if isinstance(state.data, ResultRecord) else state.data
    if isinstance(fault, StoreOutage | RegistryOutage):
        return _outages.may_try_again(run.id, fault)
    if isinstance(fault, OutOfMemory):
        return False  # an immediate retry has no more memory
    return isinstance(fault, InfraError) and run.run_count <= OTHER_RETRIES


KEPT: dict[str, Any] = {
    **NO_RESULTS,
    "cache_policy": NO_CACHE,
    "retries": len(DELAYS),
    "retry_delay_seconds": list(DELAYS),
    "retry_condition_fn": infra_fault,
}
"""How every task of ours is declared."""


def content_key(task: Task[..., Any], code: str, arguments: Mapping[str, Any]) -> str:
    """Compute the digest of a task's sources, ``code`` and all arguments, including defaults.

    Args:
        task: the task of the result.
        code: digest of the other inputs of the result: the architecture's code, the attempt.
        arguments: of the task, by name.

    Raises:
        TypeError: an argument has no canonical JSON form.
    """
    bound = inspect.signature(task.fn).bind(**arguments)
    bound.apply_defaults()
    return digest([code_digest(task.fn), code, dict(bound.arguments)])


def require_stored(result: object) -> None:
    """Raise if a result is an artifact that is not stored; accept any other result.

    An object store may delete artifacts before the records that refer to them.

    Raises:
        ArtifactMissing, ArtifactDamaged: it is not stored, or its manifest cannot be read.
    """
    if isinstance(result, Artifact):
        store().manifest(result)


def call(
    task: Task[..., R],
    code: str,
    /,
    check: Callable[[R], object] = require_stored,
    **arguments: Any,
) -> R:
    """Run a task, or return its recorded result if ``check`` accepts it.

    Args:
        task: declared with ``KEPT``.
        code: digest of inputs other than the arguments; part of the cache key.
        check: raises ``ArtifactMissing`` or ``ArtifactDamaged`` for a result that cannot be used:
            the task runs again.
        arguments: of the task, by name.
    """
    key = content_key(task, code, arguments)

    def recorded() -> R:
        found: R = find_result(store(), task.name, key, task.fn)
        check(found)
        return found

    try:
        result = wait_out(recorded)
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
    """Run a task in Prefect, as a task run of this flow run; exceptions are free of secrets."""
    guarded = copy.copy(task)
    guarded.fn = clean_exceptions()(task.fn)
    result: R = guarded(**arguments)
    return result


def show_cached(task: Task[..., Any], arguments: dict[str, Any]) -> None:
    """Show a cached result on the flow run's page, as a task run in the state Cached."""

    @functools.wraps(task.fn)
    def found(*_: Any, **__: Any) -> State[Any]:
        return Completed(name="Cached", message="Found in the object store.")

    shown = Task(
        found, name=task.name, task_run_name=task.task_run_name, cache_policy=NO_CACHE, **NO_RESULTS
    )
    shown(**arguments)
