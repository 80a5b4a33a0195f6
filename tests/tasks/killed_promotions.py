"""Kill promotions and rollbacks at every operation, or let several race: run as a script.

``python killed_promotions.py HOME COMMANDS STEP`` publishes three orders as versions 1 to 3 and
promotes them, then runs each command (``rollback``, ``from`` or ``promote``, with commas between
them) once for every STEP-th operation: killed there, and run again undisturbed. After
``rollback+reader``, another process fetches the champion in between. ``race COMMAND N`` starts N
processes at once. Each prints JSON lines.
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
from infra.triton.repository import current, place, version_in
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import (
    apply_promotion,
    apply_rollback,
    promote,
    registry,
    version_report,
)
from tasks.publish import publish

HOME = Path(sys.argv[1])


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


def restored(copy: Path) -> None:
    for name in ("recpress", "triton"):
        shutil.rmtree(HOME / name, ignore_errors=True)
        shutil.copytree(copy / name, HOME / name)


def show(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def json_state() -> str:
    return json.dumps(state())


def prepare() -> Path:
    def work() -> None:
        for digit in "abc":
            promote("m", published(HOME, digit).version, "")

    status, result = in_child(work)
    assert (status, result) == (0, "None"), result
    copy = HOME / "copy"
    for name in ("recpress", "triton"):
        shutil.copytree(HOME / name, copy / name)
    return copy


def kill_everywhere(copy: Path, name: str, step: int) -> None:
    command, _, reader = name.partition("+")

    def counted() -> int:
        restored(copy)
        last = [0]
        count_operations(lambda number: last.__setitem__(0, number))
        decide(command)
        return last[0]

    total = int(in_child(counted)[1])
    last = 3 if step > 100 else 6
    for number in sorted({*range(1, total + 1, step), *range(total + 1 - last, total + 1)}):
        restored(copy)

        def killed(number: int = number) -> None:
            count_operations(lambda at: os.kill(os.getpid(), 9) if at == number else None)
            decide(command)

        was_killed = in_child(killed)[0] == 9
        if reader:
            in_child(lambda: version_report("m", "@champion"))
        again = in_child(lambda: decide(command))[1]
        line = {"command": name, "at": number, "of": total, "killed": was_killed, "again": again}
        show(line | json.loads(in_child(json_state)[1]))


def race(command: str, count: int) -> None:
    if command == "publish":
        shutil.rmtree(HOME / "recpress", ignore_errors=True)
    else:
        prepare()
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
    if command == "publish":
        versions = [item.version for item in registry().versions("m")]
        show({"versions": versions, "task": publish.name})
    else:
        show(state())


if __name__ == "__main__":
    if sys.argv[2] == "race":
        race(sys.argv[3], int(sys.argv[4]))
    else:
        before = prepare()
        for command_name in sys.argv[2].split(","):
            kill_everywhere(before, command_name, int(sys.argv[3]))
