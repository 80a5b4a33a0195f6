"""``recpress doctor``: check the services and libraries that this installation uses.

Each result says whether the service works, and what to do if not. Services on other machines are
queried concurrently, with a time limit of 5 s each. Local checks have no time limit. A champion is
the version of a model that is in production.
"""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Literal

from compressors.contracts import TARGETS, Frozen, Target
from flows.cli.doctor_errors import CheckFailed
from infra.credentials import MLFLOW_PASSWORD, MLFLOW_USER, mask_credentials
from infra.errors import InfraError, NoAnswer, Refused
from infra.errors.settings import PREFECT_CREDENTIALS
from infra.services.http_probe import HttpAnswer, HttpRequest, send_request
from infra.settings import load_settings, public_uri
from tasks.orchestration.workspace import store
from tasks.promotion.champion import champion_versions, registry
from tasks.promotion.triton_repository import count_models

PROBE_KEY = "doctor/written.json"
"""Key of the object that is written to the object store and read again, to check write access."""

_NO_RESPONSE_REMEDY = (
    "Start it, or correct the address. A firewall in between may drop packets without an error."
)
_STORE_REMEDY = (
    "Set RECPRESS_STORE and, for s3://, AWS_ENDPOINT_URL and a key that may list, read and write "
    "below it."
)
_REGISTRY_REMEDY = (
    "Set MLFLOW_TRACKING_URI to a server that runs, or unset it for the embedded registry."
)
_CHAMPIONS_REMEDY = (
    "Set MLFLOW_TRACKING_URI to the registry the champions were published in, or register the "
    "results of the store again: 'recpress registry restore'."
)
_TRITON_REMEDY = (
    "Set RECPRESS_TRITON to a folder or s3://bucket/prefix that this key may list, read and write, "
    "or unset it."
)
_PREFECT_REMEDY = "Set PREFECT_API_URL to a server that runs, or unset it for the embedded one."
_CREDENTIALS_REMEDIES = {
    "MLflow": "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
    "MLFLOW_TRACKING_TOKEN); a server that says 'Invalid Host' needs this host in its "
    "--allowed-hosts.",
    "Prefect": PREFECT_CREDENTIALS,
}


class DoctorFinding(Frozen):
    """The result of one check.

    Attributes:
        what: the service or library.
        state: ``ok``; ``absent``: optional and not available; or ``fault``: does not work.
        found: the version, address and contents that were found, or the error.
        remedy: what to do about a fault.
    """

    what: str
    state: Literal["ok", "absent", "fault"]
    found: str
    remedy: str = ""


def check_installation() -> tuple[DoctorFinding, ...]:
    """Check the store, the registry, the Prefect server, the libraries and the builders."""
    settings = load_settings()
    # Slow imports run before the queries, so that they do not use up the time limit of a service.
    importlib.import_module("prefect.settings")
    if settings.store_root.startswith("s3://") or settings.triton.startswith("s3://"):
        importlib.import_module("s3fs")
    is_store_remote = settings.store_root.startswith("s3://")
    is_registry_remote = not settings.registry_uri.startswith("sqlite")
    is_triton_remote = settings.triton.startswith("s3://")
    is_prefect_remote = True  # with or without PREFECT_API_URL, which _check_prefect reads
    are_champions_remote = is_store_remote or is_registry_remote
    services = [
        _start_check("object store", is_store_remote, _check_store, _STORE_REMEDY),
        _start_check("registry", is_registry_remote, _check_registry, _REGISTRY_REMEDY),
        _start_check("Prefect", is_prefect_remote, _check_prefect, _PREFECT_REMEDY),
        _start_check("champions", are_champions_remote, _check_champions, _CHAMPIONS_REMEDY),
    ]
    triton = _start_check("Triton repository", is_triton_remote, _check_triton, _TRITON_REMEDY)
    unset = DoctorFinding(
        what="Triton repository", state="absent", found="RECPRESS_TRITON is not set"
    )
    return (
        *(wait() for wait in services),
        triton() if settings.triton else unset,
        _run_check("torch", _describe_torch, "Install it again: make .venv"),
        *map(_check_target, TARGETS.values()),
        _check_architectures(settings.allowed_modules),
    )


