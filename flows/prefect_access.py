"""Which Prefect server a command uses: the configured one, checked, or an embedded one."""

from flows.embedded_server import EmbeddedServer, Say, start_embedded_server
from infra.errors import InfraError, SettingRefused
from infra.settings import shown

CREDENTIALS = (
    "Set PREFECT_API_AUTH_STRING to the server's PREFECT_SERVER_API_AUTH_STRING (a server of your "
    "own; after 'make up-local' it is in client.env), or PREFECT_API_KEY (Prefect Cloud)."
)


def connect(say: Say) -> EmbeddedServer | None:
    """Check the configured server, or start an embedded one if none is configured.

    Args:
        say: called with what is waited for.

    Returns:
        The embedded server, which is not ready yet; None if another server is configured.

    Raises:
        SettingRefused: the configured server refuses the credentials or is not Prefect, or there is
            none and embedded servers are switched off.
        InfraError: the configured server does not answer, or answers with its own failure.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    if settings.api.url is not None:
        require_access()
        return None
    if not settings.server.ephemeral.enabled:
        raise SettingRefused(
            "Expected a Prefect server, got none: PREFECT_API_URL is not set and "
            "PREFECT_SERVER_EPHEMERAL_ENABLED is false. Set one of them."
        )
    return start_embedded_server(say)


def require_access() -> None:
    """Raise if the configured Prefect server cannot be used; do nothing if none is configured.

    Raises:
        SettingRefused: it refuses the credentials, or is not Prefect.
        InfraError: it does not answer, or answers with its own failure.
    """
    from prefect.settings import get_current_settings

    api = get_current_settings().api
    if api.url is None:
        return
    import httpx
    from prefect.client.orchestration import get_client

    where = f"the Prefect server at {shown(api.url)}"
    try:
        with get_client(sync_client=True) as client:
            client.read_work_pools(limit=1)
    except httpx.HTTPStatusError as fault:
        status = fault.response.status_code
        if status in {401, 403}:
            name = "PREFECT_API_KEY" if api.auth_string is None else "PREFECT_API_AUTH_STRING"
            sent = getattr(api, "key" if api.auth_string is None else "auth_string")
            got = f"with the value of {name}" if sent is not None else "without credentials"
            raise SettingRefused(
                f"Expected access to {where}, got answer {status} {got}. {CREDENTIALS}"
            ) from None
        if status >= 500:
            raise InfraError(
                f"Expected an answer of {where}, got its own failure ({status}). Its log says more."
            ) from None
        raise SettingRefused(
            f"Expected {where} to list its work pools, got answer {status}. Set PREFECT_API_URL to "
            "the address of Prefect's API, which ends with /api, or unset it for the embedded one."
        ) from None
    except (httpx.HTTPError, OSError) as fault:
        raise InfraError(
            f"Expected an answer of {where}, got {type(fault).__name__}. Start it, correct "
            "PREFECT_API_URL, or unset it for the embedded server."
        ) from None
    except ValueError as fault:  # an answer that is not Prefect's
        raise SettingRefused(
            f"Expected Prefect's API at {shown(api.url)}, got another answer "
            f"({type(fault).__name__}). Correct PREFECT_API_URL, or unset it for the embedded one."
        ) from None
