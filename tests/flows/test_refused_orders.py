"""Limits and metrics without a meaning for the model: orders are refused before any work.

The commands ``bundle pack`` and ``bundle check`` also warn about a model whose log loss is worse
than that of a constant. A home is the folder with everything that recpress stores
(``RECPRESS_HOME``). A draft is the folder that becomes a bundle when it is packed.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from drafts import ALLOWED, write_draft
from error_codes import raises_code

from compressors.contracts.value_errors import value_error
from flows.cli import app
from flows.cli.orders import build_terms
from infra.errors import CommandRefused
from tasks.bundles.packing import pack

MEANINGLESS_LIMITS = [
    ("auc vs baseline <= 0.002", "auc vs baseline >= -0.002"),
    ("bytes <= 0.5", "bytes vs baseline <= 0.5"),
    ("p99_ms@64 <= 0", "p99_ms@64 vs baseline <= 1"),
    ("auc >= 1.5", "auc vs baseline >= -0.015"),
    ("bytes vs baseline <= 200000", "bytes <= 200000"),
    ("auc vs baseline >= nan", "finite"),
    ("auc >= -0.002", "auc vs baseline"),
]
"""A limit, and a part of the error message: mostly the limit that it suggests instead."""


class CommandResult(NamedTuple):
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


Call = Callable[..., CommandResult]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Return a function that runs ``recpress`` in this process, in an empty home."""
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)

    def run_command(*arguments: str) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["recpress", *arguments])
        # A run would start a server; the commands of these tests must fail earlier.
        monkeypatch.setattr(
            "flows.cli.console.run", lambda *_, **__: pytest.fail("a run was started")
        )
        capsys.readouterr()
        code: object = 0
        try:
            app.main()
        except SystemExit as caught:
            code = caught.code
        return CommandResult(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run_command


def limit_fields(limit_text: str) -> dict[str, str]:
    """Return a limit as fields of JSON; the bound is a string, since JSON has no number ``nan``."""
    metric, *_, sign, bound = limit_text.split()
    against = "baseline" if " vs " in limit_text else "absolute"
    bound_field = "at_least" if sign == ">=" else "at_most"
    return {"metric": metric, "against": against, bound_field: bound}


def assert_refused(result: CommandResult, *words: str) -> None:
    """Assert exit code 2, no standard output, and an error message with certain words."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err


@pytest.mark.parametrize(
    ("limit_text", "code", "problem"),
    [
        ("auc > 0.5", "limit_unreadable", str(value_error("limit_form", text="auc > 0.5"))),
        ("auc >= -0.1", "limit_invalid", str(value_error("absolute_bound_negative", metric="auc"))),
        ("auc >= nan", "limit_invalid", "Input should be a finite number (found 'nan')"),
    ],
)
def test_invalid_limit_option_raises_an_error_with_the_problem(limit_text, code, problem):
    # ``build_terms`` builds an order from the options of a command.
    with raises_code(CommandRefused, code, problem=problem):
        build_terms(
            "clicks",
            "safe",
            limits=[limit_text],
            targets=None,  # the default target
            optional=[],
            promote=False,
            seed=0,
        )


@pytest.mark.parametrize(("limit_text", "suggestion"), MEANINGLESS_LIMITS)
def test_meaningless_limit_exits_with_code_2_and_suggests_another(
    call: Call, limit_text: str, suggestion: str
) -> None:
    assert_refused(call("compress", "clicks", "--limit", limit_text), suggestion)
    assert_refused(call("explain", "clicks", "--limit", limit_text), suggestion)


@pytest.mark.parametrize(("limit_text", "suggestion"), MEANINGLESS_LIMITS)
def test_meaningless_limit_in_an_order_file_exits_with_code_2(
    call: Call, tmp_path: Path, limit_text: str, suggestion: str
) -> None:
    limit = limit_fields(limit_text)
    path = tmp_path / "order.json"
    path.write_text(json.dumps({"model": "clicks", "limits": [limit]}))
    refusal = call("compress", "--order", str(path))
    assert_refused(refusal, "order.json is not a valid order", suggestion)


# Two suffice: the flow validates limits with the class ``Order``, as the command does for a file.
@pytest.mark.parametrize(("limit_text", "suggestion"), MEANINGLESS_LIMITS[:2])
def test_meaningless_limit_in_parameters_of_the_flow_fails_the_run(
    prefect_server: None, limit_text: str, suggestion: str
) -> None:
    from flows.compress import compress

    limit = limit_fields(limit_text)
    state = compress({"model": "clicks", "limits": [limit]}, return_state=True)
    assert state.is_failed()
    assert suggestion in str(state.message)


@pytest.mark.parametrize(
    "limit",
    [
        "gauc vs baseline >= 0",
        "recall@20 vs baseline >= 0",
        "ndcg@10 >= 0.3",
        "ndcg@20 vs champion >= 0",
        "mrr@10 >= 0.3",
        "p99_ms@1024 <= 5",
        "p50_ms@1024 vs baseline <= 1",
    ],
)
def test_limit_on_a_metric_that_is_not_measured_for_the_model_exits_with_code_2(
    call: Call, tmp_path: Path, limit: str
) -> None:
    rows = {"train": 500, "validation": 200, "test": 1000}  # fewer than the largest batch
    pack(write_draft(tmp_path / "draft", rows=rows))
    assert_refused(
        call("compress", "clicks", "--limit", limit), "not measured for this bundle", "logloss"
    )
    assert_refused(call("explain", "clicks", "--limit", limit), "not measured for this bundle")


def test_limit_that_requires_an_improvement_prints_a_warning(call: Call, tmp_path: Path) -> None:
    pack(write_draft(tmp_path / "draft"))
    result = call("explain", "clicks", "--limit", "auc vs baseline >= 0.002", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["limits"] == ["auc vs baseline >= 0.002"]
    assert "warning: limit 'auc vs baseline >= 0.002'" in result.err.replace("\n", " ")


def test_pack_and_check_print_warnings_about_the_model(call: Call, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    draft = write_draft(tmp_path / "draft")
    weights = load_file(draft / "model.safetensors")
    weights["out.bias"] += 4  # so the mean prediction is far above the mean label
    save_file(weights, draft / "model.safetensors")
    packed = call("bundle", "pack", str(draft))
    assert packed.code == 0, packed.err
    assert "warning: The model's log loss" in packed.out
    checked = call("bundle", "check", "clicks")
    assert "clicks@1 is valid" in checked.out
    assert "warning: The model's log loss" in checked.out
    (warning,) = json.loads(call("bundle", "check", "clicks", "--json").out)["warnings"]
    assert "mean label" in warning
    (warning_of_pack,) = json.loads(call("bundle", "pack", str(draft), "--json").out)["warnings"]
    assert warning_of_pack == warning


def test_pack_refuses_a_metric_of_another_task_with_exit_code_2(call: Call, tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", task="ranking")
    document = json.loads((draft / "model.json").read_text())
    document["signature"]["outputs"][0]["metric"] = "auc"
    (draft / "model.json").write_text(json.dumps(document))
    assert_refused(call("bundle", "pack", str(draft)), "signature", "ndcg@k", "mrr@k", "'auc'")
