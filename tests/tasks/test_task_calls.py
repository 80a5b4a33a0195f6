"""Retry policy of tasks, results of runs, and cache keys."""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any, cast, get_type_hints
from uuid import uuid4

import pytest
from error_codes import example_of, raises_code
from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.results import ResultRecordMetadata
from prefect.states import Cancelled, Completed, Crashed, Failed

import tasks
from compressors.contracts import Artifact
from compressors.contracts.coded_error import CodedError
from compressors.errors.compression import CompressionError, ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.compress import compress as compress_flow
from infra import errors
from tasks import compress, tables
from tasks.orchestration import task_calls

ARTIFACT = Artifact(uri="file:///s/artifacts/a", sha256="a" * 64, bytes=1)  # is not read


def all_tasks() -> list[Task[..., Any]]:
    """Return every Prefect task that a module of the package ``tasks`` defines."""
    tasks_by_id: dict[int, Task[..., Any]] = {}
    for info in pkgutil.walk_packages(tasks.__path__, "tasks."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if isinstance(value, Task) and value.fn.__module__ == info.name:
                tasks_by_id[id(value)] = value
    return list(tasks_by_id.values())


ALL_TASKS = all_tasks()


def with_subclasses(kind: type[Exception]) -> list[type[Exception]]:
    """Return a class and all its direct and indirect subclasses."""
    subclasses = [item for sub in kind.__subclasses__() for item in with_subclasses(sub)]
    return [kind, *subclasses]


def is_retried(fault: BaseException, run_count: int = 1) -> bool:
    """Return whether Prefect retries a task run after its ``run_count``-th failure."""
    state: State[Any] = Failed(data=fault, message=str(fault))
    run = TaskRun.model_construct(id=uuid4(), run_count=run_count)
    return task_calls.should_retry(cast("Any", None), run, state)


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in with_subclasses(errors.InfraError)
        if kind.sentences and kind is not errors.OutOfMemory
    ],
)
def test_external_fault_is_retried(kind: type[Exception]) -> None:
    assert is_retried(example_of(kind))


def test_task_that_ran_out_of_memory_is_not_retried() -> None:
    assert not is_retried(example_of(errors.OutOfMemory))


def test_killed_child_is_retried_twice_and_an_outage_more_often() -> None:
    """An outage is an error of a service that does not respond."""
    killed, outage = example_of(errors.ChildFailed), example_of(errors.RegistryOutage)
    assert [is_retried(killed, count) for count in (1, 2, 3)] == [True, True, False]
    assert all(is_retried(outage, count) for count in (1, 2, 3, 10))


def example_error(kind: type[Exception]) -> Exception:
    """Build an error of a class, with its first code if it has codes."""
    if not issubclass(kind, CodedError):
        return kind("it cannot be used")
    if kind is ParityLost:
        return ParityLost(ParityFailure(code="parity_nan", target="onnxruntime"))
    return example_of(kind)


@pytest.mark.parametrize(
    "kind",
    [
        # A class without sentences is only a base class of errors that are raised.
        *(kind for kind in with_subclasses(errors.Refused) if kind.sentences),
        *(kind for kind in with_subclasses(CompressionError) if kind.sentences),
        ValueError,
        OSError,
        MemoryError,
    ],
)
def test_refused_order_or_bug_is_not_retried(kind: type[Exception]) -> None:
    assert not is_retried(example_error(kind))


def test_successful_run_is_not_retried() -> None:
    state: State[Any] = Completed(data=1)
    assert not task_calls.should_retry(cast("Any", None), cast("TaskRun", None), state)


def test_tasks_of_every_declaring_module_are_checked() -> None:
    """Search the sources for decorators, to check that ``all_tasks`` finds every task."""
    folder = Path(tasks.__file__).parent
    declaring = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if re.search(r"^@task\b", path.read_text(), re.MULTILINE)
    }
    assert {prefect_task.fn.__module__ for prefect_task in ALL_TASKS} == declaring
    assert tables.quantize_tables in ALL_TASKS


@pytest.mark.parametrize(
    "prefect_task", [*ALL_TASKS, compress_flow], ids=lambda prefect_task: prefect_task.name
)
def test_prefect_stores_no_result_of_a_task_or_flow(prefect_task: Any) -> None:
    assert prefect_task.persist_result is False
    assert isinstance(prefect_task.result_storage, task_calls.NoResultStorage)
    assert prefect_task.result_serializer == "json"


