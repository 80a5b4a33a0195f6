"""Run the command line in the process of the test."""

import sys

import pytest

from flows.cli import app


def run_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Run ``main`` with these arguments; return the exit code, and both outputs as one text."""
    code, out, err = run_main_apart(monkeypatch, capsys, *arguments)
    return code, out + err


def run_main_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """Run ``main`` with these arguments; return the exit code, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["recpress", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        app.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err
