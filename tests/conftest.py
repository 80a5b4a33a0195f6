"""What every test starts from: an empty environment and a home of its own."""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx_operators import operators_read_once
from s3_server import S3Server, running_server

from infra.telemetry import disable_telemetry

PLACES = {"RECPRESS_STORE", "RECPRESS_TRITON", "MLFLOW_TRACKING_URI"}

disable_telemetry()

# Prefect reads this when it is imported, which is before any fixture runs.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-")


# Exports take seconds each; these files look at the same ones, so one process runs them all.
SAME_GRAPHS = {"test_audit", "test_composed", "test_lowered_graphs", "test_lowering", "test_parity"}
SAME_RUNS = {"test_steps", "test_outline"}
# What takes minutes begins first, or one process ends alone (with --no-loadscope-reorder).
LONGEST = ("flows", "graphs", "test_readme")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, those that share something slow stay together.

    That is the tests of a file, those of all flows (one Prefect server, one finished order), those
    of all faults (one server of forks), and those of the same exported graphs, or of the same runs
    of every method.
    """
    groups = {id(item): _group(item) for item in items}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[id(item)]))
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(groups[id(item)], len(LONGEST)))


def _group(item: pytest.Item) -> str:
    name = item.path.stem
    if item.path.parent.name in {"flows", "faults"}:
        return item.path.parent.name
    if name in SAME_GRAPHS:
        return "graphs"
    return "runs" if name in SAME_RUNS else name


def pytest_collection_finish() -> None:
    """What is imported and collected lives to the end: the garbage collector need not look."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def _operators_read_once() -> Iterator[None]:
    with operators_read_once():
        yield


@pytest.fixture(autouse=True)
def _own_surroundings(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a person's own store, registry or cloud account."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_TRACKING_")) or name in PLACES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("RECPRESS_HOME", str(home / "recpress"))
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "no-credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "no-config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 server for the whole run. If it cannot start, tests fail rather than skip."""
    with running_server(Path(tmp_path_factory.mktemp("seaweedfs"))) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with the environment of this test pointing to it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
