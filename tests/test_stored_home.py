"""Backward compatibility: commands on a home folder that an earlier version of recpress wrote.

A home has everything that recpress stores; its ledger is the list of a model's promotions and
rollbacks. Each fixture (a stored home) in ``tests/stored_home/fixtures`` was written once and never
changes, so these tests fail if a change makes stored files unreadable. See
``tests/stored_home/create.py`` for how to add a fixture.
"""

import hashlib
import importlib
import io
import json
import lzma
import pkgutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import run_main
from prefect import Task

import tasks
from infra.bundle.bundle_folder import read
from infra.bundle.json_limits import validate_json
from infra.bundle.json_reader import read_document
from infra.data.expectations import Validation
from infra.registry.ledger import Ledger
from infra.tensorrt.engines import Engine
from tasks.bundles.bundle_ref import resolve
from tasks.orchestration.documents import Measurement, Report, Stages
from tasks.orchestration.graph_documents import read_lowering
from tasks.orchestration.order_records import find_finished_order
from tasks.orchestration.result_records import read_result
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import version_report
from tasks.report.page import page, read_validation
from tasks.report.tables import markdown
from tests.stored_home import create
from tests.stored_home.archive import fixtures, unpack
from tests.stored_home.create import HOME
from tests.stored_home.stored import (
    EXPECTED,
    NAMES,
    WITH_ORDERS,
    Fixture,
    copy_home,
    load_fixture,
    use_home,
)

RENAMED = {"lost": "measure_quality_loss", "weigh": "measure_stages"}
"""Current name by stored name of renamed tasks."""
FILES = {
    "0.1.0-2026-11-30": {
        "expected.json": "84f888849e9c56fc21f72017864f3a92f38ee72c41db7fbb32e5bef4f87c467c",
        "expected.safetensors": "cb36e959eb5c72642ec3afc2d2636cdecc7c1fd76a0cf3afc8156a905ad13ed4",
        "home.tar.xz.1": "ffd26476d21366bbfdae56b1b2aa53ffffa99609c0f821a71973091167ccbde9",
    },
    "0.1.0-2026-12-01": {
        "expected.json": "41663a2209834c22d65bfbc887e822d547937b6fb8460542693cc547afe9e48b",
        "expected.safetensors": "5d32c40d255efe93314e4557365580d15071291ddac9a4a6966b72bd90169028",
        "home.tar.xz.1": "c27559de2bd2c42358db0be529bbb0c58284d1b90b4ff4edf952c26fa0132181",
    },
}
"""SHA-256 of every file of every fixture; lines are added, never changed."""
every_fixture = pytest.mark.parametrize("name", NAMES)
every_home = pytest.mark.parametrize("name", WITH_ORDERS)


def current_tasks() -> dict[str, Task[..., Any]]:
    """Return every Prefect task in ``tasks/`` by its name."""
    modules = pkgutil.walk_packages(tasks.__path__, "tasks.")
    members = [vars(importlib.import_module(module.name)).values() for module in modules]
    return {task.name: task for result in members for task in result if isinstance(task, Task)}


@pytest.fixture
def fixture(name: str, monkeypatch: pytest.MonkeyPatch) -> Fixture:
    """A stored home with its expected results, which the test only reads."""
    result = load_fixture(name)
    use_home(monkeypatch, result.root)
    return result


