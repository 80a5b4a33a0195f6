"""Removal of temporary files: files of killed processes are removed, others are kept.

The name of a temporary file contains machine, PID and start time of the process that writes it
(``generate_owned_name``). Arguments of ``open_writer`` are the folder of the result, the job (any
value that determines the content), and path and size of the large file. ``write`` receives the name
of a block, and its pieces as offset and bytes. ``EARLIER_SIBLINGS`` is the pattern of names that
version 0.1.0 gave to temporary folders next to their results.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.store import folder as store_folder
from infra.store import temporary
from infra.store.artifact_writer import open_writer
from infra.store.object_store import Store
from infra.store.temporary import (
    MAX_AGE_SECONDS,
    generate_owned_name,
    remove_leftovers,
    scratch_folder,
)

# Matches nothing; for folders without names that version 0.1.0 gave to temporary files.
NO_EARLIER_NAMES = re.compile(r"(?!)")
ROOT = Path(__file__).parents[2]

# Code of processes that start to write below ``top`` and call ``wait()`` with an unfinished file.
WRITER_CODE = {
    "store key": """
from infra.store.object_store import Store
Store(str(top / "store"))._backend.upload("models/1", 5, chunks())
""",
    "fetched folder": """
from infra.store.object_store import Store
from infra.store.artifact_files import ArtifactFiles
store = Store(str(top / "store"))
(top / "model").mkdir(exist_ok=True); (top / "model" / "f").write_text("x" * 9)
artifact = store.put(top / "model")
ArtifactFiles.copy = lambda *rest: wait()
store.get(artifact, top / "fetched")
""",
    "scratch folder": """
from infra.store.temporary import scratch_folder
with scratch_folder("pack") as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "f").write_text("x")
    (folder / "deep" / "f").chmod(0o444)
    wait()
""",
}


def run_same_command_again(kind: str, top: Path) -> None:
    """Do what the next run of the same command does, including the removal of old files."""
    # Otherwise the process would not remove files from a folder again within a minute.
    store_folder._last_cleanups.clear()
    if kind == "store key":
        Store(str(top / "store")).write("models/2", b"x")
    elif kind == "fetched folder":
        store = Store(str(top / "store"))
        store.get(store.put(top / "model"), top / f"fetched {time.monotonic_ns()}")
    else:
        with scratch_folder("pack"):
            pass


@contextmanager
def running_writer(kind: str, top: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process of ``WRITER_CODE`` and yield it while its file is unfinished."""
    code = f"""
import sys, time
from pathlib import Path
top = Path(sys.argv[1])
def wait():
    (top / "ready").touch()
    time.sleep(120)
def chunks():
    yield b"half"
    wait()
{WRITER_CODE[kind]}"""
    environment = {**os.environ, "TMPDIR": str(top / "tmp")}
    command = [sys.executable, "-c", code, str(top)]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        deadline = time.monotonic() + 60
        while not (top / "ready").exists():
            assert process.poll() is None, "the process ended before it wrote anything"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (top / "ready").unlink()
        yield process
        process.kill()


def temporary_names(top: Path) -> list[str]:
    """Return the names of all temporary files below ``top``."""
    return sorted(p.name for p in top.rglob("*") if temporary._OWNED.fullmatch(p.name))


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder whose subfolder ``tmp`` is the system's folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.mark.parametrize("kind", list(WRITER_CODE))
def test_next_run_removes_files_of_a_killed_process_and_keeps_files_of_a_running_one(
    kind: str, top: Path
) -> None:
    with running_writer(kind, top) as running:
        with running_writer(kind, top) as killed:
            assert len(temporary_names(top)) == 2
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        run_same_command_again(kind, top)
        (remaining,) = temporary_names(top)
        assert f"-{running.pid}-" in remaining
        running.kill()
        running.wait()
    run_same_command_again(kind, top)
    assert temporary_names(top) == []


def test_zombie_process_does_not_count_as_running(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # WNOWAIT keeps the zombie
        assert temporary._read_start_time(process.pid) == -1
        assert not temporary._is_running(process.pid, 1)  # 1: any start time
    finally:
        process.wait()


def test_file_of_an_earlier_process_with_the_same_pid_is_removed(tmp_path: Path) -> None:
    current_name = generate_owned_name("key", "tmp")
    start = temporary._read_start_time(os.getpid())
    earlier_name = current_name.replace(f"-{start}-", f"-{start - 1}-")
    for name in (current_name, earlier_name):
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path, NO_EARLIER_NAMES) == 1
    assert [path.name for path in tmp_path.iterdir()] == [current_name]


