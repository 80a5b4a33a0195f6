"""Kill a process at a chosen point: before a change of a file or the registry, or at a task.

A child process calls ``arm`` before its work. From then on, its points are numbered from 1. At the
point with a given number (``at``), the process group is killed (SIGKILL) before the change. These
are points:

* opening a file below the root for writing, ``mkdir``, ``unlink``, ``rename``, ``link``,
  ``rmdir``, ``rmtree``, ``chmod``, ``copyfile``, ``truncate``;
* a half-written file: an additional point before each ``rename`` and ``link``, at which the file is
  truncated to half its size before the kill. Blobs of the store (files whose name is a hash of
  their content) have no such point, because a blob is complete before an artifact gets a hard link
  to it;
* every SQL statement that changes the registry, and every commit;
* the start and the end of every Prefect task.

The hooks only detect changes that Python code makes. Kills after a random time (``after``) also
interrupt SQLite within a statement.
"""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

# Audit events of Python for changes of files.
CHANGES = {
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "shutil.copyfile",
    "shutil.rmtree",
}
RENAMES = {"os.link", "os.rename"}
READ_STATEMENTS = ("select", "pragma", "explain", "with", "begin")


class _Counter:
    """Counts the points of this process, and kills it at point ``at``.

    Args:
        root: changes of files outside this folder do not count.
        at: number of the point at which to kill; None to count only.
        file: file to which ``save`` writes the names of the points.
    """

    def __init__(self, root: str, at: int | None, file: Path) -> None:
        self.root, self.at, self.file = root, at, file
        self.points: list[str] = []
        self.inside = threading.local()  # has ``hook`` while this thread is in ``on_event``
        self.lock = threading.Lock()

    def pass_point(self, name: str, before_kill: Any = None) -> None:
        """Count a point; at the chosen one, call ``before_kill`` and kill the process."""
        with self.lock:
            self.points.append(name)
            is_chosen = len(self.points) == self.at
        if is_chosen:
            if before_kill is not None:
                before_kill()
            kill()

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count an audit event of Python if it changes a file; see ``sys.addaudithook``."""
        if (event != "open" and event not in CHANGES) or getattr(self.inside, "hook", False):
            return
        self.inside.hook = True
        try:
            self._count_change(event, arguments)
        finally:
            self.inside.hook = False

    def _count_change(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count a change below the root; before a rename or link, also a half-written file."""
        name = arguments[0]
        if not isinstance(name, str | bytes | os.PathLike):
            return
        path = str(Path.cwd() / os.fsdecode(name))
        if not path.startswith(self.root):
            return
        if changes_nothing(event, path, arguments):
            return
        if event in RENAMES and "/blobs/" not in path:
            self.pass_point(
                f"half-written {path_pattern(path, self.root)}",
                before_kill=lambda: cut_in_half(path),
            )
        self.pass_point(f"{event} {path_pattern(path, self.root)}")


_counters: list[_Counter] = []


def arm(fault: dict[str, Any], file: Path) -> None:
    """Count points from now on; kill at point ``fault["at"]`` or after ``fault["after"]`` seconds.

    Args:
        fault: ``root``, the folder whose changes count; ``at`` and ``after`` are optional.
        file: file to which ``save`` writes the names of the points.
    """
    import sys

    from prefect import Task
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    counter = _Counter(fault["root"], fault.get("at"), file)
    _counters.append(counter)

    changed: set[int] = set()  # ids of connections with changes that are not committed

    def on_statement(connection: Any, _: Any, statement: str, *_rest: Any) -> None:
        words = statement.split(maxsplit=3)
        if words[0].lower() not in READ_STATEMENTS:
            changed.add(id(connection))
            counter.pass_point("sql " + " ".join(words[:3]).lower())

    def on_commit(connection: Any) -> None:
        if id(connection) in changed:
            changed.discard(id(connection))
            counter.pass_point("sql commit")

    event.listen(Engine, "before_cursor_execute", on_statement)
    event.listen(Engine, "commit", on_commit)
    original_call = Task.__call__

    def counted_call(task: Any, *arguments: Any, **named: Any) -> Any:
        counter.pass_point(f"start of task {task.name}")
        result = original_call(task, *arguments, **named)
        counter.pass_point(f"end of task {task.name}")
        return result

    Task.__call__ = counted_call  # type: ignore[method-assign]
    if fault.get("after") is not None:
        timer = threading.Timer(fault["after"], kill)
        timer.daemon = True
        timer.start()
    sys.addaudithook(counter.on_event)


def save() -> None:
    """Write the names of all points that the process passed."""
    (counter,) = _counters
    counter.file.write_text(json.dumps(counter.points))


def kill() -> None:
    """Kill this process and its child processes with SIGKILL, without any cleanup."""
    os.killpg(os.getpid(), signal.SIGKILL)


def cut_in_half(path: str) -> None:
    """Truncate a file, or the last file of a folder, to half its size."""
    root = Path(path)
    files = sorted(item for item in root.rglob("*") if item.is_file()) or [root]
    if files[-1].is_file():
        os.truncate(files[-1], files[-1].stat().st_size // 2)


def changes_nothing(event: str, path: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether a call only reads, or does not change the file system."""
    if event == "open":
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
        return not writes or (path.endswith(".lock") and Path(path).exists())
    if event == "os.mkdir":
        return Path(path).exists()
    return not os.path.lexists(path)


def path_pattern(path: str, root: str) -> str:
    """Return a relative path with ``*`` for hashes and random names, which differ between runs."""
    parts = Path(path).relative_to(root).parts
    return "/".join("*" if len(part) > 40 or "-" in part else part for part in parts)
