"""``recpress doctor`` and its HTTP requests, against local servers that do not work.

A finding of ``doctor`` is its result for one service or library: the state (``ok``, ``fault`` or
``absent``), what was found, and a remedy.

The servers are down, never respond, send slowly, refuse requests, report errors, or belong to
another service.
"""

import json
import logging
import os
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest
from command_line import run_main_apart
from drafts import environment, recpress
from error_codes import raises_code
from s3_server import S3Server

from flows.cli.doctor import DoctorFinding, check_installation
from infra.errors import NoAnswer
from infra.services.http_probe import MAX_BYTES, HttpRequest, send_request

SECRET = "canary-of-a-password"
LIMIT_SECONDS = 2.5
"""The time limit of a check in these tests; the default is twice as long."""
MAX_SECONDS = LIMIT_SECONDS + 2
"""The time limit, and two more seconds for a busy machine."""

Reply = tuple[int, dict[str, str], bytes]


@contextmanager
def http_server(reply: Callable[[BaseHTTPRequestHandler], Reply]) -> Iterator[str]:
    """Run a server that sends the result of ``reply`` to every request; yields its URI."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = reply(self)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Print nothing: a client may close the connection before it has read everything."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """The port of a server that accepts connections and never responds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def set_services(patch: pytest.MonkeyPatch, uri: str) -> None:
    """Set store, registry and Prefect to one address, with a secret as every credential."""
    patch.setenv("RECPRESS_STORE", "s3://models/here")
    patch.setenv("AWS_ENDPOINT_URL", uri)
    patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("MLFLOW_TRACKING_URI", uri.replace("://", f"://somebody:{SECRET}@"))
    patch.setenv("PREFECT_API_URL", f"{uri}/api")
    patch.setenv("PREFECT_API_AUTH_STRING", f"admin:{SECRET}")


def examine_services() -> tuple[DoctorFinding, DoctorFinding, DoctorFinding]:
    """Return the findings about store, registry and Prefect; assert that none has the secret."""
    findings = {item.what: item for item in check_installation()}
    assert SECRET not in "".join(item.model_dump_json() for item in findings.values())
    return findings["object store"], findings["registry"], findings["Prefect"]


