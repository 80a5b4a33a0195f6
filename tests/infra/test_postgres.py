"""Creation of a Postgres cluster (its data folder), with the real programs of Postgres."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from error_codes import raises_code

from infra.errors import ChildFailed, SettingRefused
from infra.services import postgres

PATH = os.pathsep.join([os.environ.get("PATH", ""), *map(str, postgres.find_program_folders())])
needs_initdb = pytest.mark.skipif(
    shutil.which("initdb", path=PATH) is None, reason="needs PostgreSQL's programs"
)


def variables(folder: Path, **changes: str) -> dict[str, str]:
    """Return the environment for a cluster in ``folder``, with some variables changed."""
    values = {"POSTGRES_USER": "someone", "POSTGRES_DB": "things", "POSTGRES_PASSWORD": "secret-pw"}
    return {"PATH": PATH, "PGDATA": str(folder / "db" / "cluster"), **values, **changes}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter; tmp_path allows only its owner."""
    folder = Path(tempfile.mkdtemp(prefix="recpress-postgres-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs Postgres as another user")
def test_create_cluster_refuses_a_folder_that_its_user_cannot_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with raises_code(SettingRefused, "postgres_folder_unreachable", folder=str(tmp_path / "db")):
        postgres.create_cluster(variables(tmp_path))
    assert list((tmp_path / "db").iterdir()) == []


@needs_initdb
def test_create_cluster_creates_a_cluster_once_that_requires_passwords(
    open_folder: Path,
) -> None:
    postgres.create_cluster(variables(open_folder))
    cluster = open_folder / "db" / "cluster"
    methods = [  # the last field of each rule: how a client authenticates
        line.split()[-1]
        for line in (cluster / "pg_hba.conf").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert set(methods) == {"scram-sha-256"}
    assert [path.name for path in cluster.parent.iterdir()] == ["cluster"]
    created_at = (cluster / "PG_VERSION").stat().st_mtime_ns
    postgres.create_cluster(variables(open_folder, POSTGRES_PASSWORD="another"))
    assert (cluster / "PG_VERSION").stat().st_mtime_ns == created_at


@needs_initdb
def test_failed_initdb_raises_and_leaves_no_cluster(open_folder: Path) -> None:
    # Postgres reserves names that begin with ``pg_``.
    with raises_code(ChildFailed, "command_failed", command="initdb"):
        postgres.create_cluster(variables(open_folder, POSTGRES_USER="pg_reserved"))
    assert not (open_folder / "db" / "cluster").exists()
    assert not (open_folder / "db" / "password").exists()
