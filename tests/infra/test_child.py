"""Work in child processes: responses, errors, time limits, and the end of all processes.

``run_child`` runs a module in a child process. Its arguments are the module, the request, a folder
for files of the job, and the time limit in seconds.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from error_codes import TextMatching, raises_code

from infra.child import run_child
from infra.errors import BuildRefused, ChildFailed, InfraError, OutOfMemory, Refused

# Start of each module that a test writes and runs as a child process.
MODULE_START = """
import os, subprocess, sys, time
from infra.child import serve
from infra.errors import BuildRefused
"""
# Writes the PIDs of the child and of a process that it starts, and waits.
HANGING_WORK = """
def work(request):
    grandchild = subprocess.Popen(["sleep", "600"])
    with open(request["pids"], "w") as out:
        out.write(f"{os.getpid()} {grandchild.pid}")
    time.sleep(600)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A function that writes a module with a ``work`` function, and returns the module's name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, work):
        (tmp_path / f"{name}.py").write_text(MODULE_START + work + "\nserve(work)\n")
        return name

    return write


def is_running(pid):
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_ended(pids, seconds):
    """Return whether all processes end within a time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(is_running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def wait_for_pids(path, seconds=20):
    """Wait for the file that ``HANGING_WORK`` writes; return the PIDs in it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().split()) == 2:
            return [int(pid) for pid in path.read_text().split()]
        time.sleep(0.05)
    raise AssertionError(f"{path} never appeared")


def test_run_child_returns_the_response_of_another_posix_session_and_logs_its_output(
    child, tmp_path
):
    work = (
        "def work(request):\n"
        "    print('received', request['number'])\n"
        "    return {'twice': 2 * request['number'], 'session': os.getsid(0)}"
    )
    response = run_child(child("doubles", work), {"number": 21}, tmp_path / "job", 30)
    assert response["twice"] == 42
    assert response["session"] != os.getsid(0)
    assert "received 21" in (tmp_path / "job" / "child.log").read_text()


def test_child_that_raises_build_refused_gives_its_code_and_fields(child, tmp_path):
    work = "def work(request):\n    raise BuildRefused('profiles_missing', inputs=('a', 'b'))"
    with raises_code(BuildRefused, "profiles_missing", inputs=("a", "b")) as caught:
        run_child(child("refuses", work), {}, tmp_path / "job", 30)
    assert isinstance(caught.value, Refused)


def test_child_that_raises_another_exception_failed_with_its_last_output(child, tmp_path):
    work = "def work(request):\n    print('reached layer 7')\n    raise RuntimeError('bug')"
    with raises_code(
        ChildFailed, "child_failed", exit_code=1, output=TextMatching(r"(?s)reached layer 7.*bug")
    ) as caught:
        run_child(child("crashes", work), {}, tmp_path / "job", 30)
    assert isinstance(caught.value, InfraError)


def test_child_ended_by_a_signal_failed_with_the_signals_name(child, tmp_path):
    work = "def work(request):\n    os.kill(os.getpid(), 11)"
    with raises_code(ChildFailed, "child_signalled", signal="SIGSEGV"):
        run_child(child("faults", work), {}, tmp_path / "job", 30)


def test_child_ended_by_sigkill_is_out_of_memory(child, tmp_path):
    """Linux sends this signal to a process if memory runs out."""
    work = "def work(request):\n    os.kill(os.getpid(), 9)"
    with raises_code(OutOfMemory, "child_killed", module="killed"):
        run_child(child("killed", work), {}, tmp_path / "job", 30)


@pytest.mark.parametrize(
    "statement",
    [
        "bytearray(2**60)",
        "raise RuntimeError('std::bad_alloc')",
        "raise OSError(12, 'Cannot allocate memory')",
    ],
)
def test_child_that_exhausts_its_memory_is_out_of_memory(child, tmp_path, statement):
    module = child("exhausted", f"def work(request):\n    {statement}")
    with raises_code(OutOfMemory, None, doing="A child process"):
        run_child(module, {}, tmp_path / "job", 30)


