"""Create and migrate the SQLite file of the embedded registry atomically.

The embedded registry is a local file, which is used if no MLflow server is set.

MLflow creates its tables in hundreds of statements that SQLite commits one by one, so a process
that is killed while it creates them leaves a file that no later process can use. This module
creates the tables in a temporary file in the same folder. The temporary file becomes the registry
in one step: by a hard link if no file exists yet, else by a copy into the existing file, which is
one SQLite transaction. A copy, unlike a rename, keeps the connections of other processes valid, so
none of their writes is lost.

``registry_lock`` ensures that one process at a time calls ``create_or_migrate``. Read this file
when a registry cannot be opened, or when MLflow changes how it migrates.
"""

import functools
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compressors.contracts import is_out_of_memory
from infra.credentials import mask_first_line
from infra.errors import RegistryUnavailable, SettingRefused
from infra.store.lock import hold_lock

TEMPORARY = ".new"
"""Suffix of temporary files, which are named ``.registry.db.<random>.new``."""

BUSY_SECONDS = 20.0
"""How long SQLite waits for a lock of another program."""

MIGRATION_TABLES = {"alembic_version", "workspaces"}
"""Tables in which only MLflow's migrations write rows."""

# Queries: the version of a model by the value of one of its tags, and all tags of a version. MLflow
# keeps the row of a deleted version, in the stage 'Deleted_Internal'.
_BY_ORDER = """
SELECT v.version, v.source FROM model_versions v
JOIN model_version_tags t ON t.name = v.name AND t.version = v.version
WHERE t.key = ? AND t.value = ? AND v.name = ? AND v.current_stage != 'Deleted_Internal'
ORDER BY v.version LIMIT 1
"""
_TAGS = "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?"


@dataclass(frozen=True)
class DatabaseSchema:
    """Contents of a SQLite file.

    ``revision`` identifies the MLflow schema (alembic); None if the file does not state one.
    ``user_rows`` counts the rows that users wrote: all rows except those that MLflow writes itself.
    ``versions`` counts registered model versions.
    """

    tables: frozenset[str]
    revision: str | None
    user_rows: int
    versions: int


@contextmanager
def registry_lock(file: Path) -> Iterator[None]:
    """Hold the lock of a registry file: one process at a time migrates it or writes to it.

    Raises:
        SettingRefused: the folder cannot be created or written.
    """
    with ExitStack() as locks:
        try:
            locks.enter_context(hold_lock(file.with_name(file.name + ".lock")))
        except OSError as fault:
            raise SettingRefused(
                "registry_file_not_creatable", file=str(file), problem=fault.strerror
            ) from None
        yield


def create_or_migrate(file: Path) -> None:
    """Create or migrate ``file`` for the installed MLflow. The caller holds ``registry_lock``.

    A missing or empty file is created. A file that a killed process left incomplete is created
    again if it has no rows that users wrote. A registry of an earlier MLflow is migrated.

    Raises:
        SettingRefused: ``file`` is not a database, cannot be opened for writing, was written by a
            later MLflow, or is incomplete and has rows that users wrote. The file is not changed.
        RegistryUnavailable: another program keeps the file locked.
    """
    file = file.resolve()
    _remove_leftovers(file)
    while not _is_complete(file):
        if not file.exists():
            _create(file)
        else:
            _replace(file)


def read_order(
    file: Path, model: str, tag: str, order: str
) -> tuple[str, str, dict[str, str]] | None:
    """Read the version of a model that has this order from the file, without MLflow.

    Args:
        file: the registry's file.
        model: the registered model's name.
        tag: name of the tag that contains the order's digest.
        order: digest of the order.

    Returns:
        Number, source and tags of the version; if there are several, of the one with the lowest
        number. None if there is no such version or the file cannot be read.
    """
    try:
        with closing(_connect(file, "ro")) as database:
            row = database.execute(_BY_ORDER, (tag, order, model)).fetchone()
            if row is None:
                return None
            version, source = row
            tags = database.execute(_TAGS, (model, version)).fetchall()
    except (sqlite3.DatabaseError, SettingRefused):
        return None
    return str(version), source, dict(tags)


