"""What a service answers to one question, within seconds whatever it does.

For looking at services, not for using them: one request, no retries, no redirect followed, and a
limit on the whole of it, since a socket's own timeout starts anew with every byte.
"""

import base64
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from compressors.contracts import Frozen
from infra.errors import NoAnswer
from infra.settings import shown

SECONDS = 5.0
MOST_BYTES = 1_000_000

T = TypeVar("T")


class HttpAnswer(Frozen):
    """An HTTP answer: its status, the first megabyte of its body, how long it took."""

    status: int
    body: bytes
    ms: float

    def value(self) -> Any:
        """The body as JSON; None if it is something else."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class HttpRequest(Generic[T]):
    """Something asked in the background, so that it can be given up.

    The thread of a question that was given up stays behind; it does not keep the process alive.
    """

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._held: list[T] = []
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._started = time.monotonic()
        self._thread.start()

    def answer(self, seconds: float = SECONDS) -> T:
        """What came, at most ``seconds`` after it was asked.

        Raises:
            NoAnswer: nothing did.
            Exception: what asking raised.
        """
        self._thread.join(max(0.0, self._started + seconds - time.monotonic()))
        if self._fault is not None:
            raise self._fault
        if not self._held:
            raise NoAnswer("no_answer_in_time", seconds=seconds)
        return self._held[0]

    def _work(self) -> None:
        try:
            self._held.append(self._ask())
        except BaseException as fault:
            self._fault = fault


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer: following it would take the credentials elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


def get(
    uri: str,
    *,
    headers: Mapping[str, str] | None = None,
    posted: Mapping[str, Any] | None = None,
    seconds: float = SECONDS,
) -> HttpAnswer:
    """One request. User and password of the URI are sent as HTTP asks for them.

    Args:
        uri: ``http(s)://``, with or without ``user:password@``.
        headers: more of the request's headers.
        posted: a JSON body; the request is then a POST.
        seconds: limit for connecting and for each read.

    Raises:
        NoAnswer: there is none; the message says why, without the credentials.
    """
    parts = urlsplit(uri)
    sent = {"Accept": "application/json", **(headers or {})}
    if parts.username or parts.password:
        sent |= basic(unquote(parts.username or ""), unquote(parts.password or ""))
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    body = None if posted is None else json.dumps(posted).encode()
    if body is not None:
        sent["Content-Type"] = "application/json"
    request = urllib.request.Request(bare, data=body, headers=sent)  # noqa: S310 (see Raises)
    opener = urllib.request.build_opener(_Stay)
    begun = time.monotonic()
    try:
        with opener.open(request, timeout=seconds) as reply:
            status, read = reply.status, reply.read(MOST_BYTES)
    except urllib.error.HTTPError as fault:
        with fault:
            status, read = fault.code, fault.read(MOST_BYTES)
    except (OSError, ValueError) as fault:
        why = getattr(fault, "reason", fault)
        said = getattr(why, "strerror", None) or type(why).__name__
        raise NoAnswer("no_answer", address=shown(uri), problem=said) from None
    return HttpAnswer(status=status, body=read, ms=1000 * (time.monotonic() - begun))


def basic(user: str, password: str) -> dict[str, str]:
    """The header of HTTP's basic authentication."""
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {token}"}
