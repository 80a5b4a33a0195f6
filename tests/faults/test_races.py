"""Run commands in concurrent processes, in one home or on one S3 store.

Claim: for any interleaving, each order has one registered version. Each model has one ledger
without gaps, duplicates or lost entries, and the registry's alias ``champion`` is the version of
the ledger's last entry. A promotion is confirmed if its command exits with code 0. No process
prints a traceback. A process that loses a race fails with a message (exit code 2).

Enumeration: concurrent runs of the same order, of different orders with promotion, of promotions,
rollbacks and restores; several rounds of each.

The ledger is the list of promotions and rollbacks of a model in the store. A draft is the folder
that a user writes and ``bundle pack`` reads. A home is a folder with all files of one installation,
and a snapshot is a copy of a home.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from forked import Completed, ForkServerClient, Job
from homes import Home, find_damage, find_temporary_files, read_state, write_order
from outcomes import CountOutcome
from s3_server import S3Server

from infra.registry.ledger import Ledger
from infra.store.object_store import Store

SUITE = "races"
PROCESSES = 6  # processes that run commands without an order
ORDER_PROCESSES = 4  # processes that run complete orders
ROUNDS = 6
SECONDS = 600.0  # time limit of a process


def promotions(round_: int) -> list[tuple[str, ...]]:
    """Return the commands of one round: promotions, and rollbacks in every second round."""
    commands = [
        ("registry", "promote", "m", "--version", str(1 + number % 3), "--reason", f"{number}")
        for number in range(PROCESSES)
    ]
    if round_ % 2:
        commands[::2] = [("registry", "rollback", "m")] * len(commands[::2])
    return commands


def race(
    fork_server: ForkServerClient, commands: list[tuple[str, ...]], variables: dict[str, str]
) -> list[Completed]:
    """Run all commands at the same time, each in a separate process."""
    jobs = [Job((command,), variables=variables, seconds=SECONDS) for command in commands]
    return fork_server.run_jobs(jobs)


def check_promotions(
    home: Home,
    store: Store,
    entries_before: int,
    completed: list[Completed],
    case: str,
    count_outcome: CountOutcome,
) -> None:
    """Check that the ledger is linear, and that the alias ``champion`` is its last entry.

    ``entries_before`` is the number of ledger entries before the commands ran.
    """
    assert not any(item.crashed for item in completed), [
        item.text for item in completed if item.crashed
    ]
    assert {item.code for item in completed} <= {0, 2}, [item.text for item in completed]
    entries = Ledger(store, "m").entries()  # raises if there is a gap or a broken chain
    assert [entry.sequence for entry in entries] == list(range(1, len(entries) + 1))
    confirmed = sum(item.code == 0 for item in completed)
    # Promoting the champion again adds no entry. Neither does a rollback if the last entry is a
    # rollback that a concurrent command appended: the champion is rolled back only once.
    assert len(entries) - entries_before <= confirmed
    aliases = read_state(home, store)["aliases"]
    assert aliases["m", "champion"] == entries[-1].version
    assert find_damage(home, store) == []
    for item in completed:
        count_outcome(SUITE, case, "confirmed" if item.code == 0 else "refused with a sentence")


def test_promotions_at_once_leave_one_linear_ledger_and_its_last_entry_as_champion(
    fork_server: ForkServerClient, root: Path, promoted_snapshot: Path, count_outcome: CountOutcome
) -> None:
    home = Home(root / "home")
    home.restore(promoted_snapshot)
    store = Store(str(home.store))
    completed = race(fork_server, promotions(0)[:3], home.variables)
    # The snapshot has two promotions.
    check_promotions(home, store, 2, completed, "promotions, one home", count_outcome)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_promotions_and_rollbacks_at_once_leave_one_linear_ledger(
    fork_server: ForkServerClient, root: Path, promoted_snapshot: Path, count_outcome: CountOutcome
) -> None:
    home = Home(root / "home")
    home.restore(promoted_snapshot)
    store = Store(str(home.store))
    for number in range(ROUNDS):
        before = len(Ledger(store, "m").entries())
        completed = race(fork_server, promotions(number), home.variables)
        check_promotions(
            home, store, before, completed, "promotions and rollbacks, one home", count_outcome
        )


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_promotions_and_rollbacks_at_once_on_s3_leave_one_linear_ledger(
    fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    s3_server: S3Server,
    count_outcome: CountOutcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    home = Home(root / "home")
    home.restore(empty_snapshot)
    address = "s3://models/races"
    variables = home.variables | s3_server.environment | {"RECPRESS_STORE": address}
    arguments = {"folder": str(root / "reports"), "orders": list("abc"), "promoted": 2}
    completed = fork_server.call("homes:publish_orders", arguments, variables=variables)
    assert completed.value == ["1", "2", "3"], completed.text
    for number in range(ROUNDS):
        before = len(Ledger(Store(address), "m").entries())
        results = race(fork_server, promotions(number), variables)
        case = "promotions and rollbacks, S3"
        check_promotions(home, Store(address), before, results, case, count_outcome)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_same_draft_packed_by_several_processes_is_one_bundle(
    fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    draft: Path,
    count_outcome: CountOutcome,
) -> None:
    home = Home(root / "home")
    home.restore(empty_snapshot)
    completed = race(
        fork_server, [("bundle", "pack", str(draft), "--json")] * PROCESSES, home.variables
    )
    assert [item.code for item in completed] == [0] * PROCESSES, [item.text for item in completed]
    assert len({item.outputs for item in completed}) == 1
    assert (find_damage(home), find_temporary_files(home)) == ([], [])
    count_outcome(SUITE, "pack of one draft", "same bundle", PROCESSES)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_restore_of_a_lost_registry_by_several_processes_registers_each_order_once(
    fork_server: ForkServerClient,
    root: Path,
    promoted_snapshot: Path,
    empty_snapshot: Path,
    count_outcome: CountOutcome,
) -> None:
    home = Home(root / "home")
    home.restore(promoted_snapshot)
    expected = [order for _, _, order, _ in read_state(home)["versions"]]
    (home.recpress / "registry.db").write_bytes(
        (empty_snapshot / "recpress" / "registry.db").read_bytes()
    )
    completed = race(fork_server, [("registry", "restore")] * PROCESSES, home.variables)
    assert [item.code for item in completed] == [0] * PROCESSES, [item.text for item in completed]
    assert sorted(order for _, _, order, _ in read_state(home)["versions"]) == sorted(expected)
    assert find_damage(home) == []
    count_outcome(SUITE, "restore", "each order once", PROCESSES)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("location", ["one home", "S3"])
def test_the_same_order_by_several_processes_is_one_version_with_the_same_bytes(
    location: str,
    preloaded_fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    draft: Path,
    order: Path,
    finished_snapshot: Path,
    order_variables: dict[str, str],
    s3_server: S3Server,
    count_outcome: CountOutcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, store, variables = _prepare_store(
        location, "same-order", root, empty_snapshot, s3_server, monkeypatch
    )
    assert preloaded_fork_server.run(["bundle", "pack", str(draft)], variables=variables).code == 0
    command = ("compress", "--order", str(order), "--json")
    completed = race(
        preloaded_fork_server, [command] * ORDER_PROCESSES, variables | order_variables
    )
    assert [item.code for item in completed] == [0] * ORDER_PROCESSES, [
        item.text for item in completed
    ]
    results = [json.loads(item.outputs[0]) for item in completed]
    assert Counter(result["version"] for result in results) == {"1": ORDER_PROCESSES}
    assert read_state(home, store) == read_state(Home(finished_snapshot))
    assert find_damage(home, store) == []
    count_outcome(SUITE, f"one order, {location}", "one version, same bytes", ORDER_PROCESSES)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("location", ["one home", "S3"])
def test_concurrent_promoted_orders_have_one_version_and_one_ledger_entry_each(
    location: str,
    preloaded_fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    draft: Path,
    order_variables: dict[str, str],
    s3_server: S3Server,
    count_outcome: CountOutcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, store, variables = _prepare_store(
        location, "orders", root, empty_snapshot, s3_server, monkeypatch
    )
    assert preloaded_fork_server.run(["bundle", "pack", str(draft)], variables=variables).code == 0
    files = [
        write_order(root / f"order{number}.json", seed=number) for number in range(ORDER_PROCESSES)
    ]
    commands = [("compress", "--order", str(file), "--json") for file in files]
    completed = race(preloaded_fork_server, commands, variables | order_variables)
    assert not any(item.crashed for item in completed), [
        item.text for item in completed if item.crashed
    ]
    for command, item in zip(commands, completed, strict=True):
        if item.code:
            # Registered, but another version became champion at the same time.
            assert item.code == 2, item.text
            assert "was changed in the meantime" in item.messages[0], item.text
            repeated = preloaded_fork_server.run(command, variables=variables | order_variables)
            assert repeated.code == 0, repeated.text
    result = read_state(home, store)
    orders = {order for _, _, order, _ in result["versions"]}
    assert len(result["versions"]) == len(orders) == ORDER_PROCESSES
    entries = Ledger(store, "clicks").entries()
    assert {entry.order for entry in entries} == orders
    assert len(entries) == ORDER_PROCESSES
    assert result["aliases"]["clicks", "champion"] == entries[-1].version
    assert find_damage(home, store) == []
    for item in completed:
        outcome = "one version and one entry" if item.code == 0 else "refused, then promoted"
        count_outcome(SUITE, f"different orders, {location}", outcome)


def _prepare_store(
    location: str,
    prefix: str,
    root: Path,
    empty_snapshot: Path,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Home, Store, dict[str, str]]:
    """Return an empty home, its store in the home or on S3, and the environment variables."""
    home = Home(root / "home")
    home.restore(empty_snapshot)
    if location == "one home":
        return home, Store(str(home.store)), home.variables
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    address = f"s3://models/{prefix}"
    variables = home.variables | s3_server.environment | {"RECPRESS_STORE": address}
    return home, Store(address), variables
