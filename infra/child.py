"""Run work in a child process that can be killed.

A native build cannot be interrupted from Python: a time limit around the call only takes effect
after it has returned. Such work therefore runs as ``python -m <module>`` in a separate session and
communicates through two JSON files. The whole process group is killed at the time limit.

The parent calls ``run_child``; the module's main calls ``serve``. POSIX only.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel

from infra.credentials import cleaned
from infra.errors import BuildRefused, ChildFailed, OutOfMemory, Refused
from infra.memory import as_out_of_memory

REFUSED, NO_MEMORY = 2, 3
"""Exit codes of a child that refuses its request, or ran out of memory; the code and the fields of
the error are the field ``error`` of its answer."""

_SENT: dict[int, type[BuildRefused | OutOfMemory]] = {REFUSED: BuildRefused, NO_MEMORY: OutOfMemory}

GRACE_SECONDS = 5.0
"""How long a child lives at most after its limit if its parent no longer exists."""

_TAIL_LINES = 12
_TAIL_COLUMNS = 300


def run_child(
    module: str, request: BaseModel | dict[str, Any], folder: Path, seconds: float
) -> dict[str, Any]:
    """Run ``python -m module`` on a request and return its response.

    ``folder`` receives ``request.json``, ``answer.json`` and ``child.log`` (the child's output) and
    is created if missing. No process of the child's group survives the call, also if it raises.

    Args:
        module: a module whose main calls ``serve``; found on this process's ``sys.path``.
        request: the request, as JSON.
        folder: the folder of these files.
        seconds: wall-clock limit.

    Raises:
        BuildRefused: the child refused the request (exit code 2), with the child's code and
            fields.
        OutOfMemory: the child ran out of memory, or was killed.
        ChildFailed: the limit passed, the child died of another signal, or wrote no response.
    """
    folder.mkdir(parents=True, exist_ok=True)
    question, answer, log = (folder / n for n in ("request.json", "answer.json", "child.log"))
    text = request.model_dump_json() if isinstance(request, BaseModel) else json.dumps(request)
    question.write_text(text, encoding="utf-8")
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-P", "-m", module, str(question), str(answer)]
    command += [str(seconds + GRACE_SECONDS), str(os.getpid())]
    # -P and our sys.path: the child imports what we import, never a file of the working folder.
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired as fault:
            raise ChildFailed(
                "child_timed_out", module=module, seconds=seconds, output=_tail(log)
            ) from fault
        finally:
            _kill_group(process)
    if code in _SENT:
        raise _received(_SENT[code], answer, module, log)
    if code == -signal.SIGKILL:
        raise OutOfMemory("child_killed", module=module, output=_tail(log))
    if code < 0:
        name = signal.Signals(-code).name
        raise ChildFailed("child_signalled", module=module, signal=name, output=_tail(log))
    if code > 0:
        raise ChildFailed("child_failed", module=module, exit_code=code, output=_tail(log))
    return _read(answer, module, log)


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> NoReturn:
    """Process one request and exit; the main of a module that ``run_child`` starts.

    A ``Refused`` raised by ``work`` results in exit code 2 and a response with its code and fields
    (for classes other than ``BuildRefused``, its sentence). Any other exception results in a
    traceback in the log and exit code 1. The process ends when its parent ends.
    """
    question, answer, limit, parent = sys.argv[1:5]
    # Two guards against outliving a killed parent. The thread takes the whole group down within a
    # second, but cannot run while native code holds the interpreter's lock; the timer is the
    # kernel's, needs no lock, and ends this process a little after the parent would have.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, float(limit))
    threading.Thread(target=_die_with, args=(int(parent),), daemon=True).start()
    code = 0
    try:
        reply = work(json.loads(Path(question).read_text(encoding="utf-8")))
    except Refused as fault:
        reply, code = {"error": _sent(fault)}, REFUSED
    except Exception as fault:
        error = as_out_of_memory(fault, "A child process")
        if error is None:
            raise
        reply, code = {"error": _sent(error)}, NO_MEMORY
    part = Path(answer + ".part")
    part.write_text(json.dumps(reply), encoding="utf-8")
    part.replace(answer)
    sys.exit(code)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    try:
        os.killpg(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(1)  # only reached when this process is not a group leader


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill all remaining processes of the child's session, and reap the child."""
    with contextlib.suppress(ProcessLookupError):  # no process is left, as required
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(answer: Path, module: str, log: Path) -> dict[str, Any]:
    try:
        value = json.loads(answer.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as fault:
        raise ChildFailed("child_answer_unreadable", module=module, output=_tail(log)) from fault
    if not isinstance(value, dict):
        raise ChildFailed("child_answer_no_object", module=module, kind=type(value).__name__)
    return value


def _sent(fault: Refused | OutOfMemory) -> dict[str, Any]:
    """Encode an error as the child writes it."""
    if not isinstance(fault, BuildRefused | OutOfMemory):
        fault = BuildRefused("request_refused", problem=str(fault))
    return {"code": fault.code, "fields": fault.fields}


def _received(
    kind: type[BuildRefused | OutOfMemory], answer: Path, module: str, log: Path
) -> BuildRefused | OutOfMemory | ChildFailed:
    """Decode the error that a child wrote; lists become tuples again."""
    error = _read(answer, module, log).get("error")
    try:
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in error["fields"].items()  # type: ignore[index]
        }
        return kind(error["code"], **fields)  # type: ignore[index]
    except (TypeError, KeyError, AttributeError):
        return ChildFailed("child_answer_unreadable", module=module, output=_tail(log))


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    if not lines:
        return f"It printed nothing ({log})."
    return f"Last lines of {log}:\n" + cleaned("\n".join(line[:_TAIL_COLUMNS] for line in lines))
