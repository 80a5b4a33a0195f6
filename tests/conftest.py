"""What every test starts from: an empty environment and a home of its own."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3Server, running_server

PLACES = {"RECPRESS_STORE", "RECPRESS_TRITON", "MLFLOW_TRACKING_URI"}

# Prefect reads this when it is imported, which is before any fixture runs.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-")


@pytest.fixture(autouse=True)
def _own_surroundings(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a person's own store, registry or cloud account."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith("AWS_") or name in PLACES:
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