# The second argument of a child is the file for its response. The exit code 2 means that the
# response is a refusal, 3 that it is an error of exhausted memory.
@pytest.mark.parametrize(
    "work",
    [
        "os._exit(0)",
        "open(sys.argv[2], 'w').write('{'); os._exit(0)",
        "open(sys.argv[2], 'w').write('{}'); os._exit(2)",
        """open(sys.argv[2], 'w').write('{"error": "some text"}'); os._exit(3)""",
        """open(sys.argv[2], 'w').write('{"error": {"code": "x", "fields": {}}}'); os._exit(2)""",
    ],
)
def test_child_without_a_valid_response_failed(child, tmp_path, work):
    module = child("mute", f"def work(request):\n    {work}")
    with raises_code(ChildFailed, "child_answer_unreadable", module="mute"):
        run_child(module, {}, tmp_path / "job", 30)


def test_response_of_an_earlier_run_is_not_used(child, tmp_path):
    run_child(child("good", "def work(request):\n    return {'old': 1}"), {}, tmp_path / "job", 30)
    with raises_code(ChildFailed, "child_answer_unreadable", module="mute"):
        run_child(child("mute", "def work(request):\n    os._exit(0)"), {}, tmp_path / "job", 30)


def test_time_limit_kills_the_child_and_its_children(child, tmp_path):
    pids = tmp_path / "pids"
    start = time.monotonic()
    with raises_code(ChildFailed, "child_timed_out", seconds=3):
        run_child(child("hangs", HANGING_WORK), {"pids": str(pids)}, tmp_path / "job", 3)
    # The limit is 3 s, and the machine may be slow. Without a kill the call takes 600 s.
    assert time.monotonic() - start < 15
    assert wait_until_ended(wait_for_pids(pids), seconds=2)


def test_processes_that_a_finished_child_started_are_killed(child, tmp_path):
    work = "def work(request):\n    return {'pid': subprocess.Popen(['sleep', '600']).pid}"
    response = run_child(child("starts_process", work), {}, tmp_path / "job", 30)
    assert wait_until_ended([response["pid"]], seconds=2)


def start_and_kill_parent(tmp_path, module, seconds, grace):
    """Kill a process that called ``run_child``; return the PIDs of child and grandchild.

    A child without a parent ends at most ``grace`` seconds after its limit of ``seconds``.
    """
    pids = tmp_path / "pids"
    script = (
        "import sys, pathlib, infra.child as c\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"c.GRACE_SECONDS = {grace}\n"
        f"request, folder = {{'pids': {str(pids)!r}}}, pathlib.Path({str(tmp_path)!r})\n"
        f"c.run_child({module!r}, request, folder, {seconds})\n"
    )
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": root})
    try:
        child_pids = wait_for_pids(pids)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    return child_pids


def test_child_and_its_children_end_when_their_parent_is_killed(child, tmp_path):
    pids = start_and_kill_parent(tmp_path, child("hangs", HANGING_WORK), seconds=600, grace=5)
    # The child checks twice a second whether its parent runs. Otherwise it would run for 600 s.
    assert wait_until_ended(pids, seconds=8)


@pytest.mark.slow
def test_child_in_native_code_ends_at_its_time_limit_after_its_parent_was_killed(child, tmp_path):
    # PyDLL keeps the interpreter lock, so no Python thread can run and only the timer can end it.
    stuck = HANGING_WORK.replace("time.sleep(600)", "import ctypes; ctypes.PyDLL(None).sleep(600)")
    pids = start_and_kill_parent(tmp_path, child("stuck", stuck), seconds=4, grace=0.5)
    try:
        assert is_running(pids[0])
        assert wait_until_ended(pids[:1], seconds=10)
    finally:
        os.kill(pids[1], signal.SIGKILL)  # the timer does not end the grandchild
