"""Create a Postgres cluster as the official image does: one user, one database, a password.

Postgres refuses to run as root. If the current user is root, its programs run as the user
``postgres`` or ``nobody``.
"""

import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import Any

from infra.credentials import mask_credentials
from infra.errors import ChildFailed, SettingRefused

UNPRIVILEGED = ("postgres", "nobody")  # users that run Postgres if this process is root
# Debian; Red Hat; Homebrew on ARM and on Intel.
INSTALL_FOLDERS = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt", "/usr/local/opt")
TAIL_CHARACTERS = 1_500  # an error message has only these last characters of the output


def find_program_folders() -> list[Path]:
    """Find the folders of Postgres's programs that are usually not in PATH.

    They are in descending alphabetical order, so that the newest version is first.
    """
    folders = [
        folder
        for parent in INSTALL_FOLDERS
        for folder in Path(parent).glob("*/bin")
        if (folder / "initdb").exists()
    ]
    return sorted(folders, reverse=True)


def select_user() -> dict[str, Any]:
    """Select the user that runs Postgres, which refuses to run as root.

    Returns:
        Arguments of ``subprocess`` that run a process as this user; empty if the current user is
        not root.

    Raises:
        SettingRefused: the current user is root, and no unprivileged user exists.
    """
    if os.geteuid() != 0:
        return {}
    for name in UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise SettingRefused("postgres_user_missing", users=UNPRIVILEGED)


def create_cluster(environment: dict[str, str]) -> None:
    """Create the cluster (Postgres's data folder) if it is missing.

    Args:
        environment: ``PATH``, and the variables of the official image: ``PGDATA`` (the cluster),
            ``POSTGRES_USER``, ``POSTGRES_PASSWORD`` and ``POSTGRES_DB``.

    Raises:
        ChildFailed: a program of Postgres failed; the message contains its output.
        SettingRefused: the user that runs Postgres has no access to the folder.
    """
    cluster, run_as = Path(environment["PGDATA"]), select_user()
    parent = cluster.parent
    parent.mkdir(parents=True, exist_ok=True)
    if run_as:
        os.chown(parent, run_as["user"], run_as["group"])
    # Checked by the user that runs Postgres, who also needs access to all parents of the folder.
    if subprocess.run(["test", "-w", str(parent)], check=False, **run_as).returncode:  # noqa: S607
        raise SettingRefused(
            "postgres_folder_unreachable", user=run_as.get("user", os.geteuid()), folder=str(parent)
        )
    if (cluster / "PG_VERSION").exists():
        return
    # Created in a temporary folder and renamed when complete, so that an interruption leaves no
    # incomplete cluster.
    unfinished = parent / "part"
    shutil.rmtree(unfinished, ignore_errors=True)
    password = parent / "password"
    password.touch(0o600)
    password.write_text(environment["POSTGRES_PASSWORD"], encoding="utf-8")
    if run_as:
        os.chown(password, run_as["user"], run_as["group"])
    options = [f"--username={environment['POSTGRES_USER']}", f"--pwfile={password}"]
    options += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"]
    try:
        _run(["initdb", f"--pgdata={unfinished}", *options], environment, parent, run_as)
    finally:
        password.unlink()
    # In single-user mode with -j, a semicolon and an empty line end a statement. A failed statement
    # does not change the exit code, so ``_run`` also searches the output for errors.
    sql = f'CREATE DATABASE "{environment["POSTGRES_DB"]}";\n\n'
    _run(
        ["postgres", "--single", "-j", "-D", str(unfinished), "postgres"],
        environment,
        parent,
        run_as,
        sql,
    )
    unfinished.rename(cluster)


def _run(
    command: list[str],
    environment: dict[str, str],
    parent: Path,
    run_as: dict[str, Any],
    text: str = "",
) -> None:
    """Run a command with ``text`` as its input.

    Raises:
        ChildFailed: the exit code is not 0, or the command printed an error.
    """
    process = subprocess.run(
        command,
        env=environment,
        cwd=parent,
        input=text,
        capture_output=True,
        text=True,
        check=False,
        **run_as,
    )
    if process.returncode or "ERROR:" in process.stderr:
        output = mask_credentials(process.stdout + process.stderr).replace(
            environment["POSTGRES_PASSWORD"], "***"
        )
        raise ChildFailed("command_failed", command=command[0], output=output[-TAIL_CHARACTERS:])
