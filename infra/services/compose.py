"""Convert docker-compose.yml to descriptions of local processes, for ``make up-local``.

The compose file defines the services, their start order and their health checks. This module
returns the same for processes that listen on 127.0.0.1. Only addresses and paths differ between a
container and a process, so these are replaced in every command, variable and health check:

- ``service:port`` becomes ``127.0.0.1`` and that service's local port;
- in the settings of a service, its ports become its local ports, and ``0.0.0.0`` ``127.0.0.1``;
- folders of volumes, files of configs and the image's code folder become local paths.

Services with a compose profile (GPU, Triton) are omitted.
"""

import re
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from compressors.contracts import Frozen
from infra.bundle.json_reader import shorten
from infra.errors import SettingRefused
from infra.telemetry import TELEMETRY_OFF

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
GRPC_OFFSET = 10_000
"""SeaweedFS adds this to an HTTP port to get its gRPC port, so local ports keep the offset."""

Condition = Literal["service_started", "service_healthy", "service_completed_successfully"]

# "$$", "${NAME}", or "${NAME:-default}" and the like: the groups are the name, the operator (one of
# ":-", "-", ":?" and "?") and the text after it.
_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?:(:?[-?])([^}]*))?\})")
_DURATION = re.compile(r"(\d+)s")


class Service(Frozen):
    """One process: its command, its environment variables and its health check.

    Args:
        name: the service's name in the compose file.
        command: program and arguments.
        environment: variables of the process, in addition to those of the machine.
        health: command that exits with 0 if the service is healthy; empty if there is no check.
        health_seconds: time limit of one health check.
        starts_after: name of another service -> the condition that it must reach before this
            service is started.
        ports: port in the container -> local port.
        stop_signal: name of the signal that stops the process.
        stop_seconds: time until a process that does not stop is killed.
        one_shot: whether the process ends by itself (``restart: "no"``).
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    health: tuple[str, ...]
    health_seconds: float
    starts_after: dict[str, Condition]
    ports: dict[int, int]
    stop_signal: str
    stop_seconds: float
    one_shot: bool


class Services(Frozen):
    """All services, and what must exist before they are started.

    Args:
        services: the processes.
        client: environment variables for programs that use the services.
        files: path -> content of files that services read.
        folders: folders that services write.
    """

    services: tuple[Service, ...]
    client: dict[str, str]
    files: dict[Path, str]
    folders: tuple[Path, ...]


MALFORMED_DOCUMENT = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Exceptions raised if a field of a decoded document is missing or has a wrong type."""


def find_required_secrets(text: str) -> tuple[str, ...]:
    """Find the required variables of a compose file, ``${NAME:?message}``; all are secrets.

    Each name is returned once, in the order of the file.
    """
    return tuple(
        dict.fromkeys(
            name for name, operator, _ in _VARIABLE.findall(text) if operator.endswith("?")
        )
    )


def find_port_variables(text: str) -> tuple[str, ...]:
    """Find the variables of a compose file that set published ports, ``${NAME_PORT}``.

    Each name is returned once, in the order of the file.
    """
    return tuple(
        dict.fromkeys(name for name, _, _ in _VARIABLE.findall(text) if name.endswith("_PORT"))
    )


