"""Kill a command at every store write and every task boundary, then run it again.

Claim: after SIGKILL at any point, running the same command again has the result of an
uninterrupted run: the same bytes, one registered version per order, a ledger without gaps or
duplicates. Content that is visible in between is intact, and temporary files are removed.

Enumeration: an uninterrupted run lists the points (see ``kill_points``). Then one run is killed at
each point. The order is also killed after random times, and killed twice in a row. The first use of
a registry has hundreds of points in one temporary file; every eighth of them is tested.

A draft is the folder that a user writes and ``bundle pack`` reads. The ledger is the list of
promotions and rollbacks of a model in the store. A home is a folder with all files of one
installation, and a snapshot is a copy of a home.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import ForkServerClient
from homes import Home, find_damage, find_temporary_files, read_state
from outcomes import CountOutcome

SUITE = "kills"
SEED = 11
SHARDS = 8  # tests that share the points of the order
SAMPLE = 1  # points per command in the test without the marker ``nightly``
RANDOM_TIMES = 24
TWICE = 24  # pairs of kills


@dataclass(frozen=True)
class Scenario:
    """A command, and the snapshot that it starts from."""

    name: str
    command: tuple[str, ...]
    start: str  # name of the fixture that returns the snapshot
    stride: int = 1  # test every ``stride``-th point

    @property
    def is_order(self) -> bool:
        return self.command[0] == "compress"


# Commands without an order, which take seconds.
QUICK = (
    Scenario("bundle pack", ("bundle", "pack", "{draft}"), "empty_snapshot"),
    Scenario(
        "registry promote", ("registry", "promote", "m", "--version", "3"), "promoted_snapshot"
    ),
    Scenario(
        "registry rollback", ("registry", "rollback", "m", "--from", "2"), "promoted_snapshot"
    ),
    Scenario("registry restore", ("registry", "restore"), "lost_registry_snapshot"),
)
FIRST_USE = Scenario("first use of the registry", ("registry", "list"), "unused_snapshot", stride=8)
ORDER = Scenario("compress", ("compress", "--order", "{order}"), "packed_snapshot")


class KillTest:
    """Kills and repeats the command of one scenario in one home.

    Args:
        fork_server: fork server that runs the commands.
        home: home in which they run.
        snapshot: content of the home before each run.
        scenario: the command.
        files: values of the placeholders in the command.
        variables: environment variables, added to those of the home.
        preload: whether the fork server first imports the modules of the command.
    """

    def __init__(
        self,
        fork_server: ForkServerClient,
        home: Home,
        snapshot: Path,
        scenario: Scenario,
        files: dict[str, Path],
        variables: dict[str, str],
        preload: bool,
    ) -> None:
        self._fork_server, self.home, self._snapshot = fork_server, home, snapshot
        self._command = [part.format(**files) for part in scenario.command]
        self._draft = files["draft"]
        self._variables = home.variables | variables
        home.restore(snapshot)
        if preload:
            fork_server.run_and_preload(self._command, variables=self._variables)
            home.restore(snapshot)
        completed = self._run({})
        assert completed.code == 0, completed.text
        assert (find_damage(home), find_temporary_files(home)) == ([], [])
        self.points, self.seconds = completed.points, completed.seconds
        self.expected = read_state(home)

    def _run(self, fault: dict[str, Any] | None) -> Any:
        """Run the command; with a fault, count the points and kill as the fault says.

        An empty fault only counts. The key ``at`` is the number of the point at which to kill, and
        ``after`` the time in seconds. See ``kill_points.arm``.
        """
        if fault is not None:
            fault = {"root": f"{self.home.root}/", **fault}
        self.home.variables  # noqa: B018 - creates the folder of temporary files
        return self._fork_server.run(self._command, variables=self._variables, fault=fault)

    def problems(self, *faults: dict[str, Any]) -> list[str]:
        """Run with each kill in turn, then once without; describe what is wrong afterwards."""
        self.home.restore(self._snapshot)
        problems: list[str] = []
        for fault in faults:
            killed = self._run(fault)
            if "at" in fault and len(faults) == 1 and killed.signal != 9:
                return [f"was not killed but ended with {killed.code}: {killed.text}"]
            problems += [f"after the kill: {problem}" for problem in find_damage(self.home)]
        next_run = self._run(None)
        if next_run.code != 0 or next_run.crashed:
            return [*problems, f"the next run ended with {next_run.code}: {next_run.text}"]
        problems += [f"after the next run: {problem}" for problem in find_damage(self.home)]
        if (result := read_state(self.home)) != self.expected:
            problems.append(f"another result: {describe_differences(self.expected, result)}")
        if find_temporary_files(self.home):
            # A command whose work is already finished writes nothing and removes nothing. Later
            # commands remove temporary files: pack in TMPDIR, doctor in the store.
            removing = (["bundle", "pack", str(self._draft)], ["doctor"])
            self._fork_server.run(*removing, variables=self._variables)
            problems += [f"not collected: {name}" for name in find_temporary_files(self.home)]
        return problems


def describe_differences(expected: dict[str, Any], result: dict[str, Any]) -> str:
    """Describe the parts of a state that differ from the expected one."""
    return "; ".join(
        f"{key}: expected {expected[key]}, got {result[key]}"
        for key in expected
        if expected[key] != result[key]
    )[:1500]


def check(
    killing: KillTest,
    scenario: Scenario,
    faults: list[tuple[dict[str, Any], ...]],
    count_outcome: CountOutcome,
    case: str = "",
) -> None:
    """Run every sequence of kills in ``faults``, count the outcomes, and fail if any is wrong.

    Args:
        killing: the prepared scenario.
        scenario: its description.
        faults: sequences of kills; a kill is an argument of ``kill_points.arm``.
        count_outcome: the fixture.
        case: added to the scenario's name in the table of outcomes.
    """
    failed: list[str] = []
    for kills in faults:
        problems = killing.problems(*kills)
        outcome = "same result" if not problems else "wrong"
        count_outcome(SUITE, f"{scenario.name}{case}", outcome)
        if problems:
            names = [killing.points[at - 1] for fault in kills if (at := fault.get("at"))]
            failed.append(f"{kills} {names}: {problems}")
    assert not failed, f"{len(failed)} of {len(faults)}:\n" + "\n".join(failed[:6])


@pytest.fixture(scope="session")
def lost_registry_snapshot(root: Path, promoted_snapshot: Path, empty_snapshot: Path) -> Path:
    """A snapshot with an empty registry and a complete store."""
    home = Home(root / "home")
    home.restore(promoted_snapshot)
    (home.recpress / "registry.db").unlink()
    (home.recpress / "registry.db").write_bytes(
        (empty_snapshot / "recpress" / "registry.db").read_bytes()
    )
    return home.save_snapshot(root / "lost_registry_snapshot")


@pytest.fixture(scope="session")
def unused_snapshot(root: Path) -> Path:
    """A snapshot of a home that no command has used: an empty folder."""
    (root / "unused").mkdir()
    return root / "unused"


@pytest.fixture
def killing(
    fork_server: ForkServerClient,
    root: Path,
    draft: Path,
    order: Path,
    request: pytest.FixtureRequest,
) -> Callable[[Scenario], KillTest]:
    """A function that prepares the ``KillTest`` of a scenario."""
    preload = request.node.get_closest_marker("nightly") is not None

    def prepare(scenario: Scenario) -> KillTest:
        variables: dict[str, str] = {}
        if scenario.is_order:
            request.getfixturevalue("preloaded_fork_server")
            variables = request.getfixturevalue("order_variables")
        snapshot = request.getfixturevalue(scenario.start)
        files = {"draft": draft, "order": order}
        home = Home(root / "home")
        return KillTest(fork_server, home, snapshot, scenario, files, variables, preload)

    return prepare


@pytest.mark.parametrize("scenario", QUICK[:2], ids=lambda item: item.name)
def test_command_that_is_killed_at_a_few_points_and_run_again_gives_the_same_result(
    scenario: Scenario,
    killing: Callable[[Scenario], KillTest],
    count_outcome: CountOutcome,
) -> None:
    prepared = killing(scenario)
    points = random.Random(SEED).sample(range(1, len(prepared.points) + 1), SAMPLE)
    check(prepared, scenario, [({"at": at},) for at in sorted(points)], count_outcome)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", [*QUICK, FIRST_USE], ids=lambda item: item.name)
def test_command_that_is_killed_at_any_point_and_run_again_gives_the_same_result(
    scenario: Scenario,
    killing: Callable[[Scenario], KillTest],
    count_outcome: CountOutcome,
) -> None:
    prepared = killing(scenario)
    points = range(1, len(prepared.points) + 1, scenario.stride)
    check(prepared, scenario, [({"at": at},) for at in points], count_outcome)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_order_that_is_killed_at_any_point_and_run_again_gives_the_same_bytes_and_one_version(
    shard: int, killing: Callable[[Scenario], KillTest], count_outcome: CountOutcome
) -> None:
    prepared = killing(ORDER)
    points = range(1 + shard, len(prepared.points) + 1, SHARDS)
    check(prepared, ORDER, [({"at": at},) for at in points], count_outcome)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_order_that_is_killed_after_a_random_time_gives_the_same_bytes_and_one_version(
    killing: Callable[[Scenario], KillTest], count_outcome: CountOutcome
) -> None:
    prepared = killing(ORDER)
    rng = random.Random(SEED)
    times = [({"after": rng.uniform(0.1, prepared.seconds)},) for _ in range(RANDOM_TIMES)]
    check(prepared, ORDER, times, count_outcome, case=", at a random time")


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_order_that_is_killed_twice_in_a_row_gives_the_same_bytes_and_one_version(
    killing: Callable[[Scenario], KillTest], count_outcome: CountOutcome
) -> None:
    prepared = killing(ORDER)
    rng, count = random.Random(SEED), len(prepared.points)
    pairs = [sorted((rng.randint(1, count), rng.randint(1, count))) for _ in range(TWICE)]
    # The second run passes fewer points, because the first run finished some work. So the first is
    # killed at the larger number of a pair, and the second at the difference.
    faults = [({"at": larger}, {"at": max(1, larger - smaller)}) for smaller, larger in pairs]
    check(prepared, ORDER, faults, count_outcome, case=", twice in a row")
