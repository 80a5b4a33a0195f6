"""What every test starts from: an empty environment and a home of its own."""

import gc
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore_models import models_read_once
from groups import GROUPS, GroupScheduling, group_of
from hypothesis import HealthCheck, settings
from s3_server import S3Server, running_server

from infra.telemetry import disable_telemetry

gc.disable()  # until all is imported: nothing of it can be freed
PLACES = {"RECPRESS_STORE", "RECPRESS_TRITON", "MLFLOW_TRACKING_URI"}

disable_telemetry()

# Prefect reads this when it is imported, which is before any fixture runs.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-")


# No deadline and no limit on slow generation: a busy machine is not a wrong result. The default
# profile is derandomized: a change fails because of the change, not because of the examples drawn
# that day. The nightly profile draws new examples every time, and prints how to repeat a failure.
_PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile(
    "nightly", max_examples=200, derandomize=False, print_blob=True, **_PATIENT
)
settings.register_profile("default", max_examples=25, derandomize=True, **_PATIENT)
settings.load_profile("default")  # `pytest --hypothesis-profile nightly` overrides this


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest groups first."""
    places = {name: place for place, name in enumerate(GROUPS)}
    items.sort(key=lambda item: places.get(group_of(item.nodeid), len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling | None:
    """Schedule by the groups of ``groups.py`` under ``--dist loadgroup``."""
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_finish() -> None:
    """What is imported and collected lives to the end: the garbage collector need not look."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: a tenth of the time of a test is waiting for services."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def _read_once() -> Iterator[None]:
    # Imports torch, which the process that only sends tests to others does without.
    from onnx_operators import operators_read_once

    with operators_read_once(), models_read_once():
        yield


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new folder for each test. ``mktemp`` reads the names of all earlier ones each time."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _own_surroundings(homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a person's own store, registry or cloud account."""
    home = next(homes)
    home.mkdir()
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_TRACKING_")) or name in PLACES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("RECPRESS_HOME", str(home / "recpress"))
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "no-credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "no-config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry to copy: MLflow takes a second or two to create its tables."""
    from infra.registry.mlflow_registry import Registry

    file = tmp_path_factory.mktemp("registry") / "registry.db"
    assert Registry(f"sqlite:///{file}").models() == ()
    return file


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