def _check_target(target: Target) -> DoctorFinding:
    """Check the library of a target's runtime or builder; only the default target requires it.

    A runtime runs graphs or engines. A builder compiles a graph to an engine.
    """
    library = target.load_runtime() or target.load_builder()
    remedy = "Install it again: make .venv" if target.is_default else ""
    version = (lambda: "graphs only") if library is None else library.version
    return _run_check(target.label, version, remedy, is_needed=target.is_default)


def _check_architectures(modules: tuple[str, ...]) -> DoctorFinding:
    """Check that the package of each module that may define architectures can be found.

    Only the first part of the module's name is looked up, so that nothing is imported.
    """
    setting = ", ".join(modules) + " (RECPRESS_ALLOWED_MODULES)"
    missing = [name for name in modules if importlib.util.find_spec(name.partition(".")[0]) is None]
    if not missing:
        return DoctorFinding(what="allowed modules", state="ok", found=setting)
    return DoctorFinding(
        what="allowed modules",
        state="fault",
        found=f"{setting}: there is no module {', '.join(missing)}",
        remedy="Correct the name, or add the folder that contains it to PYTHONPATH.",
    )


def _check_triton() -> str:
    """Count the models in the Triton repository, and describe it."""
    return "{}: {} model(s)".format(*count_models())


def _start_check(
    what: str, is_remote: bool, check: Callable[[], str], remedy: str
) -> Callable[[], DoctorFinding]:
    """Start a check of a service, and return a function that waits for its result.

    Args:
        what: the service.
        is_remote: whether the check runs in a thread with a time limit.
        check: returns a description of the service; raises if it does not work.
        remedy: what to do if it does not work.
    """
    if not is_remote:
        return lambda: _run_check(what, check, remedy)
    request = HttpRequest(check)
    return lambda: _run_check(what, request.wait, remedy)


def _run_check(
    what: str, check: Callable[[], str], remedy: str, *, is_needed: bool = True
) -> DoctorFinding:
    """Run a check, and return its description or its error.

    Args:
        what: the service or library.
        check: returns a description; raises if the service or library does not work.
        remedy: what to do then.
        is_needed: whether an error is a fault; otherwise the library counts as absent.
    """
    try:
        return DoctorFinding(what=what, state="ok", found=check())
    except CheckFailed as fault:
        return DoctorFinding(
            what=what,
            state="fault",
            found=mask_credentials(fault),
            remedy=_select_remedy(fault, remedy),
        )
    except NoAnswer as fault:
        remedy = f"{_NO_RESPONSE_REMEDY} {remedy}"
        return DoctorFinding(what=what, state="fault", found=mask_credentials(fault), remedy=remedy)
    except (InfraError, Refused, ImportError, OSError) as fault:
        state: Literal["absent", "fault"] = "fault" if is_needed else "absent"
        return DoctorFinding(what=what, state=state, found=mask_credentials(fault), remedy=remedy)


def _select_remedy(fault: CheckFailed, default: str) -> str:
    """Return the remedy for an error, or a default if there is no specific one."""
    match fault.code:
        case "store_read_only":
            return "Fetching works; to pack and compress, use a key or user that may write there."
        case "credentials_refused":
            return _CREDENTIALS_REMEDIES[fault.fields["service"]]
        case "service_failed":
            return "Read its log; its database may not be available."
    return default


def _check_store() -> str:
    """List, write and read in the object store, and describe it."""
    object_store = store()
    start = time.monotonic()
    bundles = len(object_store.keys("bundles/"))
    ms = 1000 * (time.monotonic() - start)
    try:
        object_store.write(PROBE_KEY, b"{}")
        is_written = object_store.read(PROBE_KEY) == b"{}"
    except (InfraError, Refused) as fault:
        raise CheckFailed(
            "store_read_only", root=object_store.root, bundles=bundles, problem=str(fault)
        ) from fault
    if not is_written:
        raise CheckFailed("store_write_lost", root=object_store.root, key=PROBE_KEY)
    return f"{object_store.root}: {bundles} bundle(s), {ms:.0f} ms, writable"


