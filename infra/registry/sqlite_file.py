"""The embedded registry's SQLite file: created and migrated atomically.

MLflow creates its tables in hundreds of statements that SQLite commits one by one, so a process
that is killed during this leaves a file that no later process can use. This module creates the
tables in a temporary file in the same folder, which becomes the registry in one step: by a link if
no file exists yet, else by a copy into the existing file, which is one SQLite transaction. A copy,
unlike a rename, keeps the connections of other processes valid, so none of their writes is lost.

``prepare`` is called by one process at a time (``alone``). Read this file when a registry cannot
be opened, or when MLflow changes how it migrates.
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
from infra.credentials import first_line
from infra.errors import RegistryUnavailable, SettingRefused
from infra.store.lock import locked

TEMPORARY = ".new"
"""How the name of a temporary file ends: ``.registry.db.<random>.new``."""

BUSY_SECONDS = 20.0
SEEDED = {"alembic_version", "workspaces"}
"""Tables in which MLflow's own migrations write rows."""

_BY_ORDER = """
SELECT v.version, v.source FROM model_versions v
JOIN model_version_tags t ON t.name = v.name AND t.version = v.version
WHERE t.key = ? AND t.value = ? AND v.name = ? AND v.current_stage != 'Deleted_Internal'
ORDER BY v.version LIMIT 1
"""
_TAGS = "SELECT key, value FROM model_version_tags WHERE name = ? AND version = ?"


@dataclass(frozen=True)
class DatabaseSchema:
    """Contents of a SQLite file: its tables, its MLflow revision, and its counts of user rows.

    ``rows`` counts rows that a person or program stored, without those that MLflow writes itself.
    ``versions`` counts registered model versions.
    """

    tables: frozenset[str]
    revision: str | None
    rows: int
    versions: int


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold the lock of a registry file: one process at a time prepares it or writes to it.

    Raises:
        SettingRefused: the folder cannot be created or written.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(file.with_name(file.name + ".lock")))
        except OSError as fault:
            raise SettingRefused(
                "registry_file_not_creatable", file=str(file), problem=fault.strerror
            ) from None
        yield


def prepare(file: Path) -> None:
    """Create or migrate ``file`` for the installed MLflow. The caller holds ``alone``.

    A missing or empty file is created. A file that a killed process left incomplete is created
    again if it has no user rows, else refused. A registry of an earlier MLflow is migrated.

    Raises:
        SettingRefused: it is not a database, was written by a later MLflow, or is incomplete and
            has user rows; the file is unchanged.
        RegistryUnavailable: another program keeps it locked.
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

    Returns:
        Its number, source and tags; if there are several, the one with the lowest number. None if
        there is no such version, or no file that can be read.
    """
    try:
        with closing(_connected(file, "ro")) as database:
            found = database.execute(_BY_ORDER, (tag, order, model)).fetchone()
            if found is None:
                return None
            version, source = found
            tags = database.execute(_TAGS, (model, version)).fetchall()
    except (sqlite3.DatabaseError, SettingRefused):
        return None
    return str(version), source, dict(tags)


def _is_complete(file: Path) -> bool:
    if not file.exists():
        return False
    with closing(_connected(file)) as database:
        return _complete(_schema(file, database))


def _complete(schema: DatabaseSchema) -> bool:
    return schema.revision == _revisions()[0] and _required_tables() <= schema.tables


def _create(file: Path) -> None:
    """Create the registry in a temporary file and link it to its name."""
    with _temporary(file) as temporary:
        _initialize(temporary)
        _flush(temporary)
        # Journals of a registry that was deleted would be applied to the new one.
        for suffix in ("-journal", "-wal", "-shm"):
            file.with_name(file.name + suffix).unlink(missing_ok=True)
        try:
            os.link(temporary, file)  # a rename would replace a file that another program created
        except FileExistsError:
            return
        _flush(file.parent)


def _replace(file: Path) -> None:
    """Rebuild an empty or incomplete file, or migrate a complete one of an earlier MLflow."""
    with closing(_connected(file)) as database, _temporary(file) as temporary:
        # In this locking mode the lock is kept until the connection is closed.
        with _not_locked(file):
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("BEGIN EXCLUSIVE")
        schema = _schema(file, database)
        database.execute("COMMIT")
        if _complete(schema):
            return
        _require_known(file, schema)
        if schema.rows == 0:
            _initialize(temporary)
        else:
            if schema.revision in {None, _revisions()[0]}:
                raise _incomplete(file, schema, "a process was killed while it created tables")
            with closing(_connected(temporary, "rwc")) as copy:
                database.backup(copy)
            _migrate(file, temporary, schema)
        with closing(_connected(temporary)) as finished, _not_locked(file):
            finished.backup(database)


