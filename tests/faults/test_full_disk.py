"""Run pack, compress and promote on disks that become full.

Claim: the command finishes, or exits with code 1 and an error message. No partial content is
visible and no stored content is lost. After space is freed, the same command has the same result as
on a large disk.

Enumeration: file systems in memory (tmpfs) of several sizes, from almost none to almost all of the
needed space; they require the right to mount. Limits on the size of one file (RLIMIT_FSIZE) require
no rights.

A draft is the folder that a user writes and ``bundle pack`` packs as a bundle. A home is a folder
with all files of one installation, and a snapshot is a copy of a home. The default tier has the
tests without the markers ``slow`` and ``nightly``.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import Completed, ForkServerClient
from homes import Home, find_damage, read_state
from outcomes import CountOutcome

SUITE = "full disk"
# Sizes of the file systems, limits on the size of one file, and the size of the file system after
# space is freed (64 MiB).
KILOBYTES = (40, 100, 250, 400, 700, 1000, 1300, 1600, 1900, 2200, 2600)
FILE_KILOBYTES = (4, 20, 64, 150, 300)
LARGE = "64m"
SAMPLE_KILOBYTES = 64  # limit on the size of a file in the default tier


class Disk:
    """A mounted file system whose size can be changed."""

    def __init__(self, mount_point: Path) -> None:
        self.mount_point = mount_point

    def resize(self, size: str) -> None:
        """Change the size of the file system."""
        options = ["mount", "-o", f"remount,size={size}", str(self.mount_point)]
        subprocess.run(options, check=True, capture_output=True)


@contextmanager
def mounted_disk(mount_point: Path, kilobytes: int) -> Iterator[Disk]:
    """Mount a file system of this size; skip the test without the right to mount."""
    mount_point.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(mount_point)]
    process = subprocess.run(command, check=False, capture_output=True, text=True)
    if process.returncode:
        pytest.skip(f"no right to mount a file system: {process.stderr.strip()}")
    try:
        yield Disk(mount_point)
    finally:
        command = ["umount", "-l", str(mount_point)]
        subprocess.run(command, check=True, capture_output=True)


def check_command(completed: Completed, home: Home, case: str, count_outcome: CountOutcome) -> None:
    """Check that a command finished or printed an error message, and that all content is intact."""
    assert not completed.crashed, completed.text
    assert completed.code in {0, 1}, completed.text
    if completed.code:
        assert "recpress: " in completed.text, completed.text
    assert find_damage(home) == []
    count_outcome(SUITE, case, "finished" if completed.code == 0 else "exit 1 with a sentence")


def test_pack_that_writes_too_large_files_exits_with_code_1_and_works_afterwards(
    fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    draft: Path,
    count_outcome: CountOutcome,
) -> None:
    check_limited(SAMPLE_KILOBYTES, fork_server, root, empty_snapshot, draft, count_outcome)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kilobytes", FILE_KILOBYTES)
def test_pack_with_any_limit_on_files_exits_with_code_1_and_works_afterwards(
    kilobytes: int,
    fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    draft: Path,
    count_outcome: CountOutcome,
) -> None:
    check_limited(kilobytes, fork_server, root, empty_snapshot, draft, count_outcome)


def check_limited(
    kilobytes: int,
    fork_server: ForkServerClient,
    root: Path,
    empty_snapshot: Path,
    draft: Path,
    count_outcome: CountOutcome,
) -> None:
    """Pack a draft with a limit on the size of files, check the failure, and pack again without."""
    home = Home(root / "home")
    home.restore(empty_snapshot)
    command = ["bundle", "pack", str(draft)]
    limited = fork_server.run(command, variables=home.variables, file_bytes=kilobytes << 10)
    assert limited.code == 1 or kilobytes << 10 >= (draft / "model.safetensors").stat().st_size
    check_command(limited, home, "pack, files too large", count_outcome)
    unlimited = fork_server.run(command, variables=home.variables)
    assert unlimited.code == 0, unlimited.text
    assert find_damage(home) == []


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kilobytes", KILOBYTES)
def test_order_on_a_disk_that_fills_up_exits_with_code_1_and_finishes_when_there_is_space(
    kilobytes: int,
    preloaded_fork_server: ForkServerClient,
    root: Path,
    draft: Path,
    order: Path,
    finished_snapshot: Path,
    order_variables: dict[str, str],
    tmp_path: Path,
    count_outcome: CountOutcome,
) -> None:
    commands = (["bundle", "pack", str(draft)], ["compress", "--order", str(order)])
    with mounted_disk(tmp_path / "disk", kilobytes) as disk:
        home = Home(disk.mount_point / "home")
        temporary = tmp_path / "tmp"
        temporary.mkdir()
        variables = {
            "RECPRESS_HOME": str(home.recpress),
            "RECPRESS_TRITON": str(home.root / "triton"),
            "RECPRESS_USER": "tester",
            "TMPDIR": str(temporary),
            **order_variables,
        }
        for command in commands:
            completed = preloaded_fork_server.run(command, variables=variables)
            check_command(completed, home, " ".join(command[:1]) + ", tmpfs", count_outcome)
            if completed.code:
                disk.resize(LARGE)
                repeated = preloaded_fork_server.run(command, variables=variables)
                assert repeated.code == 0, repeated.text
                assert find_damage(home) == []
        assert read_state(home) == read_state(Home(finished_snapshot))
