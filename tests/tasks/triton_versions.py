"""Published versions of a model 'm' for tests of the Triton repository."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reports import report

from compressors.contracts import Outcome, TargetName
from infra.registry.ledger import Ledger
from tasks import publish as publishing
from tasks.orchestration.documents import Finished, Report
from tasks.orchestration.workspace import store

GOOD: dict[TargetName, Outcome] = {"onnxruntime": "accepted", "tensorrt-rtx": "built-unmeasured"}

Fill = Callable[[str, str], tuple[str, ...]]
"""The fixture ``fill``: orders to publish, those of them to promote -> their versions."""


def published(home: Path, digit: str, **more: Any) -> Finished:
    """Publish an order named by one repeated hex digit; ``more`` replaces parts of its report."""
    outcomes = more.pop("outcomes", GOOD)
    found: Report = report(home, digit * 64, outcomes).model_copy(update=more)
    return publishing.publish.fn(found)


def body(digit: str) -> bytes:
    """The ONNX graph of an order, as ``reports`` makes it."""
    return f"onnxruntime {digit * 64}".encode()


def champion() -> str:
    entry = Ledger(store(), "m").champion()
    assert entry is not None
    return entry.version
