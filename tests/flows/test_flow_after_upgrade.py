"""After an upgrade of recpress, completed orders in the same home do not run again.

The request digest of an order covers everything that determines its result, except the version of
recpress; the order's digest covers the version too. A request record maps the request digest to the
completed order. A home is the folder with everything that recpress stores (``RECPRESS_HOME``). The
ledger is the list of a model's promotions and rollbacks.
"""

import importlib.metadata
from pathlib import Path

import pytest
from orders import AcceptedOrder, run_without_prefect, use_copied_home

from flows import resolve
from flows.resolve import find_completed_result, request_digest
from infra.registry.ledger import Ledger
from tasks.bundles.bundle_ref import find_bundle
from tasks.orchestration import new_report
from tasks.orchestration.order_records import request_key
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import promote, registry

NEWER_VERSION = "99.1.0"


@pytest.fixture
def upgraded_order(
    accepted_order: AcceptedOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AcceptedOrder:
    """The accepted order in a copied home with a champion; recpress reports a newer version."""
    home = tmp_path / "recpress"
    use_copied_home(monkeypatch, accepted_order.home, home)
    promote("clicks", accepted_order.result.finished.version, reason="before the upgrade")
    for module in (resolve, new_report):
        monkeypatch.setattr(module, "recpress_version", lambda: NEWER_VERSION)
    return accepted_order


def registered_versions() -> list[tuple[str, str]]:
    """Return number and source of each registered version."""
    return [(version.version, version.source) for version in registry().versions("clicks")]


def test_order_of_an_earlier_version_is_found_and_nothing_is_registered_or_promoted(
    upgraded_order: AcceptedOrder,
) -> None:
    order = upgraded_order.order.model_copy(update={"promote": True})
    first = upgraded_order.result.finished
    before = registered_versions(), Ledger(store(), "clicks").entries()
    completed = find_completed_result(order)
    assert completed is not None
    assert (completed.report, completed.version) == (first.report, first.version)
    result = run_without_prefect(order)
    assert result.finished.release == first.release
    assert result.tasks == ()
    assert (registered_versions(), Ledger(store(), "clicks").entries()) == before


def test_new_attempt_after_an_upgrade_is_not_found(upgraded_order: AcceptedOrder) -> None:
    """The field ``attempt`` makes an order differ from an equal one, so that it runs again."""
    assert find_completed_result(upgraded_order.order.model_copy(update={"attempt": 7})) is None


def test_report_names_the_version_of_recpress_that_ran_the_order(
    accepted_order: AcceptedOrder,
) -> None:
    assert accepted_order.result.finished.report.recpress_version == importlib.metadata.version(
        "recpress"
    )


def test_damaged_request_record_counts_as_absent(
    upgraded_order: AcceptedOrder, caplog: pytest.LogCaptureFixture
) -> None:
    order = upgraded_order.order
    # No limit of the order is ``vs champion``, so the request digest contains no champion.
    digest = request_digest(order, find_bundle(order.model), champions={})
    path = store().folder / request_key(digest)
    record = path.read_bytes()
    # The last body names another order, so the checksum of the record is wrong.
    for body in (b"{}", b"not JSON", record.replace(b'"order": "', b'"order": "0')):
        path.write_bytes(body)
        assert find_completed_result(order) is None
    path.write_bytes(record)
    assert find_completed_result(upgraded_order.order) is not None
    assert "It counts as absent" in caplog.text
