"""A faulty proxy in front of a real S3 server: it decides for each request what goes wrong.

mitmproxy would serve as well, but its present versions do not install with our pinned packages.
"""

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, get_args
from urllib.parse import parse_qs, urlsplit

Fault = Literal["500", "503", "slow", "reset", "truncated", "lost", "flipped"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
"""What can go wrong with one request.

``500`` and ``503``: the server answers an error and does nothing. ``slow``: the answer is late.
``reset``: the connection is reset before the server sees the request. ``truncated``: half of the
body of the answer arrives. ``lost``: the request is carried out, and no answer arrives.
``flipped``: one bit in the body of the answer is changed.
"""

SLOW_SECONDS = 0.7
CODES = {"500": (500, "InternalError"), "503": (503, "SlowDown")}
DROPPED = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Request:
    """One request: what it does, on which key, and its number since the plan was set, from 1."""

    operation: str
    path: str
    number: int


Plan = Callable[[Request], Fault | None]


def nothing(_: Request) -> Fault | None:
    """No fault."""
    return None


def at(number: int, fault: Fault, repeated: int = 1) -> Plan:
    """One fault at request ``number``, and at the next ones if ``repeated``."""
    return lambda request: fault if 0 <= request.number - number < repeated else None


def often(rate: float, faults: tuple[Fault, ...], seed: int) -> Plan:
    """Faults at random requests, drawn with a fixed seed."""
    draw, lock = random.Random(seed), threading.Lock()

    def plan(_: Request) -> Fault | None:
        with lock:
            return draw.choice(faults) if draw.random() < rate else None

    return plan


class Proxy:
    """A running proxy. ``plan`` may be replaced at any time; ``seen`` lists the requests since."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.seen: list[Request] = []
        self._plan: Plan = nothing
        self._lock = threading.Lock()
        self.url = ""
        self.faults = 0

    def follow(self, plan: Plan = nothing) -> None:
        """Count requests from 1 again and follow a plan."""
        with self._lock:
            self.seen, self._plan, self.faults = [], plan, 0

    def decide(self, operation: str, path: str) -> Fault | None:
        """What goes wrong with the next request."""
        with self._lock:
            request = Request(operation, path, len(self.seen) + 1)
            self.seen.append(request)
            plan = self._plan
        fault = plan(request)
        self.faults += fault is not None
        return fault


@contextmanager
def running_proxy(upstream: str) -> Iterator[Proxy]:
    """Start a proxy on loopback; stop it at the end."""
    proxy = Proxy(upstream)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _forward(self) -> None:
        body = self._body()
        operation = operation_of(self.command, self.path, dict(self.headers.items()))
        fault = self.proxy.decide(operation, urlsplit(self.path).path)
        if fault == "reset":
            # Closing with a pending linger of 0 seconds sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
            return
        if fault in CODES:
            self._fail(*CODES[fault])
            return
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        answer, content = self._upstream(body)
        if fault == "lost":
            self._close()
            return
        if fault == "flipped" and content:
            place = random.Random(content).randrange(len(content))
            content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        self._answer(answer, content, cut=fault == "truncated")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815

    def _upstream(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        upstream = HTTPConnection(self.proxy.upstream, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {*DROPPED, "expect"}:
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        return answer, content

    def _answer(self, answer: HTTPResponse, content: bytes, *, cut: bool) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in DROPPED:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        if answer.status not in {204, 304}:
            self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._close()

    def _fail(self, status: int, code: str) -> None:
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>x</Message></Error>'
        self.send_response_only(status, code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def _close(self) -> None:
        self.close_connection = True
        self.wfile.flush()

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))


def operation_of(method: str, path: str, headers: dict[str, str]) -> str:
    """What a request does, in the words of the docs."""
    asked = parse_qs(urlsplit(path).query, keep_blank_values=True)
    names = {name.lower() for name in headers}
    if method == "GET":
        return "list" if "list-type" in asked else "get"
    if method == "PUT":
        if "partNumber" in asked:
            return "upload part"
        return "conditional create" if "if-none-match" in names else "put"
    if method == "POST":
        return "start of upload" if "uploads" in asked else "end of upload"
    return method.lower()
