"""Run work in a child process that can be killed at a time limit.

Native code, such as an engine builder, cannot be interrupted from Python. The parent process calls
``run_child``, which starts ``python -m <module>`` in a new session and kills its process group at
the time limit. The module calls ``serve`` with its work. Parent and child exchange a request and a
response as JSON files. POSIX only.
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

from infra.credentials import mask_credentials
from infra.errors import BuildRefused, ChildFailed, OutOfMemory, Refused
from infra.memory import convert_to_out_of_memory

REFUSED, NO_MEMORY = 2, 3
"""Exit codes of a child that refused its request, and of a child that ran out of memory.

The response of such a child is ``{"error": {"code": ..., "fields": {...}}}``.
"""

_ERROR_CLASSES: dict[int, type[BuildRefused | OutOfMemory]] = {
    REFUSED: BuildRefused,
    NO_MEMORY: OutOfMemory,
}

GRACE_SECONDS = 5.0
"""A child whose parent was killed ends at most this long after the time limit."""

_TAIL_LINES = 12
_TAIL_COLUMNS = 300


def run_child(
    module: str, request: BaseModel | dict[str, Any], folder: Path, seconds: float
) -> dict[str, Any]:
    """Run ``python -m module`` on a request and return its response.

    When the call returns or raises, all processes of the child's process group have ended.

    Args:
        module: name of a module on ``sys.path`` that calls ``serve`` when it is run.
        request: the argument of the child's ``work``; it can be encoded as JSON.
        folder: receives ``request.json``, ``answer.json`` (the response) and ``child.log`` (the
            child's output); created if missing.
        seconds: wall-clock limit.

    Returns:
        The result of the child's ``work``.

    Raises:
        BuildRefused: the child refused the request; has the code and the fields of its error.
        OutOfMemory: the child ran out of memory, or was killed by SIGKILL.
        ChildFailed: the time limit passed, another signal ended the child, or it failed or wrote no
            valid response.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request_file, response_file, log = (
        folder / name for name in ("request.json", "answer.json", "child.log")
    )
    text = request.model_dump_json() if isinstance(request, BaseModel) else json.dumps(request)
    request_file.write_text(text, encoding="utf-8")
    response_file.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-P", "-m", module, str(request_file), str(response_file)]
    command += [str(seconds + GRACE_SECONDS), str(os.getpid())]
    # With -P and this sys.path the child imports the same modules as this process, and never a
    # file of the working folder.
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
                "child_timed_out", module=module, seconds=seconds, output=_read_log_tail(log)
            ) from fault
        finally:
            _kill_group(process)
    if code in _ERROR_CLASSES:
        raise _decode_error(_ERROR_CLASSES[code], response_file, module, log)
    if code == -signal.SIGKILL:
        raise OutOfMemory("child_killed", module=module, output=_read_log_tail(log))
    if code < 0:
        name = signal.Signals(-code).name
        raise ChildFailed("child_signalled", module=module, signal=name, output=_read_log_tail(log))
    if code > 0:
        raise ChildFailed("child_failed", module=module, exit_code=code, output=_read_log_tail(log))
    return _read_response(response_file, module, log)


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> NoReturn:
    """Process the request of ``run_child``, write the response, and exit.

    Called by a module that ``run_child`` starts. The process also ends if its parent ends. The exit
    code is:

    - 0 if ``work`` returns; the response is its result;
    - 2 if it raises ``Refused``; the response contains code and fields of a ``BuildRefused``. If
      the error is another subclass of ``Refused``, the code is ``request_refused`` and the field
      ``problem`` its sentence;
    - 3 if memory is exhausted; the response contains code and fields of an ``OutOfMemory``;
    - 1 after any other exception; its traceback is in the log, and there is no response.

    Args:
        work: computes the response from the request.
    """
    request_file, response_file, limit, parent = sys.argv[1:5]
    # Two mechanisms end this process if the parent was killed. The thread kills the whole group
    # within a second, but cannot run while native code holds the interpreter lock. The kernel's
    # timer needs no lock, and ends this process shortly after the time limit.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, float(limit))
    threading.Thread(target=_end_with_parent, args=(int(parent),), daemon=True).start()
    code = 0
    try:
        reply = work(json.loads(Path(request_file).read_text(encoding="utf-8")))
    except Refused as fault:
        reply, code = {"error": _encode_error(fault)}, REFUSED
    except Exception as fault:
        error = convert_to_out_of_memory(fault, "A child process")
        if error is None:
            raise
        reply, code = {"error": _encode_error(error)}, NO_MEMORY
    partial_file = Path(response_file + ".part")
    partial_file.write_text(json.dumps(reply), encoding="utf-8")
    partial_file.replace(response_file)
    sys.exit(code)


def _end_with_parent(parent: int) -> None:
    """Wait until the parent process has ended, then kill this process group."""
    while os.getppid() == parent:
        time.sleep(0.5)
    try:
        os.killpg(os.getpid(), signal.SIGKILL)
    finally:
        os._exit(1)  # reached only if this process does not lead a process group


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill all remaining processes of the child's group, and wait for the child's exit code."""
    with contextlib.suppress(ProcessLookupError):  # no process remains
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_response(response_file: Path, module: str, log: Path) -> dict[str, Any]:
    """Read the response that a child wrote; raise ``ChildFailed`` if it is not a JSON object."""
    try:
        value = json.loads(response_file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as fault:
        raise ChildFailed(
            "child_answer_unreadable", module=module, output=_read_log_tail(log)
        ) from fault
    if not isinstance(value, dict):
        raise ChildFailed("child_answer_no_object", module=module, kind=type(value).__name__)
    return value


def _encode_error(fault: Refused | OutOfMemory) -> dict[str, Any]:
    """Encode an error for the child's response, as ``code`` and ``fields``."""
    if not isinstance(fault, BuildRefused | OutOfMemory):
        fault = BuildRefused("request_refused", problem=str(fault))
    return {"code": fault.code, "fields": fault.fields}


def _decode_error(
    kind: type[BuildRefused | OutOfMemory], response_file: Path, module: str, log: Path
) -> BuildRefused | OutOfMemory | ChildFailed:
    """Decode the error in a child's response; lists become tuples, as in the original fields.

    Returns:
        An error of class ``kind``; ``ChildFailed`` if the response contains no valid error.
    """
    error = _read_response(response_file, module, log).get("error")
    try:
        fields = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in error["fields"].items()  # type: ignore[index]
        }
        return kind(error["code"], **fields)  # type: ignore[index]
    except (TypeError, KeyError, AttributeError):
        return ChildFailed("child_answer_unreadable", module=module, output=_read_log_tail(log))


def _read_log_tail(log: Path) -> str:
    """Return the last lines of the child's output for an error message, without credentials."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    if not lines:
        return f"It printed nothing ({log})."
    return f"Last lines of {log}:\n" + mask_credentials(
        "\n".join(line[:_TAIL_COLUMNS] for line in lines)
    )
