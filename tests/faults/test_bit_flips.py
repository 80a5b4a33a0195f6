"""Flip single bits of stored files, and run all commands that read the files.

Claim: after one flip, every reading command prints exactly the same output as before, or fails
(exit code 1 or 2) with an error message. It never prints a traceback or other numbers, and it
changes no other stored file. Running the same order again has the same result or fails with an
error message.

Enumeration: all files of a home (the folder with everything that recpress stores) after a complete
order. Content files are blobs (files named by a hash of their content), and the manifests and files
of artifacts, whose folders are named by a hash. In the store, files of artifacts are hard links to
blobs; here they are copies, so that each is flipped alone. The other files say which artifacts are
used: bundle and order records, the ledger of promotions, cached results, the registry, the Triton
repository. In each file, one bit is flipped in the first byte, the last byte, one of the first 16
bytes, and bytes drawn with a fixed seed; more are drawn in files that are not content.

Exception: SQLite has no checksums. ``registry list`` prints names and tags from the registry
without verification; every other command compares them with the release, which is verified.
"""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import Completed, ForkServerClient
from homes import Home
from outcomes import CountOutcome

SUITE = "bit flips"
SEED = 5
SHARDS = 6  # tests with the marker ``nightly`` that share all flips
# Bytes that are drawn in each file, in addition to the first, the last and one of the header.
DRAWN_IN_CONTENT = 2
DRAWN_IN_OTHER_FILES = 16
DRAWN_IN_REGISTRY = 60
HEADER_BYTES = 16
SAMPLE = 4  # flips in the test without the marker ``nightly``
CHANGES_ON_READ = {"registry.db", "registry.db-journal"}
"""Files of SQLite, which reading commands may change, and whose content is not verified."""


class FlipTest:
    """Runs the reading commands of a home after a flip, and compares their output with before.

    Args:
        fork_server: fork server that runs the commands.
        home: home in which they run.
        snapshot: content of the home before each run.
        commands: arguments of the commands; ``{into}`` stands for an output folder.
        variables: environment variables, added to those of the home.
    """

    def __init__(
        self,
        fork_server: ForkServerClient,
        home: Home,
        snapshot: Path,
        commands: list[list[str]],
        variables: dict[str, str],
    ) -> None:
        self._fork_server, self.home, self._snapshot = fork_server, home, snapshot
        self._commands, self._variables = commands, variables
        home.restore(snapshot)
        self.files = home.files()
        self._before = {name: hashlib.sha256(path.read_bytes()).hexdigest()
                        for name, path in self.files.items()}  # fmt: skip
        self._expected = self._read()
        assert set(self._expected.codes) == {0}, self._expected.text

    def _read(self) -> Completed:
        """Run the reading commands in the current home."""
        self._into = self.home.root / "fetched"
        commands = [
            [part.format(into=self._into) for part in command] for command in self._commands
        ]
        return self._fork_server.run(*commands, variables=self.home.variables | self._variables)

    def flip(self, name: str, position: int, bit: int) -> tuple[str, str]:
        """Flip one bit and run the commands; return the outcome, and the problem if it is wrong.

        Outcomes: ``wrong`` violates the claim. ``refused``: a command failed with an error message.
        ``listed with the changed tag``: only ``registry list`` has another output. ``same output``:
        every command printed what it printed before.
        """
        self.home.restore(self._snapshot)
        path = self.home.root / name
        body = bytearray(path.read_bytes())
        body[position] ^= 1 << bit
        path.chmod(0o644)
        path.write_bytes(bytes(body))
        completed = self._read()
        problems = self._problems(completed, name, bytes(body))
        if problems:
            return "wrong", f"bit {bit} of byte {position} of {name}: {'; '.join(problems)}"
        if any(completed.codes):
            return "refused", ""
        are_listings = [
            self._commands[index][:2] == ["registry", "list"] for index in self._changed(completed)
        ]
        if are_listings and all(are_listings):
            return "listed with the changed tag", ""
        return "same output", ""

    def _changed(self, completed: Completed) -> list[int]:
        """Return the index of each successful command whose output differs from the expected."""
        pairs = zip(
            completed.codes, completed.outputs, self._expected.outputs, self._commands, strict=True
        )
        return [
            index
            for index, (code, output, expected, command) in enumerate(pairs)
            if code == 0
            and comparable_output(command, output) != comparable_output(command, expected)
        ]

    def _problems(self, completed: Completed, flipped: str, body: bytes) -> list[str]:
        """Describe each violation of the claim; ``flipped`` is the file with the flipped bit."""
        if completed.crashed or len(completed.codes) != len(self._commands):
            return [f"crashed: {completed.text}"]
        problems = []
        for index in self._changed(completed):
            is_listing = self._commands[index][:2] == ["registry", "list"]
            if not (is_listing and Path(flipped).name in CHANGES_ON_READ):
                problems.append(f"{self._commands[index]} printed something else")
        for command, code, message in zip(
            self._commands, completed.codes, completed.messages, strict=True
        ):
            if code not in {0, 1, 2} or (code and "recpress: " not in message):
                problems.append(f"{command} ended with {code}: {message[-300:]}")
        runs_order = any(command[0] == "compress" for command in self._commands)
        for name, path in self.home.files().items():
            if name not in self._before or name == flipped or Path(name).name in CHANGES_ON_READ:
                continue
            # An order that runs again may replace its order record, cached results and aliases.
            may_change = runs_order and not is_content(name)
            changed = hashlib.sha256(path.read_bytes()).hexdigest() != self._before[name]
            if changed and not may_change:
                problems.append(f"{name} was changed")
        problems += [
            f"{name} is gone" for name in self._before if not (self.home.root / name).exists()
        ]
        return problems


