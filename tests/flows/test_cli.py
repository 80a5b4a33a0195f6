"""The command line: output, exit codes, and the sentences of refused commands.

A draft is the folder that a user writes and ``bundle pack`` stores as a bundle; ``tests/drafts.py``
writes those of the tests. A home is the folder with the object store, the registry and caches.

The fixture ``accepted_order`` (``conftest.py``) is the home after one order: model ``clicks``,
preset ``small``, ``LIMIT`` and ``TARGETS``. A command with this order prints the stored result.
"""

import json
import pickle  # noqa: TID251 (to write files that must be refused)
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from drafts import ALLOWED, ROOT, ROWS, environment, recpress, write_draft
from orders import ACCEPTED, AcceptedOrder, run_without_prefect
from prefect.client.orchestration import get_client
from prefect.utilities.schema_tools.validation import ValidationError as SchemaError
from prefect.utilities.schema_tools.validation import validate
from safetensors.torch import load_file, save_file

from compressors.contracts import Limit
from flows.cli import app
from flows.cli.console import EMBEDDED
from tasks.bundles.packing import Packed, pack
from tasks.orchestration.documents import Finished, Report
from tasks.orchestration.order_records import find_finished_order
from tasks.publish import publish
from tasks.report.page import page, read_validation

LIMIT = "auc vs baseline >= -0.02"
TARGETS = ("--target", "onnxruntime", "--target", "tensorrt-rtx")


