"""Prepare, compare and check the recpress homes of fault tests.

A ``Home`` is a folder with all files of one installation: the store, the registry, a Triton
repository with the champion, and temporary files. A snapshot is a copy of a home. The ledger is the
list of a model's promotions and rollbacks in the store. Tests call ``publish_orders`` in a child
process (``ForkServerClient.call``); the functions after it only read files.
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

# Number of rows of each split of the draft (the bundle before it is packed).
ROWS = {"train": 600, "calibration": 200, "validation": 200, "test": 600}
# The limit is so wide that every result is accepted.
ORDER = {
    "model": "clicks",
    "preset": "custom",
    "steps": [{"kind": "rowwise_int8"}],
    "limits": [{"metric": "auc", "against": "baseline", "at_least": -0.4}],
    "targets": {"onnxruntime": "required"},
    "promote": True,
}
LATENCY_METRIC = re.compile(r"_ms@")
"""Part of the names of latency metrics, whose values differ between runs."""
TEMPORARY = re.compile(r"\.[0-9a-f]{12}-\d+-\d+-[0-9a-f]{8}\.\w+$|\.(part|damaged|new)$")
"""Names of files and folders that remain only after an unfinished command."""


@dataclass(frozen=True)
class Home:
    """One installation in the folder ``root``."""

    root: Path

    @property
    def recpress(self) -> Path:
        """The folder that ``RECPRESS_HOME`` refers to."""
        return self.root / "recpress"

    @property
    def store(self) -> Path:
        """The folder of the object store."""
        return self.recpress / "store"

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables for a command that uses this home."""
        (self.root / "tmp").mkdir(parents=True, exist_ok=True)
        return {
            "RECPRESS_HOME": str(self.recpress),
            "RECPRESS_TRITON": str(self.root / "triton"),
            "RECPRESS_USER": "tester",
            "TMPDIR": str(self.root / "tmp"),
        }

    def restore(self, snapshot: Path) -> None:
        """Replace the whole home by a copy of a snapshot."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(snapshot, self.root)

    def save_snapshot(self, snapshot: Path) -> Path:
        """Copy the whole home to ``snapshot``."""
        shutil.rmtree(snapshot, ignore_errors=True)
        shutil.copytree(self.root, snapshot)
        return snapshot

    def files(self) -> dict[str, Path]:
        """Return all files except locks and temporary files, by path relative to the root."""
        paths = sorted(path for path in self.root.rglob("*") if path.is_file())
        names = {str(path.relative_to(self.root)): path for path in paths}
        return {
            name: path
            for name, path in names.items()
            if not name.startswith("tmp/") and not name.endswith((".lock", "-journal"))
        }


def write_order(file: Path, **changes: Any) -> Path:
    """Write the order of the tests, with changes, to a file."""
    file.write_text(json.dumps({**ORDER, **changes}))
    return file


def publish_orders(folder: str, orders: list[str], promoted: int) -> list[str]:
    """Publish orders without running them and promote the first ones; return their versions.

    Args:
        folder: folder for the files of the reports.
        orders: one hex digit per order, whose digest is 64 times this digit.
        promoted: number of orders to promote, one after another.
    """
    from tasks.promotion.promotions import promote

    publish_version = import_module("triton_versions").publish_version  # in tests/tasks
    versions = [publish_version(Path(folder), digit).version for digit in orders]
    for version in versions[:promoted]:
        promote("m", version, "")
    return versions


def read_state(home: Home, store: Store | None = None) -> dict[str, Any]:
    """Read the state of an installation except times and latencies, which differ between runs.

    Args:
        home: the installation.
        store: its store, if the store is not in the home.
    """
    used_store = store or Store(str(home.store))
    return {
        "bundles": {
            key: json.loads(used_store.read(key))["artifact"]["sha256"]
            for key in used_store.keys("bundles/")
        },
        "orders": {key: _read_order(used_store, key) for key in used_store.keys("orders/")},
        "versions": _read_versions(home),
        "aliases": _read_aliases(home),
        "ledger": {
            model: [
                (entry.sequence, entry.action, entry.version, entry.order, entry.previous)
                for entry in Ledger(used_store, model).entries()
            ]
            for model in sorted({key.split("/")[1] for key in used_store.keys("ledger/")})
        },
        "triton": {
            str(path.relative_to(home.root)): path.read_text()
            for path in sorted((home.root / "triton").glob("*/config.pbtxt"))
        },
    }


def find_damage(home: Home, store: Store | None = None) -> list[str]:
    """Describe stored content that is damaged or inconsistent; empty if there is none.

    A record's seal is its last field, the SHA-256 of the bytes before it.
    """
    used_store, problems = store or Store(str(home.store)), []
    keys = used_store.keys("")
    for name in sorted({key.split("/")[1] for key in keys if key.endswith("/manifest.json")}):
        try:
            used_store.local(used_store.artifact(f"artifacts/{name}"), home.root / "copies")
        except (Refused, InfraError) as error:
            problems.append(f"artifact {name[:8]}: {error}")
    for key in (key for key in keys if not key.startswith(("artifacts/", "blobs/"))):
        body = used_store.read(key)
        try:
            document = json.loads(body)
        except ValueError as error:
            problems.append(f"record {key}: {error}")
            continue
        if "seal" in document and not is_sealed(body):
            problems.append(f"record {key}: its seal does not match")
    versions = {(model, number): tags for model, number, tags in _read_version_tags(home)}
    for (model, number), tags in versions.items():
        release = tags.get("recpress.release", "")
        if used_store.find(release) is None:
            problems.append(f"version {number} of {model} names a release that is not stored")
    for (model, alias), number in _read_aliases(home).items():
        if (model, number) not in versions:
            problems.append(f"alias {alias} of {model} names version {number}, which is missing")
        elif alias == "champion" and not used_store.keys(f"ledger/{model}/"):
            problems.append(f"{model} has the alias champion and no ledger")
    return problems


def find_temporary_files(home: Home) -> list[str]:
    """Return the temporary files and folders that unfinished commands left."""
    return sorted(
        str(path.relative_to(home.root))
        for path in home.root.rglob("*")
        if TEMPORARY.search(path.name)
    )


def _read_order(store: Store, key: str) -> dict[str, Any]:
    """Read the content of an order's record and report that is equal in every run."""
    record = json.loads(store.read(key))
    release = store.artifact(f"artifacts/{record['release']['sha256']}")
    report = json.loads(store.file(release, "report.json"))
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
        "quality": [item for item in numbers if not LATENCY_METRIC.search(item["metric"])],
    }


