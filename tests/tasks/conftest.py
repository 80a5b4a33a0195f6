"""Fixtures for tests that publish: a home (the folder with store and registry) for each test.

``fill`` publishes orders. It copies a home in which they are published, which is created once per
session.
"""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest


def _use_home(folder: Path, empty_registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECPRESS_HOME", str(folder / "recpress"))
    (folder / "recpress").mkdir()
    shutil.copy(empty_registry, folder / "recpress" / "registry.db")
    monkeypatch.setenv("RECPRESS_USER", "tester")


@pytest.fixture
def work_folder(empty_registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the home ``recpress``, whose store and registry are empty; it is used."""
    _use_home(tmp_path, empty_registry, monkeypatch)
    return tmp_path


@pytest.fixture
def triton(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the Triton repository that promotions update."""
    monkeypatch.setenv("RECPRESS_TRITON", str(work_folder / "triton"))
    return work_folder / "triton"


@pytest.fixture(scope="session")
def prepared_home(
    empty_registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """A function that creates a home with published orders of the model "m", once per arguments.

    Its arguments are those of ``fill``. It returns the parent folder of the home.
    """
    from triton_versions import publish_version

    from tasks.promotion.promotions import promote

    @cache
    def prepare(orders: str, promoted: str) -> Path:
        folder = tmp_path_factory.mktemp("prepared")
        with pytest.MonkeyPatch.context() as monkeypatch:
            _use_home(folder, empty_registry, monkeypatch)
            monkeypatch.setenv("RECPRESS_TRITON", str(folder / "triton"))
            monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
            for order_digit in orders:
                publish_version(folder, order_digit)
            for order_digit in promoted:
                promote("m", str(orders.index(order_digit) + 1), reason="")
        return folder

    return prepare


@pytest.fixture
def fill(
    work_folder: Path, prepared_home: Callable[[str, str], Path]
) -> Callable[[str, str], tuple[str, ...]]:
    """A function that publishes orders in the empty ``home`` and promotes some; returns versions.

    ``fill("abc", "ab")`` publishes the orders with the digests "aaa...", "bbb..." and "ccc..." as
    versions 1 to 3, and promotes the first two. Promotions also update ``home / "triton"``. The
    files are copied from another home, which is possible because stored references are relative
    (``test_moved_home.py``).
    """

    def copy(orders: str, promoted: str) -> tuple[str, ...]:
        shutil.copytree(prepared_home(orders, promoted), work_folder, dirs_exist_ok=True)
        return tuple(str(number) for number in range(1, len(orders) + 1))

    return copy
