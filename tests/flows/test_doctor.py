"""The doctor in front of real sockets: services that are down, hang, refuse, fail or are others."""

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

from flows.cli.doctor import Finding, examine
from infra.errors import NoAnswer
from infra.services.http_probe import MOST_BYTES, HttpRequest, get

SECRET = "canary-of-a-password"
LIMIT = 2.5  # seconds; the doctor's own is twice as long
# Two more seconds than the limit, for a machine that does other things as well.
AT_MOST = LIMIT + 2

Reply = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(reply: Callable[[BaseHTTPRequestHandler], Reply]) -> Iterator[str]:
    """A server on loopback whose every answer is ``reply``'s; gives its URI."""

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
            """A client that has read enough goes away: nothing to print about."""

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
def silent() -> Iterator[int]:
    """The port of a server that accepts every connection and never says a word."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield listening.getsockname()[1]


@pytest.fixture
def refused() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def configured(patch: pytest.MonkeyPatch, uri: str) -> None:
    """All three services at one address, with a password in every place there is for one."""
    patch.setenv("RECPRESS_STORE", "s3://models/here")
    patch.setenv("AWS_ENDPOINT_URL", uri)
    patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("MLFLOW_TRACKING_URI", uri.replace("://", f"://somebody:{SECRET}@"))
    patch.setenv("PREFECT_API_URL", f"{uri}/api")
    patch.setenv("PREFECT_API_AUTH_STRING", f"admin:{SECRET}")


def services() -> tuple[Finding, Finding, Finding]:
    """What the doctor says of store, registry and Prefect; never a secret."""
    found = {item.what: item for item in examine()}
    assert SECRET not in "".join(item.model_dump_json() for item in found.values())
    return found["object store"], found["registry"], found["Prefect"]


def test_services_that_are_down_are_named_with_what_to_do(
    refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(monkeypatch, f"http://127.0.0.1:{refused}")
    store, registry, prefect = services()
    assert {item.state for item in (store, registry, prefect)} == {"fault"}
    assert "did not answer" in store.found
    assert "AWS_ENDPOINT_URL" in store.remedy
    assert f"No answer from http://127.0.0.1:{refused}" in registry.found
    assert "MLFLOW_TRACKING_URI" in registry.remedy
    assert "refused" in prefect.found
    assert "PREFECT_API_URL" in prefect.remedy


def test_services_that_accept_and_never_answer_cost_one_limit_and_not_three(
    silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine()  # imports and libraries have no part in it
    monkeypatch.setattr(HttpRequest.answer, "__defaults__", (LIMIT,))
    monkeypatch.setitem(get.__kwdefaults__, "seconds", LIMIT)
    configured(monkeypatch, f"http://127.0.0.1:{silent}")
    begun = time.monotonic()
    found = services()
    assert LIMIT - 0.5 < time.monotonic() - begun < AT_MOST
    for item in found:
        assert item.state == "fault"
        assert "No answer" in item.found
        assert "firewall" in item.remedy


@pytest.mark.slow
def test_the_whole_command_ends_soon_though_its_services_hang(
    silent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(monkeypatch, f"http://127.0.0.1:{silent}")
    hanging = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("AWS_")
        or name in {"RECPRESS_STORE", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"}
    }
    begun = time.monotonic()
    said = recpress("doctor", env=environment(tmp_path, **hanging), seconds=60)
    assert said.returncode == 1
    # Start-up, imports and torch take most of it; a client's own retries would take minutes.
    assert time.monotonic() - begun < 40
    assert said.stdout.count("No answer") >= 3
    assert "registry: Start it, or correct the address" in said.stdout
    assert SECRET not in said.stdout + said.stderr


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "refuses the credentials (401)"), (403, "(403)"), (500, "its own failure (500)")],
)
def test_an_http_error_status_is_reported_with_its_remedy(
    status: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda _: (status, {}, SECRET.encode())) as uri:
        configured(monkeypatch, uri)
        store, registry, prefect = services()
    assert store.state == "fault"
    for item in (registry, prefect):
        assert item.state == "fault"
        assert words in item.found
        assert ("PREFECT_API" in item.remedy or "MLFLOW_TRACKING" in item.remedy) == (status < 500)
        assert item.remedy


def test_a_server_that_is_neither_mlflow_nor_prefect_is_not_taken_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(lambda _: (200, {}, b"<html>It works!</html>")) as uri:
        configured(monkeypatch, uri)
        monkeypatch.delenv("RECPRESS_STORE")  # the check of a store would wait until the limit
        _, registry, prefect = services()
    assert "not as MLflow does" in registry.found
    assert "not as Prefect does" in prefect.found


def test_credentials_are_sent_and_a_redirect_does_not_take_them_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str | None] = []
    elsewhere: list[str | None] = []

    def there(request: BaseHTTPRequestHandler) -> Reply:
        elsewhere.append(request.headers.get("Authorization"))
        return 200, {}, b"{}"

    with serving(there) as other:

        def here(request: BaseHTTPRequestHandler) -> Reply:
            seen.append(request.headers.get("Authorization"))
            return 302, {"Location": other}, b""

        with serving(here) as uri:
            answer = get(uri.replace("://", f"://somebody:{SECRET}@"))
    assert answer.status == 302
    assert seen == ["Basic c29tZWJvZHk6Y2FuYXJ5LW9mLWEtcGFzc3dvcmQ="]
    assert elsewhere == []


def test_doctor_reports_latency_and_write_access_of_an_s3_store(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_STORE", "s3://models/doctor")
    store, _, _ = services()
    assert store.state == "ok"
    assert "0 bundle(s)" in store.found
    assert "ms, writable" in store.found
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store, _, _ = services()
    assert store.state == "fault"
    assert "refused the credentials" in store.found


def test_a_folder_that_is_only_read_is_a_fault_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "doctor").write_text("a file where a folder has to be")
    monkeypatch.setenv("RECPRESS_STORE", str(tmp_path / "store"))
    store, _, _ = services()
    assert store.state == "fault"
    assert "read (0 bundle(s)) but not written" in store.found
    assert "pack and compress" in store.remedy


def test_without_settings_everything_is_embedded_and_well() -> None:
    store, registry, prefect = services()
    assert [store.state, registry.state, prefect.state] == ["ok", "ok", "ok"]
    assert registry.found.startswith("sqlite:///")
    assert prefect.found.startswith("embedded")


@contextmanager
def dripping(head: bytes) -> Iterator[tuple[str, threading.Event]]:
    """A server that sends ``head``, then a byte every 50 ms; the event: its client hung up."""
    hung_up, stopped = threading.Event(), threading.Event()

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65_536)
            try:
                self.request.sendall(head)
                for _ in range(100):  # 5 s, ten times the deadline of the tests
                    self.request.sendall(b"x")
                    if stopped.wait(0.05):
                        return
            except OSError:
                hung_up.set()

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", hung_up
        finally:
            stopped.set()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Long: "]
)
def test_request_to_a_server_that_drips_bytes_ends_at_its_total_deadline(head: bytes) -> None:
    with dripping(head) as (uri, _):
        begun = time.monotonic()
        with raises_code(NoAnswer, "no_answer", address=uri, problem="TimeoutError"):
            get(uri, seconds=0.5)
        # The server drips for 5 s; the rest is for a machine that does other things as well.
        assert 0.5 <= time.monotonic() - begun < 2.5


def test_connection_to_a_server_that_drips_its_body_is_closed_after_the_deadline() -> None:
    with dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n") as (uri, hung_up):
        with raises_code(NoAnswer, "no_answer", address=uri, problem="TimeoutError"):
            get(uri, seconds=0.5)
        assert hung_up.wait(2)


def test_body_is_read_to_its_first_megabyte_and_not_decompressed() -> None:
    body = b"x" * (MOST_BYTES + 100_000)
    headers = {"Content-Encoding": "gzip"}  # which it is not: reading it so would fail
    with serving(lambda _: (200, headers, body)) as uri:
        assert get(uri).body == body[:MOST_BYTES]


def test_login_in_the_uri_takes_precedence_over_the_one_given() -> None:
    seen: list[str | None] = []

    def reply(request: BaseHTTPRequestHandler) -> Reply:
        seen.append(request.headers.get("Authorization"))
        return 200, {}, b""

    with serving(reply) as uri:
        get(uri, login=("a", "b"))
        get(uri.replace("://", "://some%40body:c%3Ad@"), login=("a", "b"))
    expected = [b64encode(login).decode() for login in (b"a:b", b"some@body:c:d")]
    assert seen == [f"Basic {login}" for login in expected]


def test_a_password_in_the_uri_is_in_no_log_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    cleaning = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)  # our commands' own would remove it from a line
    try:
        with serving(lambda _: (200, {}, b"")) as uri:
            get(uri.replace("://", f"://somebody:{SECRET}@"))
    finally:
        logging.setLogRecordFactory(cleaning)
    assert "HTTP Request" in caplog.text
    assert SECRET not in caplog.text


def test_posted_json_arrives_and_an_error_status_is_returned_with_its_body() -> None:
    seen: list[tuple[str, str | None]] = []

    def reply(request: BaseHTTPRequestHandler) -> Reply:
        seen.append((request.command, request.headers.get("Content-Type")))
        return 422, {}, b'{"detail": 1}'

    with serving(reply) as uri:
        answer = get(uri, posted={"limit": 1})
    assert (answer.status, answer.value()) == (422, {"detail": 1})
    assert seen == [("POST", "application/json")]


def test_proxy_of_the_environment_is_used_unless_the_address_is_excluded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HTTP_PROXY", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")  # not read, as before httpx
    paths: list[str] = []

    def proxy(request: BaseHTTPRequestHandler) -> Reply:
        paths.append(request.path)
        return 203, {}, b""

    with serving(proxy) as through, serving(lambda _: (200, {}, b"")) as uri:
        monkeypatch.setenv("http_proxy", through.removeprefix("http://"))
        assert get(f"{uri}/x").status == 203
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert get(f"{uri}/x").status == 200
    assert paths == [f"{uri}/x"]


@pytest.mark.parametrize("uri", [f"http://a:{SECRET}/x@h:1/", "gopher://h/", "http://"])
def test_address_that_is_none_of_http_is_no_answer_without_its_password(uri: str) -> None:
    with pytest.raises(NoAnswer) as fault:
        get(uri)
    assert fault.value.code == "no_answer"
    assert SECRET not in str(fault.value)


def test_a_question_is_given_up_at_its_limit_though_it_drips() -> None:
    begun = time.monotonic()
    with raises_code(NoAnswer, "no_answer_in_time", seconds=0.2):
        HttpRequest(lambda: time.sleep(2)).answer(0.2)
    assert time.monotonic() - begun < 1


def test_http_request_raises_the_error_of_its_thread_when_the_answer_is_read() -> None:
    def refused() -> None:
        raise PermissionError("no")

    with pytest.raises(PermissionError, match="no"):
        HttpRequest(refused).answer()


def test_json_of_the_command_has_the_remedy(
    refused: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{refused}")
    code, out, _ = run_main_apart(monkeypatch, capsys, "doctor", "--json")
    assert code == 1
    remedies = {item["what"]: item["remedy"] for item in json.loads(out)}
    assert "MLFLOW_TRACKING_URI" in remedies["registry"]
    assert remedies["torch"] == ""


def test_doctor_reports_missing_modules_without_importing_any(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "loud_models.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "home"))
    for allowed, state in (("loud_models", "ok"), ("loud_models,no_such_models", "fault")):
        monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", allowed)
        (found,) = (item for item in examine() if item.what == "architectures from")
        assert found.state == state
    assert "there is no module no_such_models" in found.found
    assert "PYTHONPATH" in found.remedy
