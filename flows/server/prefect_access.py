"""Check the configured Prefect server; start an embedded one if none is configured."""

from flows.server.embedded_server import EmbeddedServer, Notify, start_embedded_server
from infra.errors import ServiceFailed, SettingRefused
from infra.settings import public_uri


def connect(notify: Notify) -> EmbeddedServer | None:
    """Check the configured server, or start an embedded one if none is configured.

    Args:
        notify: called with a sentence if the start has to wait.

    Returns:
        The embedded server, which is still starting; None if a server is configured.

    Raises:
        SettingRefused: the configured server refuses the credentials or is not a Prefect server, or
            no server is configured and embedded servers are disabled.
        ServiceFailed: the configured server does not respond, or reports an internal failure.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is not None:
        require_access()
        return None
    if not settings.server.ephemeral.enabled:
        raise SettingRefused("prefect_not_configured")
    return start_embedded_server(notify)


def require_access() -> None:
    """Raise if the configured Prefect server cannot be used; do nothing if none is configured.

    Raises:
        SettingRefused: it refuses the credentials, or is not a Prefect server.
        ServiceFailed: it does not respond, or reports an internal failure.
    """
    from prefect.settings import get_current_settings

    api = get_current_settings().api
    if api.url is None:
        return
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.read_work_pools(limit=1)
    except httpx.HTTPStatusError as fault:
        status = fault.response.status_code
        if status in {401, 403}:
            name = "PREFECT_API_KEY" if api.auth_string is None else "PREFECT_API_AUTH_STRING"
            credentials = getattr(api, "key" if api.auth_string is None else "auth_string")
            if credentials is None:
                raise SettingRefused(
                    "prefect_credentials_missing", address=public_uri(api.url), status=status
                ) from None
            raise SettingRefused(
                "prefect_credentials_refused",
                address=public_uri(api.url),
                status=status,
                variable=name,
            ) from None
        if status >= 500:
            raise ServiceFailed(
                "prefect_failed", address=public_uri(api.url), status=status
            ) from None
        raise SettingRefused(
            "prefect_not_listing", address=public_uri(api.url), status=status
        ) from None
    except (httpx.HTTPError, OSError) as fault:
        raise ServiceFailed(
            "prefect_no_answer", address=public_uri(api.url), problem=type(fault).__name__
        ) from None
    except ValueError as fault:  # the response is not JSON, or not what Prefect sends
        raise SettingRefused(
            "prefect_answer_foreign", address=public_uri(api.url), problem=type(fault).__name__
        ) from None
