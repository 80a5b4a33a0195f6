"""Fixtures and hooks of all tests: an isolated environment, scheduling, S3 server and registry.

A home is the folder with everything that recpress stores (``RECPRESS_HOME``).
"""

import gc
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore_models import models_read_once
from groups import GROUPS, LONG_IN_NIGHTLY, GroupScheduling, group_of, has_nightly_tests
from hypothesis import HealthCheck, settings
from s3_server import S3Server, running_server

from infra.telemetry import disable_telemetry

gc.disable()  # while modules are imported, since nothing of them can be freed
LARGE_TIERS = ("slow", "nightly", "data")
LARGE_TIERS_SECONDS = 3600
"""Time limit of a test in these tiers without another limit: it only finds tests that hang.

A test of some minutes can take ten times as long on a busy machine.
"""
ADDRESS_VARIABLES = {"RECPRESS_STORE", "RECPRESS_TRITON", "MLFLOW_TRACKING_URI"}

disable_telemetry()

# Prefect reads this variable at import, before any fixture runs.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-")


# No deadline and no limit on slow generation, since the machine may be busy. The default profile
# has the same examples in every run, so a test can fail only because of a change. The nightly
# profile draws new examples each time, and prints how to repeat a failure.
_PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile(
    "nightly", max_examples=200, derandomize=False, print_blob=True, **_PATIENT
)
settings.register_profile("default", max_examples=25, derandomize=True, **_PATIENT)
settings.load_profile("default")  # `pytest --hypothesis-profile nightly` overrides this


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort tests so that the longest groups start first; give large tests a longer time limit."""
    first = LONG_IN_NIGHTLY if has_nightly_tests(config) else ()
    group_indices = {name: index for index, name in enumerate((*first, *GROUPS))}
    items.sort(key=lambda item: group_indices.get(group_of(item.nodeid), len(group_indices)))
    for item in items:
        is_large = any(item.get_closest_marker(tier) for tier in LARGE_TIERS)
        if is_large and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LARGE_TIERS_SECONDS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling | None:
    """Schedule by the groups of ``groups.py`` if pytest runs with ``--dist loadgroup``."""
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_finish() -> None:
    """Exclude imported modules and collected tests, which are never freed, from collections."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Use one process more than cores, since tests wait for services 10 % of the time."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def _read_once() -> Iterator[None]:
    """Read the large definitions of ONNX operators and of AWS's API only once in a run."""
    # Imported here because the process that only distributes tests does not need torch.
    from cached_onnx_operators import cache_onnx_operators

    with cache_onnx_operators(), models_read_once():
        yield


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a new folder for each test; ``mktemp`` would list all earlier ones each time."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def _isolated_environment(homes: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own homes and no settings of the user's stores or cloud accounts."""
    home = next(homes)
    home.mkdir()
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_TRACKING_")) or name in ADDRESS_VARIABLES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("RECPRESS_HOME", str(home / "recpress"))
    monkeypatch.setenv("PREFECT_HOME", str(home / "prefect"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(home / "no-credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "no-config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an empty registry to copy, as MLflow takes 1 to 2 s to create its tables."""
    from infra.registry.mlflow_registry import Registry

    file = tmp_path_factory.mktemp("registry") / "registry.db"
    assert Registry(f"sqlite:///{file}").models() == ()
    return file


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One real S3 server for the whole run; if it cannot start, tests fail instead of skipping."""
    with running_server(Path(tmp_path_factory.mktemp("seaweedfs"))) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with the environment variables of a client set for this test."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server
