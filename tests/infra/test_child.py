"""Children answer, refuse, crash and hang; none outlives its limit or its parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from error_codes import Text, raises_code

from infra.child import run_child
from infra.errors import BuildRefused, ChildFailed, InfraError, OutOfMemory, Refused

HEAD = """
import os, subprocess, sys, time
from infra.child import serve
from infra.errors import BuildRefused
"""
HANGS = """
def work(request):
    grandchild = subprocess.Popen(["sleep", "600"])
    with open(request["pids"], "w") as out:
        out.write(f"{os.getpid()} {grandchild.pid}")
    time.sleep(600)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Writes a child module around a ``work`` function and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, work):
        (tmp_path / f"{name}.py").write_text(HEAD + work + "\nserve(work)\n")
        return name

    return write


def alive(pid):
    """Whether a process runs; a zombie that is not reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def started(path, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and len(path.read_text().split()) == 2:
            return [int(pid) for pid in path.read_text().split()]
        time.sleep(0.05)
    raise AssertionError(f"{path} never appeared")


def test_a_child_process_runs_in_a_separate_session_and_its_output_is_logged(child, tmp_path):
    work = (
        "def work(request):\n"
        "    print('received', request['number'])\n"
        "    return {'twice': 2 * request['number'], 'session': os.getsid(0)}"
    )
    answer = run_child(child("doubles", work), {"number": 21}, tmp_path / "job", 30)
    assert answer["twice"] == 42
    assert answer["session"] != os.getsid(0)
    assert "received 21" in (tmp_path / "job" / "child.log").read_text()


def test_a_child_that_says_no_is_a_refusal_with_its_own_code_and_fields(child, tmp_path):
    work = "def work(request):\n    raise BuildRefused('profiles_missing', inputs=('a', 'b'))"
    with raises_code(BuildRefused, "profiles_missing", inputs=("a", "b")) as caught:
        run_child(child("refuses", work), {}, tmp_path / "job", 30)
    assert isinstance(caught.value, Refused)


def test_a_crash_is_worth_a_retry_and_shows_the_last_lines(child, tmp_path):
    work = "def work(request):\n    print('reached layer 7')\n    raise RuntimeError('bug')"
    with raises_code(
        ChildFailed, "child_failed", exit_code=1, output=Text(r"(?s)reached layer 7.*bug")
    ) as caught:
        run_child(child("crashes", work), {}, tmp_path / "job", 30)
    assert isinstance(caught.value, InfraError)


def test_death_by_a_signal_names_the_signal(child, tmp_path):
    work = "def work(request):\n    os.kill(os.getpid(), 11)"
    with raises_code(ChildFailed, "child_signalled", signal="SIGSEGV"):
        run_child(child("faults", work), {}, tmp_path / "job", 30)


def test_a_killed_child_is_out_of_memory(child, tmp_path):
    work = "def work(request):\n    os.kill(os.getpid(), 9)"
    with raises_code(OutOfMemory, "child_killed", module="killed"):
        run_child(child("killed", work), {}, tmp_path / "job", 30)


@pytest.mark.parametrize(
    "raised",
    [
        "bytearray(2**60)",
        "raise RuntimeError('std::bad_alloc')",
        "raise OSError(12, 'Cannot allocate memory')",
    ],
)
def test_a_child_without_memory_is_no_refusal(child, tmp_path, raised):
    module = child("exhausted", f"def work(request):\n    {raised}")
    with raises_code(OutOfMemory, None, doing="A child process"):
        run_child(module, {}, tmp_path / "job", 30)


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
def test_a_child_without_a_readable_answer_failed(child, tmp_path, work):
    module = child("mute", f"def work(request):\n    {work}")
    with raises_code(ChildFailed, "child_answer_unreadable", module="mute"):
        run_child(module, {}, tmp_path / "job", 30)


def test_an_answer_of_an_earlier_run_is_not_taken_for_this_ones(child, tmp_path):
    run_child(child("good", "def work(request):\n    return {'old': 1}"), {}, tmp_path / "job", 30)
    with raises_code(ChildFailed, "child_answer_unreadable", module="mute"):
        run_child(child("mute", "def work(request):\n    os._exit(0)"), {}, tmp_path / "job", 30)


def test_the_limit_kills_the_child_and_its_children(child, tmp_path):
    pids = tmp_path / "pids"
    begin = time.monotonic()
    with raises_code(ChildFailed, "child_timed_out", seconds=3):
        run_child(child("hangs", HANGS), {"pids": str(pids)}, tmp_path / "job", 3)
    # 3 s and what two shared cores need to notice; a call that waits takes 600 s.
    assert time.monotonic() - begin < 15
    assert gone(started(pids), seconds=2)


def test_nothing_a_finished_child_left_running_survives_it(child, tmp_path):
    work = "def work(request):\n    return {'pid': subprocess.Popen(['sleep', '600']).pid}"
    answer = run_child(child("litters", work), {}, tmp_path / "job", 30)
    assert gone([answer["pid"]], seconds=2)


def orphan(tmp_path, module, seconds, grace):
    """Starts run_child in a process of its own, kills that with SIGKILL; the child's pids."""
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
        found = started(pids)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    return found


def test_a_child_and_its_children_die_when_their_parent_is_killed(child, tmp_path):
    pids = orphan(tmp_path, child("hangs", HANGS), seconds=600, grace=5)
    # The guard looks twice a second; without it these two live for 600 s.
    assert gone(pids, seconds=8)


def test_an_orphan_stuck_in_native_code_still_ends_at_its_limit(child, tmp_path):
    # PyDLL keeps the interpreter's lock, so no Python thread can run: only the kernel can help.
    stuck = HANGS.replace("time.sleep(600)", "import ctypes; ctypes.PyDLL(None).sleep(600)")
    pids = orphan(tmp_path, child("stuck", stuck), seconds=4, grace=0.5)
    try:
        assert alive(pids[0])
        assert gone(pids[:1], seconds=10)
    finally:
        os.kill(pids[1], signal.SIGKILL)  # the grandchild: the timer ends only the child itself
