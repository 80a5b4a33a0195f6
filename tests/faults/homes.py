"""Homes to break: how they are prepared, what must be equal after a fault, and what must be whole.

A ``Home`` is a folder with everything one installation writes: the store and the registry, a Triton
repository that follows the champion, and temporary files. Functions that tests pass to
``Forks.call`` (``registered``) run in a child process; the others read files only.
"""

import json
import os
import re
import shutil
import sqlite3
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from infra.errors import InfraError, Refused
from infra.registry.ledger import Ledger
from infra.store.object_store import Store
from infra.store.records import is_sealed

ROWS = {"train": 600, "calibration": 200, "validation": 200, "test": 600}
ORDER = {
    "model": "clicks",
    "preset": "custom",
    "steps": [{"kind": "rowwise_int8"}],
    "limits": [{"metric": "auc", "against": "baseline", "at_least": -0.4}],
    "targets": {"onnxruntime": "required"},
    "promote": True,
}
MEASURED = re.compile(r"_ms@")
TEMPORARY = re.compile(r"\.[0-9a-f]{12}-\d+-\d+-[0-9a-f]{8}\.\w+$|\.(part|damaged|new)$")
"""Names that only an unfinished command leaves."""


@dataclass(frozen=True)
class Home:
    """One installation below ``root``."""

    root: Path

    @property
    def recpress(self) -> Path:
        return self.root / "recpress"

    @property
    def store(self) -> Path:
        return self.recpress / "store"

    @property
    def variables(self) -> dict[str, str]:
        """What a command needs to work in this home."""
        (self.root / "tmp").mkdir(parents=True, exist_ok=True)
        return {
            "RECPRESS_HOME": str(self.recpress),
            "RECPRESS_TRITON": str(self.root / "triton"),
            "RECPRESS_USER": "tester",
            "TMPDIR": str(self.root / "tmp"),
        }

    def restore(self, snapshot: Path) -> None:
        """Replace all of it by a copy."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(snapshot, self.root)

    def keep(self, snapshot: Path) -> Path:
        """Copy all of it to ``snapshot``."""
        shutil.rmtree(snapshot, ignore_errors=True)
        shutil.copytree(self.root, snapshot)
        return snapshot

    def files(self) -> dict[str, Path]:
        """Every file by its path below the root; locks and temporary files are left out."""
        found = sorted(path for path in self.root.rglob("*") if path.is_file())
        names = {str(path.relative_to(self.root)): path for path in found}
        return {
            name: path
            for name, path in names.items()
            if not name.startswith("tmp/") and not name.endswith((".lock", "-journal"))
        }


def write_order(file: Path, **changes: Any) -> Path:
    """Write an order of the tests to a file."""
    file.write_text(json.dumps({**ORDER, **changes}))
    return file


def registered(folder: str, orders: list[str], promoted: int) -> list[str]:
    """Publish orders without their work and promote the first ones; returns their versions.

    Args:
        folder: for the files of the reports.
        orders: hex digits; each names an order.
        promoted: how many of them were champion, one after another.
    """
    from tasks.promotion.promotions import promote

    published = import_module("triton_versions").published  # in tests/tasks
    versions = [published(Path(folder), digit).version for digit in orders]
    for version in versions[:promoted]:
        promote("m", version, "")
    return versions


def state(home: Home, store: Store | None = None) -> dict[str, Any]:
    """What an installation holds, without what differs between runs: times and latencies.

    Args:
        home: the installation.
        store: its store, if that is not in the home.
    """
    held = store or Store(str(home.store))
    return {
        "bundles": {
            key: json.loads(held.read(key))["artifact"]["sha256"] for key in held.keys("bundles/")
        },
        "orders": {key: _order(held, key) for key in held.keys("orders/")},
        "versions": _versions(home),
        "aliases": _aliases(home),
        "ledger": {
            model: [
                (entry.sequence, entry.action, entry.version, entry.order, entry.previous)
                for entry in Ledger(held, model).entries()
            ]
            for model in sorted({key.split("/")[1] for key in held.keys("ledger/")})
        },
        "triton": {
            str(path.relative_to(home.root)): path.read_text()
            for path in sorted((home.root / "triton").glob("*/config.pbtxt"))
        },
    }


def damage(home: Home, store: Store | None = None) -> list[str]:
    """What is visible in an installation and not whole, or contradicts itself."""
    held, found = store or Store(str(home.store)), []
    keys = held.keys("")
    for name in sorted({key.split("/")[1] for key in keys if key.endswith("/manifest.json")}):
        try:
            held.local(held.artifact(f"artifacts/{name}"), home.root / "copies")
        except (Refused, InfraError) as fault:
            found.append(f"artifact {name[:8]}: {fault}")
    for key in (key for key in keys if not key.startswith("artifacts/")):
        body = held.read(key)
        try:
            document = json.loads(body)
        except ValueError as fault:
            found.append(f"record {key}: {fault}")
            continue
        if "seal" in document and not is_sealed(body):
            found.append(f"record {key}: its seal does not match")
    versions = {(model, number): tags for model, number, tags in _tagged(home)}
    for (model, number), tags in versions.items():
        release = tags.get("recpress.release", "")
        if held.find(release) is None:
            found.append(f"version {number} of {model} names a release that is not stored")
    for (model, alias), number in _aliases(home).items():
        if (model, number) not in versions:
            found.append(f"alias {alias} of {model} names version {number}, which is missing")
        elif alias == "champion" and not held.keys(f"ledger/{model}/"):
            found.append(f"{model} has the alias champion and no ledger")
    return found


def temporaries(home: Home) -> list[str]:
    """Files and folders that only an unfinished command leaves."""
    return sorted(
        str(path.relative_to(home.root))
        for path in home.root.rglob("*")
        if TEMPORARY.search(path.name)
    )


def _order(held: Store, key: str) -> dict[str, Any]:
    record = json.loads(held.read(key))
    release = held.artifact(f"artifacts/{record['release']['sha256']}")
    report = json.loads(held.file(release, "report.json"))
    numbers = (report["measurement"] or {"numbers": {"numbers": []}})["numbers"]["numbers"]
    return {
        "version": record["version"],
        "order": report["order"],
        "outcome": report["outcome"],
        "source": report["source"]["sha256"],
        "compressed": report["compressed"]["sha256"],
        "targets": {item["target"]: item["artifact"]["sha256"] for item in report["targets"]},
        "plan": report["plan"],
        "stages": [stage["bundle"]["sha256"] for stage in report["stages"]],
        "quality": [item for item in numbers if not MEASURED.search(item["metric"])],
    }


def _registry(home: Home, query: str) -> list[Any]:
    file = home.recpress / "registry.db"
    if not file.exists():
        return []
    database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return database.execute(query).fetchall()
    finally:
        database.close()


def _tagged(home: Home) -> list[tuple[str, str, dict[str, str]]]:
    tags: dict[tuple[str, str], dict[str, str]] = {}
    for model, number in _registry(
        home, "SELECT name, version FROM model_versions WHERE current_stage != 'Deleted_Internal'"
    ):
        tags[model, str(number)] = {}
    for model, number, key, value in _registry(
        home, "SELECT name, version, key, value FROM model_version_tags"
    ):
        if (model, str(number)) in tags:
            tags[model, str(number)][key] = value
    return [(model, number, found) for (model, number), found in sorted(tags.items())]


def _versions(home: Home) -> list[tuple[str, str, str, str]]:
    return [
        (model, number, tags.get("recpress.order", ""), tags.get("recpress.outcome", ""))
        for model, number, tags in _tagged(home)
    ]


def _aliases(home: Home) -> dict[tuple[str, str], str]:
    rows = _registry(home, "SELECT name, alias, version FROM registered_model_aliases")
    return {(model, alias): str(number) for model, alias, number in rows}


def environment(home: Path) -> dict[str, str]:
    """What the server of forks starts with: nothing of the person's own."""
    import drafts

    return drafts.environment(
        home,
        DO_NOT_TRACK="1",
        MLFLOW_DISABLE_TELEMETRY="true",
        OMP_NUM_THREADS="1",
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        TZ=os.environ.get("TZ", "UTC"),
    )
