"""Run commands on hostile drafts, data and registry entries.

Claim: each is rejected with an error message and exit code 2, in less than 20 seconds and 1.5 GiB.
No code in it runs, no file outside the draft is read or changed, nothing of it is stored, and its
text does not control the terminal. Commands may succeed on the cases of ``HARMLESS``,
``VALID_RELEASES`` and ``MAY_WORK``, in which no code runs either. The only files outside the draft
that pack then stores are the model's weights and ``model.json``, if they are links.

Enumeration: the cases of ``hostile_drafts`` and ``hostile_registry``; all of them nightly, a few by
default.

A draft is the folder that a user writes and ``bundle pack`` reads. Code in it would create the file
``RAN``. ``SECRET`` is the content of a file outside the draft. A home is the folder with everything
that recpress stores (``RECPRESS_HOME``), and a snapshot is a copy of a home.
"""

import random
import shutil
from pathlib import Path

import pytest
from forked import Completed, ForkServerClient
from homes import Home
from hostile_drafts import CASES, HARMLESS, RAN, SECRET, SECRET_FILE
from hostile_registry import MAY_WORK, MODEL, VALID_RELEASES, cases
from outcomes import CountOutcome

SUITE = "hostile inputs"
SEED = 3
SAMPLE = 4  # drafts in the test without the marker ``nightly``
SECONDS = 20.0
PEAK_MIB = 1536
MEMORY = 4 * 2**30  # in addition to the process's memory; protects the machine that runs the tests
SHARDS = 4  # nightly tests that share all drafts


def problems(completed: Completed, allowed: set[int]) -> list[str]:
    """Describe how the result of a command violates the claim; empty if it does not.

    ``allowed`` are the exit codes that the claim allows.
    """
    failures = []
    if completed.crashed or completed.code not in allowed:
        failures.append(f"ended with {completed.code} {completed.text[-600:]}")
    elif completed.code and "recpress: " not in "".join(completed.messages):
        failures.append(f"no sentence: {completed.text[-300:]}")
    # Wall time alone also depends on other processes of the machine, so a command violates the
    # claim only if it also used half of this time on the CPU.
    if completed.seconds > SECONDS and completed.cpu_seconds > SECONDS / 2:
        failures.append(f"took {completed.seconds:.0f} s")
    if completed.peak_mib > PEAK_MIB:
        failures.append(f"took {completed.peak_mib} MiB")
    if any(letter in completed.text for letter in "\x1b\x9b\x07"):
        failures.append("printed control characters")
    return failures


def pack(
    name: str, fork_server: ForkServerClient, empty_snapshot: Path, draft: Path, folder: Path
) -> list[str]:
    """Pack the hostile draft of a case; return the violations of the claim."""
    outside = folder / "outside"
    outside.mkdir(parents=True)
    (outside / SECRET_FILE).write_text(SECRET)
    copy = outside / "draft"
    shutil.copytree(draft, copy)
    CASES[name](copy)
    before = {path.name for path in outside.iterdir()}
    home = Home(folder / "home")
    home.restore(empty_snapshot)
    completed = fork_server.run(
        ["bundle", "pack", str(copy)], variables=home.variables, memory=MEMORY, seconds=120.0
    )
    failures = problems(completed, {0, 2} if name in HARMLESS else {2})
    if (outside / RAN).exists():
        failures.append("code ran")
    if SECRET in completed.text:
        failures.append("a file outside was shown")
    if {path.name for path in outside.iterdir()} != before:
        failures.append("something was written outside")
    stored = [path for path in home.store.rglob("*") if path.is_file()]
    if any(SECRET.encode() in path.read_bytes() for path in stored):
        failures.append("a file outside was stored")
    if completed.code == 2 and any("bundles" in path.parts for path in stored):
        failures.append("the refused draft is registered")
    shutil.rmtree(folder, ignore_errors=True)
    return [f"{name}: {problem}" for problem in failures]


def check(
    names: list[str],
    fork_server: ForkServerClient,
    empty_snapshot: Path,
    draft: Path,
    folder: Path,
    count_outcome: CountOutcome,
) -> None:
    """Pack the drafts of some cases, count the outcomes, and fail if there is a problem."""
    failed = []
    for number, name in enumerate(names):
        failures = pack(name, fork_server, empty_snapshot, draft, folder / str(number))
        count_outcome(SUITE, "drafts", "wrong" if failures else "as claimed")
        failed += failures
    assert not failed, f"{len(failed)} problems:\n" + "\n".join(failed[:12])


def test_hostile_drafts_are_refused_with_a_sentence(
    fork_server: ForkServerClient,
    empty_snapshot: Path,
    draft: Path,
    tmp_path: Path,
    count_outcome: CountOutcome,
) -> None:
    names = random.Random(SEED).sample(sorted(CASES), SAMPLE)
    check(names, fork_server, empty_snapshot, draft, tmp_path, count_outcome)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_hostile_draft_is_refused_with_a_sentence(
    shard: int,
    fork_server: ForkServerClient,
    empty_snapshot: Path,
    draft: Path,
    tmp_path: Path,
    count_outcome: CountOutcome,
) -> None:
    check(list(CASES)[shard::SHARDS], fork_server, empty_snapshot, draft, tmp_path, count_outcome)


def attack(
    name: str, version: str, fork_server: ForkServerClient, home: Home, count_outcome: CountOutcome
) -> list[str]:
    """Show, fetch and promote a hostile version; return the violations of the claim."""
    into = home.root.parent / "fetched" / version
    version_option = ("--version", version)
    commands = (
        ["registry", "show", MODEL, *version_option],
        ["registry", "fetch", MODEL, *version_option, "--into", str(into)],
        ["registry", "promote", MODEL, *version_option],
    )
    failures: list[str] = []
    for command in commands:
        completed = fork_server.run(command, variables=home.variables, memory=MEMORY, seconds=120.0)
        may_work = name in VALID_RELEASES or command[1] in MAY_WORK.get(name, ())
        allowed = {0, 2} if may_work else {2}
        failures += [
            f"{' '.join(command[:2])}: {problem}" for problem in problems(completed, allowed)
        ]
        if command[1] == "fetch" and completed.code == 2 and into.exists():
            failures.append("a refused fetch left a folder")
    count_outcome(SUITE, "registry entries", "wrong" if failures else "as claimed")
    return [f"{name}: {problem}" for problem in failures]


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_hostile_registry_entries_are_refused_with_a_sentence(
    fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    tmp_path: Path,
    count_outcome: CountOutcome,
) -> None:
    home = Home(root / "home")
    home.restore(empty_snapshot)
    completed = fork_server.call(
        "hostile_registry:register", {"folder": str(tmp_path)}, variables=home.variables
    )
    assert completed.value is not None, completed.text
    assert set(completed.value) == set(cases())
    failed: list[str] = []
    for name, version in completed.value.items():
        failed += attack(name, version, fork_server, home, count_outcome)
    for command in (["registry", "list"], ["registry", "list", "--json"]):
        listed = fork_server.run(command, variables=home.variables)
        failed += [f"list: {problem}" for problem in problems(listed, {0})]
    assert not list(root.rglob("*outside*")), "something was written outside"
    assert not failed, f"{len(failed)} problems:\n" + "\n".join(failed[:12])