@pytest.mark.parametrize("prefect_task", ALL_TASKS, ids=lambda prefect_task: prefect_task.name)
def test_every_task_has_our_retry_condition_and_no_prefect_cache(prefect_task: Any) -> None:
    assert prefect_task.cache_policy is NO_CACHE
    assert prefect_task.cache_key_fn is None
    assert prefect_task.retry_condition_fn is task_calls.should_retry
    assert prefect_task.retries >= 1
    assert "return" in get_type_hints(prefect_task.fn)  # records are validated by it


def test_no_result_storage_stores_nothing() -> None:
    storage = task_calls.NoResultStorage()
    storage.write_path("key", b"content")
    with pytest.raises(ValueError, match="recpress stores results itself"):
        storage.read_path("key")


# --- the result of a run of this process -----------------------------------------------------


def test_local_result_returns_the_result_or_raises_the_exception_of_a_state() -> None:
    assert task_calls.local_result(Completed(data=1)) == 1
    assert task_calls.local_result(Completed(data=Completed(data=2))) == 2
    with raises_code(errors.DataRefused, "checks_missing"):
        task_calls.local_result(Failed(data=errors.DataRefused("checks_missing")))
    with pytest.raises(KeyboardInterrupt):
        task_calls.local_result(Crashed(data=KeyboardInterrupt()))


# States as Prefect's API returns them. ``ResultRecordMetadata`` names a stored result, which anyone
# with access to the API could have written.
@pytest.mark.parametrize(
    "state",
    [
        Completed(message="m"),
        Cancelled(message="m"),
        Completed(message="m", data=ResultRecordMetadata(storage_key="/planted/result")),
        Failed(message="m", data=ResultRecordMetadata(storage_key="/planted/result")),
    ],
    ids=lambda state: f"{state.name}, {'no' if state.data is None else 'stored'} data",
)
def test_local_result_never_reads_the_location_named_by_a_state_of_the_api(
    state: State[Any],
) -> None:
    with raises_code(errors.ServiceFailed, "run_ended_by_prefect", state=state.name, problem="m"):
        task_calls.local_result(state)


# --- keys ------------------------------------------------------------------------------------


def content_key(
    prefect_task: Any = tables.quantize_tables, context_digest: str = "c", /, **arguments: Any
) -> str:
    """Return the cache key of a task's result for these arguments.

    ``context_digest`` stands for the digest of what no argument contains.
    """
    return task_calls.content_key(prefect_task, context_digest, arguments)


def test_content_key_depends_on_code_and_every_argument_but_not_their_order() -> None:
    arguments = {"source": ARTIFACT, "step": RowwiseInt8()}
    one = content_key(**arguments)
    assert one == content_key(step=RowwiseInt8(), source=ARTIFACT)
    others = [
        content_key(**arguments | {"source": ARTIFACT.model_copy(update={"sha256": "b" * 64})}),
        content_key(**arguments | {"step": RowwiseInt8(min_rows=7)}),
        content_key(tables.quantize_tables, "d", **arguments),
    ]
    assert len({one, *others}) == 4


def test_content_key_is_the_same_with_an_explicit_default() -> None:
    arguments = {
        "source": ARTIFACT,
        "step": RowwiseInt8(),
        "splits": {},
        "original": ARTIFACT,
        "teachers": (),
        "seed": 0,
        "device": "cpu",
        "context_digest": "c",
    }
    one = content_key(compress.compress, **arguments)
    assert one == content_key(compress.compress, **arguments, preset=False, excluded=None)
    assert one != content_key(compress.compress, **arguments, preset=True)


def test_content_key_of_an_argument_without_canonical_form_is_an_error() -> None:
    """The text of an object can contain its address, which differs between processes."""
    with pytest.raises(TypeError, match="no canonical JSON form"):
        content_key(source=object(), step=RowwiseInt8())


@task
def task_without_options() -> None: ...


def test_plain_prefect_task_has_none_of_our_options() -> None:
    """Otherwise, the tests above would pass without our options."""
    assert task_without_options.persist_result is not False
    assert task_without_options.result_storage is None
    assert task_without_options.cache_policy is not NO_CACHE
    assert task_without_options.retry_condition_fn is None
