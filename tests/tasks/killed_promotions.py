"""Script that kills promotions and rollbacks at many operations, or runs several at once.

``python killed_promotions.py HOME`` publishes three orders as versions 1 to 3 of the model "m" and
promotes them. Then it reads commands from standard input, one per line:

- ``kill COMMAND STRIDE``: for every STRIDE-th operation on files or the registry, and for the last
  ones, run COMMAND in a process that is killed at this operation, then run it again to its end.
  COMMAND is ``rollback``, ``rollback_from_3`` (a rollback that names version 3 as the champion to
  replace) or ``promote`` (of version 2). Each makes version 2 the champion. With
  ``rollback+reader``, another process reads the champion in between.
- ``race COMMAND N``: run COMMAND in N processes at once. COMMAND can also be ``publish``.

Each command is followed by output lines of JSON and an empty line. Processes are forks of this one,
so that they need no imports. HOME is the folder that contains ``RECPRESS_HOME`` (``recpress``) and
the Triton repository (``triton``). The ledger is the list of a model's promotions and rollbacks in
the store.
"""

import json
import os
import shutil
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from killed_registry import count_operations, run_in_child
from triton_versions import publish_version

from infra.registry.ledger import Ledger
from infra.registry.mlflow_registry import Registry
from infra.triton.repository import model_store, read_config, version_in
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import (
    apply_promotion,
    apply_rollback,
    promote,
    registry,
    version_report,
)

HOME = Path(sys.argv[1])
COPY = HOME / "copy"  # both folders before any command
EMPTY_REGISTRY = HOME / "empty" / "registry.db"

LAST_OPERATIONS = 6
"""How many operations at the end of a command are always among those at which it is killed.

They update the alias and the Triton repository.
"""
MIN_FAST_STRIDE = 101
"""From this stride on, ``FAST_LAST_OPERATIONS`` applies.

The default tier of tests uses larger strides than the slow tier, because it has to be fast.
"""
FAST_LAST_OPERATIONS = {"rollback": 3}
"""Replaces ``LAST_OPERATIONS``, by command; 1 for the other commands."""


def run_command(command: str) -> str:
    """Run a command; return the champion's version, and whether the command added a ledger entry.

    Args:
        command: ``rollback``, ``rollback_from_3`` or ``promote``, as in the module's docstring.
    """
    if command == "rollback":
        # A rollback that another process appends after this time is not repeated.
        change = apply_rollback("m", reason="", command_start=datetime.now(UTC))
    elif command == "rollback_from_3":
        change = apply_rollback("m", reason="", from_version="3")
    else:
        change = apply_promotion("m", "2", reason="")
    return f"{change.entry.version} {change.is_new}"


def final_state() -> dict[str, Any]:
    """Return the versions in the ledger, under the alias, and in the Triton repository."""
    entries = Ledger(store(), "m").entries()
    aliases = [item.version for item in registry().versions("m") if "champion" in item.aliases]
    served = version_in(read_config(model_store(os.environ["RECPRESS_TRITON"], "m")) or b"")
    return {
        "ledger": [entry.version for entry in entries],
        "alias": aliases,
        "served": served,
    }


def restore_home() -> None:
    for name in ("recpress", "triton"):
        shutil.rmtree(HOME / name, ignore_errors=True)
        shutil.copytree(COPY / name, HOME / name)


def write_line(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def prepare() -> None:
    """Publish and promote three orders, and copy both folders of HOME."""
    # Only a fork opens the registry of HOME, since an open database must not be shared with forks.
    # Opening the empty one imports MLflow's modules once for all forks.
    EMPTY_REGISTRY.parent.mkdir()
    assert Registry(f"sqlite:///{EMPTY_REGISTRY}").models() == ()
    (HOME / "recpress").mkdir()
    shutil.copy(EMPTY_REGISTRY, HOME / "recpress" / "registry.db")

    def publish_and_promote() -> None:
        for order_digit in "abc":
            promote("m", publish_version(HOME, order_digit).version, reason="")

    status, result = run_in_child(publish_and_promote)
    assert (status, result) == (0, "None"), result
    for name in ("recpress", "triton"):
        shutil.copytree(HOME / name, COPY / name)


def kill_at_operations(name: str, stride: int) -> None:
    """Kill a command at every ``stride``-th operation and at the last ones, and repeat it.

    Writes one line per kill: the number of the operation, the number of all operations, whether the
    process was killed, the result of the repeated command, and the final state.

    Args:
        name: the command, with ``+reader`` if another process reads the champion after the kill.
        stride: distance of the operations at which the command is killed.
    """
    command, _, reader = name.partition("+")

    def count_all_operations() -> int:
        restore_home()
        last_number = [0]
        count_operations(lambda number: last_number.__setitem__(0, number))
        run_command(command)
        return last_number[0]

    def repeat_command() -> str:
        result = run_command(command)
        return json.dumps({"repeated_result": result} | final_state())

    total = int(run_in_child(count_all_operations)[1])
    is_fast = stride >= MIN_FAST_STRIDE
    last_operations = FAST_LAST_OPERATIONS.get(name, 1) if is_fast else LAST_OPERATIONS
    first_of_last = total + 1 - last_operations
    for number in sorted({*range(1, total + 1, stride), *range(first_of_last, total + 1)}):
        restore_home()

        def run_and_kill(number: int = number) -> None:
            count_operations(
                lambda current: os.kill(os.getpid(), signal.SIGKILL) if current == number else None
            )
            run_command(command)

        was_killed = run_in_child(run_and_kill)[0] == signal.SIGKILL
        if reader:
            run_in_child(lambda: version_report("m", "@champion"))
        line = {"command": name, "operation": number, "operations": total, "killed": was_killed}
        write_line(line | json.loads(run_in_child(repeat_command)[1]))


def race(command: str, count: int) -> None:
    """Run a command in several processes at once, and write their results and the final state."""
    restore_home()
    if command == "publish":  # these processes also create the registry
        shutil.rmtree(HOME / "recpress")
    # All children wait for this pipe, so that they begin together.
    start_reader, start_writer = os.pipe()
    children = []
    for number in range(count):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(start_writer)
            os.read(start_reader, 1)  # returns when the parent closes its end
            try:
                if command == "publish":
                    # With other numbers, each process has another release of the same order.
                    result = publish_version(HOME / str(number), "a", baseline_bytes=1000 + number)
                    text = f"{result.version} {result.report.baseline_bytes}"
                else:
                    text = run_command(command)
            except BaseException as fault:
                text = f"{type(fault).__name__}: {fault}"
            os.write(writer, text.encode())
            os._exit(0)
        os.close(writer)
        children.append((child, reader))
    os.close(start_writer)
    for child, reader in children:
        with os.fdopen(reader) as pipe:
            write_line({"result": pipe.read()})
        os.waitpid(child, 0)

    def read_state() -> str:
        if command == "publish":
            return json.dumps({"versions": [item.version for item in registry().versions("m")]})
        return json.dumps(final_state())

    write_line(json.loads(run_in_child(read_state)[1]))


if __name__ == "__main__":
    prepare()
    for line in sys.stdin:
        action, command_name, number = line.split()
        {"kill": kill_at_operations, "race": race}[action](command_name, int(number))
        sys.stdout.write("\n")
        sys.stdout.flush()
