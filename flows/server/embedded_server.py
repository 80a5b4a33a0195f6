"""The embedded Prefect server: a process that serves one command and refuses other clients.

A command starts it if ``PREFECT_API_URL`` is not set. It listens on a free port of the loopback
interface. Every HTTP request and WebSocket needs a random secret that is generated for this
command. The secret exists only in the memory and the environment of the command and its children,
never on disk or in an argument. CORS allows no web page to call the server.

The command runs ``python -m flows.server.embedded_server FD`` as the server's process; FD is the
descriptor of the listening socket. The process ends when the command ends, for any reason.

Differs from Prefect's ``SubprocessASGIServer``: the command waits as long as the server makes
progress; it binds the port before the process starts, so that no other process can take the port;
and clients must authenticate.
"""

import atexit
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO

from infra.errors import NoAnswer, ServiceFailed
from infra.services.http_probe import send_request
from infra.store.lock import hold_lock

NOTIFY_AFTER_SECONDS = 10.0
NOTIFY_EVERY_SECONDS = 30.0
STALL_SECONDS = 300.0
"""A start without progress fails after this time."""

CPU_SECONDS = 0.05
"""Additional CPU time that counts as progress. An idle process uses less than this in hours."""

NO_ORIGIN = "http://recpress.invalid"
"""The only allowed CORS origin. No page can have it: RFC 2606 reserves this top-level domain."""

_POLL_SECONDS = 0.1
_REQUEST_SECONDS = 2.0
_STOP_SECONDS = 5.0
_TAIL_BYTES = 3_000
_REMEDY = (
    "To use a server that runs already, and to avoid this wait, start one with 'prefect server "
    "start' and set PREFECT_API_URL=http://127.0.0.1:4200/api."
)

Notify = Callable[[str], object]


class EmbeddedServer:
    """A started server process.

    Args:
        process: the process.
        api_url: the URL of its API.
        output: the file to which the process writes its output.
        home: Prefect's home folder, with the database.
        lock: holds the lock on the start of servers; closed when the server is ready.

    ``process`` and ``api_url`` are also attributes.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes]",
        api_url: str,
        output: IO[bytes],
        home: Path,
        lock: ExitStack,
    ) -> None:
        self.process = process
        self.api_url = api_url
        self._output = output
        self._home = home
        self._lock = lock
        atexit.register(self.stop)

    def wait_until_ready(self, notify: Notify, *, stall_seconds: float = STALL_SECONDS) -> None:
        """Wait until the server responds, as long as its process makes progress.

        Progress is CPU time of the server's process, or a change of its database files. Time in
        which the command itself is suspended does not count.

        Args:
            notify: called with a sentence about the wait, first after ``NOTIFY_AFTER_SECONDS``.
            stall_seconds: the longest time without progress.

        Raises:
            ServiceFailed: the process ended, or made no progress for ``stall_seconds``.
        """
        start = last_poll = time.monotonic()
        notify_at, stalled, last = start + NOTIFY_AFTER_SECONDS, 0.0, self._read_progress()
        try:
            while not self._is_ready():
                self.require_running(is_started=False)
                now, current = time.monotonic(), self._read_progress()
                if current[0] - last[0] >= CPU_SECONDS or current[1] != last[1]:
                    last, stalled = current, 0.0
                else:
                    # A longer interval means that this process was suspended.
                    stalled += min(now - last_poll, 2 * _REQUEST_SECONDS)
                last_poll = now
                if stalled >= stall_seconds:
                    raise ServiceFailed(
                        "embedded_server_stalled",
                        process=self.process.pid,
                        seconds=stall_seconds,
                        folder=str(self._home),
                        output=self._read_last_output(),
                    )
                if now >= notify_at:
                    notify_at = now + NOTIFY_EVERY_SECONDS
                    notify(
                        f"waiting for the embedded Prefect server to start ({now - start:.0f} s, "
                        f"process {self.process.pid}, database in {self._home}). {_REMEDY}"
                    )
                time.sleep(_POLL_SECONDS)
        except BaseException:
            self.stop()
            raise
        finally:
            self._lock.close()

    def require_running(self, *, is_started: bool = True) -> None:
        """Raise ``ServiceFailed`` with the server's last output if its process has ended."""
        code, folder = self.process.poll(), str(self._home)
        if code is None:
            return
        output = self._read_last_output()
        if is_started:
            raise ServiceFailed(
                "embedded_server_ended", exit_code=code, folder=folder, output=output
            )
        raise ServiceFailed(
            "embedded_server_not_started", exit_code=code, folder=folder, output=output
        )

    def stop(self) -> None:
        """Stop the process, if it still runs."""
        atexit.unregister(self.stop)
        self._lock.close()
        self.process.terminate()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def _is_ready(self) -> bool:
        try:
            return send_request(f"{self.api_url}/health", timeout=_REQUEST_SECONDS).status == 200
        except NoAnswer:
            return False

    def _read_progress(self) -> tuple[float, tuple[tuple[str, int, int], ...]]:
        """Return CPU seconds of the process, and name, size and mtime of its database files."""
        files = []
        for path in sorted(self._home.glob("prefect.db*")):
            try:
                state = path.stat()
            except FileNotFoundError:  # SQLite removed a journal in the meantime
                continue
            files.append((path.name, state.st_size, state.st_mtime_ns))
        return cpu_seconds(self.process.pid), tuple(files)

    def _read_last_output(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        # pread, because the server's process shares the position of the file.
        tail = os.pread(self._output.fileno(), _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        text = tail.decode("utf-8", "replace").strip()
        return f"Its last output:\n{text}" if text else "It printed nothing."


def start_embedded_server(notify: Notify) -> EmbeddedServer:
    """Start the server of this command, and make Prefect's clients in this process use it.

    Every server migrates the database in Prefect's home folder when it starts. A lock ensures that
    only one does so at a time; ``EmbeddedServer.wait_until_ready`` releases it.

    Args:
        notify: called with a sentence if another command holds the lock.
    """
    from prefect.settings import get_current_settings

    home = get_current_settings().home
    lock = ExitStack()
    notify_waiting = partial(
        notify, f"waiting for another command that starts a Prefect server in {home}"
    )
    lock.enter_context(hold_lock(home / "recpress-server.lock", notify_waiting))
    output = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server runs)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        api_url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        auth = new_auth_string()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(listener.fileno())],
            env=_build_environment(auth),
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # closes when this process ends, which ends the server
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the command handles Ctrl-C and stops the server
        )
    server = EmbeddedServer(process, api_url, output, home, lock)
    _set_variables(PREFECT_API_URL=api_url, PREFECT_API_AUTH_STRING=auth)
    return server


