"""The registry's SQLite file: killed writers, damaged files, and migration from earlier MLflow."""

import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from child_commands import SendCommand, running_child
from error_codes import TextMatching, raises_code

from infra.errors import RegistryUnavailable, SettingRefused
from infra.registry import sqlite_file
from infra.registry.mlflow_registry import Registry

ORDER = "a" * 64
EARLIER_REVISION = "acf3f17fdcc7"  # an alembic revision older than the one of the installed MLflow


@pytest.fixture
def file(empty_registry: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(empty_registry, tmp_path / "registry.db"))


def open_registry(file: Path) -> Registry:
    """Return the registry in a file."""
    return Registry(f"sqlite:///{file}")


def publish(file: Path, order: str = ORDER) -> str:
    """Publish an order in a registry file; return its version."""
    return open_registry(file).publish("ranker", order, "s3://models/x", {}, "").version


def execute(file: Path, *statements: str) -> None:
    """Execute SQL statements on a registry file."""
    with closing(sqlite3.connect(file)) as database, database:
        for statement in statements:
            database.execute(statement)


@pytest.fixture(scope="module")
def send() -> Iterator[SendCommand]:
    with running_child("tests/killed_registry.py", variables={}) as send:
        yield send


def kill_writer_at(
    send: SendCommand, folder: Path, writer: str, points: list[float]
) -> list[dict[str, Any]]:
    """Kill a process that creates a registry, at each of some points; return the results.

    Args:
        send: sends a command to the process of ``tests/killed_registry.py``.
        folder: folder for the registries.
        writer: ``now``, or ``earlier`` for a process that lets MLflow create the registry directly
            in its file, as earlier versions of recpress did.
        points: shares of the writer's operations (SQL statements, commits and changes of files) at
            which it is killed.

    Returns:
        For each point: ``killed`` (False if the writer ended before the point), ``version`` that a
        process published afterwards, and ``left``, the files in the folder.
    """
    return send(" ".join([str(folder), writer, *map(str, points)]))


# Points for ``kill_writer_at``: steps of 0.025, and of 0.002 from 0.9 to 1, because the last
# operations hard-link the finished temporary file to the registry's path and delete its old name.
FEW_POINTS = [0.5, 1.0]
MANY_POINTS = [number / 40 for number in range(1, 36)] + [
    0.9 + number / 500 for number in range(51)
]


@pytest.mark.parametrize("points", [FEW_POINTS, pytest.param(MANY_POINTS, marks=pytest.mark.slow)])
def test_registry_is_complete_after_the_process_that_created_it_was_killed(
    send: SendCommand, tmp_path: Path, points: list[float]
) -> None:
    results = kill_writer_at(send, tmp_path, "now", points)
    assert [result["version"] for result in results] == ["1"] * len(points)
    assert all(result["killed"] for result in results)
    # Temporary files of the killed process are removed.
    assert {tuple(result["left"]) for result in results} == {("registry.db", "registry.db.lock")}


@pytest.mark.slow
def test_registry_left_half_created_by_an_earlier_version_is_repaired(
    send: SendCommand, tmp_path: Path
) -> None:
    results = kill_writer_at(send, tmp_path, "earlier", MANY_POINTS)
    assert [result["version"] for result in results] == ["1"] * len(MANY_POINTS)
    assert all(result["killed"] for result in results)


def test_empty_file_becomes_a_registry(tmp_path: Path) -> None:
    file = tmp_path / "registry.db"
    file.touch()
    assert publish(file) == "1"


def test_journal_of_a_deleted_registry_is_not_applied_to_the_new_one(file: Path) -> None:
    journal = file.with_name("registry.db-journal")
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("PRAGMA cache_size = 1")  # pages reach the file before the commit
        database.execute("BEGIN IMMEDIATE")
        database.execute("DELETE FROM workspaces")
        database.execute("CREATE TABLE large AS SELECT zeroblob(1000000) AS body")
        journal_bytes = journal.read_bytes()
        database.execute("ROLLBACK")
    file.unlink()
    journal.write_bytes(journal_bytes)
    assert publish(file) == "1"
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_registry_is_created_in_a_folder_whose_name_has_uri_characters(tmp_path: Path) -> None:
    file = tmp_path / "what % 20 # of it" / "registry.db"
    assert publish(file) == "1"
    assert file.is_file()


