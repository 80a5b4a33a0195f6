"""Start and stop the services of docker-compose.yml as `make up-local` runs them."""

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

from infra.services.postgres import find_program_folders

START_SECONDS = 240  # longest time until the services are ready
STOP_SECONDS = 120  # longest time until they have ended
READY_LINE = "Ctrl-C stops them."  # the end of the output when they are ready


@dataclass(frozen=True)
class LocalServices:
    """Running services: their home folder, environment variables of a client, and process id."""

    home: Path
    client: dict[str, str]
    pid: int


def missing_programs() -> str:
    """Return a sentence with the missing programs; empty if the services can run."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, find_program_folders())])
    missing = [
        name
        for name in ("initdb", "postgres", "pg_isready", "wget")
        if not shutil.which(name, path=path)
    ]
    return f"needs {', '.join(missing)} on PATH" if missing else ""


@contextmanager
def running_services() -> Iterator[LocalServices]:
    """Start the services on free ports in a temporary home; stop them at the end.

    Raises:
        RuntimeError: the services were not ready in time or ended; the error contains their output.
    """
    # Not in pytest's folder, which only its owner can enter: Postgres runs as another user, because
    # it refuses to run as root.
    home = Path(tempfile.mkdtemp(prefix="recpress-services-"))
    home.chmod(0o755)
    env = environment(
        home,
        RECPRESS_HOME=str(home),
        RECPRESS_MODULES=str(ROOT / "tests"),
        RECPRESS_ALLOWED_MODULES=ALLOWED,
    )
    log_file = home / "output"
    with log_file.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.services.local_services", "--any-ports"],
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while READY_LINE not in log_file.read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"expected services that are ready, got:\n{log_file.read_text()[-4000:]}"
                )
            time.sleep(0.2)
        yield LocalServices(home, _read_exports(home / "services" / "client.env"), process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
        output = log_file.read_text()
        shutil.rmtree(home)
    assert code == 0, output
    assert "is killed" not in output, output  # every service ended when it was stopped


def _read_exports(path: Path) -> dict[str, str]:
    """Return the variables that a shell script exports."""
    result = {}
    for line in path.read_text().splitlines():
        name, _, value = line.removeprefix("export ").partition("=")
        result[name] = shlex.split(value)[0]
    return result
