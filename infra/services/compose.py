"""Read docker-compose.yml as local processes on this machine's loopback.

The file defines the services, their start order and their health checks; this module returns the
same for processes. Only addresses and paths differ, so they are replaced in every command, variable
and check:

- ``service:port`` becomes ``127.0.0.1`` and that service's local port;
- a service's ports in its settings become its local ports; ``0.0.0.0`` becomes loopback;
- folders of volumes, files of configs and the image's code folder become local paths.

Services of a profile (GPU, Triton) are omitted.
"""

import re
import secrets
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from compressors.contracts import Frozen
from infra.bundle.json_reader import short
from infra.errors import SettingRefused
from infra.telemetry import TELEMETRY_OFF

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
GRPC_ABOVE = 10_000
"""SeaweedFS expects each gRPC port this far above its service's port; such pairs stay pairs."""

Condition = Literal["service_started", "service_healthy", "service_completed_successfully"]

_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?:(:?[-?])([^}]*))?\})")
_SECONDS = re.compile(r"(\d+)s")


class Service(Frozen):
    """One process: its command, its variables and its health check."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    health: tuple[str, ...]
    health_seconds: float
    after: dict[str, Condition]
    ports: dict[int, int]
    stop_signal: str
    stop_seconds: float
    one_shot: bool


class Services(Frozen):
    """All services, the variables of a client, and the files that services read."""

    services: tuple[Service, ...]
    client: dict[str, str]
    files: dict[Path, str]
    folders: tuple[Path, ...]


NOT_OF_ITS_FORM = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What reading a document raises that has other types or lacks a field."""


def needed_secrets(text: str) -> tuple[str, ...]:
    """Return the required variables of a compose file: those with ``:?``."""
    return tuple(
        dict.fromkeys(name for name, how, _ in _VARIABLE.findall(text) if how.endswith("?"))
    )


def port_variables(text: str) -> tuple[str, ...]:
    """Return the variables that set published ports."""
    return tuple(
        dict.fromkeys(name for name, _, _ in _VARIABLE.findall(text) if name.endswith("_PORT"))
    )


