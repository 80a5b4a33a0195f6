"""Points at which a process can be killed: every change to files, the registry, and every task.

``arm`` is called in a child before its work. It counts these points in order and, if it is given
the number of one, kills the process group (SIGKILL) there, before the change happens:

* opening a file below the root for writing, ``mkdir``, ``unlink``, ``rename``, ``link``,
  ``rmtree``, ``truncate``;
* before each ``rename`` and ``link``: the file is cut to half first, so it is left half written;
* every SQL statement of the registry that changes something, and every commit;
* the start and the end of every Prefect task.

The hooks see changes made through Python. What SQLite does inside one statement is covered by
kills after a random time (``after``).
"""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

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
PUT_IN_PLACE = {"os.link", "os.rename"}
READING = ("select", "pragma", "explain", "with", "begin")


class _Counter:
    def __init__(self, root: str, at: int | None, file: Path) -> None:
        self.root, self.at, self.file = root, at, file
        self.points: list[str] = []
        self.inside = threading.local()
        self.lock = threading.Lock()

    def pass_point(self, name: str, before_kill: Any = None) -> None:
        with self.lock:
            self.points.append(name)
            reached = len(self.points) == self.at
        if reached:
            if before_kill is not None:
                before_kill()
            kill()

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if (event != "open" and event not in CHANGES) or getattr(self.inside, "hook", False):
            return
        self.inside.hook = True
        try:
            self._changed(event, arguments)
        finally:
            self.inside.hook = False

    def _changed(self, event: str, arguments: tuple[Any, ...]) -> None:
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        place = str(Path.cwd() / os.fsdecode(path))
        if not place.startswith(self.root):
            return
        if changes_nothing(event, place, arguments):
            return
        if event in PUT_IN_PLACE:
            self.pass_point(
                f"half-written {kind(place, self.root)}", before_kill=lambda: cut_in_half(place)
            )
        self.pass_point(f"{event} {kind(place, self.root)}")


_counters: list[_Counter] = []


def arm(fault: dict[str, Any], file: Path) -> None:
    """Count points from here on; kill at number ``fault["at"]``, or ``fault["after"]`` seconds.

    Args:
        fault: ``root``, the folder whose changes count; ``at`` and ``after`` may be missing.
        file: where ``save`` writes the names of the points.
    """
    import sys

    from prefect import Task
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    counter = _Counter(fault["root"], fault.get("at"), file)
    _counters.append(counter)

    changed: set[int] = set()

    def on_statement(connection: Any, _: Any, statement: str, *_rest: Any) -> None:
        words = statement.split(maxsplit=3)
        if words[0].lower() not in READING:
            changed.add(id(connection))
            counter.pass_point("sql " + " ".join(words[:3]).lower())

    def on_commit(connection: Any) -> None:
        if id(connection) in changed:
            changed.discard(id(connection))
            counter.pass_point("sql commit")

    event.listen(Engine, "before_cursor_execute", on_statement)
    event.listen(Engine, "commit", on_commit)
    call = Task.__call__

    def called(task: Any, *arguments: Any, **named: Any) -> Any:
        counter.pass_point(f"start of task {task.name}")
        result = call(task, *arguments, **named)
        counter.pass_point(f"end of task {task.name}")
        return result

    Task.__call__ = called  # type: ignore[method-assign]
    if fault.get("after") is not None:
        timer = threading.Timer(fault["after"], kill)
        timer.daemon = True
        timer.start()
    sys.addaudithook(counter.on_event)


def save() -> None:
    """Write the names of the points that were passed."""
    (counter,) = _counters
    counter.file.write_text(json.dumps(counter.points))


def kill() -> None:
    """Kill this process and all it started, as the system does: nothing is cleaned up."""
    os.killpg(os.getpid(), signal.SIGKILL)


def cut_in_half(path: str) -> None:
    """Cut a file, or the last file of a folder, to half its bytes."""
    place = Path(path)
    files = sorted(item for item in place.rglob("*") if item.is_file()) or [place]
    if files[-1].is_file():
        os.truncate(files[-1], files[-1].stat().st_size // 2)


def changes_nothing(event: str, path: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call only reads, or leaves the file system as it is."""
    if event == "open":
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR)
        return not writes or (path.endswith(".lock") and Path(path).exists())
    if event == "os.mkdir":
        return Path(path).exists()
    return not os.path.lexists(path)


def kind(path: str, root: str) -> str:
    """A path without what differs between runs: hashes and random names."""
    parts = Path(path).relative_to(root).parts
    return "/".join("*" if len(part) > 40 or "-" in part else part for part in parts)
