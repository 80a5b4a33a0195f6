"""What this installation uses, and whether it answers."""

import os
from collections.abc import Callable
from typing import Literal

from compressors.contracts import Frozen
from infra.errors import InfraError, Refused
from infra.settings import load_settings
from infra.tensorrt import load
from tasks.promotion import registry
from tasks.stored import store
from tasks.triton import contents


class Found(Frozen):
    """One thing that was looked at: it works, it is not there (and need not be), or a fault."""

    what: str
    state: Literal["ok", "absent", "fault"]
    found: str


def examine() -> tuple[Found, ...]:
    """Look at the store, the registry, the builders and the Prefect server that are configured."""
    settings = load_settings()
    return (
        _try("object store", lambda: f"{store().root}: {len(store().keys('bundles/'))} bundle(s)"),
        _try("registry", lambda: f"{len(registry().models())} model(s)"),
        _triton(),
        _try("ONNX Runtime", _onnxruntime),
        _try("TensorRT-RTX", lambda: str(load("tensorrt-rtx").__version__), needed=False),
        _try("TensorRT", lambda: str(load("tensorrt").__version__), needed=False),
        Found(
            what="Prefect",
            state="ok",
            found=os.environ.get("PREFECT_API_URL") or "embedded, started with each command",
        ),
        Found(
            what="architectures from",
            state="ok",
            found=", ".join(settings.allowed_modules) + " (RECPRESS_ALLOWED_MODULES)",
        ),
    )


def _triton() -> Found:
    what = "Triton repository"
    if not load_settings().triton:
        return Found(what=what, state="absent", found="RECPRESS_TRITON is not set")
    return _try(what, lambda: "{}: {} model(s)".format(*contents()))


def _onnxruntime() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _try(what: str, look: Callable[[], str], *, needed: bool = True) -> Found:
    try:
        return Found(what=what, state="ok", found=look())
    except (InfraError, Refused) as fault:
        return Found(what=what, state="fault" if needed else "absent", found=str(fault))
