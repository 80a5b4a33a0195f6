"""The services of `make up-local` refuse requests of web pages and of other local users."""

import asyncio
import http.client
import json
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from drafts import environment, recpress
from local_services import LocalServices
from prefect.events import emit_event
from prefect.events.clients import get_events_subscriber
from prefect.events.filters import EventFilter, EventNameFilter
from prefect.logging.clients import get_logs_subscriber
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from processes import LOOPBACK, arguments, environment_of, listening_sockets, process_tree
from web_attacks import FOREIGN, basic_auth_header, require_rejection_without_the_secret, send

from infra.services.compose import read_variables
from infra.telemetry import TELEMETRY_OFF

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Names of this machine. Some of the origins in FOREIGN (origins of web pages that must not read
# responses, ``tests/web_attacks.py``) are on this machine.
LOCAL = {"localhost", "127.0.0.1"}
JSON = {"Content-Type": "application/json"}


def secrets_of(services: LocalServices) -> dict[str, str]:
    """Return the six secrets that ``make up-local`` generates, by environment variable.

    They are two passwords of databases, one of Prefect, and three keys of the object store.
    """
    return read_variables(services.home / "services" / "secrets.env")


def command_lines_by_pid(services: LocalServices) -> dict[int, list[str]]:
    """Return the command line of each process of the services, by process id."""
    command_lines = {}
    for pid in process_tree(services.pid):
        try:
            command_lines[pid] = arguments(pid)
        except (FileNotFoundError, ProcessLookupError):  # the process has ended
            continue
    return command_lines


def test_prefect_refuses_requests_without_the_secret(local_services: LocalServices) -> None:
    client = local_services.client
    require_rejection_without_the_secret(
        client["PREFECT_API_URL"], client["PREFECT_API_AUTH_STRING"]
    )


def test_prefect_allows_its_own_ui_as_127_0_0_1_and_as_localhost(
    local_services: LocalServices,
) -> None:
    api = local_services.client["PREFECT_API_URL"]
    ui_origin = api.removesuffix("/api")
    for origin in (ui_origin, ui_origin.replace("127.0.0.1", "localhost")):
        reply = send(api, "GET", "/health", headers={"Origin": origin})
        assert reply.headers["access-control-allow-origin"] == origin


def test_websockets_for_events_and_logs_open_with_the_secret(local_services: LocalServices) -> None:
    client, name = local_services.client, f"recpress.test.{uuid4()}"

    async def open_websockets() -> None:
        async with get_events_subscriber(
            filter=EventFilter(event=EventNameFilter(name=[name]))
        ) as events:
            emit_event(event=name, resource={"prefect.resource.id": name})
            assert (await asyncio.wait_for(anext(events), 60)).event == name
        # By default Prefect publishes no log lines there, but the client authenticates.
        async with get_logs_subscriber():
            pass

    settings = {
        PREFECT_API_URL: client["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: client["PREFECT_API_AUTH_STRING"],
    }
    with temporary_settings(settings):
        asyncio.run(open_websockets())


def test_every_process_listens_only_on_loopback(local_services: LocalServices) -> None:
    ports = {
        (pid, " ".join(command_line)[:60], *address)
        for pid, command_line in command_lines_by_pid(local_services).items()
        for address in listening_sockets(pid)
    }
    assert len(ports) >= 13  # 2 Postgres, 8 of the store, Prefect, MLflow, the worker
    assert [port for port in ports if port[2] not in LOOPBACK] == []


def test_secrets_are_only_in_files_that_only_their_owner_can_read(
    local_services: LocalServices,
) -> None:
    secrets = set(secrets_of(local_services).values())
    assert len(secrets) == 6
    for command_line in command_lines_by_pid(local_services).values():
        with_secret = [word for word in command_line for secret in secrets if secret in word]
        assert not with_secret, command_line[0]
    state = local_services.home / "services"
    # "identities" has the keys of the object store.
    private_files = {state / "secrets.env", state / "client.env", state / "configs" / "identities"}
    assert {path.stat().st_mode & 0o777 for path in private_files} == {0o600}
    other_files = [
        str(path)
        for path in local_services.home.rglob("*")
        if path.is_file() and path not in private_files
        for content in [path.read_bytes()]
        for secret in secrets
        if secret.encode() in content
    ]
    assert other_files == []


def test_telemetry_is_off_in_every_process(local_services: LocalServices) -> None:
    checked = set()
    for pid, command_line in command_lines_by_pid(local_services).items():
        services = {name for name in ("prefect", "mlflow") if f"/{name}" in " ".join(command_line)}
        # The parent process is not one of the services.
        if services and pid != local_services.pid:
            values = environment_of(pid)
            telemetry = {name: values.get(name, "") for name in TELEMETRY_OFF}
            assert telemetry == TELEMETRY_OFF, command_line
            checked |= services
        # "weed" is the program of SeaweedFS, the object store.
        assert "weed" not in command_line[:1] or "-master.telemetry=false" in command_line
    assert checked == {"prefect", "mlflow"}


def test_printed_command_prints_the_secret_that_logs_in(local_services: LocalServices) -> None:
    printed = (local_services.home / "output").read_text()
    (command,) = (line.strip() for line in printed.splitlines() if "echo" in line)
    shell = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=True)
    secret = shell.stdout.strip()
    assert secret not in printed
    reply = send(
        local_services.client["PREFECT_API_URL"],
        "GET",
        "/admin/version",
        headers=basic_auth_header(secret),
    )
    assert reply.status == 200


def test_prefects_command_line_works_with_the_variables_of_client_env(
    local_services: LocalServices, tmp_path: Path
) -> None:
    file = shlex.quote(str(local_services.home / "services" / "client.env"))
    command = f"{shlex.quote(sys.executable)} -m prefect work-pool ls"
    env = environment(tmp_path, COLUMNS="200")
    allowed = subprocess.run(
        ["/bin/sh", "-c", f". {file}; {command}"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "recpress-cpu" in allowed.stdout
    url = local_services.client["PREFECT_API_URL"]
    refused = subprocess.run(
        ["/bin/sh", "-c", command],
        env=env | {"PREFECT_API_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0


def test_doctor_names_the_variable_of_wrong_credentials(
    local_services: LocalServices, tmp_path: Path
) -> None:
    wrong = local_services.client | {"PREFECT_API_AUTH_STRING": "recpress:wrong"}
    process = recpress("doctor", "--json", env=environment(tmp_path, **wrong))
    assert process.returncode == 1
    (prefect,) = (item for item in json.loads(process.stdout) if item["what"] == "Prefect")
    assert "refuses the credentials (401)" in prefect["found"]
    assert "PREFECT_API_AUTH_STRING" in prefect["remedy"]


def test_mlflow_refuses_requests_of_other_origins_and_for_other_hosts(
    local_services: LocalServices,
) -> None:
    uri = local_services.client["MLFLOW_TRACKING_URI"]
    create = "/api/2.0/mlflow/registered-models/create"
    # MLflow accepts pages of this machine on any port (docs/services.md).
    origins = [origin for origin in FOREIGN if urlsplit(origin).hostname not in LOCAL]
    assert len(origins) == 4  # the other three are on this machine
    for origin in origins:
        for path in (create, create.replace("/api", "/ajax-api")):
            for content_type in ("application/json", "text/plain"):
                body = json.dumps({"name": "from-another-origin"}).encode()
                headers = {"Origin": origin, "Content-Type": content_type}
                reply = send(uri, "POST", path, body=body, headers=headers)
                assert reply.status == 403, (origin, content_type, reply)
        preflight = send(
            uri,
            "OPTIONS",
            create,
            headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
        )
        assert "access-control-allow-origin" not in preflight.headers
    for method, path in (("GET", "/"), ("POST", create), ("POST", "/graphql")):
        reply = send(uri, method, path, body=b"{}", headers=JSON | {"Host": "evil.example"})
        assert reply.status == 403, path
    listed = send(uri, "GET", "/api/2.0/mlflow/registered-models/search?max_results=100")
    assert b"from-another-origin" not in listed.body
    assert send(uri, "GET", "/").headers["x-frame-options"] == "SAMEORIGIN"


def test_store_refuses_http_requests_without_a_key_on_every_port(
    local_services: LocalServices,
) -> None:
    (pid,) = (
        pid
        for pid, command_line in command_lines_by_pid(local_services).items()
        if command_line[:1] == ["weed"]
    )
    # Requests of SeaweedFS's HTTP interfaces (master, volume and filer), and of S3. "1,0112345678"
    # has the form of a file id on a volume.
    requests = (
        ("GET", "/dir/assign"),
        ("GET", "/col/delete?collection=recpress"),
        ("GET", "/vol/grow?count=1"),
        ("POST", "/submit"),
        ("GET", "/buckets/"),
        ("PUT", "/buckets/recpress/from-another-origin"),
        ("POST", "/buckets/recpress/from-another-origin"),
        ("DELETE", "/buckets/recpress?recursive=true"),
        ("POST", "/1,0112345678"),
        ("DELETE", "/1,0112345678"),
        ("PUT", "/recpress/from-another-origin"),
    )
    accepted = {}
    for _, port in listening_sockets(pid):
        for method, path in requests:
            try:
                reply = send(f"http://127.0.0.1:{port}", method, path, body=b"content")
            except (OSError, http.client.HTTPException):
                continue  # gRPC is another protocol
            if reply.status < 400:
                accepted[port, method, path] = reply.status
    assert accepted == {}
    s3 = local_services.client["AWS_ENDPOINT_URL"]
    for method, path in (("GET", "/"), ("POST", "/?Action=CreateUser&UserName=x")):
        assert send(s3, method, path).status in {403, 405}, path