def read_variables(path: Path) -> dict[str, str]:
    """Read the ``NAME=value`` lines of a file such as ``.env``; return none if it is missing.

    Raises:
        SettingRefused: a line has another form, or the file is not UTF-8 text.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise SettingRefused("variables_not_utf8", path=str(path), problem=str(fault)) from fault
    variables = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"\w+", name.strip()):
            raise SettingRefused("variables_line_form", path=str(path), line=number)
        variables[name.strip()] = value.strip().strip("\"'")
    return variables


def read_services(
    variables: Mapping[str, str],
    state: Path,
    *,
    compose: Path = COMPOSE,
    ports: "Callable[[Iterable[int]], dict[int, int]] | None" = None,
) -> Services:
    """Read a compose file as descriptions of processes.

    Args:
        variables: the values of ``${NAME}`` in the file.
        state: the local folder for volumes and configs.
        compose: the compose file.
        ports: returns a free local port for each port that the file does not publish; by default
            ``choose_free_ports``.

    Raises:
        SettingRefused: a required variable is missing, or a part of the file cannot be run as a
            process.
    """
    import yaml

    try:
        document = yaml.safe_load(compose.read_text(encoding="utf-8"))
        return _read_services(
            _replace_variables(document, variables), state, compose, ports or choose_free_ports
        )
    except (yaml.YAMLError, *MALFORMED_DOCUMENT) as fault:
        raise SettingRefused(
            "services_form", path=str(compose), kind=type(fault).__name__, problem=str(fault)[:300]
        ) from fault


def _read_services(
    document: dict[str, Any],
    state: Path,
    compose: Path,
    choose_ports: "Callable[[Iterable[int]], dict[int, int]]",
) -> Services:
    """Convert the decoded compose file, in which variables are already replaced."""
    entries = {
        name: entry for name, entry in document["services"].items() if not entry.get("profiles")
    }
    local_ports = {name: _map_ports(entry, choose_ports) for name, entry in entries.items()}
    hosts = {
        f"{name}:{container_port}": f"127.0.0.1:{local_port}"
        for name, ports in local_ports.items()
        for container_port, local_port in ports.items()
    }
    folder = compose.parent
    configs = {name: state / "configs" / name for name in document.get("configs", {})}
    services, folders = [], set()
    for name, entry in entries.items():
        paths = {entry["working_dir"]: str(folder)} if "build" in entry else {}
        for volume in entry.get("volumes", ()):
            source, container_path = volume.split(":")[:2]
            is_volume = source in document["volumes"]  # else a folder of this machine
            paths[container_path] = str(
                state / source if is_volume else (folder / source).absolute()
            )
            folders |= {state / source} if is_volume else set()
        for item in entry.get("configs", ()):
            paths[item["target"]] = str(configs[item["source"]])
        services.append(
            _build_service(
                name, entry, local_ports[name], _Replacements(hosts, local_ports[name], paths)
            )
        )
    return Services(
        services=tuple(services),
        # "x-client" is an extension of the compose file: the variables that all clients need.
        client=_Replacements(hosts, {}, {}).apply_to_all({**document["x-client"], **TELEMETRY_OFF}),
        files={configs[name]: item["content"] for name, item in document["configs"].items()},
        folders=tuple(sorted(folders)),
    )


def _build_service(
    name: str, entry: dict[str, Any], local_ports: dict[int, int], replacements: "_Replacements"
) -> Service:
    """Convert the entry of one service in the compose file.

    Raises:
        SettingRefused: the health check is a shell command, or a duration is not in seconds.
    """
    health = entry.get("healthcheck", {})
    test = health.get("test", ["CMD"])
    if test[0] != "CMD":
        raise SettingRefused("health_check_form", service=name)
    return Service(
        name=name,
        command=tuple(map(replacements.apply, [*entry.get("entrypoint", ()), *entry["command"]])),
        environment=replacements.apply_to_all(entry.get("environment", {})),
        health=tuple(map(replacements.apply, test[1:])),
        health_seconds=_parse_seconds(health.get("timeout", "5s")),
        starts_after={
            other: item["condition"] for other, item in entry.get("depends_on", {}).items()
        },
        ports=local_ports,
        stop_signal=entry.get("stop_signal", "SIGTERM"),
        stop_seconds=_parse_seconds(entry.get("stop_grace_period", "10s")),
        one_shot=entry.get("restart") == "no",
    )


class _Replacements:
    """Replaces addresses, ports and paths in a container by local ones.

    Args:
        hosts: ``service:port`` -> local address, of all services.
        ports: port in the container -> local port, of this service.
        paths: path in the container -> local path, of this service.
    """

    def __init__(
        self, hosts: Mapping[str, str], ports: Mapping[int, int], paths: Mapping[str, str]
    ) -> None:
        self._local = {**hosts, **paths, "0.0.0.0": "127.0.0.1"}  # noqa: S104 (is replaced)
        self._local |= {str(container): str(local) for container, local in ports.items()}
        words = sorted(self._local, key=len, reverse=True)
        # One pattern for all words, so that no replacement is replaced again.
        self._pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, words))})(?![\w.])")

    def apply(self, text: str) -> str:
        """Replace all addresses, ports and paths of the container in one text."""
        return self._pattern.sub(lambda match: self._local[match[0]], str(text))

    def apply_to_all(self, values: Mapping[str, str]) -> dict[str, str]:
        """Apply the replacements to each value of a mapping."""
        return {name: self.apply(value) for name, value in values.items()}


def _map_ports(
    entry: dict[str, Any], choose_ports: "Callable[[Iterable[int]], dict[int, int]]"
) -> dict[int, int]:
    """Return port in the container -> local port, for all ports of a service.

    The file states the local port of a published port. Its gRPC port, ``GRPC_OFFSET`` above it, has
    that local port plus ``GRPC_OFFSET``. Every other port gets a free local port.

    Raises:
        SettingRefused: a port is published on another address than 127.0.0.1.
    """
    published: dict[int, int] = {}
    for line in entry.get("ports", ()):
        address, local_port, container_port = line.split(":")
        if address != "127.0.0.1":
            raise SettingRefused("port_not_loopback", port=line)
        published[int(container_port)] = int(local_port)
    exposed = [int(port) for port in entry.get("expose", ())]
    grpc = {
        port: published[port - GRPC_OFFSET] + GRPC_OFFSET
        for port in exposed
        if port - GRPC_OFFSET in published
    }
    return published | grpc | choose_ports(port for port in exposed if port not in grpc)


def choose_free_ports(ports: Iterable[int]) -> dict[int, int]:
    """Choose a random free local port for each of ``ports``; returns port -> local port.

    If one port is ``GRPC_OFFSET`` above another one, their local ports have the same offset.
    """
    chosen: dict[int, int] = {}
    for port in sorted(ports):
        if port - GRPC_OFFSET in chosen:
            chosen[port] = chosen[port - GRPC_OFFSET] + GRPC_OFFSET
            continue
        while port not in chosen:
            # At most 31,999: Linux assigns ports from 32,768 to outgoing connections.
            # A gRPC port may be higher; it is checked, too.
            local = 12_000 + secrets.randbelow(20_000)
            if (
                local not in chosen.values()
                and is_port_free(local)
                and is_port_free(local + GRPC_OFFSET)
            ):
                chosen[port] = local
    return chosen


def is_port_free(port: int) -> bool:
    """Return whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket() as probe:
        # As servers do: without it, connections that were closed recently would occupy the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _replace_variables(value: Any, variables: Mapping[str, str]) -> Any:
    """Replace ``${NAME}`` in all texts of a document, as Docker Compose does."""
    match value:
        case str():
            return _VARIABLE.sub(lambda match: _resolve_variable(match, variables), value)
        case dict():
            return {name: _replace_variables(item, variables) for name, item in value.items()}
        case list():
            return [_replace_variables(item, variables) for item in value]
    return value


def _resolve_variable(match: "re.Match[str]", variables: Mapping[str, str]) -> str:
    """Return the text that replaces a match of ``_VARIABLE``: ``$`` or the variable's value.

    If the operator contains a colon, an empty value counts as missing.

    Raises:
        SettingRefused: the variable is required and missing.
    """
    name, operator, default_or_message = match.groups()
    if name is None:
        return "$"
    value = variables.get(name)
    if value or (value is not None and operator in {None, "-", "?"}):
        return value
    if operator in {"?", ":?"}:
        raise SettingRefused("variable_missing", name=name, remedy=default_or_message)
    return default_or_message or ""


def _parse_seconds(text: str) -> float:
    """Parse a duration in whole seconds, such as ``5s``; raise ``SettingRefused`` for others."""
    match = _DURATION.fullmatch(text)
    if not match:
        raise SettingRefused("duration_form", got=shorten(text))
    return float(match[1])
