"""A proxy in front of a real S3 server that injects a fault into selected requests.

mitmproxy is not used, because its current versions conflict with this project's pinned packages.
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
"""Kinds of faults of one request.

``500`` and ``503``: the response is an error, and the request is not executed. ``slow``: the
response is delayed. ``reset``: the connection is reset before the server receives the request.
``truncated``: only half of the response's body arrives. ``lost``: the request is executed, but no
response arrives. ``flipped``: one bit of the response's body is changed.
"""

SLOW_SECONDS = 0.7
# HTTP status and S3 error code of a fault.
CODES = {"500": (500, "InternalError"), "503": (503, "SlowDown")}
# Headers that are not forwarded, because they are about one connection.
DROPPED = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Request:
    """One request: operation, path, and its number since the schedule was set, from 1."""

    operation: str
    path: str
    number: int


Schedule = Callable[[Request], Fault | None]
"""Decides which requests fail: a function that returns the fault of a request, or None."""


def no_fault(_: Request) -> Fault | None:
    """Return None: a schedule in which no request has a fault."""
    return None


def fail_at(number: int, fault: Fault, repeated: int = 1) -> Schedule:
    """Return a schedule: request ``number`` and the next ``repeated - 1`` requests have a fault."""
    return lambda request: fault if 0 <= request.number - number < repeated else None


def fail_randomly(rate: float, faults: tuple[Fault, ...], seed: int) -> Schedule:
    """Return a schedule: a share ``rate`` of the requests have a random fault, from a seed."""
    rng, lock = random.Random(seed), threading.Lock()

    def schedule(_: Request) -> Fault | None:
        with lock:
            return rng.choice(faults) if rng.random() < rate else None

    return schedule


class Proxy:
    """A running proxy.

    Attributes:
        upstream: host and port of the real server.
        requests: the requests since the schedule was set.
        faults: number of faults since the schedule was set.
        url: address of the proxy.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.requests: list[Request] = []
        self._schedule: Schedule = no_fault
        self._lock = threading.Lock()
        self.url = ""
        self.faults = 0

    def set_schedule(self, schedule: Schedule = no_fault) -> None:
        """Set a schedule and restart the numbers of requests at 1."""
        with self._lock:
            self.requests, self._schedule, self.faults = [], schedule, 0

    def add_request(self, operation: str, path: str) -> Fault | None:
        """Add a request to ``requests``, and return its fault or None."""
        with self._lock:
            request = Request(operation, path, len(self.requests) + 1)
            self.requests.append(request)
            schedule = self._schedule
        fault = schedule(request)
        self.faults += fault is not None
        return fault


@contextmanager
def running_proxy(upstream: str) -> Iterator[Proxy]:
    """Start a proxy on loopback, and stop it at the end."""
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
    """Sends each request to the real server and its response to the client, with a fault."""

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
        """Process one request with its fault: forward it and send the response to the client."""
        body = self._read_body()
        operation = operation_of(self.command, self.path, dict(self.headers.items()))
        fault = self.proxy.add_request(operation, urlsplit(self.path).path)
        if fault == "reset":
            # Closing with SO_LINGER set to 0 seconds sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
            return
        if fault in CODES:
            self._fail(*CODES[fault])
            return
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        response, content = self._send_upstream(body)
        if fault == "lost":
            self._close()
            return
        if fault == "flipped" and content:
            position = random.Random(content).randrange(len(content))
            flipped = bytes([content[position] ^ 1])
            content = content[:position] + flipped + content[position + 1 :]
        self._respond(response, content, truncate=fault == "truncated")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815

    def _send_upstream(self, body: bytes) -> tuple[HTTPResponse, bytes]:
        """Send the request to the real server; return the response and its body."""
        upstream = HTTPConnection(self.proxy.upstream, timeout=60)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {*DROPPED, "expect"}:
                upstream.putheader(name, value)
        upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        return response, content

    def _respond(self, response: HTTPResponse, content: bytes, *, truncate: bool) -> None:
        """Send a response to the client; if ``truncate``, only half of its body."""
        self.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in DROPPED:
                self.send_header(name, value)
        length = response.getheader("Content-Length") if self.command == "HEAD" else None
        if response.status not in {204, 304}:
            self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if truncate else content)
        if truncate:
            self._close()

    def _fail(self, status: int, code: str) -> None:
        """Send an S3 error response to the client."""
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>x</Message></Error>'
        self.send_response_only(status, code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text.encode())

    def _close(self) -> None:
        """Close the connection after the current request."""
        self.close_connection = True
        self.wfile.flush()

    def _read_body(self) -> bytes:
        """Read the body of the request."""
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
    """Return the name of a request's operation, such as ``conditional create``."""
    query = parse_qs(urlsplit(path).query, keep_blank_values=True)
    names = {name.lower() for name in headers}
    if method == "GET":
        return "list" if "list-type" in query else "get"
    if method == "PUT":
        if "partNumber" in query:
            return "upload part"
        return "conditional create" if "if-none-match" in names else "put"
    if method == "POST":
        return "start of upload" if "uploads" in query else "end of upload"
    return method.lower()