def test_unreachable_services_are_faults_with_a_remedy(
    closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_services(monkeypatch, f"http://127.0.0.1:{closed_port}")
    store, registry, prefect = examine_services()
    assert {item.state for item in (store, registry, prefect)} == {"fault"}
    assert "did not respond" in store.found
    assert "AWS_ENDPOINT_URL" in store.remedy
    assert f"No answer from http://127.0.0.1:{closed_port}" in registry.found
    assert "MLFLOW_TRACKING_URI" in registry.remedy
    assert "refused" in prefect.found
    assert "PREFECT_API_URL" in prefect.remedy


def test_three_services_that_never_respond_take_one_time_limit(
    silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installation()  # loads the libraries, so that the measured time does not include that
    monkeypatch.setattr(HttpRequest.wait, "__defaults__", (LIMIT_SECONDS,))
    monkeypatch.setitem(send_request.__kwdefaults__, "timeout", LIMIT_SECONDS)
    set_services(monkeypatch, f"http://127.0.0.1:{silent_port}")
    start = time.monotonic()
    findings = examine_services()
    assert LIMIT_SECONDS - 0.5 < time.monotonic() - start < MAX_SECONDS
    for item in findings:
        assert item.state == "fault"
        assert "No answer" in item.found
        assert "firewall" in item.remedy


@pytest.mark.slow
def test_doctor_command_ends_soon_if_services_never_respond(
    silent_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_services(monkeypatch, f"http://127.0.0.1:{silent_port}")
    service_variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("AWS_")
        or name in {"RECPRESS_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"}
    }
    start = time.monotonic()
    process = recpress("doctor", env=environment(tmp_path, **service_variables), seconds=60)
    assert process.returncode == 1
    # Most of the time is imports. Without the limit, retries of the clients would take minutes.
    assert time.monotonic() - start < 40
    assert process.stdout.count("No answer") >= 3
    assert "registry: Start it, or correct the address" in process.stdout
    assert SECRET not in process.stdout + process.stderr


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "refuses the credentials (401)"), (403, "(403)"), (500, "an internal error (500)")],
)
def test_http_error_status_is_reported_with_its_remedy(
    status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http_server(lambda _: (status, {}, SECRET.encode())) as uri:
        set_services(monkeypatch, uri)
        store, registry, prefect = examine_services()
    assert store.state == "fault"
    for item in (registry, prefect):
        assert item.state == "fault"
        assert words in item.found
        # An internal error of the server is not mended by another setting.
        assert ("PREFECT_API" in item.remedy or "MLFLOW_TRACKING" in item.remedy) == (status < 500)
        assert item.remedy


def test_server_that_is_neither_mlflow_nor_prefect_is_a_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with http_server(lambda _: (200, {}, b"<html>It works!</html>")) as uri:
        set_services(monkeypatch, uri)
        monkeypatch.delenv("RECPRESS_STORE")  # its check would wait until the time limit
        _, registry, prefect = examine_services()
    assert "its response is not that of MLflow" in registry.found
    assert "its response is not that of Prefect" in prefect.found


def test_get_sends_credentials_and_does_not_follow_a_redirect(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    received: list[str | None] = []
    redirected: list[str | None] = []

    def reply_ok(request: BaseHTTPRequestHandler) -> Reply:
        redirected.append(request.headers.get("Authorization"))
        return 200, {}, b"{}"

    with http_server(reply_ok) as other:

        def reply_redirect(request: BaseHTTPRequestHandler) -> Reply:
            received.append(request.headers.get("Authorization"))
            return 302, {"Location": other}, b""

        with http_server(reply_redirect) as uri:
            answer = send_request(uri.replace("://", f"://somebody:{SECRET}@"))
    assert answer.status == 302
    assert received == [f"Basic {b64encode(f'somebody:{SECRET}'.encode()).decode()}"]
    assert redirected == []


def test_doctor_reports_latency_and_write_access_of_an_s3_store(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_STORE", "s3://models/doctor")
    store, _, _ = examine_services()
    assert store.state == "ok"
    assert "0 bundle(s)" in store.found
    assert "ms, writable" in store.found
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store, _, _ = examine_services()
    assert store.state == "fault"
    assert "refused the credentials" in store.found


def test_store_folder_that_cannot_be_written_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "doctor").write_text("a file where a folder has to be")
    monkeypatch.setenv("RECPRESS_STORE", str(tmp_path / "store"))
    store, _, _ = examine_services()
    assert store.state == "fault"
    assert "can be read (0 bundle(s)), but not written" in store.found
    assert "pack and compress" in store.remedy


def test_without_settings_every_service_is_embedded_and_ok() -> None:
    store, registry, prefect = examine_services()
    assert [store.state, registry.state, prefect.state] == ["ok", "ok", "ok"]
    assert registry.found.startswith("sqlite:///")
    assert prefect.found.startswith("embedded")


@contextmanager
def slow_server(head: bytes) -> Iterator[tuple[str, threading.Event]]:
    """Run a server that sends ``head``, then one byte every 50 ms.

    Yields:
        Its URI, and an event that is set when the client closes the connection.
    """
    is_closed, is_stopped = threading.Event(), threading.Event()

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65_536)
            try:
                self.request.sendall(head)
                for _ in range(100):  # 5 s, ten times the deadline of the tests
                    self.request.sendall(b"x")
                    if is_stopped.wait(0.05):
                        return
            except OSError:
                is_closed.set()

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", is_closed
        finally:
            is_stopped.set()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Long: "]
)
def test_request_to_a_server_that_sends_slowly_ends_at_its_total_deadline(head: bytes) -> None:
    with slow_server(head) as (uri, _):
        start = time.monotonic()
        with raises_code(NoAnswer, "no_answer", address=uri, problem="TimeoutError"):
            send_request(uri, timeout=0.5)
        # The server sends for 5 s; 2 s more than the deadline are for a busy machine.
        assert 0.5 <= time.monotonic() - start < 2.5


