"""Flip one bit in every stored file and read all that a user can read.

Claim: every reading command gives exactly what it gave before, or refuses (exit 1 or 2) with a
sentence. It never shows a traceback or other numbers, and it changes no other stored file. The same
order, given again, has the same result or is refused.

Enumeration: every file of a home after a whole order, whatever they are: artifacts, manifests,
records, the ledger, remembered results, the registry, the Triton repository. In each file the first
and the last byte, one of the first 16, and bytes drawn with a fixed seed; more of them in records,
which are small and decide much, and in the registry.

Exception: SQLite has no checksums. ``registry list`` prints names and tags as the registry has
them; every other command compares them with the release, which is verified.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import Ended, Forks
from homes import Home

SUITE = "bit flips"
SEED = 5
SHARDS = 6
DRAWN = 2
DRAWN_IN_RECORDS = 16
DRAWN_IN_REGISTRY = 60
HEADER_BYTES = 16
SAMPLE = 4
NEVER_SAME = {"registry.db", "registry.db-journal"}

Outcomes = Callable[..., None]


class Readers:
    """The reading commands of one home, with their output before any fault."""

    def __init__(
        self,
        forks: Forks,
        home: Home,
        snapshot: Path,
        commands: list[list[str]],
        more: dict[str, str],
    ) -> None:
        self._forks, self.home, self._snapshot = forks, home, snapshot
        self._commands, self._more = commands, more
        home.restore(snapshot)
        self.files = home.files()
        self._before = {name: hashlib.sha256(path.read_bytes()).hexdigest()
                        for name, path in self.files.items()}  # fmt: skip
        self._expected = self._read()
        assert set(self._expected.codes) == {0}, self._expected.text

    def _read(self) -> Ended:
        self._into = self.home.root / "fetched"
        commands = [
            [part.format(into=self._into) for part in command] for command in self._commands
        ]
        return self._forks.run(*commands, variables=self.home.variables | self._more)

    def flip(self, name: str, position: int, bit: int) -> tuple[str, str]:
        """Flip one bit and read; what happened, and what is wrong if it is wrong."""
        self.home.restore(self._snapshot)
        path = self.home.root / name
        body = bytearray(path.read_bytes())
        body[position] ^= 1 << bit
        path.chmod(0o644)
        path.write_bytes(bytes(body))
        ended = self._read()
        problems = self._problems(ended, name, bytes(body))
        if problems:
            return "wrong", f"bit {bit} of byte {position} of {name}: {'; '.join(problems)}"
        if any(ended.codes):
            return "refused", ""
        listed = [self._commands[at][:2] == ["registry", "list"] for at in self._changed(ended)]
        if listed and all(listed):
            return "listed with the changed tag", ""
        return "same output", ""

    def _changed(self, ended: Ended) -> list[int]:
        pairs = zip(ended.codes, ended.outputs, self._expected.outputs, self._commands, strict=True)
        return [
            at
            for at, (code, output, expected, command) in enumerate(pairs)
            if code == 0 and answer(command, output) != answer(command, expected)
        ]

    def _problems(self, ended: Ended, flipped: str, body: bytes) -> list[str]:
        if ended.crashed or len(ended.codes) != len(self._commands):
            return [f"crashed: {ended.text}"]
        found = []
        for at in self._changed(ended):
            is_listing = self._commands[at][:2] == ["registry", "list"]
            if not (is_listing and Path(flipped).name in NEVER_SAME):
                found.append(f"{self._commands[at]} printed something else")
        for command, code, message in zip(self._commands, ended.codes, ended.messages, strict=True):
            if code not in {0, 1, 2} or (code and "recpress: " not in message):
                found.append(f"{command} ended with {code}: {message[-300:]}")
        reruns = any(command[0] == "compress" for command in self._commands)
        for name, path in self.home.files().items():
            if name not in self._before or name == flipped or Path(name).name in NEVER_SAME:
                continue
            # An order that runs again may replace its own record, results and aliases.
            may_change = reruns and "/artifacts/" not in name
            changed = hashlib.sha256(path.read_bytes()).hexdigest() != self._before[name]
            if changed and not may_change:
                found.append(f"{name} was changed")
        found += [
            f"{name} is gone" for name in self._before if not (self.home.root / name).exists()
        ]
        return found


def answer(command: list[str], output: str) -> Any:
    """What a command says, without what differs between two runs of an order: latencies."""
    if command[0] != "compress":
        return output
    done = json.loads(output)
    report = done["report"]
    return (
        done["version"],
        report["order"],
        report["outcome"],
        report["compressed"],
        [(item["target"], item["artifact"]) for item in report["targets"]],
        report["plan"],
    )


def positions(name: str, size: int, draw: random.Random) -> list[tuple[int, int]]:
    """Bytes and bits to flip in one file."""
    drawn = DRAWN
    if Path(name).name == "registry.db":
        drawn = DRAWN_IN_REGISTRY
    elif "artifacts/" not in name:
        drawn = DRAWN_IN_RECORDS
    places = {0, size - 1, draw.randrange(min(size, HEADER_BYTES))}
    places |= {draw.randrange(size) for _ in range(drawn)}
    return [(place, draw.randrange(8)) for place in sorted(places)]


def every_flip(readers: Readers) -> list[tuple[str, int, int]]:
    """All flips of a home, in an order that does not depend on random names."""
    draw = random.Random(SEED)
    flips = []
    for name, path in sorted(readers.files.items()):
        size = path.stat().st_size
        if size:
            flips += [(name, place, bit) for place, bit in positions(name, size, draw)]
    return flips


def kind(name: str) -> str:
    """What a file is, for the table."""
    if "/artifacts/" in name:
        return "manifests" if name.endswith("manifest.json") else "files of artifacts"
    if name.startswith("triton/"):
        return "Triton repository"
    parts = name.split("/")
    return "registry" if parts[-1] == "registry.db" else " ".join(parts[1:-1][:2]) or parts[0]


def check(readers: Readers, flips: list[tuple[str, int, int]], outcomes: Outcomes) -> None:
    failed = []
    for name, position, bit in flips:
        outcome, problem = readers.flip(name, position, bit)
        outcomes(SUITE, kind(name), outcome)
        if problem:
            failed.append(problem)
    assert not failed, f"{len(failed)} of {len(flips)}:\n" + "\n".join(failed[:8])


def reading(model: str) -> list[list[str]]:
    """Every command that only reads a registered model."""
    return [
        ["registry", "list", "--json"],
        ["registry", "show", model, "--version", "1", "--json"],
        ["registry", "show", model, "--version", "@champion", "--json"],
        ["registry", "show", model, "--version", "1", "--html", "{into}.html"],
        ["registry", "fetch", model, "--version", "1", "--into", "{into}", "--json"],
    ]


def test_bit_flipped_in_a_stored_file_is_refused_or_does_not_matter(
    forks: Forks, root: Path, promoted: Path, outcomes: Outcomes
) -> None:
    readers = Readers(forks, Home(root / "home"), promoted, reading("m"), {})
    flips = random.Random(SEED).sample(every_flip(readers), SAMPLE)
    check(readers, flips, outcomes)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_bit_flipped_in_any_stored_file_is_refused_or_does_not_matter(
    shard: int,
    learned: Forks,
    root: Path,
    finished: Path,
    order: Path,
    ordering: dict[str, str],
    outcomes: Outcomes,
) -> None:
    commands = [
        *reading("clicks"),
        ["bundle", "show", "clicks", "--json"],
        ["bundle", "check", "clicks", "--json"],
        ["compress", "--order", str(order), "--json"],
    ]
    readers = Readers(learned, Home(root / "home"), finished, commands, ordering)
    check(readers, every_flip(readers)[shard::SHARDS], outcomes)
    shutil.rmtree(root / "home", ignore_errors=True)