def _require_known(file: Path, schema: DatabaseSchema) -> None:
    if schema.revision is not None and schema.revision not in _revisions()[1]:
        raise SettingRefused("registry_schema_unknown", file=str(file), schema=schema.revision)


def _migrate(file: Path, temporary: Path, schema: DatabaseSchema) -> None:
    from mlflow.store.db import utils

    upgrade: Callable[[Any], None] = utils._upgrade_db  # what "mlflow db upgrade" calls
    try:
        with _engine(temporary) as engine:
            upgrade(engine)
        with closing(_connected(temporary)) as database:
            migrated = _schema(temporary, database)
    except Exception as fault:  # MLflow's migrations raise any exception of their libraries
        if is_out_of_memory(fault):
            raise
        why = f"MLflow cannot migrate it: {first_line(fault)}"
        raise _incomplete(file, schema, why) from None
    if not _complete(migrated):
        raise _incomplete(file, schema, "MLflow's migration leaves tables out")


def _incomplete(file: Path, schema: DatabaseSchema, why: str) -> SettingRefused:
    return SettingRefused(
        "registry_incomplete", file=str(file), problem=why, versions=schema.versions
    )


def _schema(file: Path, database: sqlite3.Connection) -> DatabaseSchema:
    try:
        names = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        tables = frozenset(name for (name,) in names if not name.startswith("sqlite_"))
        revisions: list[Any] = []
        if "alembic_version" in tables:
            revisions = database.execute("SELECT version_num FROM alembic_version").fetchall()
        rows = {name: _rows(database, name) for name in tables - SEEDED}
    except sqlite3.OperationalError as fault:
        raise RegistryUnavailable(
            "registry_file_unreadable", file=str(file), problem=str(fault)
        ) from None
    except sqlite3.DatabaseError as fault:
        raise SettingRefused("registry_file_unusable", file=str(file), problem=str(fault)) from None
    return DatabaseSchema(
        tables=tables,
        revision=revisions[0][0] if len(revisions) == 1 else None,
        rows=sum(rows.values()),
        versions=rows.get("model_versions", 0),
    )


def _rows(database: sqlite3.Connection, table: str) -> int:
    # MLflow creates the experiment 0, "Default", whenever it opens a file.
    other = " WHERE experiment_id != 0" if table == "experiments" else ""
    name = table.replace('"', '""')
    (count,) = database.execute(f'SELECT count(*) FROM "{name}"{other}').fetchone()  # noqa: S608
    return int(count)


@functools.cache
def _revisions() -> tuple[str, frozenset[str]]:
    """Return the newest revision of the installed MLflow, and all its revisions."""
    import mlflow
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    (newest,) = scripts.get_heads()
    return newest, frozenset(script.revision for script in scripts.walk_revisions())


def _required_tables() -> frozenset[str]:
    import mlflow.store.db.utils  # noqa: F401 (registers every table)
    from mlflow.store.db.base_sql_model import Base

    return frozenset(Base.metadata.tables)


def _initialize(temporary: Path) -> None:
    from mlflow.store.db import utils

    initialize: Callable[[Any], None] = utils._initialize_tables
    with _engine(temporary) as engine:
        initialize(engine)


@contextmanager
def _engine(temporary: Path) -> Iterator[Any]:
    """Create an engine for a private file, which is discarded if the process dies."""
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    def connected() -> sqlite3.Connection:
        database = sqlite3.connect(temporary)
        database.execute("PRAGMA journal_mode = MEMORY")
        database.execute("PRAGMA synchronous = OFF")
        return database

    engine = create_engine("sqlite://", creator=connected, poolclass=NullPool)
    try:
        yield engine
    finally:
        engine.dispose()


def _connected(file: Path, mode: str = "rw") -> sqlite3.Connection:
    # By URI, so that a file that was just removed is not created again.
    uri = f"file:{quote(str(file))}?mode={mode}"
    try:
        return sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    except sqlite3.OperationalError as fault:
        raise SettingRefused(
            "registry_file_not_writable", file=str(file), problem=str(fault)
        ) from None


@contextmanager
def _not_locked(file: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as fault:
        raise RegistryUnavailable(
            "registry_file_locked", file=str(file), problem=str(fault)
        ) from None


@contextmanager
def _temporary(file: Path) -> Iterator[Path]:
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(file: Path) -> None:
    """Remove temporary files of killed processes; the process that holds the lock has none yet."""
    for path in file.parent.iterdir():
        name = path.name.partition(TEMPORARY)
        if name[0].startswith(f".{file.name}.") and name[1]:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