def _check_registry() -> str:
    """List models in the registry, and describe it."""
    uri = load_settings().registry_uri
    if not uri.startswith(("http://", "https://")):
        return f"{public_uri(uri)}: {len(registry().models())} model(s)"
    base = uri.rstrip("/")
    path = "/api/2.0/mlflow/registered-models/search?max_results=1000"
    answer = _request_from_mlflow(base + path)
    _require_accepted(answer, "MLflow", public_uri(uri))
    body = answer.parse_json()
    if not isinstance(body, dict) or body.keys() - {"registered_models", "next_page_token"}:
        raise CheckFailed("answer_foreign", service="MLflow", address=public_uri(uri))
    more = "+" if body.get("next_page_token") else ""
    models = len(body.get("registered_models", ()))
    response = _request_from_mlflow(f"{base}/version")
    version = response.body.decode("ascii", "replace")[:20] if response.status == 200 else "?"
    return f"MLflow {version} at {public_uri(uri)}: {models}{more} model(s), {answer.ms:.0f} ms"


def _check_champions() -> str:
    """Find the registered version of every champion, and list them."""
    versions = champion_versions()
    return ", ".join(f"{model} {version}" for model, version in versions.items()) or "none yet"


def _request_from_mlflow(uri: str) -> HttpAnswer:
    """Send a GET request with the credentials that MLflow's client uses: a login, else a token."""
    user, password = os.environ.get(MLFLOW_USER), os.environ.get(MLFLOW_PASSWORD)
    if user and password:
        return send_request(uri, auth=(user, password))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return send_request(uri, headers={"Authorization": f"Bearer {token}"} if token else {})


def _check_prefect() -> str:
    """List the work pools of the Prefect server, and describe it."""
    from prefect.settings import Settings

    api = Settings().api  # read again, since Prefect caches settings in this process
    if not api.url:
        return "embedded, started with each command"
    base, headers, auth = api.url.rstrip("/"), dict[str, str](), None
    if api.key is not None:
        headers = {"Authorization": f"Bearer {api.key.get_secret_value()}"}
    elif api.auth_string is not None:
        user, _, password = api.auth_string.get_secret_value().partition(":")
        auth = user, password
    # Prefect lists work pools in response to a POST request, with a JSON body.
    answer = send_request(
        f"{base}/work_pools/filter", headers=headers, auth=auth, json_body={"limit": 200}
    )
    _require_accepted(answer, "Prefect", public_uri(api.url))
    pools = answer.parse_json()
    if not isinstance(pools, list):
        raise CheckFailed("answer_foreign", service="Prefect", address=public_uri(api.url))
    response = send_request(f"{base}/admin/version", headers=headers, auth=auth)
    version = str(response.parse_json())[:20] if response.status == 200 else "?"
    ready = ", ".join(str(pool.get("name")) for pool in pools if pool.get("status") == "READY")
    workers = f"workers of {ready}" if ready else "no worker online"
    return f"Prefect {version} at {public_uri(api.url)}: {workers}, {answer.ms:.0f} ms"


def _require_accepted(answer: HttpAnswer, service: str, address: str) -> None:
    """Raise if the status of an HTTP answer is not 200.

    Raises:
        CheckFailed: contains no body, since some servers repeat the credentials of the request.
    """
    status = answer.status
    if status == 200:
        return
    if status in {401, 403}:
        raise CheckFailed("credentials_refused", service=service, address=address, status=status)
    if status >= 500:
        raise CheckFailed("service_failed", service=service, address=address, status=status)
    raise CheckFailed("status_unexpected", service=service, address=address, status=status)


def _describe_torch() -> str:
    """Return torch's version and the GPU."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{torch.__version__}{gpu}"
