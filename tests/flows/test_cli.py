"""The command line: what it prints where, its exit codes, and what it refuses in one sentence."""

import json
import pickle  # noqa: TID251 (what is refused has to be made first)
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
from tasks.orchestration.order_records import finished
from tasks.publish import publish
from tasks.report.page import page, validation_of

LIMIT = "auc vs baseline >= -0.02"
TARGETS = ("--target", "onnxruntime", "--target", "tensorrt-rtx")


class Said:
    """Exit code and output of one call of the command line in this process."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``main`` with these arguments; start-up of a process is tested once, elsewhere."""

    def called(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["recpress", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Said(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    return called


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which nothing happened yet."""
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", ALLOWED)
    return tmp_path


def refused(said: Said, *words: str) -> None:
    """Exit code 2, nothing on standard output, one sentence of ours without a traceback."""
    assert said.code == 2, said.err
    assert said.out == ""
    assert said.err.startswith("recpress: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err, said.err


# --- start ----------------------------------------------------------------------------------


def imported_by(code: str, env: Mapping[str, str]) -> set[str]:
    """The top-level modules a fresh process has after running some code."""
    show = "import sys; print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"],
        cwd=ROOT,
        env=dict(env),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(ended.stderr.splitlines()[-1].split())


def test_help_imports_no_heavy_package(tmp_path: Path) -> None:
    loaded = imported_by("import flows.cli.app", environment(tmp_path))
    assert "typer" in loaded
    assert not loaded & {"torch", "prefect", "mlflow", "numpy", "pyarrow", "onnx", "pydantic"}


def test_help_lists_every_command(tmp_path: Path) -> None:
    ended = recpress("--help", env=environment(tmp_path, COLUMNS="100"))
    assert ended.returncode == 0
    for command in ("compress", "demo", "bundle", "registry", "triton", "doctor"):
        assert command in ended.stdout
    assert ended.stderr == ""


def test_a_finished_order_returns_its_report_without_prefect_or_the_registry(
    accepted_order: AcceptedOrder,
) -> None:
    code = (
        "import sys\nfrom flows.cli.app import main\n"
        f"sys.argv = ['recpress', 'compress', 'clicks@1', '--preset', 'small', '--limit', "
        f"{LIMIT!r}, *{TARGETS!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    )
    env = environment(accepted_order.home.parent) | {"RECPRESS_HOME": str(accepted_order.home)}
    loaded = imported_by(code, env)
    assert "flows" in loaded
    assert not loaded & {"prefect", "mlflow", "great_expectations", "onnxscript", "torch"}


# --- compress -------------------------------------------------------------------------------


def test_an_accepted_order_ends_with_0_the_table_and_the_command_that_fetches_it(
    accepted_order: AcceptedOrder, call: Any
) -> None:
    said = call("compress", "clicks", "--preset", "small", "--limit", LIMIT, *TARGETS)
    assert said.code == 0, said.err
    assert "was carried out before" in said.err
    for text in ("bytes served", "AUC", "p99 ms, batch 64", "onnxruntime: accepted"):
        assert text in said.out
    assert accepted_order.result.finished.fetch_command() in said.out
    assert "The 3,000 test rows resolve a change of AUC of about" in said.out


@pytest.mark.parametrize(
    ("limit", "outcome", "code"),
    [("bytes vs baseline <= 0.02", "rejected", 3), ("between", "undecided", 4)],
)
def test_a_result_that_is_not_accepted_has_an_exit_code_of_its_own(
    accepted_order: AcceptedOrder, call: Any, limit: str, outcome: str, code: int
) -> None:
    if limit == "between":
        measured = accepted_order.result.finished.report.measurement
        assert measured is not None
        change = measured.numbers.of("auc", "baseline")
        assert change is not None
        limit = f"auc vs baseline >= {(change.point + change.high) / 2!r}"
    run_without_prefect(accepted_order.order.model_copy(update={"limits": (Limit.parse(limit),)}))
    said = call("compress", "clicks", "--preset", "small", "--limit", limit, *TARGETS, "--json")
    assert said.code == code, said.err
    assert Finished.model_validate_json(said.out).report.outcome == outcome


def test_an_order_file_is_the_same_order(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    path = tmp_path / "order.json"
    path.write_text(accepted_order.order.model_dump_json())
    said = call("compress", "--order", str(path), "--json")
    assert said.code == 0, said.err
    assert Finished.model_validate_json(said.out) == accepted_order.result.finished
    assert said.err == ""


def test_an_order_whose_files_are_gone_from_the_store_is_not_called_carried_out(
    accepted_order: AcceptedOrder,
) -> None:
    """A finished report is useless if the graph that it refers to cannot be fetched."""
    served = accepted_order.result.finished.report.targets[0].artifact
    lying = accepted_order.home / "store" / "artifacts" / served.sha256
    aside = lying.with_name("aside")
    lying.rename(aside)
    try:
        assert finished(accepted_order.result.finished.report.order) is None
    finally:
        aside.rename(lying)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], ["Name a model"], id="no model"),
        pytest.param(["clicks"], ["at least one limit", "--limit"], id="no limit"),
        pytest.param(["clicks", "--limit", "auc is good"], ["auc is good", "form"], id="no sign"),
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
def test_a_bad_order_is_refused_in_words_with_exit_code_2(
    home: Path, call: Any, arguments: list[str], words: list[str]
) -> None:
    refused(call("compress", *arguments), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no json", ["JSON"]),
        ('{"model": "clicks"}', ["limits"]),
        (
            '{"model": "clicks", "limits": [], "promotion": true}',
            ["order.json holds no order", "limits", "promotion", "did you mean 'promote'?"],
        ),
    ],
)
def test_an_unusable_order_file_is_refused_with_the_field_that_is_wrong(
    home: Path, call: Any, text: str, words: list[str]
) -> None:
    path = home / "order.json"
    path.write_text(text)
    refused(call("compress", "--order", str(path)), *words)


def test_an_order_file_that_is_no_text_is_refused(home: Path, call: Any) -> None:
    path = home / "order.json"
    path.write_bytes(b"\xff\xfe\x00\x80")
    refused(call("compress", "--order", str(path)), "order.json")


def test_a_required_target_that_cannot_be_built_ends_with_2_and_how_to_install_it(
    accepted_order: AcceptedOrder, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as where it is not installed
    for name, value in EMBEDDED.items():  # the command sets them for good
        monkeypatch.setenv(name, value)
    said = call("compress", "clicks", "--limit", LIMIT, "--target", "tensorrt", "--json")
    refused(said, "pip install 'recpress[tensorrt]'")


def test_an_unexpected_error_exits_with_code_1_and_names_its_class_and_the_debug_variable(
    call: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(reference: str) -> None:
        raise ZeroDivisionError("an unexpected error")

    monkeypatch.setattr("tasks.bundles.packing.show", broken)
    said = call("bundle", "show", "clicks")
    assert said.code == 1
    assert "ZeroDivisionError: an unexpected error" in said.err
    assert "RECPRESS_DEBUG=1" in said.err
    assert "Traceback" not in said.err


# --- bundle ---------------------------------------------------------------------------------


def test_packing_the_same_draft_twice_is_a_no_op(home: Path, call: Any) -> None:
    draft = write_draft(home / "draft")
    first = call("bundle", "pack", str(draft), "--json")
    assert first.code == 0, first.err
    packed = Packed.model_validate_json(first.out)
    assert packed.rows == ROWS
    before = sorted(str(path) for path in (home / "recpress" / "store").rglob("*"))
    second = call("bundle", "pack", str(draft), "--json")
    assert second.out == first.out
    assert sorted(str(path) for path in (home / "recpress" / "store").rglob("*")) == before


def test_other_contents_under_a_packed_version_are_refused_and_nothing_is_lost(
    home: Path, call: Any
) -> None:
    packed = pack(write_draft(home / "draft"))
    other = write_draft(home / "other", seed=1)
    refused(call("bundle", "pack", str(other)), "clicks@1", "raise 'version'")
    found = call("bundle", "check", "clicks@1", "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["rows"] == ROWS
    assert pack(home / "draft") == packed


def test_check_and_show_say_what_a_bundle_is(accepted_order: AcceptedOrder, call: Any) -> None:
    checked = call("bundle", "check", "clicks")
    assert checked.code == 0, checked.err
    assert "clicks@1 is valid" in checked.out
    by_uri = call("bundle", "check", accepted_order.packed.artifact.uri, "--json")
    assert json.loads(by_uri.out)["version"] == "1"
    shown = call("bundle", "show", "clicks@1")
    assert "input tags: jagged_bag int64 [5] a row -> table tags" in shown.out
    assert "draft_network:ClickNet" in shown.out
    assert json.loads(call("bundle", "show", "clicks", "--json").out)["name"] == "clicks"


def test_the_drafts_schema_is_json_and_a_draft_follows_it(home: Path, call: Any) -> None:
    said = call("bundle", "schema")
    schema = json.loads(said.out)
    draft = json.loads((write_draft(home / "draft") / "model.json").read_text())
    assert set(schema["required"]) <= set(draft) <= set(schema["properties"])
    validate(draft, schema, raise_on_error=True)
    output = draft["signature"]["outputs"][0]
    several = draft["signature"] | {"outputs": [output, output | {"name": "second"}]}
    unknown = draft["signature"] | {"outputs": [output | {"kind": "unknown"}]}
    for other in (
        draft | {"schema_version": 1},
        draft | {"signature": several},
        draft | {"signature": unknown},
    ):
        with pytest.raises(SchemaError):
            validate(other, schema, raise_on_error=True)


def hostile_pickle(draft: Path) -> None:
    (draft / "model.safetensors").write_bytes(pickle.dumps({"weights": [1.0]}))


def hostile_extra(draft: Path) -> None:
    (draft / "weights.bin").write_bytes(pickle.dumps([1]))


def hostile_path(draft: Path) -> None:
    edit(draft, lambda text: text.replace("test.parquet", "../../etc/passwd"))


def hostile_module(draft: Path) -> None:
    edit(draft, lambda text: text.replace("draft_network:ClickNet", "os:system"))


def hostile_version(draft: Path) -> None:
    edit(draft, lambda text: text.replace('"schema_version": 2', '"schema_version": 99'))


def hostile_nan(draft: Path) -> None:
    weights = load_file(draft / "model.safetensors")
    weights["user.weight"][7, 3] = float("nan")
    save_file(weights, draft / "model.safetensors")


def hostile_table(draft: Path) -> None:
    weights = load_file(draft / "model.safetensors")
    weights["user.weight"] = weights["user.weight"][:50].contiguous()
    save_file(weights, draft / "model.safetensors")
    edit(draft, lambda text: text.replace('"users": 3000', '"users": 50'))


def hostile_shape(draft: Path) -> None:
    edit(draft, lambda text: text.replace('"hidden": 64', '"hidden": 65'))


def edit(draft: Path, change: Any) -> None:
    path = draft / "model.json"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (hostile_pickle, ["model.safetensors"]),
        (hostile_extra, ["weights.bin"]),
        (hostile_path, [".."]),
        (hostile_module, ["os", "RECPRESS_ALLOWED_MODULES"]),
        (hostile_version, ["schema_version", "99"]),
        (hostile_nan, ["user.weight"]),
        (hostile_table, ["'user'", "50 rows"]),
        (hostile_shape, ["first.", "[65]", "'config'"]),
    ],
)
def test_a_hostile_draft_is_refused_and_no_bundle_is_stored(
    home: Path, call: Any, spoil: Any, words: list[str]
) -> None:
    draft = write_draft(home / "draft")
    spoil(draft)
    refused(call("bundle", "pack", str(draft)), *words)
    assert not list((home / "recpress" / "store" / "bundles").rglob("*.json"))


def test_a_hostile_draft_is_refused_by_the_process_as_well(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft")
    hostile_pickle(draft)
    ended = recpress("bundle", "pack", str(draft), env=environment(tmp_path))
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.strip().splitlines()) <= 4
    assert "Traceback" not in ended.stderr


# --- registry -------------------------------------------------------------------------------


def test_list_and_show_print_the_versions_and_the_report(
    accepted_order: AcceptedOrder, call: Any
) -> None:
    listed = json.loads(call("registry", "list", "--json").out)
    mine = next(
        item for item in listed if item["version"] == accepted_order.result.finished.version
    )
    assert mine["tags"]["recpress.outcome"] == "accepted"
    assert "clicks" in call("registry", "list", "clicks").out
    version = accepted_order.result.finished.version
    shown = call("registry", "show", "clicks", "--version", version, "--json")
    assert Report.model_validate_json(shown.out) == accepted_order.result.finished.report
    markdown = call("registry", "show", "clicks", "--version", version).out
    assert "# clicks 1: accepted" in markdown
    assert "| tensorrt-rtx | built-unmeasured |" in markdown


def test_the_reports_page_is_written_as_it_was_published(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    version = accepted_order.result.finished.version
    show = ("registry", "show", "clicks", "--version", version)
    said = call(*show, "--html", str(tmp_path / "report.html"))
    assert said.code == 0, said.err
    html = (tmp_path / "report.html").read_text()
    assert f"{tmp_path}/report.html" in said.out
    report = accepted_order.result.finished.report
    assert html == page(report, validation_of(report.validation))
    for line in report.plan.lines:
        assert f"<code>{line.module}</code>" in html
    assert report.reproduction.command.startswith("recpress compress clicks@1")
    refused(call(*show, "--html", str(tmp_path / "no" / "report.html")), "does not exist")


def test_registry_command_line_and_prefect_say_where_the_reports_page_lies(
    accepted_order: AcceptedOrder, call: Any
) -> None:
    listed = json.loads(call("registry", "list", "clicks", "--json").out)
    mine = next(
        item for item in listed if item["version"] == accepted_order.result.finished.version
    )
    where = mine["tags"]["recpress.report"]
    assert where == accepted_order.result.finished.page_uri()
    assert Path(where.removeprefix("file://")).read_text().startswith("<!doctype html>")
    said = call("compress", "clicks", "--preset", "small", "--limit", LIMIT, *TARGETS)
    assert where in said.out
    with get_client(sync_client=True) as client:
        shown = [str(item.data) for item in client.read_artifacts() if item.type == "markdown"]
    assert any(where in text and f"--version {mine['version']} --html" in text for text in shown)


def test_a_report_that_is_published_again_is_the_same_artifact(
    accepted_order: AcceptedOrder,
) -> None:
    again = publish.fn(accepted_order.result.finished.report)
    assert again == accepted_order.result.finished


def test_the_reproduction_command_of_a_report_returns_that_report(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    again = accepted_order.result.finished.report.reproduction
    said = call(*shlex.split(again.command.replace("\\\n", ""))[1:], "--json")
    assert Finished.model_validate_json(said.out) == accepted_order.result.finished
    (tmp_path / "order.json").write_text(json.dumps(again.order))
    said = call("compress", "--order", str(tmp_path / "order.json"), "--json")
    assert Finished.model_validate_json(said.out) == accepted_order.result.finished


def test_an_empty_registry_says_what_to_do(home: Path, call: Any) -> None:
    said = call("registry", "list")
    assert said.code == 0
    assert "recpress demo" in said.out
    assert json.loads(call("registry", "list", "--json").out) == []


def test_a_version_is_fetched_into_another_folder_and_only_into_an_empty_one(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    arguments = ("registry", "fetch", "clicks", "--version", accepted_order.result.finished.version)
    into = tmp_path / "deep" / "served"
    said = call(*arguments, "--into", str(into), "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["target"] == "onnxruntime"
    assert {"model.onnx", "lowering.json"} <= {path.name for path in into.iterdir()}
    refused(call(*arguments, "--into", str(into)), "not empty")


def test_a_flipped_byte_in_the_store_is_noticed_and_no_folder_is_made(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    served = accepted_order.result.finished.report.targets[0].artifact
    path = accepted_order.home / "store" / "artifacts" / served.sha256 / "files" / "model.onnx"
    whole = path.read_bytes()
    spoiled = bytearray(whole)
    spoiled[len(spoiled) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(spoiled)
    into = tmp_path / "new" / "served"
    version = accepted_order.result.finished.version
    try:
        said = call("registry", "fetch", "clicks", "--version", version, "--into", str(into))
    finally:
        path.write_bytes(whole)
        path.chmod(0o444)
    refused(said, "damaged", "model.onnx")
    assert not into.exists()
    assert list(tmp_path.iterdir()) == []


def test_fetch_of_an_unmeasured_engine_requires_the_option_unmeasured(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    version = accepted_order.result.finished.version
    arguments = ("registry", "fetch", "clicks", "--version", version, "--target", "tensorrt-rtx")
    into = tmp_path / "engine"
    refused(call(*arguments, "--into", str(into)), "built-unmeasured", "--unmeasured")
    assert not into.exists()
    said = call(*arguments, "--into", str(into), "--unmeasured")
    assert said.code == 0, said.err
    assert "model.engine" in {path.name for path in into.iterdir()}


def test_an_unknown_target_or_version_is_refused_with_what_there_is(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path
) -> None:
    into = ("--into", str(tmp_path / "x"))
    refused(call("registry", "fetch", "clicks", "--version", "99", *into), "99")
    refused(call("registry", "fetch", "clicks", "--version", "1", "--target", "tpu", *into), "tpu")
    refused(
        call("registry", "fetch", "clicks", "--version", "1", "--target", "tensorrt", *into),
        "has no tensorrt",
    )
    refused(call("registry", "show", "views"), "views", "clicks")


def test_a_rejected_version_is_not_promoted_and_its_fetch_requires_the_option_unaccepted(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path, without_champion: None
) -> None:
    limits = (Limit.parse("bytes vs baseline <= 0.015"),)
    rejected = run_without_prefect(
        accepted_order.order.model_copy(update={"limits": limits})
    ).finished.version
    refused(call("registry", "promote", "clicks", "--version", rejected), "rejected")
    into = tmp_path / "rejected"
    arguments = ("registry", "fetch", "clicks", "--version", rejected, "--into", str(into))
    refused(call(*arguments), "--unaccepted")
    assert not into.exists()
    assert call(*arguments, "--unaccepted").code == 0
    assert into.is_dir()


def test_promote_and_roll_back_move_the_champion_that_fetch_gives(
    accepted_order: AcceptedOrder, call: Any, tmp_path: Path, without_champion: None
) -> None:
    refused(call("registry", "fetch", "clicks", "--into", str(tmp_path / "none")), "@champion")
    first = accepted_order.result.finished.version
    limits = (ACCEPTED, Limit.parse("bytes vs baseline <= 0.5"))
    second = run_without_prefect(
        accepted_order.order.model_copy(update={"limits": limits})
    ).finished.version
    said = call("registry", "promote", "clicks", "--version", first)
    assert f"version {first} is champion (there was none)." in said.out
    said = call("registry", "promote", "clicks", "--version", second, "--reason", "smaller")
    assert f"version {second} is champion (was version {first})." in said.out
    said = call("registry", "promote", "clicks", "--version", second)
    assert f"version {second} is champion already (promote by " in said.out
    fetched = call("registry", "fetch", "clicks", "--into", str(tmp_path / "a"))
    assert f"clicks version {second}" in fetched.out
    back = json.loads(call("registry", "rollback", "clicks", "--json").out)
    assert (back["action"], back["version"]) == ("rollback", first)
    refused(call("registry", "rollback", "clicks"), "no champion before")


def test_an_order_that_promotes_does_so_also_when_it_was_carried_out_before(
    accepted_order: AcceptedOrder, call: Any, without_champion: None
) -> None:
    said = call("compress", "clicks", "--preset", "small", "--limit", LIMIT, *TARGETS, "--promote")
    assert said.code == 0, said.err
    listed = json.loads(call("registry", "list", "clicks", "--json").out)
    champions = [item["version"] for item in listed if "champion" in item["aliases"]]
    assert champions == [accepted_order.result.finished.version]
    assert f"Promoted: version {champions[0]} is champion (there was none)." in said.err
    again = call("compress", "clicks", "--preset", "small", "--limit", LIMIT, *TARGETS, "--promote")
    assert f"Version {champions[0]} is champion already." in again.err
    rejected = ("--limit", "bytes vs baseline <= 0.015", *TARGETS, "--promote")
    said = call("compress", "clicks", "--preset", "small", *rejected)
    assert said.code == 3
    assert "Not promoted: version " in said.err
    assert (
        f"is rejected, and only an accepted version becomes champion; version {champions[0]}"
        in (said.err)
    )


# --- doctor ---------------------------------------------------------------------------------


def test_doctor_names_store_registry_and_builders_and_fails_if_the_store_does(
    accepted_order: AcceptedOrder, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = call("doctor", "--json")
    found = {item["what"]: item for item in json.loads(said.out)}
    assert said.code == 0, said.out
    assert found["object store"]["state"] == "ok"
    assert found["ONNX Runtime"]["state"] == "ok"
    assert ALLOWED in found["architectures from"]["found"]
    monkeypatch.setenv("RECPRESS_STORE", "ftp://nowhere")
    broken = call("doctor", "--json")
    assert broken.code == 1
    states = {item["what"]: item["state"] for item in json.loads(broken.out)}
    assert states["object store"] == "fault"
