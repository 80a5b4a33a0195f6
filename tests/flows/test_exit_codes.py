"""Exit codes of commands, from the outcome of a result or from the fault that ended them."""

from pathlib import Path

import pytest
from command_line import run_main

from compressors.contracts import Outcome
from compressors.errors.steps import StepRefused
from flows import resolve
from flows.cli import errors as cli_errors
from tasks.orchestration.documents import Finished
from tests.tasks.reports import report

DOCUMENTED = {"accepted": 0, "rejected": 3, "undecided": 4, "built-unmeasured": 4}
"""As docs/gates.md states them."""


@pytest.mark.parametrize("outcome", DOCUMENTED)
def test_a_finished_order_exits_with_the_code_of_its_outcome(
    outcome: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = report(tmp_path, "a" * 64, {"onnxruntime": outcome})
    done = Finished(report=made, release=made.source, version="1", registry="sqlite:///r.db")
    monkeypatch.setattr(resolve, "earlier", lambda order: done)
    code, printed = run_main(
        monkeypatch, capsys, "compress", "m", "--limit", "auc vs baseline >= -0.002", "--json"
    )
    assert code == DOCUMENTED[outcome], printed
    assert f'"outcome": "{outcome}"' in printed


@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "as the cause of a refusal"])
def test_a_lack_of_memory_exits_with_code_1_and_one_sentence(
    wrapped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that raises a refusal because memory ran out is no bad input: a retry may pass."""
    fault: Exception = MemoryError()
    if wrapped:
        fault = StepRefused("norm_without_statistics")
        fault.__cause__ = MemoryError()
    assert cli_errors.report(fault) == 1
    printed = capsys.readouterr().err
    assert "ran out of memory" in printed
    assert len(printed.splitlines()) == 1
