"""Interrupted, repeated and concurrent promotions and rollbacks: each has its effect once.

A change is the result of a promotion or rollback: the ledger entry, and whether the command added
it (``is_new``) or an earlier one did.

The ledger is the list of a model's promotions and rollbacks in the store. ``fill("ab", "a")``
publishes the orders "aaa..." and "bbb..." as versions 1 and 2, and promotes the first
(``conftest.py``).
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from child_commands import SendCommand, running_child
from error_codes import raises_code
from triton_configs import loaded_version
from triton_versions import Fill, graph_bytes

from infra.errors import PromotionRefused, RegistryRefused
from infra.registry.ledger import Ledger
from infra.registry.mlflow_registry import Registry
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import (
    apply_promotion,
    apply_rollback,
    promote,
    registry,
    rollback,
    version_report,
)


class Interrupted(Exception):
    """Raised where the process is assumed to end."""


@pytest.fixture
def three_champions(fill: Fill) -> None:
    """Three versions, promoted one after the other."""
    fill("abc", "abc")


def ledger_versions() -> list[str]:
    """Return the version number of every ledger entry, in order."""
    return [entry.version for entry in Ledger(store(), "m").entries()]


def interrupt_rollback_at(method: str) -> None:
    """Roll back, and raise ``Interrupted`` at the first call of this method of the registry."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, method, interrupt)
        with pytest.raises(Interrupted):
            rollback("m", reason="clicks fell")


# After its ledger entry, a rollback calls "repair", which calls "set_alias" for the new champion,
# and then "confirm", which records that the change is complete.
@pytest.mark.parametrize("method", ["repair", "set_alias", "confirm"])
def test_repeated_rollback_completes_an_interrupted_one(three_champions: None, method: str) -> None:
    interrupt_rollback_at(method)
    change = apply_rollback("m", reason="clicks fell")
    assert (change.entry.version, change.is_new) == ("2", False)
    assert ledger_versions() == ["1", "2", "3", "2"]
    assert registry().version("m", "@champion").version == "2"


def test_repair_by_a_reader_does_not_complete_an_interrupted_rollback(
    three_champions: None,
) -> None:
    interrupt_rollback_at("repair")
    assert version_report("m", "@champion")[0].version == "2"
    assert registry().version("m", "@champion").version == "2"
    assert rollback("m", reason="").version == "2"
    assert ledger_versions() == ["1", "2", "3", "2"]


def test_repeated_rollback_updates_the_triton_repository(
    work_folder: Path, triton: Path, three_champions: None
) -> None:
    interrupt_rollback_at("repair")
    assert loaded_version(triton) == ("3", graph_bytes("c"))
    rollback("m", reason="")
    assert loaded_version(triton) == ("2", graph_bytes("b"))


def test_second_rollback_after_a_complete_one_goes_back_further(three_champions: None) -> None:
    assert rollback("m", reason="").version == "2"
    assert apply_rollback("m", reason="").is_new
    assert ledger_versions() == ["1", "2", "3", "2", "1"]
    with raises_code(PromotionRefused, "earlier_champion_missing", model="m"):
        rollback("m", reason="")


def test_rollback_from_a_named_version_is_idempotent(
    three_champions: None,
) -> None:
    assert [rollback("m", reason="", from_version="3").version for _ in range(3)] == ["2", "2", "2"]
    assert apply_rollback("m", reason="", from_version="2").is_new
    assert rollback("m", reason="", from_version="3").version == "1"
    assert ledger_versions() == ["1", "2", "3", "2", "1"]


def test_rollback_from_a_named_version_works_after_an_interrupted_rollback(
    three_champions: None,
) -> None:
    interrupt_rollback_at("repair")
    assert rollback("m", reason="", from_version="2").version == "1"


def test_rollback_from_a_version_that_is_not_champion_is_refused(
    work_folder: Path, three_champions: None
) -> None:
    with raises_code(PromotionRefused, "other_champion", expected="2", got="version 3"):
        rollback("m", reason="", from_version="2")
    rollback("m", reason="", from_version="3")
    promote("m", "1", reason="")
    with raises_code(PromotionRefused, "other_champion", expected="3", got="version 1"):
        rollback("m", reason="", from_version="3")
    with raises_code(RegistryRefused, "version_missing", version="9"):
        rollback("m", reason="", from_version="9")


