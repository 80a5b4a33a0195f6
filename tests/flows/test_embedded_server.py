"""The embedded Prefect server: authentication, start, failures and its end.

A command starts this server for itself if ``PREFECT_API_URL`` is not set
(``flows/server/embedded_server.py``).

A home is the folder with everything that recpress stores (``RECPRESS_HOME``).
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import prefect
import pytest
from command_line import run_main_apart
from drafts import ROOT, environment, recpress, write_draft
from error_codes import raises_code
from orders import use_home
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_HOME,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    get_current_settings,
    temporary_settings,
)
from processes import LOOPBACK, arguments, environment_of, listening_sockets, process_tree
from test_doctor import http_server
from web_attacks import require_rejection_without_the_secret, send

from flows.cli import errors as cli_errors
from flows.cli.console import EMBEDDED
from flows.server import embedded_server
from flows.server.embedded_server import (
    CPU_SECONDS,
    EmbeddedServer,
    cpu_seconds,
    start_embedded_server,
)
from flows.server.prefect_access import require_access
from infra.errors import ServiceFailed, SettingRefused
from infra.telemetry import TELEMETRY_OFF
from tasks.bundles.packing import pack

LIMIT = "auc vs baseline >= -0.02"
# --force, because a repeated order returns its stored report and starts no server; another test may
# have run this order.
COMPRESS = ("compress", "clicks", "--preset", "fast", "--limit", LIMIT, "--force", "--json")
START_SECONDS = 120  # for a busy machine; an idle one needs about 12 s
END_SECONDS = 200  # longest time until a command has ended
SHORT_PREFECT_LIMIT = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "1"}
"""Prefect's own time limit for a start, which must have no effect."""
SUSPENDED_SECONDS = 3  # longer than SHORT_PREFECT_LIMIT
# The module of an embedded server, and that of a server that Prefect would start itself.
SERVER_MODULES = ("flows.server.embedded_server", "prefect.server.api.server")


@pytest.fixture(scope="module")
def packed_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a draft and with a home, ``recpress``, in which the draft is packed."""
    folder = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, folder / "recpress")
        pack(write_draft(folder / "draft"))
    return folder


@contextmanager
def running_command(env: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """Run ``recpress compress`` in a process; kill it at the end of the context."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli.app", *COMPRESS],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], object], process: "subprocess.Popen[str]") -> object:
    """Call ``condition`` until its result is true, and return that; the process must still run."""
    deadline = time.monotonic() + START_SECONDS
    while not (result := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.05)
    return result


def server_processes(pid: int) -> list[int]:
    """Return the descendants of a process that serve Prefect's API, or start to."""
    servers = []
    for child in process_tree(pid)[1:]:
        try:
            command_line = " ".join(arguments(child))
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(module in command_line for module in SERVER_MODULES):
            servers.append(child)
    return servers