def _is_complete(file: Path) -> bool:
    """Return whether the file exists and has the complete schema of the installed MLflow."""
    if not file.exists():
        return False
    with closing(_connect(file)) as database:
        return _is_current(_read_schema(file, database))


def _is_current(schema: DatabaseSchema) -> bool:
    """Return whether the schema is complete and has the revision of the installed MLflow."""
    return schema.revision == _read_revisions()[0] and _list_required_tables() <= schema.tables


def _create(file: Path) -> None:
    """Create the registry in a temporary file and link ``file`` to it."""
    with _temporary_file(file) as temporary:
        _initialize(temporary)
        _flush_to_disk(temporary)
        # SQLite would apply the journals of a deleted registry to the new one.
        for suffix in ("-journal", "-wal", "-shm"):
            file.with_name(file.name + suffix).unlink(missing_ok=True)
        try:
            os.link(temporary, file)  # a rename would replace a file that another program created
        except FileExistsError:
            return
        _flush_to_disk(file.parent)


def _replace(file: Path) -> None:
    """Rebuild an empty or incomplete file, or migrate a complete one of an earlier MLflow.

    Raises:
        SettingRefused: the file is of a later MLflow; or it has rows that users wrote, and is
            incomplete or cannot be migrated.
        RegistryUnavailable: another program keeps the file locked.
    """
    with closing(_connect(file)) as database, _temporary_file(file) as temporary:
        # In this locking mode SQLite keeps the lock until the connection is closed.
        with _translate_lock_errors(file):
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("BEGIN EXCLUSIVE")
        schema = _read_schema(file, database)
        database.execute("COMMIT")
        if _is_current(schema):
            return
        _require_known(file, schema)
        if schema.user_rows == 0:
            _initialize(temporary)
        else:
            if schema.revision in {None, _read_revisions()[0]}:
                raise _build_incomplete_error(
                    file, schema, "a process was killed while it created tables"
                )
            with closing(_connect(temporary, "rwc")) as copy:
                database.backup(copy)
            _migrate(file, temporary, schema)
        with closing(_connect(temporary)) as rebuilt, _translate_lock_errors(file):
            rebuilt.backup(database)


def _require_known(file: Path, schema: DatabaseSchema) -> None:
    """Raise ``SettingRefused`` if the schema is of a later MLflow."""
    if schema.revision is not None and schema.revision not in _read_revisions()[1]:
        raise SettingRefused("registry_schema_unknown", file=str(file), schema=schema.revision)


def _migrate(file: Path, temporary: Path, schema: DatabaseSchema) -> None:
    """Migrate ``temporary``, a copy of the registry ``file`` with this schema."""
    from mlflow.store.db import utils

    upgrade: Callable[[Any], None] = utils._upgrade_db  # what "mlflow db upgrade" calls
    try:
        with _open_engine(temporary) as engine:
            upgrade(engine)
        with closing(_connect(temporary)) as database:
            migrated = _read_schema(temporary, database)
    except Exception as fault:  # MLflow's migrations may raise exceptions of several libraries
        if is_out_of_memory(fault):
            raise
        why = f"MLflow cannot migrate it: {mask_first_line(fault)}"
        raise _build_incomplete_error(file, schema, why) from None
    if not _is_current(migrated):
        raise _build_incomplete_error(file, schema, "MLflow's migration did not create every table")


def _build_incomplete_error(file: Path, schema: DatabaseSchema, why: str) -> SettingRefused:
    """Return the error for an incomplete file with rows that users wrote."""
    return SettingRefused(
        "registry_incomplete", file=str(file), problem=why, versions=schema.versions
    )