def read_variables(path: Path) -> dict[str, str]:
    """Read the ``NAME=value`` lines of a file such as ``.env``; empty without that file.

    Raises:
        SettingRefused: a line has another form, or the file is not UTF-8 text.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise SettingRefused("variables_not_utf8", path=str(path), problem=str(fault)) from fault
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"\w+", name.strip()):
            raise SettingRefused("variables_line_form", path=str(path), line=number)
        found[name.strip()] = value.strip().strip("\"'")
    return found


def read_services(
    variables: Mapping[str, str],
    state: Path,
    *,
    compose: Path = COMPOSE,
    ports: "Callable[[Iterable[int]], dict[int, int]] | None" = None,
) -> Services:
    """Read a compose file as processes.

    Args:
        variables: the values of ``${NAME}`` in the file.
        state: the local folder of volumes and configs.
        compose: the compose file.
        ports: maps each unpublished port to a free local port.

    Raises:
        SettingRefused: a required variable is missing, or a part of the file cannot be run as a
            process.
    """
    import yaml

    try:
        document = yaml.safe_load(compose.read_text(encoding="utf-8"))
        return _read_services(_filled(document, variables), state, compose, ports or free_ports)
    except (yaml.YAMLError, *NOT_OF_ITS_FORM) as fault:
        raise SettingRefused(
            "services_form", path=str(compose), kind=type(fault).__name__, problem=str(fault)[:300]
        ) from fault


def _read_services(
    document: dict[str, Any],
    state: Path,
    compose: Path,
    free: "Callable[[Iterable[int]], dict[int, int]]",
) -> Services:
    chosen = {
        name: entry for name, entry in document["services"].items() if not entry.get("profiles")
    }
    at = {name: _ports(entry, free) for name, entry in chosen.items()}
    hosts = {
        f"{name}:{inside}": f"127.0.0.1:{here}"
        for name, held in at.items()
        for inside, here in held.items()
    }
    folder = compose.parent
    configs = {name: state / "configs" / name for name in document.get("configs", {})}
    services, folders = [], set()
    for name, entry in chosen.items():
        paths = {entry["working_dir"]: str(folder)} if "build" in entry else {}
        for volume in entry.get("volumes", ()):
            outside, inside = volume.split(":")[:2]
            named = outside in document["volumes"]
            paths[inside] = str(state / outside if named else (folder / outside).absolute())
            folders |= {state / outside} if named else set()
        for item in entry.get("configs", ()):
            paths[item["target"]] = str(configs[item["source"]])
        services.append(_service(name, entry, at[name], _Places(hosts, at[name], paths)))
    return Services(
        services=tuple(services),
        client=_Places(hosts, {}, {}).of_all({**document["x-client"], **TELEMETRY_OFF}),
        files={configs[name]: held["content"] for name, held in document["configs"].items()},
        folders=tuple(sorted(folders)),
    )


def _service(name: str, entry: dict[str, Any], at: dict[int, int], places: "_Places") -> Service:
    health = entry.get("healthcheck", {})
    test = health.get("test", ["CMD"])
    if test[0] != "CMD":
        raise SettingRefused("health_check_form", service=name)
    return Service(
        name=name,
        command=tuple(map(places.of, [*entry.get("entrypoint", ()), *entry["command"]])),
        environment=places.of_all(entry.get("environment", {})),
        health=tuple(map(places.of, test[1:])),
        health_seconds=_seconds(health.get("timeout", "5s")),
        after={other: held["condition"] for other, held in entry.get("depends_on", {}).items()},
        ports=at,
        stop_signal=entry.get("stop_signal", "SIGTERM"),
        stop_seconds=_seconds(entry.get("stop_grace_period", "10s")),
        one_shot=entry.get("restart") == "no",
    )


class _Places:
    """Addresses and paths of containers, and their local replacements."""

    def __init__(
        self, hosts: Mapping[str, str], own: Mapping[int, int], paths: Mapping[str, str]
    ) -> None:
        self._here = {**hosts, **paths, "0.0.0.0": "127.0.0.1"}  # noqa: S104 (is replaced)
        self._here |= {str(inside): str(here) for inside, here in own.items()}
        words = sorted(self._here, key=len, reverse=True)
        # In one pass, so that no replacement is replaced again.
        self._pattern = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, words))})(?![\w.])")

    def of(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._here[found[0]], str(text))

    def of_all(self, values: Mapping[str, str]) -> dict[str, str]:
        return {name: self.of(value) for name, value in values.items()}


def _ports(
    entry: dict[str, Any], free: "Callable[[Iterable[int]], dict[int, int]]"
) -> dict[int, int]:
    """Map each port of a service to its local port."""
    published: dict[int, int] = {}
    for line in entry.get("ports", ()):
        address, here, inside = line.split(":")
        if address != "127.0.0.1":
            raise SettingRefused("port_not_loopback", port=line)
        published[int(inside)] = int(here)
    inner = [int(port) for port in entry.get("expose", ())]
    pairs = {
        port: published[port - GRPC_ABOVE] + GRPC_ABOVE
        for port in inner
        if port - GRPC_ABOVE in published
    }
    return published | pairs | free(port for port in inner if port not in pairs)


def free_ports(wanted: Iterable[int]) -> dict[int, int]:
    """Return a free port for each; a port ``GRPC_ABOVE`` another one keeps that offset."""
    inside = sorted(wanted)
    found: dict[int, int] = {}
    for port in inside:
        if port - GRPC_ABOVE in found:
            found[port] = found[port - GRPC_ABOVE] + GRPC_ABOVE
            continue
        while port not in found:
            here = 12_000 + secrets.randbelow(20_000)
            if here not in found.values() and is_free(here) and is_free(here + GRPC_ABOVE):
                found[port] = here
    return found


def is_free(port: int) -> bool:
    """Return whether a server could listen on this port of loopback now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    """Replace the variables of a document as compose does."""
    match value:
        case str():
            return _VARIABLE.sub(lambda found: _value(found, variables), value)
        case dict():
            return {name: _filled(held, variables) for name, held in value.items()}
        case list():
            return [_filled(held, variables) for held in value]
    return value


def _value(found: "re.Match[str]", variables: Mapping[str, str]) -> str:
    name, how, rest = found.groups()
    if name is None:
        return "$"
    value = variables.get(name)
    if value or (value is not None and how in {None, "-", "?"}):
        return value
    if how in {"?", ":?"}:
        raise SettingRefused("variable_missing", name=name, remedy=rest)
    return rest or ""


def _seconds(text: str) -> float:
    found = _SECONDS.fullmatch(text)
    if not found:
        raise SettingRefused("duration_form", got=short(text))
    return float(found[1])