def test_rollback_by_another_command_after_the_start_is_not_repeated(three_champions: None) -> None:
    command_start = datetime.now(UTC)
    rollback("m", reason="by another command")
    change = apply_rollback("m", reason="", command_start=command_start)
    assert (change.entry.version, change.is_new) == ("2", False)


def test_rollback_entry_without_digest_is_completed_if_the_alias_differs(
    three_champions: None,
) -> None:
    entry = rollback("m", reason="")
    text = entry.model_dump_json(exclude={"digest"})
    for earlier in Ledger(store(), "m").entries()[:-1]:
        body = earlier.model_dump_json(exclude={"digest"})
        store().write(f"ledger/m/{earlier.sequence:08d}.json", body.encode())
    store().write("ledger/m/00000004.json", text.encode())
    registry().set_alias("m", "champion", "3")
    assert rollback("m", reason="").version == "2"
    assert rollback("m", reason="").version == "1"


def test_promotion_of_the_champion_completes_an_interrupted_promotion(
    work_folder: Path, three_champions: None
) -> None:
    registry().set_alias("m", "champion", "1")
    change = apply_promotion("m", "3", reason="")
    assert (change.entry.version, change.is_new) == ("3", False)
    assert registry().version("m", "@champion").version == "3"


# --- real processes --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SendCommand]:
    """A function that sends a command to ``killed_promotions.py``, which runs for all tests."""
    work_folder = tmp_path_factory.mktemp("processes")
    variables = {
        "RECPRESS_HOME": str(work_folder / "recpress"),
        "RECPRESS_TRITON": str(work_folder / "triton"),
    }
    script = "tests/tasks/killed_promotions.py"
    with running_child(script, str(work_folder), variables=variables) as send:
        yield send


# Commands of killed_promotions.py. A kill takes half a second to a second. The default tier kills
# one command at every 150th operation and at the last ones, which update the alias and the Triton
# repository.
COMMANDS = ("rollback", "rollback+reader", "rollback_from_3", "promote")
# The command, and the distance of the operations at which it is killed.
KILL_RUNS = [
    *(
        pytest.param(command, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
        for command in COMMANDS
    ),
    *(
        pytest.param(command, 40, marks=[pytest.mark.slow, pytest.mark.timeout(600)])
        for command in COMMANDS
    ),
    pytest.param("rollback", 150, marks=pytest.mark.timeout(600)),
]


@pytest.mark.parametrize(("command", "stride"), KILL_RUNS)
def test_command_killed_at_any_operation_and_repeated_has_its_effect_once(
    run: SendCommand, command: str, stride: int
) -> None:
    results = run(f"kill {command} {stride}")
    assert command == "promote" or all(item["killed"] for item in results)
    # Versions 1 to 3 were promoted before each command. Each command makes version 2 the champion.
    for item in results:
        state = (item["ledger"], item["alias"], item["served"])
        assert state == (["1", "2", "3", "2"], ["2"], "2"), item
    assert {item["command"] for item in results} == {command}


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("rollback", 3),
        ("promote", 3),
        *(
            pytest.param(command, 8, marks=pytest.mark.nightly)
            for command in ("rollback", "rollback_from_3", "promote")
        ),
    ],
)
def test_concurrent_processes_with_the_same_command_all_succeed(
    run: SendCommand, command: str, count: int
) -> None:
    *results, state = run(f"race {command} {count}")
    changes = [item["result"] for item in results]  # version and is_new
    assert sorted(changes) == ["2 False"] * (count - 1) + ["2 True"]
    assert state == {"ledger": ["1", "2", "3", "2"], "alias": ["2"], "served": "2"}


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.nightly)])
def test_concurrent_processes_that_publish_one_order_share_one_version(
    run: SendCommand, count: int
) -> None:
    *results, state = run(f"race publish {count}")
    (result,) = {item["result"] for item in results}  # all have the same version and report
    assert result.startswith("1 ")
    assert state["versions"] == ["1"]
