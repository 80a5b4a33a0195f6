"""A home with an empty registry of its own for every test that publishes."""

import shutil
from pathlib import Path

import pytest

from infra.registry.mlflow_registry import Registry


@pytest.fixture(scope="session")
def empty_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes two seconds to make its tables; copying them takes none."""
    file = tmp_path_factory.mktemp("registry") / "registry.db"
    assert Registry(f"sqlite:///{file}").models() == ()
    return file


@pytest.fixture
def home(empty_registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    (tmp_path / "recpress").mkdir()
    shutil.copy(empty_registry, tmp_path / "recpress" / "registry.db")
    monkeypatch.setenv("RECPRESS_USER", "tester")
    return tmp_path


@pytest.fixture
def triton(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository that follows."""
    monkeypatch.setenv("RECPRESS_TRITON", str(home / "triton"))
    return home / "triton"
