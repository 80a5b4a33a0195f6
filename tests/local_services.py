"""The services of docker-compose.yml as `make up-local` runs them, for tests that need them."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from drafts import ALLOWED, ROOT, environment

from infra.services.postgres import programs

START_SECONDS = 240
STOP_SECONDS = 120
READY = "Ctrl-C stops them."


@dataclass(frozen=True)
class LocalServices:
    """Where they are, and what a client of theirs has in its environment."""

    home: Path
    client: dict[str, str]
    pid: int


def lacking() -> str:
    """Why they cannot run on this machine; empty if they can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, programs())])
    missing = [
        name
        for name in ("initdb", "postgres", "pg_isready", "wget")
        if not shutil.which(name, path=path)
    ]
    return f"needs {', '.join(missing)} on PATH" if missing else ""


@contextmanager
def running_services() -> Iterator[LocalServices]:
    """Start them on free ports with a state of their own; stop them at the end.

    Raises:
        RuntimeError: they were not ready in time or ended; what was printed is in the message.
    """
    # Not below pytest's folder: only its owner may enter that, and Postgres, which refuses to run
    # as root, runs as another user.
    home = Path(tempfile.mkdtemp(prefix="recpress-services-"))
    home.chmod(0o755)
    env = environment(
        home,
        RECPRESS_HOME=str(home),
        RECPRESS_MODULES=str(ROOT / "tests"),
        RECPRESS_ALLOWED_MODULES=ALLOWED,
    )
    printed = home / "printed"
    with printed.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.services.local_services", "--any-ports"],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        end = time.monotonic() + START_SECONDS
        while READY not in printed.read_text():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the services are not ready:\n{printed.read_text()[-4000:]}")
            time.sleep(0.2)
        yield LocalServices(home, _exported(home / "services" / "client.env"), process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
        said = printed.read_text()
        shutil.rmtree(home)
    assert code == 0, said
    assert "is killed" not in said, said


def _exported(path: Path) -> dict[str, str]:
    found = {}
    for line in path.read_text().splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        found[name] = shlex.split(value)[0]
    return found
