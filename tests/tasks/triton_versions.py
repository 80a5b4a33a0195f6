"""Publish versions of a model "m" without running orders, for tests of promotion.

Digests of orders are one repeated hexadecimal digit. Tests publish most orders with the fixture
``fill`` of ``conftest.py``: ``fill("ab", "a")`` publishes the orders "aaa..." and "bbb..." as
versions 1 and 2, promotes the first, and returns ``("1", "2")``. A home is the folder with
everything that recpress stores (``RECPRESS_HOME``). The ledger is the list of a model's promotions
and rollbacks in the store.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reports import create_report

from compressors.contracts import Outcome, TargetName
from infra.registry.ledger import Ledger
from tasks import publish as publishing
from tasks.orchestration.documents import Finished, Report
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import promote

GOOD: dict[TargetName, Outcome] = {"onnxruntime": "accepted", "tensorrt-rtx": "built-unmeasured"}

Fill = Callable[[str, str], tuple[str, ...]]
"""Type of the fixture ``fill`` in ``conftest.py``."""


def publish_version(work_folder: Path, order_digit: str, **changes: Any) -> Finished:
    """Publish an order whose digest is one repeated hexadecimal digit.

    Args:
        work_folder: the fixture ``work_folder``.
        order_digit: the digit.
        changes: fields of the report to replace, and ``outcomes``: the outcome of each target,
            ``GOOD`` by default.
    """
    outcomes = changes.pop("outcomes", GOOD)
    changed: Report = create_report(work_folder, order_digit * 64, outcomes).model_copy(
        update=changes
    )
    return publishing.publish.fn(changed)


def graph_bytes(order_digit: str) -> bytes:
    """Return the contents of the ONNX graph of an order."""
    return f"onnxruntime {order_digit * 64}".encode()


def champion_number() -> str:
    """Return the version number of the champion in the ledger."""
    entry = Ledger(store(), "m").champion()
    assert entry is not None
    return entry.version


def promote_during_next_promotion(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promote a version after the next promotion has read the ledger, and before it appends."""
    read_entries = Ledger.entries

    def read_then_promote(ledger: Ledger) -> object:
        entries = read_entries(ledger)
        monkeypatch.setattr(Ledger, "entries", read_entries)
        promote("m", version, reason="concurrent")
        return entries

    monkeypatch.setattr(Ledger, "entries", read_then_promote)
