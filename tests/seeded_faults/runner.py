"""Run the tests of one fault in a copy of the repository, and classify the outcome."""

import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from tests.seeded_faults.fault import ROOT, Fault, NotApplicable

CAUGHT, SURVIVED, NOT_APPLICABLE, ERROR = "caught", "survived", "not applicable", "error"

HYPOTHESIS_PROFILE = "first-failure"
"""Hypothesis profile that does not shrink failing examples, because shrinking can take minutes."""

CPU_FILE = "seeded-faults.cpu"
"""File in the copy of the repository to which a pytest process writes its CPU time."""

TIMEOUT_SECONDS = 900
"""Limit of one pytest process. The slowest selection takes about a minute on two idle cores."""

PRELOADED = ("numpy", "torch", "torch.export", "torch.onnx", "onnxscript", "scipy.stats", "numba")
"""Libraries that are imported once; libraries that read settings on import are excluded."""

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", *PRELOADED])

CACHES = ("*.pyc", "*.nbi", "*.nbc")
"""Compiled files that make a copy start faster; valid while modification times are equal."""


@dataclass(frozen=True)
class Outcome:
    """The result of the tests of a fault.

    Attributes:
        fault: the fault.
        status: one of ``CAUGHT``, ``SURVIVED``, ``NOT_APPLICABLE``, ``ERROR``.
        failed: names of the failed tests.
        seconds: duration of the pytest process.
        cpu_seconds: its CPU time.
        detail: the end of pytest's output if the status is ``ERROR``.
    """

    fault: Fault
    status: str
    failed: tuple[str, ...] = ()
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class PytestRun:
    """The result of a pytest process.

    Attributes:
        exit_code: exit code of pytest, or minus the number of the signal that ended it.
        failed: names of the failed tests.
        seconds: duration.
        cpu_seconds: CPU time of the process and its children.
        output: the end of its output.
    """

    exit_code: int
    failed: tuple[str, ...]
    seconds: float
    cpu_seconds: float
    output: str


def copy_tracked_files(destination: Path) -> None:
    """Copy the files that git tracks, with their current contents, and their compiled caches.

    Modification times are kept, so that Python and numba accept the copied caches.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z"],  # noqa: S607
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    folders = set()
    for name in filter(None, listed):
        if not (ROOT / name).is_file():
            continue  # deleted in the working tree
        copied = destination / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copied)
        folders.add(Path(name).parent)
    for folder in folders:
        for pattern in CACHES:
            for cache in (ROOT / folder / "__pycache__").glob(pattern):
                copied = destination / folder / "__pycache__" / cache.name
                copied.parent.mkdir(exist_ok=True)
                shutil.copy2(cache, copied)


def apply_fault(fault: Fault, tree: Path) -> None:
    """Write the fault into a copy of the repository.

    Raises:
        NotApplicable: the old text does not occur exactly once.
    """
    file = tree / fault.file
    text = fault.patched(tree)
    times = file.stat()
    file.write_text(text)
    # Python compares only seconds and sizes, so a very different time invalidates the caches.
    os.utime(file, (times.st_atime, times.st_mtime + 1000))


def run_tests(tree: Path, tests: Iterable[str], *, first_failure_only: bool) -> PytestRun:
    """Run pytest on a selection in a copy of the repository, with the default marker expression.

    The process is a fork of a server that has imported the large libraries but no code of this
    repository. This saves most of the time of short tests.

    Args:
        tree: the copy.
        tests: pytest selections, relative to the copy.
        first_failure_only: stop after one failed test.
    """
    report, log = tree / "seeded-faults.xml", tree / "seeded-faults.log"
    arguments = [
        *("-q", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-seed=0"),
        f"--hypothesis-profile={HYPOTHESIS_PROFILE}",
        *(f"--junitxml={report}", "-o", "junit_family=xunit1"),
        *(["-x"] if first_failure_only else []),
        *dict.fromkeys(tests),
    ]
    start = time.monotonic()
    process = _SERVER.Process(target=_run_pytest, args=(tree, arguments, log))
    process.start()
    process.join(TIMEOUT_SECONDS)
    timeout_note = "" if process.exitcode is not None else f"\nNo end after {TIMEOUT_SECONDS} s."
    with suppress(ProcessLookupError):  # child processes of tests are in its process group
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    seconds = time.monotonic() - start
    failed = failed_tests(report) if report.exists() else ()
    cpu = float((tree / CPU_FILE).read_text()) if (tree / CPU_FILE).exists() else math.nan
    output = log.read_text(errors="replace")[-3000:] if log.exists() else ""
    return PytestRun(process.exitcode or 0, failed, seconds, cpu, output + timeout_note)


def _run_pytest(tree: Path, arguments: list[str], log: Path) -> None:
    """Run pytest in this process and exit with its exit code."""
    os.setsid()  # so that child processes of tests can be killed with it
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(tree)
    # The package is installed in editable mode. These settings make this process, and child
    # processes of the tests, import the copy instead.
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = str(tree)
    settings.register_profile(HYPOTHESIS_PROFILE, phases=(Phase.explicit, Phase.generate))
    code = pytest.main(arguments)
    sys.stdout.flush()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
    (tree / CPU_FILE).write_text(f"{cpu:.1f}")
    os._exit(code)  # threads of the tests may still run


def failed_tests(report: Path) -> tuple[str, ...]:
    """Return the names of the tests whose body failed.

    Errors of collection, imports and fixtures do not count.
    """
    cases = ElementTree.parse(report).iter("testcase")  # noqa: S314 - pytest wrote it
    return tuple(
        f"{case.get('file')}::{case.get('name')}"
        for case in cases
        if (failure := case.find("failure")) is not None and not _is_import_error(failure)
    )


def _is_import_error(failure: ElementTree.Element) -> bool:
    reason = failure.get("message", "")
    return (
        re.match(r"(ImportError|ModuleNotFoundError|SyntaxError|NameError)\b", reason) is not None
    )


def check_fault(fault: Fault) -> Outcome:
    """Apply a fault to a new copy of the repository and run its tests."""
    with tempfile.TemporaryDirectory(prefix="seeded-fault-") as folder:
        tree = Path(folder)
        copy_tracked_files(tree)
        try:
            apply_fault(fault, tree)
        except NotApplicable as refusal:
            return Outcome(fault, NOT_APPLICABLE, detail=str(refusal))
        return outcome_of(fault, run_tests(tree, fault.tests, first_failure_only=True))


def outcome_of(fault: Fault, run: PytestRun) -> Outcome:
    """Classify a run of the tests of a fault; only a failed test body catches the fault."""
    if run.exit_code == 0:
        status = SURVIVED
    else:
        status = CAUGHT if run.exit_code == 1 and run.failed else ERROR
    detail = run.output if status == ERROR else ""
    return Outcome(fault, status, run.failed, run.seconds, run.cpu_seconds, detail)


def check_unpatched(faults: Iterable[Fault]) -> PytestRun:
    """Run the tests of all faults in a copy without a fault; all must pass."""
    with tempfile.TemporaryDirectory(prefix="seeded-fault-") as folder:
        tree = Path(folder)
        copy_tracked_files(tree)
        tests = [name for fault in faults for name in fault.tests]
        return run_tests(tree, tests, first_failure_only=False)
