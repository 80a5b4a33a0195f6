"""Another version of recpress in the same home: nothing is registered or promoted again by it."""

import importlib.metadata
from pathlib import Path

import pytest
from orders import AcceptedOrder, run_without_prefect, use_copied_home

from flows import resolve
from flows.resolve import find_completed_result, request_digest
from infra.registry.ledger import Ledger
from tasks.bundles.bundle_ref import find
from tasks.orchestration import new_report
from tasks.orchestration.order_records import request_key
from tasks.orchestration.workspace import store
from tasks.promotion.promotions import promote, registry

NEWER = "99.1.0"


@pytest.fixture
def upgraded(
    accepted_order: AcceptedOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AcceptedOrder:
    """A copy of the finished order's home, with a champion, in the hands of another version."""
    home = tmp_path / "recpress"
    use_copied_home(monkeypatch, accepted_order.home, home)
    promote("clicks", accepted_order.result.finished.version, "before the upgrade")
    for module in (resolve, new_report):
        monkeypatch.setattr(module, "recpress_version", lambda: NEWER)
    return accepted_order


def registered() -> list[tuple[str, str]]:
    return [(found.version, found.source) for found in registry().versions("clicks")]


def test_order_of_an_earlier_version_is_found_and_registers_and_promotes_nothing(
    upgraded: AcceptedOrder,
) -> None:
    order = upgraded.order.model_copy(update={"promote": True})
    first = upgraded.result.finished
    before = registered(), Ledger(store(), "clicks").entries()
    found = find_completed_result(order)
    assert found is not None
    assert (found.report, found.version) == (first.report, first.version)
    ran = run_without_prefect(order)
    assert ran.finished.release == first.release
    assert ran.tasks == ()
    assert (registered(), Ledger(store(), "clicks").entries()) == before


def test_new_attempt_after_an_upgrade_is_not_found_and_would_run(upgraded: AcceptedOrder) -> None:
    assert find_completed_result(upgraded.order.model_copy(update={"attempt": 7})) is None


def test_report_names_the_version_that_carried_the_order_out(accepted_order: AcceptedOrder) -> None:
    assert accepted_order.result.finished.report.recpress_version == importlib.metadata.version(
        "recpress"
    )


def test_request_record_that_is_damaged_counts_as_absent(
    upgraded: AcceptedOrder, caplog: pytest.LogCaptureFixture
) -> None:
    order = upgraded.order
    place = store().folder / request_key(request_digest(order, find(order.model), {}))
    record = place.read_bytes()
    for body in (b"{}", b"not JSON", record.replace(b'"order": "', b'"order": "0')):
        place.write_bytes(body)
        assert find_completed_result(order) is None
    place.write_bytes(record)
    assert find_completed_result(upgraded.order) is not None
    assert "It counts as absent" in caplog.text
