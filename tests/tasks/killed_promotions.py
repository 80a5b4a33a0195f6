"""Kill promotions and rollbacks at every operation, or let several race: run as a script.

``python killed_promotions.py HOME`` publishes three orders as versions 1 to 3 and promotes them,
then reads lines. ``kill COMMAND STEP`` runs a command (``rollback``, ``from`` or ``promote``) once
for every STEP-th operation: killed there, and run again undisturbed. After ``rollback+reader``,
another process fetches the champion in between. ``race COMMAND N`` starts N processes at once. The
reply to each line is JSON lines and an empty line. The processes are forks of this one, which has
imported everything.
"""

import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from killed_registry import count_operations, in_child
from triton_versions import published

from infra.registry.ledger import Ledger
from infra.registry.mlflow_registry import Registry
from infra.triton.repository import current, place, version_in
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import (
    apply_promotion,
    apply_rollback,
    promote,
    registry,
    version_report,
)

HOME = Path(sys.argv[1])
COPY = HOME / "copy"
EMPTY = HOME / "empty" / "registry.db"


def decide(command: str) -> str:
    if command == "rollback":
        change = apply_rollback("m", "", began=datetime.now(UTC))
    elif command == "from":
        change = apply_rollback("m", "", leaving="3")
    else:
        change = apply_promotion("m", "2", "")
    return f"{change.entry.version} {change.is_new}"


def state() -> dict[str, Any]:
    entries = Ledger(store(), "m").entries()
    aliases = [item.version for item in registry().versions("m") if "champion" in item.aliases]
    served = version_in(current(place(os.environ["RECPRESS_TRITON"], "m")) or b"")
    return {
        "ledger": [entry.version for entry in entries],
        "alias": aliases,
        "served": served,
    }


def restored() -> None:
    for name in ("recpress", "triton"):
        shutil.rmtree(HOME / name, ignore_errors=True)
        shutil.copytree(COPY / name, HOME / name)


def show(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def json_state() -> str:
    return json.dumps(state())


def prepare() -> None:
    # This process opens no file that its forks open, but imports what opening one imports.
    EMPTY.parent.mkdir()
    assert Registry(f"sqlite:///{EMPTY}").models() == ()
    (HOME / "recpress").mkdir()
    shutil.copy(EMPTY, HOME / "recpress" / "registry.db")

    def work() -> None:
        for digit in "abc":
            promote("m", published(HOME, digit).version, "")

    status, result = in_child(work)
    assert (status, result) == (0, "None"), result
    for name in ("recpress", "triton"):
        shutil.copytree(HOME / name, COPY / name)


def kill_everywhere(name: str, step: int) -> None:
    command, _, reader = name.partition("+")

    def counted() -> int:
        restored()
        last = [0]
        count_operations(lambda number: last.__setitem__(0, number))
        decide(command)
        return last[0]

    def again() -> str:
        result = decide(command)
        return json.dumps({"again": result} | state())

    total = int(in_child(counted)[1])
    last = (3 if name == "rollback" else 1) if step > 100 else 6
    for number in sorted({*range(1, total + 1, step), *range(total + 1 - last, total + 1)}):
        restored()

        def killed(number: int = number) -> None:
            count_operations(lambda at: os.kill(os.getpid(), 9) if at == number else None)
            decide(command)

        was_killed = in_child(killed)[0] == 9
        if reader:
            in_child(lambda: version_report("m", "@champion"))
        line = {"command": name, "at": number, "of": total, "killed": was_killed}
        show(line | json.loads(in_child(again)[1]))


def race(command: str, count: int) -> None:
    restored()
    if command == "publish":  # they make the registry as well
        shutil.rmtree(HOME / "recpress")
    start, begin = os.pipe()
    children = []
    for number in range(count):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(begin)
            os.read(start, 1)  # returns when the parent closes its end
            try:
                if command == "publish":
                    # Another measurement of each process: another release of the same order.
                    result = published(HOME / str(number), "a", baseline_bytes=1000 + number)
                    text = f"{result.version} {result.report.baseline_bytes}"
                else:
                    text = decide(command)
            except BaseException as fault:
                text = f"{type(fault).__name__}: {fault}"
            os.write(writing, text.encode())
            os._exit(0)
        os.close(writing)
        children.append((child, reading))
    os.close(begin)
    for child, reading in children:
        with os.fdopen(reading) as pipe:
            show({"result": pipe.read()})
        os.waitpid(child, 0)

    def ended() -> str:
        if command == "publish":
            return json.dumps({"versions": [item.version for item in registry().versions("m")]})
        return json_state()

    show(json.loads(in_child(ended)[1]))


if __name__ == "__main__":
    prepare()
    for line in sys.stdin:
        work, command_name, number = line.split()
        {"kill": kill_everywhere, "race": race}[work](command_name, int(number))
        sys.stdout.write("\n")
        sys.stdout.flush()
