"""Send one HTTP request to a service with a total deadline.

Use this module to check whether a service responds. It does not retry and follows no redirect. The
request runs in a thread, so that the caller can stop waiting at the deadline: timeouts of sockets
and of httpx restart with every byte, and a host name lookup has no timeout.
"""

import functools
import json
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx

from compressors.contracts import Frozen
from infra.errors import NoAnswer
from infra.settings import public_uri

TIMEOUT_SECONDS = 5.0
"""Default deadline of a request."""
MAX_BYTES = 1_000_000
"""Most bytes of a response's body that are read."""

T = TypeVar("T")


class HttpAnswer(Frozen):
    """An HTTP answer: its status, at most ``MAX_BYTES`` of its body, its duration in ms."""

    status: int
    body: bytes
    ms: float

    def parse_json(self) -> Any:
        """Parse the body as JSON; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class HttpRequest(Generic[T]):
    """A request in a background thread, so that the caller can abandon it.

    The thread of an abandoned request continues to run, but does not keep the process alive.

    Args:
        send: sends the request and returns the result; it is called in the thread.
    """

    def __init__(self, send: Callable[[], T]) -> None:
        self._send = send
        self._results: list[T] = []
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._send_requests, daemon=True)
        self._started = time.monotonic()
        self._thread.start()

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> T:
        """Wait for the request and return the result of ``send``.

        Raises:
            NoAnswer: the request is not complete ``timeout`` seconds after it was started.
            Exception: the exception that ``send`` raised.
        """
        self._thread.join(max(0.0, self._started + timeout - time.monotonic()))
        if self._fault is not None:
            raise self._fault
        if not self._results:
            raise NoAnswer("no_answer_in_time", seconds=timeout)
        return self._results[0]

    def _send_requests(self) -> None:
        try:
            self._results.append(self._send())
        except BaseException as fault:
            self._fault = fault


def send_request(
    uri: str,
    *,
    headers: Mapping[str, str] | None = None,
    json_body: Mapping[str, Any] | None = None,
    auth: tuple[str, str] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> HttpAnswer:
    """Send a GET or POST request and return the HTTP answer, also if it is an error or a redirect.

    Args:
        uri: ``http(s)://``, with or without ``user:password@``.
        headers: additional headers of the request.
        json_body: the body of a POST request; without it, the request is a GET.
        auth: user and password for basic authentication, unless the URI contains them.
        timeout: total deadline in seconds, from the lookup of the host name to the end of the body.

    Raises:
        NoAnswer: the service did not respond before the deadline, or the connection failed. The
            message gives the reason, without credentials.
    """
    request = HttpRequest(lambda: _send_and_read(uri, headers or {}, json_body, auth, timeout))
    try:
        return request.wait(timeout)
    except NoAnswer:
        problem = TimeoutError.__name__
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as fault:
        problem = _describe_failure(fault)
    raise NoAnswer("no_answer", address=public_uri(uri), problem=problem)


def _send_and_read(
    uri: str,
    headers: Mapping[str, str],
    json_body: Mapping[str, Any] | None,
    auth: tuple[str, str] | None,
    timeout: float,
) -> HttpAnswer:
    """Send the request and read at most ``MAX_BYTES`` of the body.

    Raises:
        TimeoutError: the body is not complete after ``timeout`` seconds; the connection is closed.
    """
    address = httpx.URL(uri)
    if address.userinfo:
        auth = address.username, address.password
    # Without user and password, because httpx logs the address.
    address = address.copy_with(userinfo=b"")
    # No decompression: a compressed body could expand beyond the limit.
    request_headers = {"Accept": "application/json", "Accept-Encoding": "identity", **headers}
    method = "GET" if json_body is None else "POST"
    body = bytearray()
    with httpx.Client(
        verify=_load_certificates(), proxy=_select_proxy(address), trust_env=False, timeout=timeout
    ) as client:
        start = time.monotonic()
        with client.stream(
            method, address, headers=request_headers, json=json_body, auth=auth
        ) as response:
            for chunk in response.iter_raw():
                body += chunk
                if len(body) >= MAX_BYTES:
                    break
                # The timeout of httpx restarts with every chunk.
                if time.monotonic() > start + timeout:
                    raise TimeoutError
    ms = 1000 * (time.monotonic() - start)
    return HttpAnswer(status=response.status_code, body=bytes(body[:MAX_BYTES]), ms=ms)


@functools.cache
def _load_certificates() -> ssl.SSLContext:
    """Load the certificates that the system trusts; by default httpx uses those of certifi."""
    return ssl.create_default_context()


def _select_proxy(address: httpx.URL) -> str | None:
    """Select the proxy in ``http_proxy`` or ``https_proxy`` unless ``no_proxy`` excludes the host.

    httpx can read these variables itself, but it also reads ``all_proxy`` and fails if that is a
    SOCKS proxy.
    """
    if proxy_bypass(address.netloc.decode("ascii")):
        return None
    proxy = getproxies().get(address.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def _describe_failure(fault: BaseException) -> str:
    """Return the operating system's description of a failure, or the name of its class."""
    cause: BaseException | None = fault
    while cause is not None and not isinstance(cause, OSError):
        # httpcore raises its exceptions "from None", so their cause is only in __context__.
        cause = cause.__cause__ or cause.__context__
    return getattr(cause, "strerror", None) or type(cause or fault).__name__