def protect_ephemeral_server() -> None:
    """Require a secret of clients of the server that Prefect starts for a flow called in Python.

    Such a server reads its settings from this process. Does nothing if a server is configured.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is not None or not settings.server.ephemeral.enabled:
        return
    configured = settings.server.api.auth_string or settings.api.auth_string
    auth = configured.get_secret_value() if configured is not None else new_auth_string()
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    _set_variables(PREFECT_API_AUTH_STRING=auth, **_build_server_settings(auth))


def new_auth_string() -> str:
    """Return a user and a random password, in the form ``user:password`` that Prefect expects."""
    return f"recpress:{secrets.token_hex(24)}"


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds; 0 if it has ended."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        # proc(5): utime and stime, fields 14 and 15; the text after the name begins with field 3.
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    output = subprocess.run(  # macOS: [[days-]hours:]minutes:seconds
        ["ps", "-o", "time=", "-p", str(pid)],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    seconds = 0.0
    for part in output.strip().replace("-", ":").split(":"):
        seconds = seconds * 60 + float(part or 0)
    return seconds


def _set_variables(**variables: str) -> None:
    """Set environment variables, and make Prefect read its settings from them again."""
    from prefect.context import refresh_global_settings_context

    os.environ.update(variables)
    refresh_global_settings_context()


def _build_server_settings(auth: str) -> dict[str, str]:
    """Return the variables that make a server require a secret and allow no origin."""
    return {
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        # The setting has two names. If a profile sets the first, the second has no effect.
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": NO_ORIGIN,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": NO_ORIGIN,
    }


def _build_environment(auth: str) -> dict[str, str]:
    """Return the environment variables of the server's process."""
    from prefect.settings import get_current_settings

    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    return {
        **os.environ,
        **settings,  # includes those of the Prefect profile
        **_build_server_settings(auth),
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "PREFECT_UI_ENABLED": "0",
        # Prefect sets these two for its own embedded server: fewer services, less memory.
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        # Its output is printed only if the server fails.
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }


def _end_with_parent() -> None:
    """Wait until the parent process closes standard input, then exit."""
    os.read(0, 1)  # not sys.stdin: the lock of a blocked read breaks the interpreter's shutdown
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_SECONDS)
    os._exit(1)


def main() -> None:
    """Serve Prefect's API on the socket whose descriptor is the first argument."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    listener = socket.socket(fileno=int(sys.argv[1]))
    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app",
        factory=True,
        lifespan="on",
        log_level="error",
        timeout_graceful_shutdown=3,
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    if not server.started:
        sys.exit(3)  # as uvicorn's own command does if the start fails


if __name__ == "__main__":
    main()