def _read_schema(file: Path, database: sqlite3.Connection) -> DatabaseSchema:
    """Read tables, revision and row counts; raise if the file is not a database or is locked."""
    try:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        tables = frozenset(name for (name,) in names if not name.startswith("sqlite_"))
        revisions: list[Any] = []
        if "alembic_version" in tables:
            revisions = database.execute("SELECT version_num FROM alembic_version").fetchall()
        rows = {name: _count_rows(database, name) for name in tables - MIGRATION_TABLES}
    except sqlite3.OperationalError as fault:
        raise RegistryUnavailable(
            "registry_file_unreadable", file=str(file), problem=str(fault)
        ) from None
    except sqlite3.DatabaseError as fault:
        raise SettingRefused("registry_file_unusable", file=str(file), problem=str(fault)) from None
    return DatabaseSchema(
        tables=tables,
        revision=revisions[0][0] if len(revisions) == 1 else None,
        user_rows=sum(rows.values()),
        versions=rows.get("model_versions", 0),
    )


def _count_rows(database: sqlite3.Connection, table: str) -> int:
    """Return the number of a table's rows that MLflow does not write by itself."""
    # Every MLflow process that opens a file creates the experiment 0, "Default".
    other = " WHERE experiment_id != 0" if table == "experiments" else ""
    name = table.replace('"', '""')
    (count,) = database.execute(f'SELECT count(*) FROM "{name}"{other}').fetchone()  # noqa: S608
    return int(count)


@functools.cache
def _read_revisions() -> tuple[str, frozenset[str]]:
    """Read the newest revision of the installed MLflow, and all its revisions."""
    import mlflow
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    (newest,) = scripts.get_heads()
    return newest, frozenset(script.revision for script in scripts.walk_revisions())


def _list_required_tables() -> frozenset[str]:
    """List the names of all tables of the installed MLflow."""
    import mlflow.store.db.utils  # noqa: F401 (registers every table)
    from mlflow.store.db.base_sql_model import Base

    return frozenset(Base.metadata.tables)


def _initialize(temporary: Path) -> None:
    """Create the tables of the installed MLflow in a new file."""
    from mlflow.store.db import utils

    initialize: Callable[[Any], None] = utils._initialize_tables
    with _open_engine(temporary) as engine:
        initialize(engine)


@contextmanager
def _open_engine(temporary: Path) -> Iterator[Any]:
    """Yield a fast SQLAlchemy engine for a temporary file, which need not survive a crash."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    def connect() -> sqlite3.Connection:
        database = sqlite3.connect(temporary)
        database.execute("PRAGMA journal_mode = MEMORY")
        database.execute("PRAGMA synchronous = OFF")
        return database

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
    try:
        yield engine
    finally:
        engine.dispose()


def _connect(file: Path, mode: str = "rw") -> sqlite3.Connection:
    """Open a file; mode ``rwc`` creates it. Raise ``SettingRefused`` if it cannot be opened."""
    # In mode "rw", SQLite does not create a file that another process has just removed: it fails.
    uri = f"file:{quote(str(file))}?mode={mode}"
    try:
        return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    except sqlite3.OperationalError as fault:
        raise SettingRefused(
            "registry_file_not_writable", file=str(file), problem=str(fault)
        ) from None


@contextmanager
def _translate_lock_errors(file: Path) -> Iterator[None]:
    """Translate SQLite's operational errors in the block, for example if another program locks it.

    Raises:
        RegistryUnavailable: SQLite could not execute a statement.
    """
    try:
        yield
    except sqlite3.OperationalError as fault:
        raise RegistryUnavailable(
            "registry_file_locked", file=str(file), problem=str(fault)
        ) from None


@contextmanager
def _temporary_file(file: Path) -> Iterator[Path]:
    """Yield an unused path next to ``file``, and remove the file there after the block."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(file: Path) -> None:
    """Remove temporary files of killed processes; this process holds the lock and has none yet."""
    for path in file.parent.iterdir():
        stem, suffix, _ = path.name.partition(TEMPORARY)  # "-journal" may follow the suffix
        if stem.startswith(f".{file.name}.") and suffix:
            path.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
