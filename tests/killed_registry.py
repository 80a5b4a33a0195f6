"""Kill processes while they open a registry for the first time, then use it: run as a script.

For each line that it reads, ``FOLDER WRITER POINT...``, it prints one JSON line for each point and
an empty one. A point is a share of all operations of an undisturbed first use: the SQL
statements and commits of SQLAlchemy and the changes to files. ``WRITER`` is ``now`` for
``Registry`` as it is, and ``earlier`` for MLflow's own migrations in place, as earlier versions of
recpress ran them.
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


def first_use(writer: str, file: Path) -> None:
    uri = f"sqlite:///{file}"
    if writer == "now":
        Registry(uri).models()
    else:
        MlflowClient(uri, uri).search_registered_models(max_results=1)


def count_operations(at: Callable[[int], None]) -> None:
    """Call ``at`` with the number of every operation, before it happens."""
    done = [0]

    def count(*_: object) -> None:
        done[0] += 1
        at(done[0])

    event.listen(Engine, "before_cursor_execute", count)
    event.listen(Engine, "commit", count)
    sys.addaudithook(lambda name, _: count() if name in FILE_EVENTS else None)


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """Run ``work`` in a forked process; its wait status and what it returned or raised."""
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


def operations(writer: str, file: Path) -> int:
    def work() -> int:
        last = [0]
        count_operations(lambda number: last.__setitem__(0, number))
        first_use(writer, file)
        return last[0]

    return int(in_child(work)[1])


def killed_at(writer: str, file: Path, number: int) -> bool:
    def work() -> None:
        count_operations(lambda at: os.kill(os.getpid(), signal.SIGKILL) if at == number else None)
        first_use(writer, file)

    return in_child(work)[0] == signal.SIGKILL


def used(file: Path) -> str:
    def work() -> str:
        registry = Registry(f"sqlite:///{file}")
        return registry.publish("ranker", ORDER, "s3://models/x", {}, "").version

    return in_child(work)[1]


def main(folder: Path, writer: str, points: list[float]) -> None:
    total = operations(writer, folder / "whole" / "registry.db")
    for point in points:
        number = max(1, min(total, round(point * total)))
        file = folder / f"{number}" / "registry.db"
        file.parent.mkdir()
        killed = killed_at(writer, file, number)
        version = used(file)
        left = sorted(path.name for path in file.parent.iterdir())
        line = {"at": number, "killed": killed, "version": version, "left": left}
        sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.write("\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for command in sys.stdin:
        place, kind, *shares = command.split()
        main(Path(place), kind, [float(share) for share in shares])