def name_from_another_machine(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a temporary file that another machine would create."""
    with monkeypatch.context() as patch:
        patch.setattr(temporary, "_compute_machine_id", lambda: "0123456789ab")
        return generate_owned_name(".out", "part")


def test_folder_of_another_machine_is_removed_after_the_age_limit_of_all_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name_from_another_machine(monkeypatch)
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "growing").touch()
    old = time.time() - MAX_AGE_SECONDS - 60
    for path in (folder, folder / "deep"):
        os.utime(path, (old, old))
    assert remove_leftovers(tmp_path, NO_EARLIER_NAMES) == 0, (
        "a file in a subfolder changed recently"
    )
    for path in (folder / "deep" / "growing", folder / "deep", folder):
        os.utime(path, (old, old))
    assert remove_leftovers(tmp_path, NO_EARLIER_NAMES) == 1
    assert list(tmp_path.iterdir()) == []


def test_old_files_without_the_name_of_a_temporary_file_are_kept(tmp_path: Path) -> None:
    names = [
        ".out.part",
        "a" * 32,
        "key.tmp",
        ".x.0-1-2-3.part",
        "recpress-pack",
        "x.part",
        "tmpab",
    ]
    old = time.time() - 100 * MAX_AGE_SECONDS
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (old, old))
    assert remove_leftovers(tmp_path, temporary.EARLIER_SIBLINGS) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_temporary_folders_of_version_0_1_0_are_removed_after_the_age_limit(tmp_path: Path) -> None:
    recent, old = tmp_path / f".out.{'a' * 32}.part", tmp_path / f".out.{'b' * 32}.part"
    for folder in (recent, old):
        folder.mkdir()
    long_ago = time.time() - MAX_AGE_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    assert remove_leftovers(tmp_path, temporary.EARLIER_SIBLINGS) == 1
    assert list(tmp_path.iterdir()) == [recent]


def test_remove_leftovers_removes_a_symlink_and_keeps_its_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").touch()
    start = temporary._read_start_time(os.getpid())
    # The name of a file of a process that has ended: with the same PID and another start time.
    link = tmp_path / generate_owned_name("x", "tmp").replace(f"-{start}-", "-1-")
    link.symlink_to(tmp_path / "kept")
    assert remove_leftovers(tmp_path, NO_EARLIER_NAMES) == 1
    assert (tmp_path / "kept" / "f").exists()


def test_generate_owned_name_of_a_long_stem_is_a_valid_file_name(tmp_path: Path) -> None:
    name = generate_owned_name("ü" * 250, "part")
    assert len(name.encode()) < 200
    (tmp_path / name).mkdir()


def test_scratch_folder_is_private_and_removed_after_an_error(top: Path) -> None:
    def fails() -> None:
        with scratch_folder("pack") as folder:
            assert folder.stat().st_mode & 0o077 == 0
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert list((top / "tmp").iterdir()) == []


# --- a repeated command resumes a killed run, so only old unfinished artifacts are removed ----


def leave_unfinished_artifact(into: Path, days: float) -> None:
    """Create the files of a killed run of ``tables quantize`` that changed ``days`` days ago."""
    with open_writer(into, "job", "data", 5) as writer:
        writer.write("0", [(0, memoryview(b"12345"))])
    last_change = time.time() - days * 86_400
    unfinished_folder = into.with_name(f".{into.name}.part")
    for path in (
        *unfinished_folder.rglob("*"),
        unfinished_folder,
        into.with_name(f".{into.name}.journal"),
    ):
        os.utime(path, (last_change, last_change))


def hidden_files(folder: Path) -> list[str]:
    """Return the sorted names in a folder that begin with a dot."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def finish_other_artifact(folder: Path) -> None:
    """Publish an artifact in ``folder``, which removes abandoned unfinished artifacts there."""
    with open_writer(folder / "other", "job", "data", 5) as writer:
        writer.write("0", [(0, memoryview(b"12345"))])
        writer.publish(writer.seal())


def test_unfinished_artifact_unchanged_for_more_than_a_week_is_removed(tmp_path: Path) -> None:
    leave_unfinished_artifact(tmp_path / "recent", days=6)
    leave_unfinished_artifact(tmp_path / "old", days=8)
    finish_other_artifact(tmp_path)
    assert hidden_files(tmp_path) == [".recent.journal", ".recent.part"]


def test_old_unfinished_artifact_that_a_process_has_open_is_kept(tmp_path: Path) -> None:
    with open_writer(tmp_path / "open", "job", "data", 5):
        for path in (tmp_path / ".open.journal", *(tmp_path / ".open.part").rglob("*")):
            os.utime(path, (0, 0))
        os.utime(tmp_path / ".open.part", (0, 0))
        finish_other_artifact(tmp_path)
        assert hidden_files(tmp_path) == [".open.journal", ".open.part"]


def test_old_file_with_a_journals_name_but_other_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".unrelated.journal").write_text("not a header\n")
    os.utime(tmp_path / ".unrelated.journal", (0, 0))
    finish_other_artifact(tmp_path)
    assert hidden_files(tmp_path) == [".unrelated.journal"]


def test_result_refused_for_a_full_folder_leaves_no_journal(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "f").touch()
    with (
        pytest.raises(Exception, match="not empty"),
        open_writer(tmp_path / "full", "job", "data", 5),
    ):
        pass
    assert hidden_files(tmp_path) == []
