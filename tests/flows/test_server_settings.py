"""Which requests an embedded Prefect server accepts; its application runs in this process."""

import asyncio

import httpx
import pytest
from prefect.context import SettingsContext, get_settings_context
from prefect.server.api.server import create_app
from prefect.settings import Settings
from web_attacks import FOREIGN, basic_auth_header

from flows.server import embedded_server
from flows.server.embedded_server import new_auth_string

# Unlike /health, this path requires authentication. It does not read the database.
VERSION = "http://127.0.0.1/api/version"


def send_to_embedded_server(
    monkeypatch: pytest.MonkeyPatch, auth: str, *requests: dict[str, str]
) -> list[httpx.Response]:
    """Send requests to Prefect's application, with the environment of an embedded server.

    Args:
        monkeypatch: sets the environment.
        auth: the authentication string of the server.
        requests: the headers of each request.
    """
    for name, value in embedded_server._build_environment(auth).items():
        monkeypatch.setenv(name, value)

    async def send_requests() -> list[httpx.Response]:
        app = create_app(ephemeral=True, ignore_cache=True)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:
            return [await client.get(VERSION, headers=headers) for headers in requests]

    with SettingsContext(profile=get_settings_context().profile, settings=Settings()):
        return asyncio.run(send_requests())


def test_embedded_server_accepts_only_requests_with_its_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    auth = new_auth_string()
    without_secret, with_wrong_secret, with_secret = send_to_embedded_server(
        monkeypatch, auth, {}, basic_auth_header("recpress:recpress"), basic_auth_header(auth)
    )
    assert without_secret.status_code == with_wrong_secret.status_code == 401
    assert with_secret.status_code == 200


def test_embedded_server_allows_no_other_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    """``FOREIGN`` are origins of web pages that must not read responses."""
    auth = new_auth_string()
    headers = [basic_auth_header(auth) | {"Origin": origin} for origin in FOREIGN]
    for reply in send_to_embedded_server(monkeypatch, auth, *headers):
        assert reply.status_code == 200
        assert "access-control-allow-origin" not in reply.headers


def test_auth_strings_are_unique_with_at_least_128_bits() -> None:
    secrets = {new_auth_string().partition(":")[2] for _ in range(100)}
    assert len(secrets) == 100
    assert all(len(bytes.fromhex(secret)) * 8 >= 128 for secret in secrets)
