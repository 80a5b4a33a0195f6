"""Drafts, data and registry entries that were written to do harm.

Claim: each is refused with a sentence and exit code 2, in less than 20 seconds and 1.5 GiB. No code
in it runs, nothing outside the draft is read or changed, nothing of it is stored, and its texts do
not control the terminal.

Enumeration: the cases of ``hostile_drafts`` and ``hostile_registry``; all of them nightly, a few by
default.
"""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Ended, Forks
from homes import Home
from hostile_drafts import CASES, HARMLESS, RAN, SECRET, SECRET_FILE
from hostile_registry import MAY_WORK, MODEL, ONLY_A_TAG, cases

SUITE = "hostile inputs"
SEED = 3
SAMPLE = 4
SECONDS = 20.0
PEAK_MIB = 1536
MEMORY = 4 * 2**30  # above what the process has; protects the machine that runs the tests
SHARDS = 4

Outcomes = Callable[..., None]


def problems(ended: Ended, allowed: set[int]) -> list[str]:
    """What is wrong with how a command ended."""
    found = []
    if ended.crashed or ended.code not in allowed:
        found.append(f"ended with {ended.code} {ended.text[-600:]}")
    elif ended.code and "recpress: " not in "".join(ended.messages):
        found.append(f"no sentence: {ended.text[-300:]}")
    if ended.seconds > SECONDS and ended.cpu_seconds > SECONDS / 2:
        found.append(f"took {ended.seconds:.0f} s")
    if ended.peak_mib > PEAK_MIB:
        found.append(f"took {ended.peak_mib} MiB")
    if any(letter in ended.text for letter in "\x1b\x9b\x07"):
        found.append("printed control characters")
    return found


def pack(name: str, forks: Forks, empty: Path, draft: Path, folder: Path) -> list[str]:
    """Pack the draft of a case; what is wrong."""
    outside = folder / "outside"
    outside.mkdir(parents=True)
    (outside / SECRET_FILE).write_text(SECRET)
    copy = outside / "draft"
    shutil.copytree(draft, copy)
    CASES[name](copy)
    before = {path.name for path in outside.iterdir()}
    home = Home(folder / "home")
    home.restore(empty)
    ended = forks.run(
        ["bundle", "pack", str(copy)], variables=home.variables, memory=MEMORY, seconds=120.0
    )
    found = problems(ended, {0, 2} if name in HARMLESS else {2})
    if (outside / RAN).exists():
        found.append("code ran")
    if SECRET in ended.text:
        found.append("a file outside was shown")
    if {path.name for path in outside.iterdir()} != before:
        found.append("something was written outside")
    stored = [path for path in home.store.rglob("*") if path.is_file()]
    if any(SECRET.encode() in path.read_bytes() for path in stored):
        found.append("a file outside was stored")
    if ended.code == 2 and any("bundles" in path.parts for path in stored):
        found.append("the refused draft is registered")
    shutil.rmtree(folder, ignore_errors=True)
    return [f"{name}: {problem}" for problem in found]


def check(
    names: list[str], forks: Forks, empty: Path, draft: Path, folder: Path, outcomes: Outcomes
) -> None:
    failed = []
    for number, name in enumerate(names):
        found = pack(name, forks, empty, draft, folder / str(number))
        outcomes(SUITE, "drafts", "wrong" if found else "as claimed")
        failed += found
    assert not failed, f"{len(failed)} problems:\n" + "\n".join(failed[:12])


def test_hostile_drafts_are_refused_with_a_sentence(
    forks: Forks, empty: Path, draft: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    names = random.Random(SEED).sample(sorted(CASES), SAMPLE)
    check(names, forks, empty, draft, tmp_path, outcomes)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_hostile_draft_is_refused_with_a_sentence(
    shard: int, forks: Forks, empty: Path, draft: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    check(list(CASES)[shard::SHARDS], forks, empty, draft, tmp_path, outcomes)


def attack(name: str, version: str, forks: Forks, home: Home, outcomes: Outcomes) -> list[str]:
    """Show, fetch and promote a hostile version; what is wrong."""
    into = home.root.parent / "fetched" / version
    place = ("--version", version)
    commands = (
        ["registry", "show", MODEL, *place],
        ["registry", "fetch", MODEL, *place, "--into", str(into)],
        ["registry", "promote", MODEL, *place],
    )
    found: list[str] = []
    for command in commands:
        ended = forks.run(command, variables=home.variables, memory=MEMORY, seconds=120.0)
        may_work = name in ONLY_A_TAG or command[1] in MAY_WORK.get(name, ())
        allowed = {0, 2} if may_work else {2}
        found += [f"{' '.join(command[:2])}: {problem}" for problem in problems(ended, allowed)]
        if command[1] == "fetch" and ended.code == 2 and into.exists():
            found.append("a refused fetch left a folder")
    outcomes(SUITE, "registry entries", "wrong" if found else "as claimed")
    return [f"{name}: {problem}" for problem in found]


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_hostile_registry_entries_are_refused_with_a_sentence(
    forks: Forks, root: Path, empty: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    home = Home(root / "home")
    home.restore(empty)
    ended = forks.call(
        "hostile_registry:register", {"folder": str(tmp_path)}, variables=home.variables
    )
    assert ended.value is not None, ended.text
    assert set(ended.value) == set(cases())
    failed: list[str] = []
    for name, version in ended.value.items():
        failed += attack(name, version, forks, home, outcomes)
    for command in (["registry", "list"], ["registry", "list", "--json"]):
        listed = forks.run(command, variables=home.variables)
        failed += [f"list: {problem}" for problem in problems(listed, {0})]
    assert not list(root.rglob("*outside*")), "something was written outside"
    assert not failed, f"{len(failed)} problems:\n" + "\n".join(failed[:12])