class CommandResult:
    """Exit code, standard output and standard error of one command in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs ``recpress`` with arguments in this process."""

    def run_command(*arguments: str) -> CommandResult:
        monkeypatch.setattr(sys, "argv", ["recpress", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return CommandResult(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    return run_command


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the home ``recpress``, which is empty; it is used."""
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    return tmp_path


def assert_refused(result: CommandResult, *words: str) -> None:
    """Assert exit code 2, no standard output, and an error message with certain words."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert result.err.startswith("recpress: ")
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err


# --- start ----------------------------------------------------------------------------------


def modules_imported_by(code: str, env: Mapping[str, str]) -> set[str]:
    """Return the top-level modules that a new process has loaded after it ran some code."""
    print_modules = (
        "import sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    process = subprocess.run(
        [sys.executable, "-c", f"{code}\n{print_modules}"],
        cwd=ROOT,
        env=dict(env),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(process.stderr.splitlines()[-1].split())


def test_help_imports_no_heavy_package(tmp_path: Path) -> None:
    loaded = modules_imported_by("import flows.cli.app", environment(tmp_path))
    assert "typer" in loaded
    assert not loaded & {"torch", "prefect", "mlflow", "numpy", "pyarrow", "onnx", "pydantic"}


def test_help_lists_every_command(tmp_path: Path) -> None:
    process = recpress("--help", env=environment(tmp_path, COLUMNS="100"))
    assert process.returncode == 0
    for command in ("compress", "demo", "bundle", "registry", "triton", "doctor"):
        assert command in process.stdout
    assert process.stderr == ""


def test_completed_order_prints_its_report_without_importing_prefect_or_mlflow(
    accepted_order: AcceptedOrder,
) -> None:
    code = (
        "import sys\nfrom flows.cli.app import main\n"
        f"sys.argv = ['recpress', 'compress', 'clicks@1', '--preset', 'small', '--limit', "
        f"{LIMIT!r}, *{TARGETS!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    env = environment(accepted_order.home.parent) | {"RECPRESS_HOME": str(accepted_order.home)}
    loaded = modules_imported_by(code, env)
    assert "flows" in loaded
    assert not loaded & {"prefect", "mlflow", "great_expectations", "onnxscript", "torch"}


# --- compress -------------------------------------------------------------------------------


def test_accepted_order_exits_with_code_0_and_prints_table_and_fetch_command(
    accepted_order: AcceptedOrder, call: Any
) -> None:
    result = call("compress", "clicks", "--preset", "small", "--limit", LIMIT, *TARGETS)
    assert result.code == 0, result.err
    assert "was completed before" in result.err
    for text in ("bytes served", "AUC", "p99 ms, batch 64", "onnxruntime: accepted"):
        assert text in result.out
    assert accepted_order.result.finished.fetch_command() in result.out
    assert "The 3,000 test rows resolve a change of AUC of about" in result.out


@pytest.mark.parametrize(
    ("limit", "outcome", "code"),
    [
        ("bytes vs baseline <= 0.02", "rejected", 3),
        # None: a limit inside the interval that was measured.
        (None, "undecided", 4),
    ],
)
def test_rejected_order_exits_with_code_3_and_undecided_order_with_code_4(
    accepted_order: AcceptedOrder, call: Any, limit: str | None, outcome: str, code: int
) -> None:
    if limit is None:
        measured = accepted_order.result.finished.report.measurement
        assert measured is not None
        change = measured.numbers.of("auc", "baseline")
        assert change is not None
        # Between the estimate and the upper end of its 95 % interval, which decides neither way.
        limit = f"auc vs baseline >= {(change.point + change.high) / 2!r}"
    run_without_prefect(accepted_order.order.model_copy(update={"limits": (Limit.parse(limit),)}))
    result = call("compress", "clicks", "--preset", "small", "--limit", limit, *TARGETS, "--json")
    assert result.code == code, result.err
    assert Finished.model_validate_json(result.out).report.outcome == outcome


def test_order_file_returns_the_result_of_the_same_order(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    path = tmp_path / "order.json"
    path.write_text(accepted_order.order.model_dump_json())
    result = call("compress", "--order", str(path), "--json")
    assert result.code == 0, result.err
    assert Finished.model_validate_json(result.out) == accepted_order.result.finished
    assert result.err == ""


def test_order_whose_graph_is_missing_in_the_store_does_not_count_as_completed(
    accepted_order: AcceptedOrder,
) -> None:
    """A finished report is useless if the graph that it refers to cannot be fetched."""
    served = accepted_order.result.finished.report.targets[0].artifact
    folder = accepted_order.home / "store" / "artifacts" / served.sha256
    moved_folder = folder.with_name("moved")
    folder.rename(moved_folder)
    try:
        assert find_finished_order(accepted_order.result.finished.report.order) is None
    finally:
        moved_folder.rename(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], ["Name a model"], id="no model"),
        pytest.param(["clicks"], ["at least one limit", "--limit"], id="no limit"),
        pytest.param(
            ["clicks", "--limit", "auc is good"], ["auc is good", "a limit like"], id="no sign"
        ),
        pytest.param(["clicks", "--limit", "auk >= 0.7"], ["auk"], id="unknown metric"),
        pytest.param(["clicks", "--limit", "auc >= much"], ["much"], id="no number"),
        pytest.param(
            ["clicks", "--limit", "max_score_change vs baseline <= 0.1"],
            ["--limit: max_score_change already compares"],
            id="two references",
        ),
        pytest.param(
            ["clicks", "--limit", LIMIT, "--preset", "tiny"], ["preset", "'safe'"], id="preset"
        ),
        pytest.param(
            ["clicks", "--limit", LIMIT, "--target", "tpu"], ["'tpu'", "onnxruntime"], id="target"
        ),
        pytest.param(["views", "--limit", LIMIT], ["views", "bundle pack"], id="missing model"),
        pytest.param(
            ["--order", "/does/not/exist.json"], ["exist.json cannot be read"], id="no order file"
        ),
        pytest.param(["clicks", "--order", "o.json"], ["not both"], id="order and model"),
    ],
)
def test_invalid_order_exits_with_code_2_and_a_sentence(
    work_folder: Path, call: Any, arguments: list[str], words: list[str]
) -> None:
    assert_refused(call("compress", *arguments), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", ["JSON"]),
        ('{"model": "clicks"}', ["limits"]),
        (
            '{"model": "clicks", "limits": [], "promotion": true}',
            ["order.json is not a valid order", "limits", "promotion", "did you mean 'promote'?"],
        ),
    ],
)
def test_invalid_order_file_exits_with_code_2_and_names_the_field(
    work_folder: Path, call: Any, text: str, words: list[str]
) -> None:
    path = work_folder / "order.json"
    path.write_text(text)
    assert_refused(call("compress", "--order", str(path)), *words)


def test_binary_order_file_exits_with_code_2(work_folder: Path, call: Any) -> None:
    path = work_folder / "order.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert_refused(call("compress", "--order", str(path)), "order.json")


def test_required_target_without_its_library_exits_with_code_2_and_the_install_command(
    accepted_order: AcceptedOrder, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # makes its import fail
    # Variables for Prefect that the command sets for the whole process; monkeypatch restores them.
    for name, value in EMBEDDED.items():
        monkeypatch.setenv(name, value)
    result = call("compress", "clicks", "--limit", LIMIT, "--target", "tensorrt", "--json")
    assert_refused(result, "pip install 'recpress[tensorrt]'")


def test_unexpected_error_exits_with_code_1_and_names_its_class_and_recpress_debug(
    call: Any, work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(reference: str) -> None:
        raise ZeroDivisionError("an unexpected error")

    monkeypatch.setattr("tasks.bundles.packing.show", broken)
    result = call("bundle", "show", "clicks")
    assert result.code == 1
    assert "ZeroDivisionError: an unexpected error" in result.err
    assert "RECPRESS_DEBUG=1" in result.err
    assert "Traceback" not in result.err


# --- bundle ---------------------------------------------------------------------------------


def test_packing_the_same_draft_twice_changes_nothing(work_folder: Path, call: Any) -> None:
    draft = write_draft(work_folder / "draft")
    first = call("bundle", "pack", str(draft), "--json")
    assert first.code == 0, first.err
    packed = Packed.model_validate_json(first.out)
    assert packed.rows == ROWS
    before = sorted(str(path) for path in (work_folder / "recpress" / "store").rglob("*"))
    second = call("bundle", "pack", str(draft), "--json")
    assert second.out == first.out
    assert sorted(str(path) for path in (work_folder / "recpress" / "store").rglob("*")) == before


def test_pack_refuses_other_contents_with_a_packed_version_and_keeps_the_bundle(
    work_folder: Path, call: Any
) -> None:
    packed = pack(write_draft(work_folder / "draft"))
    other = write_draft(work_folder / "other", seed=1)
    assert_refused(call("bundle", "pack", str(other)), "clicks@1", "raise 'version'")
    checked = call("bundle", "check", "clicks@1", "--json")
    assert checked.code == 0, checked.err
    assert json.loads(checked.out)["rows"] == ROWS
    assert pack(work_folder / "draft") == packed


def test_bundle_check_and_show_describe_a_bundle(accepted_order: AcceptedOrder, call: Any) -> None:
    checked = call("bundle", "check", "clicks")
    assert checked.code == 0, checked.err
    assert "clicks@1 is valid" in checked.out
    by_uri = call("bundle", "check", accepted_order.packed.artifact.uri, "--json")
    assert json.loads(by_uri.out)["version"] == "1"
    shown = call("bundle", "show", "clicks@1")
    assert "input tags: jagged_bag int64, at most 5 values per row -> table tags" in shown.out
    assert "draft_network:ClickNet" in shown.out
    assert json.loads(call("bundle", "show", "clicks", "--json").out)["name"] == "clicks"


def test_bundle_schema_accepts_a_valid_draft_and_rejects_invalid_drafts(
    work_folder: Path, call: Any
) -> None:
    result = call("bundle", "schema")
    schema = json.loads(result.out)
    draft = json.loads((write_draft(work_folder / "draft") / "model.json").read_text())
    assert set(schema["required"]) <= set(draft) <= set(schema["properties"])
    validate(draft, schema, raise_on_error=True)
    output = draft["signature"]["outputs"][0]
    several = draft["signature"] | {"outputs": [output, output | {"name": "second"}]}
    validate(draft | {"signature": several}, schema, raise_on_error=True)
    none = draft["signature"] | {"outputs": []}
    unknown = draft["signature"] | {"outputs": [output | {"kind": "unknown"}]}
    for other in (
        draft | {"schema_version": 1},
        draft | {"signature": none},
        draft | {"signature": unknown},
    ):
        with pytest.raises(SchemaError):
            validate(other, schema, raise_on_error=True)


def pickle_weights(draft: Path) -> None:
    (draft / "model.safetensors").write_bytes(pickle.dumps({"weights": [1.0]}))


def add_pickle_file(draft: Path) -> None:
    (draft / "weights.bin").write_bytes(pickle.dumps([1]))


def name_path_outside_the_draft(draft: Path) -> None:
    edit_model_json(draft, lambda text: text.replace("test.parquet", "../../etc/passwd"))


def name_forbidden_module(draft: Path) -> None:
    edit_model_json(draft, lambda text: text.replace("draft_network:ClickNet", "os:system"))


def set_unknown_schema_version(draft: Path) -> None:
    edit_model_json(draft, lambda text: text.replace('"schema_version": 2', '"schema_version": 99'))


def set_weight_to_nan(draft: Path) -> None:
    weights = load_file(draft / "model.safetensors")
    weights["user.weight"][7, 3] = float("nan")
    save_file(weights, draft / "model.safetensors")


def remove_table_rows(draft: Path) -> None:
    weights = load_file(draft / "model.safetensors")
    weights["user.weight"] = weights["user.weight"][:50].contiguous()
    save_file(weights, draft / "model.safetensors")
    edit_model_json(draft, lambda text: text.replace('"users": 3000', '"users": 50'))


def change_width_in_config(draft: Path) -> None:
    edit_model_json(draft, lambda text: text.replace('"hidden": 64', '"hidden": 65'))


def edit_model_json(draft: Path, change: Any) -> None:
    """Change the text of a draft's model.json, and assert that the change has an effect."""
    path = draft / "model.json"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


@pytest.mark.parametrize(
    ("make_unsafe", "words"),
    [
        (pickle_weights, ["model.safetensors"]),
        (add_pickle_file, ["weights.bin"]),
        (name_path_outside_the_draft, [".."]),
        (name_forbidden_module, ["os", "RECPRESS_ALLOWED_MODULES"]),
        (set_unknown_schema_version, ["schema_version", "99"]),
        (set_weight_to_nan, ["user.weight"]),
        (remove_table_rows, ["'user'", "50 rows"]),
        (change_width_in_config, ["first.", "[65]", "'config'"]),
    ],
)
def test_pack_of_an_unsafe_draft_exits_with_code_2_and_stores_no_bundle(
    work_folder: Path, call: Any, make_unsafe: Any, words: list[str]
) -> None:
    draft = write_draft(work_folder / "draft")
    make_unsafe(draft)
    assert_refused(call("bundle", "pack", str(draft)), *words)
    assert not list((work_folder / "recpress" / "store" / "bundles").rglob("*.json"))


def test_pack_of_an_unsafe_draft_in_a_process_prints_no_traceback(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft")
    pickle_weights(draft)
    process = recpress("bundle", "pack", str(draft), env=environment(tmp_path))
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.strip().splitlines()) <= 4
    assert "Traceback" not in process.stderr


# --- registry -------------------------------------------------------------------------------


def test_registry_list_and_show_print_the_versions_and_the_report(
    accepted_order: AcceptedOrder, call: Any
) -> None:
    listed = json.loads(call("registry", "list", "--json").out)
    entry = next(
        item for item in listed if item["version"] == accepted_order.result.finished.version
    )
    assert entry["tags"]["recpress.outcome"] == "accepted"
    assert "clicks" in call("registry", "list", "clicks").out
    version = accepted_order.result.finished.version
    shown = call("registry", "show", "clicks", "--version", version, "--json")
    assert Report.model_validate_json(shown.out) == accepted_order.result.finished.report
    markdown = call("registry", "show", "clicks", "--version", version).out
    assert "# clicks 1: accepted" in markdown
    assert "| tensorrt-rtx | built-unmeasured |" in markdown


def test_registry_show_html_writes_the_published_page(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    version = accepted_order.result.finished.version
    show = ("registry", "show", "clicks", "--version", version)
    result = call(*show, "--html", str(tmp_path / "report.html"))
    assert result.code == 0, result.err
    html = (tmp_path / "report.html").read_text()
    assert f"{tmp_path}/report.html" in result.out
    report = accepted_order.result.finished.report
    assert html == page(report, read_validation(report.validation))
    for line in report.plan.lines:
        assert f"<code>{line.module}</code>" in html
    assert report.reproduction.command.startswith("recpress compress clicks@1")
    assert_refused(call(*show, "--html", str(tmp_path / "no" / "report.html")), "does not exist")


def test_registry_command_line_and_prefect_name_the_uri_of_the_reports_page(
    accepted_order: AcceptedOrder, call: Any
) -> None:
    listed = json.loads(call("registry", "list", "clicks", "--json").out)
    entry = next(
        item for item in listed if item["version"] == accepted_order.result.finished.version
    )
    page_uri = entry["tags"]["recpress.report"]
    assert page_uri == accepted_order.result.finished.page_uri()
    assert Path(page_uri.removeprefix("file://")).read_text().startswith("<!doctype html>")
    result = call("compress", "clicks", "--preset", "small", "--limit", LIMIT, *TARGETS)
    assert page_uri in result.out
    with get_client(sync_client=True) as client:
        shown = [str(item.data) for item in client.read_artifacts() if item.type == "markdown"]
    assert any(
        page_uri in text and f"--version {entry['version']} --html" in text for text in shown
    )


def test_publishing_the_same_report_again_returns_the_same_artifact(
    accepted_order: AcceptedOrder,
) -> None:
    republished = publish.fn(accepted_order.result.finished.report)
    assert republished == accepted_order.result.finished


def test_reproduction_command_and_order_of_a_report_return_that_report(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    reproduction = accepted_order.result.finished.report.reproduction
    result = call(*shlex.split(reproduction.command.replace("\\\n", ""))[1:], "--json")
    assert Finished.model_validate_json(result.out) == accepted_order.result.finished
    (tmp_path / "order.json").write_text(json.dumps(reproduction.order))
    result = call("compress", "--order", str(tmp_path / "order.json"), "--json")
    assert Finished.model_validate_json(result.out) == accepted_order.result.finished


def test_listing_an_empty_registry_suggests_the_demo(work_folder: Path, call: Any) -> None:
    result = call("registry", "list")
    assert result.code == 0
    assert "recpress demo" in result.out
    assert json.loads(call("registry", "list", "--json").out) == []


def test_fetch_creates_the_folder_and_refuses_a_folder_with_files(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    arguments = ("registry", "fetch", "clicks", "--version", accepted_order.result.finished.version)
    into = tmp_path / "deep" / "served"
    result = call(*arguments, "--into", str(into), "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["target"] == "onnxruntime"
    assert {"model.onnx", "lowering.json"} <= {path.name for path in into.iterdir()}
    assert_refused(call(*arguments, "--into", str(into)), "not empty")


def test_fetch_of_a_damaged_file_exits_with_code_2_and_creates_no_folder(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    served = accepted_order.result.finished.report.targets[0].artifact
    path = accepted_order.home / "store" / "artifacts" / served.sha256 / "files" / "model.onnx"
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[len(damaged) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)
    into = tmp_path / "new" / "served"
    version = accepted_order.result.finished.version
    try:
        result = call("registry", "fetch", "clicks", "--version", version, "--into", str(into))
    finally:
        path.write_bytes(original)
        path.chmod(0o444)
    assert_refused(result, "damaged", "model.onnx")
    assert not into.exists()
    assert list(tmp_path.iterdir()) == []


def test_fetch_of_an_unmeasured_engine_requires_the_option_unmeasured(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    version = accepted_order.result.finished.version
    arguments = ("registry", "fetch", "clicks", "--version", version, "--target", "tensorrt-rtx")
    into = tmp_path / "engine"
    assert_refused(call(*arguments, "--into", str(into)), "built-unmeasured", "--unmeasured")
    assert not into.exists()
    result = call(*arguments, "--into", str(into), "--unmeasured")
    assert result.code == 0, result.err
    assert "model.engine" in {path.name for path in into.iterdir()}


def test_unknown_target_version_or_model_exits_with_code_2_and_the_known_names(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    into = ("--into", str(tmp_path / "x"))
    assert_refused(call("registry", "fetch", "clicks", "--version", "99", *into), "99")
    assert_refused(
        call("registry", "fetch", "clicks", "--version", "1", "--target", "tpu", *into), "tpu"
    )
    assert_refused(
        call("registry", "fetch", "clicks", "--version", "1", "--target", "tensorrt", *into),
        "has no tensorrt",
    )
    assert_refused(call("registry", "show", "views"), "views", "clicks")


def test_rejected_version_is_not_promoted_and_its_fetch_requires_unaccepted(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path, without_champion: None
) -> None:
    limits = (Limit.parse("bytes vs baseline <= 0.015"),)
    rejected = run_without_prefect(
        accepted_order.order.model_copy(update={"limits": limits})
    ).finished.version
    assert_refused(call("registry", "promote", "clicks", "--version", rejected), "rejected")
    into = tmp_path / "rejected"
    arguments = ("registry", "fetch", "clicks", "--version", rejected, "--into", str(into))
    assert_refused(call(*arguments), "--unaccepted")
    assert not into.exists()
    assert call(*arguments, "--unaccepted").code == 0
    assert into.is_dir()


def test_promote_and_rollback_change_the_champion_that_fetch_copies(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path, without_champion: None
) -> None:
    assert_refused(
        call("registry", "fetch", "clicks", "--into", str(tmp_path / "none")), "@champion"
    )
    first = accepted_order.result.finished.version
    limits = (ACCEPTED, Limit.parse("bytes vs baseline <= 0.5"))
    second = run_without_prefect(
        accepted_order.order.model_copy(update={"limits": limits})
    ).finished.version
    result = call("registry", "promote", "clicks", "--version", first)
    assert f"version {first} is champion (there was none)." in result.out
    result = call("registry", "promote", "clicks", "--version", second, "--reason", "smaller")
    assert f"version {second} is champion (was version {first})." in result.out
    result = call("registry", "promote", "clicks", "--version", second)
    assert f"version {second} is champion already (promote by " in result.out
    fetched = call("registry", "fetch", "clicks", "--into", str(tmp_path / "a"))
    assert f"clicks version {second}" in fetched.out
    rollback = json.loads(call("registry", "rollback", "clicks", "--json").out)
    assert (rollback["action"], rollback["version"]) == ("rollback", first)
    assert_refused(call("registry", "rollback", "clicks"), "no champion before")


def test_order_with_promote_promotes_a_result_that_was_completed_before(
    accepted_order: AcceptedOrder, call: Any, without_champion: None
) -> None:
    result = call(
        "compress", "clicks", "--preset", "small", "--limit", LIMIT, *TARGETS, "--promote"
    )
    assert result.code == 0, result.err
    listed = json.loads(call("registry", "list", "clicks", "--json").out)
    champions = [item["version"] for item in listed if "champion" in item["aliases"]]
    assert champions == [accepted_order.result.finished.version]
    assert f"Promoted: version {champions[0]} is champion (there was none)." in result.err
    repeated = call(
        "compress", "clicks", "--preset", "small", "--limit", LIMIT, *TARGETS, "--promote"
    )
    assert f"Version {champions[0]} is champion already." in repeated.err
    rejected = ("--limit", "bytes vs baseline <= 0.015", *TARGETS, "--promote")
    result = call("compress", "clicks", "--preset", "small", *rejected)
    assert result.code == 3
    assert "Not promoted: version " in result.err
    assert (
        f"is rejected, and only an accepted version becomes champion; version {champions[0]}"
        in (result.err)
    )


# --- doctor ---------------------------------------------------------------------------------


def test_doctor_reports_each_service_and_exits_with_code_1_if_the_store_fails(
    accepted_order: AcceptedOrder, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = call("doctor", "--json")
    findings = {item["what"]: item for item in json.loads(result.out)}
    assert result.code == 0, result.out
    assert findings["object store"]["state"] == "ok"
    assert findings["ONNX Runtime"]["state"] == "ok"
    assert ALLOWED in findings["allowed modules"]["found"]
    monkeypatch.setenv("RECPRESS_STORE", "ftp://nowhere")
    broken = call("doctor", "--json")
    assert broken.code == 1
    states = {item["what"]: item["state"] for item in json.loads(broken.out)}
    assert states["object store"] == "fault"