def _query_registry(home: Home, query: str) -> list[Any]:
    """Return the rows of an SQL query on the registry; no rows if the file does not exist."""
    file = home.recpress / "registry.db"
    if not file.exists():
        return []
    database = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return database.execute(query).fetchall()
    finally:
        database.close()


def _read_version_tags(home: Home) -> list[tuple[str, str, dict[str, str]]]:
    """Return model, version and tags of every registered version."""
    tags: dict[tuple[str, str], dict[str, str]] = {}
    for model, number in _query_registry(
        home, "SELECT name, version FROM model_versions WHERE current_stage != 'Deleted_Internal'"
    ):
        tags[model, str(number)] = {}
    for model, number, key, value in _query_registry(
        home, "SELECT name, version, key, value FROM model_version_tags"
    ):
        if (model, str(number)) in tags:
            tags[model, str(number)][key] = value
    return [(model, number, version_tags) for (model, number), version_tags in sorted(tags.items())]


def _read_versions(home: Home) -> list[tuple[str, str, str, str]]:
    """Return model, version, order and outcome of every registered version."""
    return [
        (model, number, tags.get("recpress.order", ""), tags.get("recpress.outcome", ""))
        for model, number, tags in _read_version_tags(home)
    ]


def _read_aliases(home: Home) -> dict[tuple[str, str], str]:
    """Return the version that each alias of each model refers to."""
    rows = _query_registry(home, "SELECT name, alias, version FROM registered_model_aliases")
    return {(model, alias): str(number) for model, alias, number in rows}


def environment(home: Path) -> dict[str, str]:
    """Return the environment of the fork server, without the user's settings."""
    import drafts

    return drafts.environment(
        home,
        DO_NOT_TRACK="1",
        MLFLOW_DISABLE_TELEMETRY="true",
        OMP_NUM_THREADS="1",
        PREFECT_SERVER_ANALYTICS_ENABLED="false",
        TZ=os.environ.get("TZ", "UTC"),
    )
