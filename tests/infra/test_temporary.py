"""Temporary files of killed runs are removed by the next run; those of live runs never are."""

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
from infra.store.draft import draft
from infra.store.object_store import Store
from infra.store.temporary import MAX_AGE_SECONDS, collect, owned_name, scratch_folder

NONE = re.compile(r"(?!)")
ROOT = Path(__file__).parents[2]

# Each writes in the folder argv[1], says so, and waits to be killed while the file is unfinished.
WRITERS = {
    "store key": """
from infra.store.object_store import Store
Store(str(top / "store"))._place.upload("models/1", 5, chunks())
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


def repeat(what: str, top: Path) -> None:
    """What the next run of the same command does."""
    store_folder._collected.clear()
    if what == "store key":
        Store(str(top / "store")).write("models/2", b"x")
    elif what == "fetched folder":
        store = Store(str(top / "store"))
        store.get(store.put(top / "model"), top / f"fetched {time.monotonic_ns()}")
    else:
        with scratch_folder("pack"):
            pass


@contextmanager
def writer(what: str, top: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in the middle of writing."""
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
{WRITERS[what]}"""
    environment = {**os.environ, "TMPDIR": str(top / "tmp")}
    with subprocess.Popen([sys.executable, "-c", code, str(top)], cwd=ROOT, env=environment) as run:
        until = time.monotonic() + 60
        while not (top / "ready").exists():
            assert run.poll() is None, "it ended before it wrote anything"
            assert time.monotonic() < until
            time.sleep(0.01)
        (top / "ready").unlink()
        yield run
        run.kill()


def leftovers(top: Path) -> list[str]:
    return sorted(p.name for p in top.rglob("*") if temporary._OWNED.fullmatch(p.name))


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.mark.parametrize("what", list(WRITERS))
def test_the_next_run_removes_what_a_killed_run_left_and_nothing_of_a_live_one(
    what: str, top: Path
) -> None:
    with writer(what, top) as live:
        with writer(what, top) as killed:
            assert len(leftovers(top)) == 2
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        repeat(what, top)
        (left,) = leftovers(top)
        assert f"-{live.pid}-" in left
        live.kill()
        live.wait()
    repeat(what, top)
    assert leftovers(top) == []


def test_a_zombie_no_longer_owns_anything(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)  # it ended and is not reaped
        assert temporary._start(run.pid) == -1
        assert not temporary._is_running(run.pid, 1)
    finally:
        run.wait()


def test_a_later_process_with_the_same_pid_is_not_the_owner(tmp_path: Path) -> None:
    own = owned_name("key", "tmp")
    start = temporary._start(os.getpid())
    earlier = own.replace(f"-{start}-", f"-{start - 1}-")
    for name in (own, earlier):
        (tmp_path / name).touch()
    assert collect(tmp_path, NONE) == 1
    assert [path.name for path in tmp_path.iterdir()] == [own]


def of_another_machine(monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(temporary, "_machine", lambda: "0123456789ab")
        return owned_name(".out", "part")


def test_a_file_of_another_machine_is_removed_only_after_the_age_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / of_another_machine(monkeypatch)
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "growing").touch()
    old = time.time() - MAX_AGE_SECONDS - 60
    for path in (folder, folder / "deep"):
        os.utime(path, (old, old))
    assert collect(tmp_path, NONE) == 0, "a file deep inside still grows"
    for path in (folder / "deep" / "growing", folder / "deep", folder):
        os.utime(path, (old, old))
    assert collect(tmp_path, NONE) == 1
    assert list(tmp_path.iterdir()) == []


def test_other_names_are_never_touched_however_old(tmp_path: Path) -> None:
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
    assert collect(tmp_path, temporary.EARLIER_SIBLINGS) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_names_of_an_earlier_version_are_removed_after_the_age_limit(tmp_path: Path) -> None:
    young, old = tmp_path / f".out.{'a' * 32}.part", tmp_path / f".out.{'b' * 32}.part"
    for folder in (young, old):
        folder.mkdir()
    long_ago = time.time() - MAX_AGE_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    assert collect(tmp_path, temporary.EARLIER_SIBLINGS) == 1
    assert list(tmp_path.iterdir()) == [young]


def test_a_link_is_removed_and_not_what_it_points_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "f").touch()
    start = temporary._start(os.getpid())
    link = tmp_path / owned_name("x", "tmp").replace(f"-{start}-", "-1-")
    link.symlink_to(tmp_path / "kept")
    assert collect(tmp_path, NONE) == 1
    assert (tmp_path / "kept" / "f").exists()


def test_a_long_name_leaves_room_for_the_owner(tmp_path: Path) -> None:
    name = owned_name("ü" * 250, "part")
    assert len(name.encode()) < 200
    (tmp_path / name).mkdir()


def test_a_scratch_folder_is_private_and_removed_after_an_error(top: Path) -> None:
    def fails() -> None:
        with scratch_folder("pack") as folder:
            assert folder.stat().st_mode & 0o077 == 0
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert list((top / "tmp").iterdir()) == []


# --- drafts: a killed run can be continued, so only old drafts are removed --------------------


def abandoned(into: Path, days: float) -> None:
    """What a killed run of ``tables quantize`` leaves, this long ago."""
    with draft(into, "job", "data", 5) as begun:
        begun.write("0", [(0, memoryview(b"12345"))])
    then = time.time() - days * 86_400
    part = into.with_name(f".{into.name}.part")
    for path in (*part.rglob("*"), part, into.with_name(f".{into.name}.journal")):
        os.utime(path, (then, then))


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def other(folder: Path) -> None:
    with draft(folder / "other", "job", "data", 5) as begun:
        begun.write("0", [(0, memoryview(b"12345"))])
        begun.publish(begun.seal())


def test_a_draft_that_was_not_continued_for_a_week_is_removed(tmp_path: Path) -> None:
    abandoned(tmp_path / "recent", days=6)
    abandoned(tmp_path / "old", days=8)
    other(tmp_path)
    assert hidden(tmp_path) == [".recent.journal", ".recent.part"]


def test_an_old_draft_that_a_process_has_open_is_kept(tmp_path: Path) -> None:
    with draft(tmp_path / "open", "job", "data", 5):
        for path in (tmp_path / ".open.journal", *(tmp_path / ".open.part").rglob("*")):
            os.utime(path, (0, 0))
        os.utime(tmp_path / ".open.part", (0, 0))
        other(tmp_path)
        assert hidden(tmp_path) == [".open.journal", ".open.part"]


def test_an_old_journal_of_another_program_is_kept(tmp_path: Path) -> None:
    (tmp_path / ".else.journal").write_text("something else\n")
    os.utime(tmp_path / ".else.journal", (0, 0))
    other(tmp_path)
    assert hidden(tmp_path) == [".else.journal"]


def test_a_refused_draft_leaves_no_journal(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "f").touch()
    with pytest.raises(Exception, match="not empty"), draft(tmp_path / "full", "job", "data", 5):
        pass
    assert hidden(tmp_path) == []
