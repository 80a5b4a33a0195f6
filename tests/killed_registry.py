"""Script: kill processes while they open a registry for the first time, then use the registry.

``tests/infra/test_sqlite_file.py`` runs it. Each input line is ``FOLDER WRITER POINT...``; the
script prints one JSON line per point and an empty line. A point between 0 and 1 is a share of all
operations of an uninterrupted first use: SQL statements and commits of SQLAlchemy and changes of
files. The fields of a line are ``at`` (number of the operation before which the process is killed),
``killed`` (False if it ended earlier), ``version`` (published afterwards, or the error) and
``left`` (files in the registry's folder).

``WRITER`` is ``now`` for ``Registry``, which creates the database in a temporary file. It is
``earlier`` for MLflow's migrations of the database itself, which earlier versions of recpress used.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import alembic  # noqa: F401 (imported once, before the processes are forked)
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
from mlflow import MlflowClient
from sqlalchemy import event
from sqlalchemy.engine import Engine

from infra.registry.mlflow_registry import Registry

FILE_EVENTS = {"os.link", "os.mkdir", "os.remove", "os.rename", "sqlite3.connect"}
ORDER = "a" * 64


def use_registry(writer: str, file: Path) -> None:
    """Use a registry that may not exist yet."""
    uri = f"sqlite:///{file}"
    if writer == "now":
        Registry(uri).models()
    else:
        MlflowClient(uri, uri).search_registered_models(max_results=1)


def count_operations(before_operation: Callable[[int], None]) -> None:
    """Call ``before_operation`` with the number of each operation, before it happens."""
    counter = [0]

    def count(*_: object) -> None:
        counter[0] += 1
        before_operation(counter[0])

    event.listen(Engine, "before_cursor_execute", count)
    event.listen(Engine, "commit", count)
    sys.addaudithook(lambda name, _: count() if name in FILE_EVENTS else None)


def run_in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Run ``work`` in a forked process; return its wait status and its result or exception."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = str(work())
        except BaseException as fault:
            result = f"{type(fault).__name__}: {fault}"
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        result = pipe.read()
    return os.waitpid(child, 0)[1], result


def count_use_operations(writer: str, file: Path) -> int:
    """Count the operations of an uninterrupted first use."""

    def work() -> int:
        last = [0]
        count_operations(lambda number: last.__setitem__(0, number))
        use_registry(writer, file)
        return last[0]

    return int(run_in_child(work)[1])


def kill_at(writer: str, file: Path, number: int) -> bool:
    """Kill a first use before an operation; return False if it ended earlier."""

    def work() -> None:
        count_operations(
            lambda operation: os.kill(os.getpid(), signal.SIGKILL) if operation == number else None
        )
        use_registry(writer, file)

    return run_in_child(work)[0] == signal.SIGKILL


def publish_after_kill(file: Path) -> str:
    """Publish a version in another process; return the version or the error."""

    def work() -> str:
        registry = Registry(f"sqlite:///{file}")
        return registry.publish("ranker", ORDER, "s3://models/x", {}, "").version

    return run_in_child(work)[1]


def main(folder: Path, writer: str, points: list[float]) -> None:
    """Kill one first use at each point, publish a version, and print what happened."""
    total = count_use_operations(writer, folder / "uninterrupted" / "registry.db")
    for point in points:
        number = max(1, min(total, round(point * total)))
        file = folder / f"{number}" / "registry.db"
        file.parent.mkdir()
        killed = kill_at(writer, file, number)
        version = publish_after_kill(file)
        remaining_files = sorted(path.name for path in file.parent.iterdir())
        line = {"at": number, "killed": killed, "version": version, "left": remaining_files}
        sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.write("\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for command in sys.stdin:
        test_folder, writer_name, *shares = command.split()
        main(Path(test_folder), writer_name, [float(share) for share in shares])
