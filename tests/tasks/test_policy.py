"""What is retried, and under which key a result is found again."""

from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect import task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.states import Completed, Failed

from compressors.contracts import Artifact, Limit
from compressors.errors import CompressionError, ParityLost
from compressors.tables.rowwise_int8 import RowwiseInt8
from infra import errors
from tasks import (
    build,
    compress,
    gate,
    lower,
    measure,
    policy,
    prepare,
    publish,
    pull,
    tables,
    validate,
)

A = Artifact(uri="file:///s/artifacts/a", sha256="a" * 64, bytes=1)
EVERY = [
    tables.quantize_tables,
    pull.pull,
    validate.validate,
    prepare.prepare,
    compress.compress,
    lower.lower_model,
    build.build,
    measure.measure,
    gate.gate,
    publish.publish,
]


def kinds(of: type[Exception]) -> list[type[Exception]]:
    return [of, *(kind for sub in of.__subclasses__() for kind in kinds(sub))]


def retried(fault: BaseException, run_count: int = 1) -> bool:
    state: State[Any] = Failed(data=fault, message=str(fault))
    run = TaskRun.model_construct(id=uuid4(), run_count=run_count)
    return policy.infra_fault(cast("Any", None), run, state)


@pytest.mark.parametrize("kind", kinds(errors.InfraError))
def test_a_fault_outside_of_us_is_worth_a_second_try(kind: type[Exception]) -> None:
    assert retried(kind("it did not answer"))


def test_a_killed_child_is_retried_twice_and_an_outage_more_often() -> None:
    killed, outage = errors.ChildFailed("killed"), errors.RegistryOutage("no answer")
    assert [retried(killed, count) for count in (1, 2, 3)] == [True, True, False]
    assert all(retried(outage, count) for count in (1, 2, 3, 10))


@pytest.mark.parametrize(
    "kind", [*kinds(errors.Refused), CompressionError, ParityLost, ValueError, OSError, MemoryError]
)
def test_a_bad_order_or_our_own_bug_stays_bad(kind: type[Exception]) -> None:
    assert not retried(kind("it cannot be used"))


def test_a_result_is_no_fault() -> None:
    state: State[Any] = Completed(data=1)
    assert not policy.infra_fault(cast("Any", None), cast("TaskRun", None), state)


@pytest.mark.parametrize("ours", EVERY, ids=lambda ours: ours.name)
def test_every_task_of_ours_keeps_its_result_by_content_as_json(ours: Any) -> None:
    assert ours.cache_key_fn is policy.content_key
    assert ours.persist_result
    assert ours.result_serializer == "json"
    assert ours.retry_condition_fn is policy.infra_fault
    assert ours.retries >= 1


@pytest.mark.parametrize("ours", EVERY, ids=lambda ours: ours.name)
def test_every_task_of_ours_is_told_which_code_makes_its_result(ours: Any) -> None:
    assert "code" in ours.fn.__annotations__


def key(name: str = "compress", **arguments: Any) -> str:
    context = SimpleNamespace(task=SimpleNamespace(name=name))
    return policy.content_key(cast("TaskRunContext", context), arguments)


def test_a_key_says_the_task_and_everything_it_was_given() -> None:
    limits = (Limit.parse("bytes <= 5"),)
    one = key(source=A, step=RowwiseInt8(), limits=limits, seed=0, code="c")
    assert one == key(code="c", seed=0, limits=limits, step=RowwiseInt8(), source=A)
    others = [
        key("lower", source=A, step=RowwiseInt8(), limits=limits, seed=0, code="c"),
        key(
            source=A.model_copy(update={"sha256": "b" * 64}),
            step=RowwiseInt8(),
            limits=limits,
            seed=0,
            code="c",
        ),
        key(source=A, step=RowwiseInt8(min_rows=7), limits=limits, seed=0, code="c"),
        key(source=A, step=RowwiseInt8(), limits=(), seed=0, code="c"),
        key(source=A, step=RowwiseInt8(), limits=limits, seed=1, code="c"),
        key(source=A, step=RowwiseInt8(), limits=limits, seed=0, code="d"),
    ]
    assert len({one, *others}) == 7


def test_what_has_no_canonical_form_is_no_part_of_a_key() -> None:
    """Rather an error than a key that is another one tomorrow, such as an address in memory."""
    with pytest.raises(TypeError, match="no canonical JSON form"):
        key(source=object())


def test_results_lie_in_our_home_unless_prefect_has_a_place_for_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path))
    monkeypatch.delenv("PREFECT_DEFAULT_RESULT_STORAGE_BLOCK", raising=False)
    assert policy._result_storage() == tmp_path / "results"
    monkeypatch.setenv("PREFECT_DEFAULT_RESULT_STORAGE_BLOCK", "s3-bucket/results")
    assert policy._result_storage() is None


@task
def never() -> None: ...


def test_a_task_that_was_not_declared_so_is_not_kept() -> None:
    """The check above would pass for anything if Prefect filled these in by itself."""
    assert never.cache_key_fn is None
    assert never.retry_condition_fn is None
