"""Requests that a web page of another origin or another local user can send to a Prefect API.

In this file the secret is the authentication string of the API, ``user:password``.

Browsers allow pages to send all of the requests: with a preflight (JSON) or without one (plain
text, a form, no body). ``http.client`` sends them, so no library adds or removes a header.
"""

import base64
import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

FOREIGN = (
    "http://evil.example",
    "https://evil.example",
    "null",  # a sandboxed frame or a local file
    "http://localhost:1",
    "http://127.0.0.1:1",
    "https://127.0.0.1",
    "http://127.0.0.1.evil.example",
)
"""Origins of web pages that may not read responses."""

CONTENT_TYPES = ("application/json", "text/plain", "application/x-www-form-urlencoded", "")
SECONDS = 60
WEB_SOCKETS = (
    "/events/in",
    "/events/out",
    "/logs/out",
    "/task_runs/subscriptions/scheduled",
    "/work_pools/recpress-cpu/workers/connect",
)
POOL = {"name": "from-another-origin", "type": "process", "base_job_template": {}}


@dataclass(frozen=True)
class Reply:
    """The response to one request."""

    status: int
    headers: dict[str, str]
    body: bytes


def send(
    api: str,
    method: str,
    path: str,
    *,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Send one request to ``api``, a URL that ends with /api."""
    parts = urlsplit(api)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=SECONDS)
    try:
        connection.request(method, f"{parts.path}{path}", body=body, headers=headers or {})
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, fields, response.read())
    finally:
        connection.close()


def basic_auth_header(auth_string: str) -> dict[str, str]:
    """Return the header of a client that knows the authentication string."""
    return {"Authorization": f"Basic {base64.b64encode(auth_string.encode()).decode()}"}


def write_requests() -> Iterator[tuple[str, str, object]]:
    """Yield requests that create, change, list or delete objects: name, path, body."""
    flow, deployment = str(uuid4()), str(uuid4())
    yield "work pool", "/work_pools/", POOL
    yield "flow", "/flows/", {"name": "from-another-origin"}
    yield (
        "deployment",
        "/deployments/",
        {"name": "d", "flow_id": flow, "job_variables": {"command": "touch attacked"}},
    )
    yield "flow run", "/flow_runs/", {"flow_id": flow, "name": "from-another-origin"}
    yield "run of a deployment", f"/deployments/{deployment}/create_flow_run", {}
    yield "variable", "/variables/", {"name": "attacked", "value": 1}
    yield "concurrency limit", "/v2/concurrency_limits/", {"name": "attacked", "limit": 1}
    yield "automation", "/automations/", {"name": "attacked", "trigger": {}, "actions": []}
    yield "list of flows", "/flows/filter", {}
    yield "clear the database", "/admin/database/clear", {"confirm": True}


def stored_names(api: str, auth_string: str) -> dict[str, list[str]]:
    """Return the names of all objects of the server, read with the secret."""
    result = {}
    for kind in ("work_pools", "flows", "deployments", "flow_runs", "variables"):
        reply = send(
            api,
            "POST",
            f"/{kind}/filter",
            body=b"{}",
            headers={"Content-Type": "application/json", **basic_auth_header(auth_string)},
        )
        assert reply.status == 200, (kind, reply)
        result[kind] = sorted(item["name"] for item in json.loads(reply.body))
    return result


def require_rejection_without_the_secret(api: str, auth_string: str) -> None:
    """Fail if a request without the secret succeeds or another origin may read a response.

    Also fails if the names of the objects of the server change.
    """
    before = stored_names(api, auth_string)
    for origin in FOREIGN:
        for name, path, document in write_requests():
            text = json.dumps(document).encode()
            for content_type in CONTENT_TYPES:
                headers = {"Origin": origin}
                if content_type:
                    headers["Content-Type"] = content_type
                reply = send(api, "POST", path, body=text, headers=headers)
                assert reply.status == 401, (origin, name, content_type, reply)
                assert "access-control-allow-origin" not in reply.headers, (origin, name, reply)
            preflight_headers = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
                "Access-Control-Request-Private-Network": "true",
            }
            preflight = send(api, "OPTIONS", path, headers=preflight_headers)
            assert "access-control-allow-origin" not in preflight.headers, (origin, preflight)
            assert "access-control-allow-private-network" not in preflight.headers
    for credentials in wrong_credentials(auth_string):
        for method, path in (("POST", "/flows/filter"), ("GET", "/admin/settings")):
            reply = send(api, method, path, body=b"{}", headers={"Authorization": credentials})
            assert reply.status == 401, (credentials.partition(" ")[0], path, reply.status)
    # Prefect requires no secret for "GET /health", so similar requests are tried.
    for method, path in (
        ("GET", "/admin/settings"),
        ("GET", "/admin/version"),
        ("HEAD", "/admin/version"),
        ("DELETE", "/work_pools/recpress-cpu"),
        ("POST", "/health"),
        ("GET", "/health/../admin/settings"),
        ("GET", "/health%2f..%2fadmin/settings"),
        ("GET", "/variables/name/health"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ):
        for host in ("evil.example", "evil.example:80/api/health?"):
            reply = send(api, method, path, headers={"Host": host})
            assert reply.status in {401, 404}, (method, path, host, reply)
    for path in WEB_SOCKETS:
        require_closed_socket(api, path)
    assert stored_names(api, auth_string) == before


def wrong_credentials(auth_string: str) -> Iterator[str]:
    """Yield wrong values of the header Authorization."""
    user, _, password = auth_string.partition(":")
    for guess in ("recpress:recpress", f"{user}:", f":{password}", password, auth_string[:-1], ""):
        yield f"Basic {base64.b64encode(guess.encode()).decode()}"
    yield f"Bearer {auth_string}"
    yield f"Basic {auth_string}"  # not encoded
    yield "Basic"


def require_closed_socket(api: str, path: str) -> None:
    """Fail if the server sends a message to a web socket that was opened without the secret."""
    url = api.replace("http://", "ws://") + path
    for protocols, message in (
        (None, None),
        (["prefect"], {"type": "auth", "token": None}),
        (["prefect"], {"type": "auth", "token": "recpress:wrong"}),
        (["prefect"], {"type": "filter", "filter": {}}),
    ):
        with pytest.raises((ConnectionClosed, InvalidHandshake)):
            first_response(url, protocols, message)


def first_response(url: str, protocols: list[str] | None, message: object) -> object:
    """Open a web socket from another origin, send a message and return the first response."""
    with connect(
        url, subprotocols=protocols, origin="http://evil.example", open_timeout=SECONDS
    ) as socket:
        if message is not None:
            socket.send(json.dumps(message))
        return socket.recv(timeout=SECONDS)
