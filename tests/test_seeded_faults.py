"""Every seeded fault applies to the current code; the runner classifies outcomes of test runs.

A seeded fault is a mutant: a small wrong change of the code that some test must detect. The runner
applies one to a copy of the repository and runs the tests that should fail.
"""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.seeded_faults import FAULTS
from tests.seeded_faults.fault import ROOT, Fault, NotApplicable
from tests.seeded_faults.runner import (
    CAUGHT,
    ERROR,
    SURVIVED,
    PytestRun,
    failed_tests,
    outcome_of,
)

pytest_plugins = ("pytester",)

MINIMUM_FAULTS = 60
PRODUCT_FOLDERS = ("compressors", "tasks", "infra", "flows")


def test_there_are_at_least_60_faults_with_different_ids() -> None:
    ids = [fault.id for fault in FAULTS]
    assert len(ids) >= MINIMUM_FAULTS
    assert sorted(set(ids)) == sorted(ids)


def test_every_fault_applies_to_the_present_product_code_and_compiles() -> None:
    for fault in FAULTS:
        assert fault.file.partition("/")[0] in PRODUCT_FOLDERS, fault.id
        patched = fault.patched(ROOT)  # raises, with its id, unless the old text occurs once
        assert patched != (ROOT / fault.file).read_text(), fault.id
        compile(patched, fault.file, "exec")
        assert fault.effect.endswith("."), fault.id


def test_no_fault_uses_an_undefined_name(tmp_path: Path) -> None:
    """A fault that raises ``NameError`` would be caught by any test that runs its line."""
    for fault in FAULTS:
        (tmp_path / f"{fault.id}.py").write_text(fault.patched(ROOT))
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F822"]
    checked = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_every_selection_of_a_fault_names_an_existing_test() -> None:
    functions: dict[str, set[str]] = {}
    missing = []
    for fault in FAULTS:
        assert fault.tests, fault.id
        for selection in fault.tests:
            file, _, name = selection.partition("::")
            if file not in functions:
                path = ROOT / file
                tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
                functions[file] = {
                    node.name for node in tree.body if isinstance(node, ast.FunctionDef)
                }
            names = functions[file]
            if not names or (name and name.partition("[")[0] not in names):
                missing.append(f"{fault.id}: {selection}")
    assert missing == []


# --- the runner ------------------------------------------------------------------------------

EXAMPLE = Fault(
    id="example",
    file="limit.py",
    old="LIMIT = 3",
    new="LIMIT = 4",
    effect="An example.",
    tests=("test_code.py",),
)
TESTS = """
import pytest

def test_passing():
    pass

def test_failing():
    assert 3 == 4

def test_raising():
    raise ValueError("a fault of the product")

def test_importing():
    import no_such_module

@pytest.fixture
def broken():
    raise ValueError("an error of a fixture")

def test_with_broken_fixture(broken):
    pass
"""


def test_failed_tests_lists_only_tests_that_fail_in_their_body(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_code=TESTS)
    report = pytester.path / "report.xml"
    run = pytester.runpytest_inprocess(
        "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit1"
    )
    assert run.ret == 1
    assert failed_tests(report) == ("test_code.py::test_failing", "test_code.py::test_raising")


@pytest.mark.parametrize(
    ("exit_code", "failed", "status"),
    [
        (0, (), SURVIVED),
        (1, ("test_code.py::test_failing",), CAUGHT),
        (1, (), ERROR),  # errors of fixtures or imports only
        (2, (), ERROR),  # pytest cannot collect the tests
        (4, (), ERROR),  # no such test
        (5, (), ERROR),  # no test is selected
        (-9, ("test_code.py::test_failing",), ERROR),  # killed at the time limit
    ],
)
def test_a_fault_is_caught_only_by_failed_tests(
    exit_code: int, failed: tuple[str, ...], status: str
) -> None:
    run = PytestRun(exit_code, failed, seconds=1.0, cpu_seconds=1.0, output="output")
    assert outcome_of(EXAMPLE, run).status == status


def test_a_fault_whose_text_occurs_twice_raises_not_applicable(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("a = 1\na = 1\n")
    with pytest.raises(NotApplicable) as refusal:
        replace(EXAMPLE, id="twice", file="x.py", old="a = 1", new="a = 2").patched(tmp_path)
    assert (refusal.value.fault_id, refusal.value.occurrences) == ("twice", 2)