@pytest.mark.slow
def test_embedded_server_refuses_other_clients_and_ends_with_its_command(
    packed_home: Path, tmp_path: Path
) -> None:
    env = environment(packed_home, RECPRESS_HOME=str(tmp_path / "recpress"), **SHORT_PREFECT_LIMIT)
    shutil.copytree(packed_home / "recpress", tmp_path / "recpress")
    with running_command(env) as process:
        server, secret = attack(process)
        process.kill()
        deadline = time.monotonic() + START_SECONDS
        while Path(f"/proc/{server}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not Path(f"/proc/{server}").exists(), "the server outlived its command"
    assert files_with(secret, packed_home, tmp_path) == []


@pytest.mark.slow
def test_run_whose_server_is_attacked_completes_and_no_file_has_the_secret(
    packed_home: Path,
) -> None:
    with running_command(environment(packed_home, **SHORT_PREFECT_LIMIT)) as process:
        server, secret = attack(process)
        out, err = process.communicate(timeout=END_SECONDS)
        assert process.returncode == 0, err
        assert json.loads(out)["version"] == "1"
        assert secret.partition(":")[2] not in out + err
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert files_with(secret, packed_home) == []


def attack(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Send requests without the secret to the embedded server of a command; all must fail.

    The secret is an authentication string, ``recpress:`` and a random password. The start of the
    server is suspended for longer than Prefect's own time limit, which must have no effect. The
    command is suspended during the requests, so that its run does not end.

    Returns:
        The process id and the authentication string of the server.
    """
    (server,) = wait_until(lambda: server_processes(process.pid), process)
    os.kill(server, signal.SIGSTOP)
    time.sleep(SUSPENDED_SECONDS)
    assert process.poll() is None, process.communicate()
    os.kill(server, signal.SIGCONT)
    wait_until(lambda: listening_sockets(server), process)
    os.kill(process.pid, signal.SIGSTOP)
    ((address, port),) = listening_sockets(server)
    api = f"http://127.0.0.1:{port}/api"
    variables = environment_of(server)
    secret = variables.get("PREFECT_SERVER_API_AUTH_STRING", "")
    assert re.fullmatch("recpress:[0-9a-f]{48}", secret)
    assert address in LOOPBACK
    assert send(api, "GET", "/health").status == 200
    require_rejection_without_the_secret(api, secret)
    # The server has no pages, so not even its own origin is allowed.
    for origin in (f"http://127.0.0.1:{port}", f"http://localhost:{port}"):
        reply = send(api, "GET", "/health", headers={"Origin": origin})
        assert "access-control-allow-origin" not in reply.headers
    for pid in process_tree(process.pid):
        assert secret.partition(":")[2] not in " ".join(arguments(pid))
    assert {name: variables[name].lower() for name in TELEMETRY_OFF} == TELEMETRY_OFF
    os.kill(process.pid, signal.SIGCONT)
    return server, secret


def files_with(secret: str, *folders: Path) -> list[str]:
    """Return the files that contain the password of an authentication string."""
    password = secret.partition(":")[2].encode()
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in files if password in path.read_bytes()]


# --- start -----------------------------------------------------------------------------------


@pytest.fixture
def starting_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedServer]:
    """An embedded server that has just been started, in a new Prefect home."""
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, "to be restored afterwards")
    monkeypatch.setattr(embedded_server, "_STOP_SECONDS", 0.5)  # a suspended server is killed
    # Starting a server replaces Prefect's global settings; monkeypatch restores them.
    context = prefect.context.GLOBAL_SETTINGS_CONTEXT
    monkeypatch.setattr(prefect.context, "GLOBAL_SETTINGS_CONTEXT", context)
    settings = {
        PREFECT_HOME: tmp_path / "prefect",
        PREFECT_SERVER_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{tmp_path}/prefect/prefect.db",
    }
    with temporary_settings(settings, restore_defaults={PREFECT_API_URL}):
        server = start_embedded_server(lambda _: None)
        yield server
        server.stop()


def test_server_without_progress_raises_embedded_server_stalled_and_is_stopped(
    starting_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_server, "NOTIFY_AFTER_SECONDS", 0.5)
    output: list[str] = []
    os.kill(starting_server.process.pid, signal.SIGSTOP)
    with raises_code(ServiceFailed, "embedded_server_stalled", seconds=1) as raised:
        starting_server.wait_until_ready(output.append, stall_seconds=1)
    assert "set PREFECT_API_URL" in str(raised.value)
    assert starting_server.process.poll() is not None
    assert f"process {starting_server.process.pid}" in output[0]
    assert "set PREFECT_API_URL" in output[0]


def test_cpu_seconds_grow_for_a_busy_process_and_not_for_a_suspended_one() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(0.5)
        before = cpu_seconds(process.pid)
        time.sleep(1)
        # A start that uses at least CPU_SECONDS between two checks counts as making progress.
        assert cpu_seconds(process.pid) - before >= CPU_SECONDS
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.1)
        before = cpu_seconds(process.pid)
        time.sleep(0.5)
        assert cpu_seconds(process.pid) == before
        process.kill()


def test_port_is_bound_before_the_server_process_listens(
    starting_server: EmbeddedServer,
) -> None:
    os.kill(starting_server.process.pid, signal.SIGSTOP)
    port = int(starting_server.api_url.removesuffix("/api").rpartition(":")[2])
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))


@pytest.fixture
def invalid_database(tmp_path: Path) -> Path:
    """Write an invalid database into the Prefect home of ``starting_server``."""
    folder = tmp_path / "prefect"
    folder.mkdir()
    (folder / "prefect.db").write_bytes(b"this is no database" * 1000)
    return folder


def test_server_that_ends_at_start_raises_an_error_with_its_last_output(
    invalid_database: Path, starting_server: EmbeddedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    # uvicorn, which runs the server, exits with code 3 if the application fails to start.
    with raises_code(ServiceFailed, "embedded_server_not_started", exit_code=3) as raised:
        starting_server.wait_until_ready(lambda _: None)
    assert cli_errors.report_error(raised.value) == 1
    output = capsys.readouterr().err
    assert "The embedded Prefect server ended with exit code 3 before it was ready" in output
    assert "file is not a database" in output
    assert "set PREFECT_API_URL" in output
    assert str(invalid_database) in output


@pytest.mark.nightly
def test_command_whose_server_ends_at_start_exits_with_code_1_and_its_last_output(
    packed_home: Path,
) -> None:
    prefect_home = packed_home / "damaged"
    prefect_home.mkdir()
    (prefect_home / "prefect.db").write_bytes(b"this is no database" * 1000)
    output = recpress(*COMPRESS, env=environment(packed_home, PREFECT_HOME=str(prefect_home)))
    assert output.returncode == 1
    assert "The embedded Prefect server ended with exit code 3 before it was ready" in output.stderr
    assert "file is not a database" in output.stderr
    assert "set PREFECT_API_URL" in output.stderr
    assert str(prefect_home) in output.stderr


@pytest.mark.slow
def test_command_whose_server_is_killed_exits_with_code_1(packed_home: Path) -> None:
    env = environment(packed_home, PREFECT_HOME=str(packed_home / "killed"))
    with running_command(env) as process:
        (server,) = wait_until(lambda: server_processes(process.pid), process)
        os.kill(server, signal.SIGKILL)
        _, err = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 1
    assert "ended with exit code -9 before it was ready" in err
    assert "Traceback" not in err


# --- a configured server ---------------------------------------------------------------------


def test_command_with_missing_credentials_exits_with_code_2_before_any_work(
    packed_home: Path,
    prefect_server: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = get_current_settings().api.url
    use_home(monkeypatch, packed_home / "recpress")
    # Variables for Prefect that the command sets for the whole process; monkeypatch restores them.
    for name, value in EMBEDDED.items():
        monkeypatch.setenv(name, value)
    with temporary_settings(restore_defaults={PREFECT_API_AUTH_STRING}):
        code, out, err = run_main_apart(monkeypatch, capsys, *COMPRESS)
    assert (code, out) == (2, "")
    expected = f"recpress: Expected access to the Prefect server at {url}, got HTTP 401 without"
    assert err.startswith(expected)
    assert "Set PREFECT_API_AUTH_STRING" in err
    assert len(err.splitlines()) == 1
    assert not (packed_home / "recpress" / "results").exists()


def test_wrong_credentials_raise_an_error_that_does_not_contain_them(prefect_server: None) -> None:
    with (
        temporary_settings({PREFECT_API_AUTH_STRING: "recpress:canary"}),
        raises_code(
            SettingRefused,
            "prefect_credentials_refused",
            status=401,
            variable="PREFECT_API_AUTH_STRING",
        ) as caught,
    ):
        require_access()
    assert "canary" not in str(caught.value)


def test_configured_server_that_is_down_or_not_prefect_raises_an_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}/api"
        with (
            temporary_settings({PREFECT_API_URL: uri}),
            raises_code(ServiceFailed, "prefect_no_answer", address=uri),
        ):
            require_access()
    with (
        http_server(lambda _: (200, {}, b"<html>It works!</html>")) as uri,
        temporary_settings({PREFECT_API_URL: f"{uri}/api"}),
        raises_code(SettingRefused, "prefect_answer_foreign"),
    ):
        require_access()


def test_server_that_prefect_starts_for_a_called_flow_requires_a_secret(
    prefect_server: None,
) -> None:
    """Prefect starts the server of ``prefect_server`` as it does for a flow without a server."""
    settings = get_current_settings()
    assert settings.api.url is not None
    assert settings.api.auth_string is not None
    secret = settings.api.auth_string.get_secret_value()
    require_rejection_without_the_secret(settings.api.url, secret)