@pytest.fixture
def home(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parent of a copy of a stored home, at another path, which the test may change."""
    root = copy_home(name, tmp_path / "moved")
    use_home(monkeypatch, root)
    return root


# --- fixtures --------------------------------------------------------------------------------


def test_fixture_files_are_unchanged():
    result = {
        folder.name: {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
        }
        for folder in fixtures()
    }
    assert result == FILES
    assert WITH_ORDERS


def test_creating_an_existing_fixture_exits_with_an_error():
    with pytest.raises(SystemExit, match="exists and stays as it is"):
        create.main([NAMES[0]])


@pytest.mark.parametrize(("name", "target"), [("../outside", ""), ("link", "/etc")])
def test_unpacking_an_entry_outside_the_folder_raises_a_filter_error(
    name: str, target: str, tmp_path: Path
):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = (tarfile.SYMTYPE, target) if target else (entry.type, "")
        tar.addfile(entry)
    (tmp_path / "home.tar.xz.1").write_bytes(lzma.compress(archive.getvalue()))
    with pytest.raises(tarfile.FilterError):
        unpack(tmp_path, tmp_path / "into")
    assert not (tmp_path / "outside").exists()


# --- the registry's commands -----------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """The command line in this process, with the home of the test."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run a command, require its exit code, and return its output."""
        exit_code, text = run_main(self.monkeypatch, self.capsys, *arguments)
        assert exit_code == code, text
        return text

    def json(self, *arguments: str, code: int = 0) -> Any:
        """Run a command with ``--json`` and return the parsed output."""
        return json.loads(self(*arguments, "--json", code=code))


@pytest.fixture
def recpress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def require_within(expected: Any, actual: Any, path: str = "") -> None:
    """Require that ``actual`` has every value of a stored document; it may have more fields."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict), path
        for key, value in expected.items():
            assert key in actual, f"{path}.{key} is missing"
            require_within(value, actual[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert isinstance(actual, list), path
        assert len(actual) == len(expected), path
        for number, (old, new) in enumerate(zip(expected, actual, strict=True)):
            require_within(old, new, f"{path}[{number}]")
    else:
        assert actual == expected, path


def stored_versions(name: str, home: Path) -> list[dict[str, Any]]:
    """Return the stored output of ``registry list`` with the current path of the home."""
    text = json.dumps(EXPECTED[name]["registry"]["list"])
    result: list[dict[str, Any]] = json.loads(text.replace(HOME, str(home / "recpress")))
    return result


@every_home
def test_registry_list_and_show_print_the_stored_output(name: str, home: Path, recpress: Command):
    versions = stored_versions(name, home)
    assert len(versions) == len(EXPECTED[name]["finished"])
    require_within(versions, recpress.json("registry", "list"))
    for version, report in EXPECTED[name]["registry"]["show"].items():
        model, _, number = version.partition("@")
        require_within(report, recpress.json("registry", "show", model, "--version", number))


@every_home
def test_registry_show_prints_every_stored_report_and_writes_its_page(
    name: str, home: Path, recpress: Command
):
    for version in EXPECTED[name]["registry"]["show"]:
        model, _, number = version.partition("@")
        command = ("registry", "show", model, "--version", number)
        assert recpress(*command).startswith("#")
        recpress(*command, "--html", str(home / "page.html"))
        assert "</html>" in (home / "page.html").read_text()


@every_home
def test_registry_fetch_writes_the_files_of_a_stored_champion(
    name: str, home: Path, recpress: Command
):
    for model, files in EXPECTED[name]["registry"]["fetch"].items():
        recpress("registry", "fetch", model, "--into", str(home / model))
        result = {
            path.relative_to(home / model).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (home / model).rglob("*")
            if path.is_file()
        }
        assert result == files
        assert any(path.endswith(".onnx") for path in result)
    # Version 2 is of the order "safe", whose optional target is an engine.
    engine = ("--version", "2", "--target", "tensorrt-rtx", "--unmeasured")
    recpress("registry", "fetch", "clicks", "--into", str(home / "engine"), *engine)
    assert (home / "engine" / "model.engine").stat().st_size > 0


@every_home
def test_promotions_and_rollbacks_extend_the_stored_ledger(home: Path, recpress: Command):
    def ledger() -> list[tuple[str, str]]:
        return [(entry.action, entry.version) for entry in Ledger(store(), "clicks").entries()]

    # Versions 1 to 4 are of the first four orders of tests/stored_home/orders.py. The first order
    # promoted its result, and commands after the second promoted version 2 and rolled it back.
    before = [("promote", "1"), ("promote", "2"), ("rollback", "1")]
    assert ledger() == before
    recpress("registry", "promote", "clicks", "--version", "3", code=2)  # it is rejected
    recpress("registry", "promote", "clicks", "--version", "4", code=2)  # it is undecided
    assert ledger() == before
    recpress("registry", "promote", "clicks", "--version", "2")
    assert ledger() == [*before, ("promote", "2")]
    champion = recpress.json("registry", "show", "clicks", "--version", "@champion")
    assert champion["reproduction"]["order"]["preset"] == "safe"
    recpress("registry", "rollback", "clicks")
    assert ledger() == [*before, ("promote", "2"), ("rollback", "1")]


@every_home
def test_a_stored_triton_repository_is_shown_and_exported(home: Path, recpress: Command):
    for model in ("clicks", "ranker", "finder"):
        # Another version may write another configuration; then the exit code is 1.
        _, text = run_main(recpress.monkeypatch, recpress.capsys, "triton", "show", model, "--json")
        shown = json.loads(text)
        assert {item["served"] for item in shown} == {"1"}
        assert {state for item in shown for state in item["files"].values()} == {"ok"}
        recpress("triton", "export", model)
        exported = recpress.json("triton", "show", model)
        assert {item["state"] for item in exported} == {"champion"}
    recpress("registry", "promote", "clicks", "--version", "2")
    assert {item["served"] for item in recpress.json("triton", "show", "clicks")} == {"2"}


@every_home
def test_registry_restore_recreates_a_deleted_registry_with_its_tags(
    name: str, home: Path, recpress: Command
):
    (home / "recpress" / "registry.db").unlink()
    recpress("registry", "restore")
    require_within(stored_versions(name, home), recpress.json("registry", "list"))


@every_home
def test_every_stored_report_is_rendered(fixture: Fixture):
    for version in fixture.expected["registry"]["show"]:
        model, _, number = version.partition("@")
        _, report = version_report(model, number)
        assert markdown(report).startswith("#")
        assert "</html>" in page(report, read_validation(report.validation))


# --- bundles, tables and records -------------------------------------------------------------


@every_fixture
def test_a_stored_bundle_is_checked_and_packing_it_gives_the_same_artifact(
    home: Path, recpress: Command
):
    for model in ("clicks", "ranker", "finder"):
        result = recpress.json("bundle", "check", f"{model}@1")
        assert (result["name"], result["version"]) == (model, "1")
        before = resolve(f"{model}@1")
        packed = recpress.json("bundle", "pack", str(home / "drafts" / model))
        assert packed["artifact"]["sha256"] == before.sha256
        assert packed["rows"] == result["rows"]
        manifest = recpress.json("bundle", "show", before.uri)
        assert manifest == recpress.json("bundle", "show", model)


@every_fixture
def test_stored_table_files_are_complete(name: str, fixture: Fixture, recpress: Command):
    for kind, sha256 in EXPECTED[name]["tables"].items():
        result, tables = recpress.json("tables", "check", str(fixture.root / "tables" / kind))
        assert result["sha256"] == sha256
        assert tables["step"]["kind"] == kind


@every_home
def test_every_stored_task_result_is_read(fixture: Fixture):
    """Keys have a digest of the code, so the results are not used again, but must be readable."""
    current = current_tasks()
    keys = store().keys("results/")
    assert len({key.split("/")[1] for key in keys}) > 10
    for key in keys:
        _, task, file = key.split("/")
        function = current[RENAMED.get(task, task)].fn
        read_result(store(), task, file.removesuffix(".json"), function)


DOCUMENTS = {
    "build.json": lambda path: validate_json(Engine, path.read_bytes()),
    "lowering.json": lambda path: read_lowering(path.parent),
    "measurement.json": lambda path: read_document(Measurement, path),
    "model.json": lambda path: read(path.parent),
    "report.json": lambda path: validate_json(Report, path.read_bytes()),
    "stages.json": lambda path: Stages.validate_json(path.read_bytes()),
    "validation.json": lambda path: read_document(Validation, path),
}
"""Readers of the documents in artifacts; the other JSON files are a user's vocabularies."""


@every_home
def test_every_document_in_a_stored_artifact_is_read(fixture: Fixture):
    artifacts = fixture.root / "recpress" / "store" / "artifacts"
    for name, reader in DOCUMENTS.items():
        paths = sorted(artifacts.glob(f"*/files/{name}"))
        assert paths, name
        for path in paths:
            assert reader(path) is not None
    assert {path.name for path in artifacts.glob("*/files/*.json")} == {*DOCUMENTS, "items.json"}


@every_home
def test_every_finished_order_is_found_with_its_version(name: str, fixture: Fixture):
    for order in EXPECTED[name]["finished"].values():
        result = find_finished_order(order["order"])
        assert result is not None
        assert (result.version, result.report.name) == (order["version"], order["model"])
        assert (result.report.outcome, result.release.sha256) == (
            order["outcome"],
            order["release"],
        )
