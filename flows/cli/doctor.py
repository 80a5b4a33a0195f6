"""Check the services and libraries that this installation uses; report faults and remedies.

Services are queried concurrently and have ``SECONDS`` each, so an address that never responds takes
no longer than that. Checks on this machine have no time limit.
"""

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Literal

from compressors.contracts import TARGETS, Frozen, Target
from flows.cli.doctor_errors import CheckFailed
from infra.credentials import MLFLOW_PASSWORD, MLFLOW_USER, cleaned
from infra.errors import InfraError, NoAnswer, Refused
from infra.errors.settings import PREFECT_CREDENTIALS
from infra.services.http_probe import HttpAnswer, HttpRequest, get
from infra.settings import load_settings, shown
from tasks.orchestration.workspace import store
from tasks.promotion.champion import champions, registry
from tasks.promotion.triton_repository import contents

PROBE = "doctor/written.json"

_SILENT = "Start it, or correct the address; a firewall in between may swallow what is sent."
_STORE = (
    "Set RECPRESS_STORE and, for s3://, AWS_ENDPOINT_URL and a key that may list, read and write "
    "below it."
)
_REGISTRY = "Set MLFLOW_TRACKING_URI to a server that runs, or unset it for the embedded registry."
_CHAMPIONS = (
    "Set MLFLOW_TRACKING_URI to the registry the champions were published in, or register the "
    "results of the store again: 'recpress registry restore'."
)
_TRITON = (
    "Set RECPRESS_TRITON to a folder or s3://bucket/prefix that this key may list, read and write, "
    "or unset it."
)
_PREFECT = "Set PREFECT_API_URL to a server that runs, or unset it for the embedded one."
_CREDENTIALS = {
    "MLflow": "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or "
    "MLFLOW_TRACKING_TOKEN); a server that says 'Invalid Host' needs this host in its "
    "--allowed-hosts.",
    "Prefect": PREFECT_CREDENTIALS,
}


class Finding(Frozen):
    """The result of one check: it works, it is absent (and optional), or it is a fault."""

    what: str
    state: Literal["ok", "absent", "fault"]
    found: str
    remedy: str = ""


def examine() -> tuple[Finding, ...]:
    """Check the store, the registry, the Prefect server, the libraries and the builders."""
    settings = load_settings()
    # Imports do not count in a service's seconds: they run before any query.
    importlib.import_module("prefect.settings")
    if settings.store_root.startswith("s3://") or settings.triton.startswith("s3://"):
        importlib.import_module("s3fs")
    probes = [
        _start("object store", settings.store_root.startswith("s3://"), _store, _STORE),
        _start("registry", not settings.registry_uri.startswith("sqlite"), _registry, _REGISTRY),
        _start("Prefect", True, _prefect, _PREFECT),
    ]
    remote = settings.store_root.startswith("s3://")
    remote = remote or not settings.registry_uri.startswith("sqlite")
    champion = _start("champions", remote, _champions, _CHAMPIONS)
    triton = _start("Triton repository", settings.triton.startswith("s3://"), _triton, _TRITON)
    unset = Finding(what="Triton repository", state="absent", found="RECPRESS_TRITON is not set")
    return (
        *(wait() for wait in probes),
        champion(),
        triton() if settings.triton else unset,
        _try("torch", _torch, "Install it again: make .venv"),
        *map(_target, TARGETS.values()),
        _architectures(settings.allowed_modules),
    )


def _target(target: Target) -> Finding:
    """Check the library of a target's runtime or builder; only the default target needs it."""
    library = target.load_runtime() or target.load_builder()
    remedy = "Install it again: make .venv" if target.is_default else ""
    version = (lambda: "graphs only") if library is None else library.version
    return _try(target.label, version, remedy, needed=target.is_default)


def _architectures(modules: tuple[str, ...]) -> Finding:
    """Check whether each allowed module can be found; none is imported, since that runs it."""
    said = ", ".join(modules) + " (RECPRESS_ALLOWED_MODULES)"
    missing = [name for name in modules if importlib.util.find_spec(name.partition(".")[0]) is None]
    if not missing:
        return Finding(what="architectures from", state="ok", found=said)
    return Finding(
        what="architectures from",
        state="fault",
        found=f"{said}: there is no module {', '.join(missing)}",
        remedy="Correct the name, or put the folder that holds it on PYTHONPATH.",
    )


def _triton() -> str:
    return "{}: {} model(s)".format(*contents())


def _start(what: str, remote: bool, probe: Callable[[], str], remedy: str) -> Callable[[], Finding]:
    """Start a probe and return a function that waits for its result."""
    if not remote:
        return lambda: _try(what, probe, remedy)
    question = HttpRequest(probe)
    return lambda: _try(what, question.answer, remedy)


