"""What may be retried, and under which key a result is found again.

Prefect's own cache keys see a task's lines but not the code those lines call, and its default
includes the run. Here a result is found by what it was made from: the task, its arguments (stored
artifacts are named by content) and a digest of the code.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.tasks import exponential_backoff

from compressors.contracts import Artifact, digest
from infra.errors import ArtifactDamaged, ArtifactMissing, InfraError, OutOfMemory
from infra.settings import load_settings
from tasks.stored import store

log = logging.getLogger(__name__)


def infra_fault(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001
    """Retry only what may pass on a second try; a bad order stays bad."""
    try:
        state.result()
    except OutOfMemory:
        return False  # a moment later there is no more memory than now
    except InfraError:
        return True
    except Exception:
        return False
    return False


def content_key(context: TaskRunContext, arguments: dict[str, Any]) -> str:
    """The cache key of a task run: its name and everything that was handed to it."""
    return f"{context.task.name}-{digest(arguments)}"


KEPT: dict[str, Any] = {
    "cache_key_fn": content_key,
    "persist_result": True,
    "result_serializer": "json",  # the default would pickle
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_condition_fn": infra_fault,
}
"""How every task of ours is declared."""


def kept(task: Task[..., Artifact], **arguments: Any) -> Artifact:
    """Run a task, or take its earlier result if what that names is still stored.

    Prefect remembers results longer than an object store may keep them: a remembered artifact
    that is gone is made again.
    """
    result: Artifact = remembered(task, lambda artifact: store().manifest(artifact), **arguments)
    return result


def remembered(
    task: Task[..., Any], check: Callable[[Any], object] = bool, **arguments: Any
) -> Any:
    """Run a task, or take its earlier result if ``check`` finds it sound."""
    stored = task.with_options(result_storage=_result_storage())
    result = stored(**arguments)
    try:
        check(result)
    except (ArtifactMissing, ArtifactDamaged) as fault:
        log.warning("%s: %s Making it again.", task.name, fault)
        result = stored.with_options(refresh_cache=True)(**arguments)
        check(result)
    return result


def _result_storage() -> Any:
    """Where results are remembered: Prefect's own default block, or a folder of ours."""
    if os.environ.get("PREFECT_DEFAULT_RESULT_STORAGE_BLOCK"):
        return None
    return load_settings().home / "results"
