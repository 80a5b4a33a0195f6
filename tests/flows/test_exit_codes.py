"""Exit codes of commands: of the outcome of an order, and of an error."""

from pathlib import Path

import pytest
from command_line import run_main

from compressors.contracts import Outcome
from compressors.errors.steps import StepRefused
from flows import resolve
from flows.cli import errors as cli_errors
from tasks.orchestration.documents import Finished
from tests.tasks.reports import create_report

DOCUMENTED_CODES = {"accepted": 0, "rejected": 3, "undecided": 4, "built-unmeasured": 4}
"""The exit codes in docs/gates.md."""


@pytest.mark.parametrize("outcome", DOCUMENTED_CODES)
def test_completed_order_exits_with_the_code_of_its_outcome(
    outcome: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    order_digest = "a" * 64
    report_of_outcome = create_report(tmp_path, order_digest, {"onnxruntime": outcome})
    finished = Finished(
        report=report_of_outcome,
        release=report_of_outcome.source,
        version="1",
        registry="sqlite:///r.db",
    )
    # The command uses this result instead of running the order.
    monkeypatch.setattr(resolve, "reuse_completed_result", lambda order: finished)
    code, output = run_main(
        monkeypatch, capsys, "compress", "m", "--limit", "auc vs baseline >= -0.002", "--json"
    )
    assert code == DOCUMENTED_CODES[outcome], output
    assert f'"outcome": "{outcome}"' in output


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["raised", "as the cause of a refusal"])
def test_memory_error_exits_with_code_1_and_one_sentence(
    is_wrapped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A refusal that a memory error caused is not invalid input: a retry may succeed."""
    fault: Exception = MemoryError()
    if is_wrapped:
        fault = StepRefused("norm_without_statistics")  # any refusal
        fault.__cause__ = MemoryError()
    assert cli_errors.report_error(fault) == 1
    output = capsys.readouterr().err
    assert "ran out of memory" in output
    assert len(output.splitlines()) == 1