def _try(what: str, probe: Callable[[], str], remedy: str, *, needed: bool = True) -> Finding:
    try:
        return Finding(what=what, state="ok", found=probe())
    except CheckFailed as fault:
        return Finding(
            what=what, state="fault", found=cleaned(fault), remedy=_remedy(fault, remedy)
        )
    except NoAnswer as fault:
        return Finding(what=what, state="fault", found=cleaned(fault), remedy=f"{_SILENT} {remedy}")
    except (InfraError, Refused, ImportError, OSError) as fault:
        state: Literal["absent", "fault"] = "fault" if needed else "absent"
        return Finding(what=what, state=state, found=cleaned(fault), remedy=remedy)


def _remedy(fault: CheckFailed, otherwise: str) -> str:
    match fault.code:
        case "store_read_only":
            return "Fetching works; to pack and compress, use a key or user that may write there."
        case "credentials_refused":
            return _CREDENTIALS[fault.fields["service"]]
        case "service_failed":
            return "Its log says more; it may wait for its database."
    return otherwise


def _store() -> str:
    held = store()
    begun = time.monotonic()
    bundles = len(held.keys("bundles/"))
    ms = 1000 * (time.monotonic() - begun)
    try:
        held.write(PROBE, b"{}")
        written = held.read(PROBE) == b"{}"
    except (InfraError, Refused) as fault:
        raise CheckFailed(
            "store_read_only", root=held.root, bundles=bundles, problem=str(fault)
        ) from fault
    if not written:
        raise CheckFailed("store_write_lost", root=held.root, key=PROBE)
    return f"{held.root}: {bundles} bundle(s), {ms:.0f} ms, writable"


def _registry() -> str:
    uri = load_settings().registry_uri
    if not uri.startswith(("http://", "https://")):
        return f"{shown(uri)}: {len(registry().models())} model(s)"
    base = uri.rstrip("/")
    path = "/api/2.0/mlflow/registered-models/search?max_results=1000"
    answer = _mlflow_get(base + path)
    _require_accepted(answer, "MLflow", shown(uri))
    found = answer.value()
    if not isinstance(found, dict) or found.keys() - {"registered_models", "next_page_token"}:
        raise CheckFailed("answer_foreign", service="MLflow", address=shown(uri))
    more = "+" if found.get("next_page_token") else ""
    models = len(found.get("registered_models", ()))
    version = _mlflow_get(f"{base}/version")
    named = version.body.decode("ascii", "replace")[:20] if version.status == 200 else "?"
    return f"MLflow {named} at {shown(uri)}: {models}{more} model(s), {answer.ms:.0f} ms"


def _champions() -> str:
    found = champions()
    return ", ".join(f"{model} {number}" for model, number in found.items()) or "none yet"


def _mlflow_get(uri: str) -> HttpAnswer:
    """Send a request with the credentials of MLflow's client: a login, otherwise a token."""
    user, password = os.environ.get(MLFLOW_USER), os.environ.get(MLFLOW_PASSWORD)
    if user and password:
        return get(uri, login=(user, password))
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return get(uri, headers={"Authorization": f"Bearer {token}"} if token else {})


def _prefect() -> str:
    from prefect.settings import Settings

    api = Settings().api  # the environment and the profile, as a command started now reads them
    if not api.url:
        return "embedded, started with each command"
    base, headers, login = api.url.rstrip("/"), dict[str, str](), None
    if api.key is not None:
        headers = {"Authorization": f"Bearer {api.key.get_secret_value()}"}
    elif api.auth_string is not None:
        user, _, password = api.auth_string.get_secret_value().partition(":")
        login = user, password
    answer = get(f"{base}/work_pools/filter", headers=headers, login=login, posted={"limit": 200})
    _require_accepted(answer, "Prefect", shown(api.url))
    pools = answer.value()
    if not isinstance(pools, list):
        raise CheckFailed("answer_foreign", service="Prefect", address=shown(api.url))
    version = get(f"{base}/admin/version", headers=headers, login=login)
    named = str(version.value())[:20] if version.status == 200 else "?"
    ready = ", ".join(str(pool.get("name")) for pool in pools if pool.get("status") == "READY")
    workers = f"workers of {ready}" if ready else "no worker online"
    return f"Prefect {named} at {shown(api.url)}: {workers}, {answer.ms:.0f} ms"


def _require_accepted(answer: HttpAnswer, service: str, address: str) -> None:
    """Raise unless the answer is 200.

    Raises:
        CheckFailed: omits the body, since some servers quote the request in it.
    """
    status = answer.status
    if status == 200:
        return
    if status in {401, 403}:
        raise CheckFailed("credentials_refused", service=service, address=address, status=status)
    if status >= 500:
        raise CheckFailed("service_failed", service=service, address=address, status=status)
    raise CheckFailed("status_unexpected", service=service, address=address, status=status)


def _torch() -> str:
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{torch.__version__}{gpu}"
