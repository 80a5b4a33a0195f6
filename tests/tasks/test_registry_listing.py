"""Registry versions with unexpected tags, sources or reports: listed with a note, never used.

Every user with write access to the registry can create such versions.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run_main
from error_codes import raises_code
from mlflow import MlflowClient
from reports import create_report
from triton_versions import GOOD, Fill

from compressors.contracts.reasons import Reason
from flows.cli.console import printable
from infra.errors import RecordRefused, Refused
from infra.registry.mlflow_registry import RegisteredVersion
from infra.settings import load_settings
from tasks import publish as publishing
from tasks.orchestration.documents import Finished
from tasks.orchestration.order_records import find_finished_order
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import fetch, promote, version_report
from tasks.promotion.registry_listing import list_versions

ORDER = "b" * 64
# Control sequences of terminals, a reversed reading direction, a line end and markup of rich.
ESCAPES = "\x1b[31mPWN\x1b]0;t\x07\x9b1m\u202egpj\r\n[red]x[/y]"


@pytest.fixture
def accepted(fill: Fill) -> Finished:
    """The result of an accepted order that recpress has published."""
    fill("a", "")
    result = find_finished_order("a" * 64)
    assert result is not None
    return result


def register(source: Any, tags: dict[str, str], name: str = "m") -> str:
    """Register a version with any source and tags, and return its number."""
    uri = load_settings().registry_uri
    client = MlflowClient(uri, uri)
    if name != "m":
        client.create_registered_model(name)
    created = client.create_model_version(name, source, tags=tags, await_creation_for=None)
    return str(created.version)


TAGS = {
    "recpress.order": ORDER,
    "recpress.recipe": "[]",
    "recpress.outcome": "accepted",
    "recpress.bundle": "m@1",
}
# For each version: its source (None for a valid one), changes of TAGS (None removes a tag), and a
# part of the expected note.
UNEXPECTED: dict[str, tuple[str | None, dict[str, str | None], str]] = {
    "no recipe": (None, {"recpress.recipe": None}, "recpress.recipe is not a list of steps"),
    "recipe not JSON": (None, {"recpress.recipe": "{"}, "not a list of steps"),
    "recipe empty": (None, {"recpress.recipe": ""}, "not a list of steps"),
    "recipe of numbers": (None, {"recpress.recipe": "[1]"}, "not a list of steps"),
    "recipe an object": (None, {"recpress.recipe": '{"kind": "x"}'}, "not a list of steps"),
    "recipe null": (None, {"recpress.recipe": "null"}, "not a list of steps"),
    "recipe no kind": (None, {"recpress.recipe": "[{}]"}, "not a list of steps"),
    "recipe kind a list": (None, {"recpress.recipe": '[{"kind": []}]'}, "not a list of steps"),
    "recipe deep": (None, {"recpress.recipe": "[" * 4000}, "not a list of steps"),
    "recipe huge number": (None, {"recpress.recipe": "9" * 4500}, "not a list of steps"),
    "no outcome": (None, {"recpress.outcome": None}, "no tag recpress.outcome"),
    "no bundle": (None, {"recpress.bundle": None}, "no tag recpress.bundle"),
    "only an order": (None, {name: None for name in TAGS if name != "recpress.order"}, "no tag"),
    "order not a digest": (None, {"recpress.order": "x"}, "not an order's digest"),
    "source of this machine": ("file:///etc", {}, "its source is not an artifact"),
    "source elsewhere": ("http://127.0.0.1:1/x", {}, "its source is not an artifact"),
    "source empty": ("", {}, "its source is not an artifact"),
    "escapes": (
        None,
        {"recpress.outcome": ESCAPES, "recpress.bundle": ESCAPES, "recpress.recipe": ESCAPES},
        "not a list of steps",
    ),
    "escapes in the recipe": (None, {"recpress.recipe": json.dumps([{"kind": ESCAPES}])}, ""),
}


# The same code reads all invalid recipes, so the default tier has two of them.
NIGHTLY = {kind for kind in UNEXPECTED if kind.startswith("recipe ")}
NIGHTLY -= {"recipe no kind", "recipe deep"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.nightly if kind in NIGHTLY else ())
        for kind in UNEXPECTED
    ],
)
def test_version_with_unexpected_tags_is_listed_with_a_note_next_to_the_others(
    kind: str,
    accepted: Finished,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, changes, note = UNEXPECTED[kind]
    tags = {name: text for name, text in (TAGS | changes).items() if text is not None}
    unexpected = register(f"artifacts/{'0' * 64}" if source is None else source, tags)
    versions = {item.version: item for item in list_versions(None)}
    assert set(versions) == {accepted.version, unexpected}
    assert note in versions[unexpected].note
    listed_accepted = versions[accepted.version]
    assert (listed_accepted.note, listed_accepted.recipe) == ("", ("rowwise_int8",))
    code, text = run_main(monkeypatch, capsys, "registry", "list")
    assert code == 0
    assert "rowwise_int8" in text
    assert (f"m version {unexpected} is not as recpress registers it" in text) == bool(note)
    assert text == printable(text)
    code, text = run_main(monkeypatch, capsys, "registry", "list", "--json")
    assert (code, text) == (0, printable(text))
    assert [item["version"] for item in json.loads(text)] == [unexpected, accepted.version]
    assert (
        run_main(monkeypatch, capsys, "registry", "show", "m", "--version", accepted.version)[0]
        == 0
    )
    assert run_main(monkeypatch, capsys, "registry", "show", "m", "--version", unexpected)[0] == 2


def test_model_with_an_unexpected_name_is_left_out_of_the_list(accepted: Finished) -> None:
    for name in ("it's", "tab\there", 'quo"te'):
        register(f"artifacts/{'0' * 64}", TAGS, name)
    assert [item.model for item in list_versions(None)] == ["m"]
    with pytest.raises(Refused):
        list_versions("it's")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"schema_version": 1}',
        b'{"schema_version": ' + b"9" * 5_000 + b"}",
        b"\xff\xfe",
        b'{"schema_version": NaN}',
    ],
)
def test_release_without_a_valid_report_is_refused(
    body: bytes, accepted: Finished, tmp_path: Path
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "report.json").write_bytes(body)
    unexpected = register(store().put(tmp_path / "r").uri, TAGS)
    for use in (
        lambda: version_report("m", unexpected),
        lambda: fetch("m", unexpected, "onnxruntime", tmp_path / "out"),
        lambda: promote("m", unexpected, reason=""),
    ):
        with raises_code(RecordRefused, "report_unusable", file="report.json"):
            use()


def test_escape_sequences_in_a_report_or_name_are_not_printed(
    accepted: Finished,
    work_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unpublished = create_report(work_folder, ORDER, GOOD)
    target = unpublished.targets[0]
    verdict = target.verdict.model_copy(update={"reasons": (Reason("as_written", text=ESCAPES),)})
    targets = (target.model_copy(update={"verdict": verdict}), *unpublished.targets[1:])
    finished = publishing.publish.fn(unpublished.model_copy(update={"targets": targets}))
    for options in ((), ("--json",)):
        code, text = run_main(
            monkeypatch, capsys, "registry", "show", "m", "--version", finished.version, *options
        )
        assert code == 0
        assert "PWN" in text
        assert text == printable(text)
    code, text = run_main(monkeypatch, capsys, "registry", "show", f"{ESCAPES}", "--version", "1")
    assert (code, text) == (2, printable(text))


def test_references_are_listed_with_the_root_of_the_current_store(accepted: Finished) -> None:
    (item,) = list_versions("m")
    assert isinstance(item, RegisteredVersion)
    assert item.source == store().uri_of(accepted.release)
    assert item.tags["recpress.report"] == accepted.page_uri()
    served = accepted.report.targets[0].artifact
    assert item.tags["recpress.artifact.onnxruntime"] == store().uri_of(served)