def test_registry_that_is_a_symlink_is_created_at_the_target_of_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    file = tmp_path / "registry.db"
    file.symlink_to(tmp_path / "disk" / "real.db")
    assert publish(file) == "1"
    assert file.is_symlink()
    assert (tmp_path / "disk" / "real.db").is_file()


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM alembic_version",
        "DROP TABLE model_version_tags",
        # EARLIER_REVISION, although the tables are those of a later one.
        "UPDATE alembic_version SET version_num = (SELECT 'acf3f17fdcc7')",
    ],
)
def test_incomplete_registry_with_versions_is_refused_and_unchanged(
    file: Path, damage: str
) -> None:
    publish(file)
    execute(file, damage)
    before = file.read_bytes()
    with raises_code(SettingRefused, "registry_incomplete", file=str(file), versions=1):
        open_registry(file).models()
    assert file.read_bytes() == before
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "registry.db",
        "registry.db.lock",
    ]


@pytest.mark.parametrize("damage", ["DELETE FROM alembic_version", "DROP TABLE model_versions"])
def test_incomplete_registry_without_user_rows_is_created_again(file: Path, damage: str) -> None:
    execute(file, damage)
    assert publish(file) == "1"


def test_incomplete_file_with_a_table_of_another_program_is_refused(file: Path) -> None:
    execute(file, "DELETE FROM alembic_version", "CREATE TABLE mine AS SELECT 1 AS one")
    with raises_code(SettingRefused, "registry_incomplete", file=str(file)):
        open_registry(file).models()


# --- a registry of an earlier MLflow ---------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A registry file with one version and the schema of an earlier MLflow."""
    from alembic import command
    from mlflow.store.db.utils import InitialBase, _get_alembic_config

    file = tmp_path / "registry.db"
    with sqlite_file._open_engine(file) as engine:
        InitialBase.metadata.create_all(engine)
        config = _get_alembic_config("sqlite://")
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, EARLIER_REVISION)
    execute(
        file,
        "INSERT INTO registered_models (name, creation_time, last_updated_time) "
        "VALUES ('ranker', 1, 1)",
        "INSERT INTO model_versions (name, creation_time, last_updated_time, version, source, "
        "current_stage) VALUES ('ranker', 1, 1, 1, 's3://models/x', 'None')",
        "INSERT INTO model_version_tags (name, version, key, value) "
        "VALUES ('ranker', 1, 'recpress.order', printf('%.64c', 'a'))",
    )
    return file


def test_registry_of_an_earlier_mlflow_is_migrated_with_its_versions(earlier: Path) -> None:
    assert publish(earlier) == "1"  # the order of the version that exists
    assert publish(earlier, "b" * 64) == "2"


def test_failed_migration_leaves_the_registry_unchanged(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.store.db.utils

    upgrade = mlflow.store.db.utils._upgrade_db

    def upgrade_and_fail(engine: Any) -> None:
        upgrade(engine)
        raise RuntimeError("no such column")

    monkeypatch.setattr(mlflow.store.db.utils, "_upgrade_db", upgrade_and_fail)
    before = earlier.read_bytes()
    with raises_code(
        SettingRefused,
        "registry_incomplete",
        problem=TextMatching("cannot migrate it: no such column"),
    ):
        open_registry(earlier).models()
    assert earlier.read_bytes() == before
    monkeypatch.undo()
    assert publish(earlier) == "1"


def test_write_of_another_connection_during_a_migration_is_not_lost(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.store.db.utils

    upgrade = mlflow.store.db.utils._upgrade_db
    insert = (
        "INSERT INTO model_version_tags (name, version, key, value) "
        "VALUES ('ranker', 1, 'meanwhile', 'yes')"
    )
    writers: list[threading.Thread] = []
    with closing(sqlite3.connect(earlier, timeout=60, check_same_thread=False)) as other:
        assert other.execute("SELECT count(*) FROM model_versions").fetchone() == (1,)

        def upgrade_slowly(engine: Any) -> None:
            writers.append(threading.Thread(target=lambda: (other.execute(insert), other.commit())))
            writers[0].start()
            writers[0].join(0.5)
            assert writers[0].is_alive(), "the writer waits"
            upgrade(engine)

        monkeypatch.setattr(mlflow.store.db.utils, "_upgrade_db", upgrade_slowly)
        registry = open_registry(earlier)
        registry.models()
        writers[0].join(60)
    assert registry.version("ranker", "1").tags["meanwhile"] == "yes"


def test_empty_registry_of_a_later_mlflow_is_refused(file: Path) -> None:
    execute(file, "UPDATE alembic_version SET version_num = 'later'")
    with raises_code(SettingRefused, "registry_schema_unknown", schema="later"):
        open_registry(file).models()


def test_registry_locked_by_another_program_is_reported_as_unavailable(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(earlier)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with raises_code(
            RegistryUnavailable, "registry_file_unreadable", problem="database is locked"
        ):
            open_registry(earlier).models()