def comparable_output(command: list[str], output: str) -> Any:
    """Return the output of a command without latencies, which differ between runs of an order."""
    if command[0] != "compress":
        return output
    result = json.loads(output)
    report = result["report"]
    return (
        result["version"],
        report["order"],
        report["outcome"],
        report["compressed"],
        [(item["target"], item["artifact"]) for item in report["targets"]],
        report["plan"],
    )


def is_content(name: str) -> bool:
    """Return whether a file is part of an artifact, whose name is a hash of its content."""
    return "/artifacts/" in name or "/blobs/" in name


def draw_bits(name: str, size: int, rng: random.Random) -> list[tuple[int, int]]:
    """Draw the bits to flip in one file, as position of the byte and number of the bit."""
    count = DRAWN_IN_CONTENT
    if Path(name).name == "registry.db":
        count = DRAWN_IN_REGISTRY
    elif not is_content(name):
        count = DRAWN_IN_OTHER_FILES
    indices = {0, size - 1, rng.randrange(min(size, HEADER_BYTES))}
    indices |= {rng.randrange(size) for _ in range(count)}
    return [(index, rng.randrange(8)) for index in sorted(indices)]


def list_flips(flip_test: FlipTest) -> list[tuple[str, int, int]]:
    """Return all flips in a home as (file, position, bit), the same in every run."""
    rng = random.Random(SEED)
    flips = []
    for name, path in sorted(flip_test.files.items()):
        size = path.stat().st_size
        if size:
            flips += [(name, position, bit) for position, bit in draw_bits(name, size, rng)]
    return flips


def category(name: str) -> str:
    """Return the category of a file in the table of outcomes.

    A file of the store belongs to its folder: ``recpress/store/orders/1f.json`` to "store orders".
    """
    if is_content(name):
        return "manifests" if name.endswith("manifest.json") else "files of artifacts"
    if name.startswith("triton/"):
        return "Triton repository"
    parts = name.split("/")
    return "registry" if parts[-1] == "registry.db" else " ".join(parts[1:-1][:2]) or parts[0]


def check(
    flip_test: FlipTest, flips: list[tuple[str, int, int]], count_outcome: CountOutcome
) -> None:
    """Run all flips, count their outcomes, and fail if any of them violates the claim."""
    failed = []
    for name, position, bit in flips:
        outcome, problem = flip_test.flip(name, position, bit)
        count_outcome(SUITE, category(name), outcome)
        if problem:
            failed.append(problem)
    assert not failed, f"{len(failed)} of {len(flips)}:\n" + "\n".join(failed[:8])


def reading_commands(model: str) -> list[list[str]]:
    """Return the arguments of all commands that only read a registered model."""
    return [
        ["registry", "list", "--json"],
        ["registry", "show", model, "--version", "1", "--json"],
        ["registry", "show", model, "--version", "@champion", "--json"],
        ["registry", "show", model, "--version", "1", "--html", "{into}.html"],
        ["registry", "fetch", model, "--version", "1", "--into", "{into}", "--json"],
    ]


def test_bit_flipped_in_a_stored_file_is_refused_or_does_not_matter(
    fork_server: ForkServerClient, root: Path, promoted_snapshot: Path, count_outcome: CountOutcome
) -> None:
    flip_test = FlipTest(
        fork_server, Home(root / "home"), promoted_snapshot, reading_commands("m"), {}
    )
    flips = random.Random(SEED).sample(list_flips(flip_test), SAMPLE)
    check(flip_test, flips, count_outcome)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_bit_flipped_in_any_stored_file_is_refused_or_does_not_matter(
    shard: int,
    preloaded_fork_server: ForkServerClient,
    root: Path,
    finished_snapshot: Path,
    order: Path,
    order_variables: dict[str, str],
    count_outcome: CountOutcome,
) -> None:
    commands = [
        *reading_commands("clicks"),
        ["bundle", "show", "clicks", "--json"],
        ["bundle", "check", "clicks", "--json"],
        ["compress", "--order", str(order), "--json"],
    ]
    flip_test = FlipTest(
        preloaded_fork_server, Home(root / "home"), finished_snapshot, commands, order_variables
    )
    check(flip_test, list_flips(flip_test)[shard::SHARDS], count_outcome)
    shutil.rmtree(root / "home", ignore_errors=True)