def test_connection_to_a_server_that_sends_slowly_is_closed_after_the_deadline() -> None:
    with slow_server(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n") as (uri, is_closed):
        with raises_code(NoAnswer, "no_answer", address=uri, problem="TimeoutError"):
            send_request(uri, timeout=0.5)
        assert is_closed.wait(2)


def test_body_is_read_to_its_first_megabyte_and_not_decompressed() -> None:
    body = b"x" * (MAX_BYTES + 100_000)
    headers = {"Content-Encoding": "gzip"}  # the body is not gzip, so decompression would fail
    with http_server(lambda _: (200, headers, body)) as uri:
        assert send_request(uri).body == body[:MAX_BYTES]


def test_login_in_the_uri_takes_precedence_over_the_argument() -> None:
    received: list[str | None] = []

    def reply(request: BaseHTTPRequestHandler) -> Reply:
        received.append(request.headers.get("Authorization"))
        return 200, {}, b""

    with http_server(reply) as uri:
        send_request(uri, auth=("a", "b"))
        # The login is "some@body" and "c:d", percent-encoded.
        send_request(uri.replace("://", "://some%40body:c%3Ad@"), auth=("a", "b"))
    expected = [b64encode(login).decode() for login in (b"a:b", b"some@body:c:d")]
    assert received == [f"Basic {login}" for login in expected]


def test_log_records_do_not_contain_the_password_of_the_uri(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    masking_factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)  # without the masking of secrets
    try:
        with http_server(lambda _: (200, {}, b"")) as uri:
            send_request(uri.replace("://", f"://somebody:{SECRET}@"))
    finally:
        logging.setLogRecordFactory(masking_factory)
    assert "HTTP Request" in caplog.text
    assert SECRET not in caplog.text


def test_posted_json_arrives_and_an_error_status_is_returned_with_its_body() -> None:
    received: list[tuple[str, str | None]] = []

    def reply(request: BaseHTTPRequestHandler) -> Reply:
        received.append((request.command, request.headers.get("Content-Type")))
        return 422, {}, b'{"detail": 1}'

    with http_server(reply) as uri:
        answer = send_request(uri, json_body={"limit": 1})
    assert (answer.status, answer.parse_json()) == (422, {"detail": 1})
    assert received == [("POST", "application/json")]


def test_proxy_of_the_environment_is_used_unless_the_address_is_excluded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")  # must be ignored
    paths: list[str] = []

    def proxy(request: BaseHTTPRequestHandler) -> Reply:
        paths.append(request.path)
        return 203, {}, b""

    with http_server(proxy) as through, http_server(lambda _: (200, {}, b"")) as uri:
        monkeypatch.setenv("http_proxy", through.removeprefix("http://"))
        assert send_request(f"{uri}/x").status == 203
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert send_request(f"{uri}/x").status == 200
    assert paths == [f"{uri}/x"]


@pytest.mark.parametrize("uri", [f"http://a:{SECRET}/x@h:1/", "gopher://h/", "http://"])
def test_invalid_address_raises_no_answer_without_its_password(uri: str) -> None:
    with pytest.raises(NoAnswer) as fault:
        send_request(uri)
    assert fault.value.code == "no_answer"
    assert SECRET not in str(fault.value)


def test_http_request_raises_no_answer_in_time_at_its_limit() -> None:
    start = time.monotonic()
    with raises_code(NoAnswer, "no_answer_in_time", seconds=0.2):
        HttpRequest(lambda: time.sleep(2)).wait(0.2)
    assert time.monotonic() - start < 1


def test_http_request_raises_the_error_of_its_thread_when_the_answer_is_read() -> None:
    def raise_permission_error() -> None:
        raise PermissionError("no")

    with pytest.raises(PermissionError, match="no"):
        HttpRequest(raise_permission_error).wait()


def test_doctor_json_contains_the_remedy(
    closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    code, out, _ = run_main_apart(monkeypatch, capsys, "doctor", "--json")
    assert code == 1
    remedies = {item["what"]: item["remedy"] for item in json.loads(out)}
    assert "MLFLOW_TRACKING_URI" in remedies["registry"]
    assert remedies["torch"] == ""


def test_doctor_reports_missing_modules_without_importing_any(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # "allowed modules" is the finding about the modules from which networks may be imported.
    (tmp_path / "loud_models.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "home"))
    for allowed, state in (("loud_models", "ok"), ("loud_models,no_such_models", "fault")):
        monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", allowed)
        (finding,) = (item for item in check_installation() if item.what == "allowed modules")
        assert finding.state == state
    assert "there is no module no_such_models" in finding.found
    assert "PYTHONPATH" in finding.remedy
