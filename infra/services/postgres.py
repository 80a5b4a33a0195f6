"""Create a Postgres cluster as the official image does: one user, one database, a password.

Postgres does not run as root, so for root its programs run as ``postgres`` or ``nobody``.
"""

import os
import pwd
import shutil
import subprocess
from pathlib import Path
from typing import Any

from infra.credentials import cleaned
from infra.errors import ChildFailed, SettingRefused

UNPRIVILEGED = ("postgres", "nobody")
PLACES = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt", "/usr/local/opt")


def programs() -> list[Path]:
    """List folders outside PATH that may contain ``initdb`` and ``postgres``."""
    found = [
        folder
        for place in PLACES
        for folder in Path(place).glob("*/bin")
        if (folder / "initdb").exists()
    ]
    return sorted(found, reverse=True)


def as_whom() -> dict[str, Any]:
    """Return ``subprocess`` arguments that run the process as a user Postgres accepts.

    Raises:
        SettingRefused: this is root, and there is no unprivileged user to switch to.
    """
    if os.geteuid() != 0:
        return {}
    for name in UNPRIVILEGED:
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise SettingRefused("postgres_user_missing", users=UNPRIVILEGED)


def prepare(environment: dict[str, str]) -> None:
    """Create the cluster if it is missing.

    Args:
        environment: the image's variables (``PGDATA``, ``POSTGRES_USER``, ``_PASSWORD`` and
            ``_DB``) and a PATH.

    Raises:
        ChildFailed: ``initdb`` failed; the message contains its output.
        SettingRefused: the user that has to run Postgres may not reach the folder.
    """
    cluster, whom = Path(environment["PGDATA"]), as_whom()
    home = cluster.parent
    home.mkdir(parents=True, exist_ok=True)
    if whom:
        os.chown(home, whom["user"], whom["group"])
    if subprocess.run(["test", "-w", str(home)], check=False, **whom).returncode:  # noqa: S607
        raise SettingRefused(
            "postgres_folder_unreachable", user=whom.get("user", os.geteuid()), folder=str(home)
        )
    if (cluster / "PG_VERSION").exists():
        return
    # Created in a temporary folder and renamed when complete, so that an interruption leaves no
    # incomplete cluster.
    part = home / "part"
    shutil.rmtree(part, ignore_errors=True)
    password = home / "password"
    password.touch(0o600)
    password.write_text(environment["POSTGRES_PASSWORD"], encoding="utf-8")
    if whom:
        os.chown(password, whom["user"], whom["group"])
    options = [f"--username={environment['POSTGRES_USER']}", f"--pwfile={password}"]
    options += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"]
    try:
        _run(["initdb", f"--pgdata={part}", *options], environment, home, whom)
    finally:
        password.unlink()
    made = f'CREATE DATABASE "{environment["POSTGRES_DB"]}";\n\n'
    _run(["postgres", "--single", "-j", "-D", str(part), "postgres"], environment, home, whom, made)
    part.rename(cluster)


def _run(
    command: list[str],
    environment: dict[str, str],
    home: Path,
    whom: dict[str, Any],
    said: str = "",
) -> None:
    ended = subprocess.run(
        command,
        env=environment,
        cwd=home,
        input=said,
        capture_output=True,
        text=True,
        check=False,
        **whom,
    )
    if ended.returncode or "ERROR:" in ended.stderr:
        output = cleaned(ended.stdout + ended.stderr).replace(
            environment["POSTGRES_PASSWORD"], "***"
        )
        raise ChildFailed("command_failed", command=command[0], output=output[-1500:])
