"""Hostile registry entries for ``registry show``, ``fetch`` and ``promote``.

Each case is a registered version with a false source, tag or report. The source of a version is the
URI of its release, which contains ``report.json``; the tags repeat parts of the report.
``register`` registers all cases; it runs in a child process. The release of a case with a false
report is stored.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

MODEL = "m"
OTHER_ORDER = "1" * 64  # digest of an order that is not that of the release

VALID_RELEASES = {
    "recipe tag is missing",
    "recipe tag of numbers",
    "recipe tag is no JSON",
    "recipe tag without kinds",
    "tags with control characters",
    "report with control characters",
}
"""Cases whose release is valid, so commands may use it.

A tag is wrong, or a text of the tags or of the report has control characters. Before a release is
served, it is compared with the tags.
"""

MAY_WORK = {
    # `show` reads only the report.
    "target outside the store": ("show",),
    "accepted report of a rejected target": ("show",),
    # Graph names are not file names: `fetch` uses the file names of the verified artifact.
    "graph whose name climbs out": ("show", "fetch"),
}
"""Cases of a stored release with false content, and the commands that may succeed on it."""


def cases() -> tuple[str, ...]:
    """Return the names of all cases in the order of registration."""
    return (*SOURCES, *TAGS, *BODIES, *REPORTS)


# Source of a version, from the root of the store and a valid report.
SOURCES: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "source outside the store": lambda _root, _report: "file:///etc",
    "source that climbs out": lambda root, _report: f"{root}/artifacts/../../../../etc",
    "source without a report": lambda _root, report: str(report["compressed"]["uri"]),
    "source that is missing": lambda root, _report: f"{root}/artifacts/{'0' * 64}",
    "source on the web": lambda _root, _report: "http://127.0.0.1:1/x",
    "source in another bucket": lambda _root, _report: "s3://a/b",
    "source that is empty": lambda _root, _report: "",
}
# Changes of a version's tags; None removes a tag.
TAGS: dict[str, dict[str, str | None]] = {
    "recipe tag is missing": {"recpress.recipe": None},
    "recipe tag of numbers": {"recpress.recipe": "[1]"},
    "recipe tag is no JSON": {"recpress.recipe": "{"},
    "recipe tag without kinds": {"recpress.recipe": "[{}]"},
    "tags with control characters": {
        "recpress.outcome": "\x1b[31mred\x1b]0;title\x07",
        "recpress.bundle": "[red]x[/y]",
    },
}
# Content of report.json in a release.
BODIES: dict[str, bytes] = {
    "report is no JSON": b"{",
    "report is a list": b"[]",
    "report of depth 100,000": b"[" * 100_000,
    "report without fields": b'{"schema_version":1}',
    "report with an integer of 5,000 digits": b'{"schema_version":' + b"9" * 5000 + b"}",
    "report is not UTF-8": b"\xff\xfe",
    "report is empty": b"",
}


def _each(part: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Any], None]:
    """Return a function that changes every item of one list in a report."""

    def apply(report: dict[str, Any]) -> None:
        for item in report[part]:
            change(item)

    return apply


def _move_outside(target: dict[str, Any]) -> None:
    """Change the address of a target's artifact to a path outside the store."""
    target["artifact"]["uri"] = "file:///etc/" + target["artifact"]["sha256"]


def _rename_graphs_outside(target: dict[str, Any]) -> None:
    """Change the names of a target's graphs to a path outside their folder."""
    for graph in target["lowering"]["graphs"]:
        graph["name"] = "../../../outside"


# A reason of a verdict whose text has control characters.
CONTROL = {"code": "as_written", "fields": {"text": "\x1b[31mred\x1b]0;t\x07\x9b"}}

# Changes of a valid report.
REPORTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "target outside the store": _each("targets", _move_outside),
    "graph whose name climbs out": _each("targets", _rename_graphs_outside),
    "report with control characters": _each(
        "targets",
        lambda item: item["verdict"].update(reasons=[CONTROL]),
    ),
    "report without targets": lambda report: report.update(targets=[]),
    "accepted report of a rejected target": _each(
        "targets", lambda item: item["verdict"].update(outcome="rejected")
    ),
    "report of another order": lambda report: report.update(order=OTHER_ORDER),
    "report of another model": lambda report: report.update(name="other"),
}


def register(folder: str) -> dict[str, str]:
    """Register all cases; return the version of each.

    Args:
        folder: folder for the files of the reports.
    """
    from mlflow import MlflowClient

    from infra.settings import load_settings
    from tasks.orchestration.workspace import store

    # Publish a valid order first, to copy its report and tags. Its digest is 64 times "d".
    valid = import_module("triton_versions").publish_version(Path(folder), "d")
    report = json.loads(valid.report.model_dump_json())
    uri = load_settings().registry_uri
    client = MlflowClient(uri, uri)
    (version,) = client.search_model_versions(f"name = '{MODEL}'")
    tags, root = dict(version.tags), store().root
    client.delete_model_version(MODEL, version.version)
    valid_report = json.dumps(report).encode()
    versions: dict[str, str] = {}

    def create(name: str, source: str, changes: dict[str, str | None] | None = None) -> None:
        all_tags = {key: value for key, value in {**tags, **(changes or {})}.items() if value}
        created = client.create_model_version(MODEL, source, tags=all_tags, await_creation_for=None)
        versions[name] = str(created.version)

    for name, source_of in SOURCES.items():
        create(name, source_of(root, report))
    for name, changes in TAGS.items():
        create(name, _release(valid_report), changes)
    for name, body in BODIES.items():
        create(name, _release(body))
    for name, change in REPORTS.items():
        changed = copy.deepcopy(report)
        change(changed)
        create(name, _release(json.dumps(changed).encode()))
    return versions


def _release(report: bytes) -> str:
    """Store a release with this report; return its URI."""
    from tasks.orchestration.workspace import store

    with tempfile.TemporaryDirectory() as scratch:
        for name in ("report.md", "report.html"):
            (Path(scratch) / name).write_text("x")
        (Path(scratch) / "report.json").write_bytes(report)
        return store().uri_of(store().put(Path(scratch)))
