"""Disks of several sizes that fill up in the middle of pack, compress and promote.

Claim: the command ends with exit code 1 and a sentence; nothing half stored is visible and nothing
stored before is lost; after space is freed the same command gives what it gives on a large disk.

Enumeration: file systems in memory (tmpfs) of sizes from one that holds almost nothing to one that
holds almost everything; needs the right to mount. Limits on the size of one file (RLIMIT_FSIZE)
need no right.
"""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import Ended, Forks
from homes import Home, damage, state

SUITE = "full disk"
KILOBYTES = (40, 100, 250, 400, 700, 1000, 1300, 1600, 1900, 2200, 2600)
FILE_KILOBYTES = (4, 20, 64, 150, 300)
LARGE = "64m"
SAMPLE_KILOBYTES = 64

Outcomes = Callable[..., None]


class Disk:
    """A mounted file system whose size can be changed."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def resize(self, size: str) -> None:
        """Give it another size."""
        options = ["mount", "-o", f"remount,size={size}", str(self.place)]
        subprocess.run(options, check=True, capture_output=True)


@contextmanager
def disk(place: Path, kilobytes: int) -> Iterator[Disk]:
    """Mount a file system of this size; skip the test if that is not allowed."""
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a file system: {mounted.stderr.strip()}")
    try:
        yield Disk(place)
    finally:
        command = ["umount", "-l", str(place)]
        subprocess.run(command, check=True, capture_output=True)


def check_failed(ended: Ended, home: Home, case: str, outcomes: Outcomes) -> None:
    """A command that did not finish says so; what is visible is whole."""
    assert not ended.crashed, ended.text
    assert ended.code in {0, 1}, ended.text
    if ended.code:
        assert "recpress: " in ended.text, ended.text
    assert damage(home) == []
    outcomes(SUITE, case, "finished" if ended.code == 0 else "exit 1 with a sentence")


def test_pack_that_writes_too_large_files_exits_with_code_1_and_works_afterwards(
    forks: Forks, root: Path, empty: Path, draft: Path, outcomes: Outcomes
) -> None:
    check_limited(SAMPLE_KILOBYTES, forks, root, empty, draft, outcomes)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kilobytes", FILE_KILOBYTES)
def test_pack_with_any_limit_on_files_exits_with_code_1_and_works_afterwards(
    kilobytes: int, forks: Forks, root: Path, empty: Path, draft: Path, outcomes: Outcomes
) -> None:
    check_limited(kilobytes, forks, root, empty, draft, outcomes)


def check_limited(
    kilobytes: int, forks: Forks, root: Path, empty: Path, draft: Path, outcomes: Outcomes
) -> None:
    home = Home(root / "home")
    home.restore(empty)
    command = ["bundle", "pack", str(draft)]
    limited = forks.run(command, variables=home.variables, file_bytes=kilobytes << 10)
    assert limited.code == 1 or kilobytes << 10 >= (draft / "model.safetensors").stat().st_size
    check_failed(limited, home, "pack, files too large", outcomes)
    again = forks.run(command, variables=home.variables)
    assert again.code == 0, again.text
    assert damage(home) == []


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kilobytes", KILOBYTES)
def test_order_on_a_disk_that_fills_up_exits_with_code_1_and_finishes_when_there_is_space(
    kilobytes: int,
    learned: Forks,
    root: Path,
    draft: Path,
    order: Path,
    finished: Path,
    ordering: dict[str, str],
    tmp_path: Path,
    outcomes: Outcomes,
) -> None:
    commands = (["bundle", "pack", str(draft)], ["compress", "--order", str(order)])
    with disk(tmp_path / "disk", kilobytes) as small:
        home = Home(small.place / "home")
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        variables = {
            "RECPRESS_HOME": str(home.recpress),
            "RECPRESS_TRITON": str(home.root / "triton"),
            "RECPRESS_USER": "tester",
            "TMPDIR": str(temporary),
            **ordering,
        }
        for command in commands:
            ended = learned.run(command, variables=variables)
            check_failed(ended, home, " ".join(command[:1]) + ", tmpfs", outcomes)
            if ended.code:
                small.resize(LARGE)
                again = learned.run(command, variables=variables)
                assert again.code == 0, again.text
                assert damage(home) == []
        assert state(home) == state(Home(finished))
