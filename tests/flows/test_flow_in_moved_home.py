"""After a home folder was moved, its completed orders are found and its cached results used.

A home is the folder with everything that recpress stores (``RECPRESS_HOME``).
"""

import shutil
from pathlib import Path

import pytest
from orders import AcceptedOrder, run_without_prefect, use_copied_home

from compressors.contracts import Limit
from flows.resolve import find_completed_result
from tasks.promotion.promotions import champion_graph, promote, version_report


@pytest.fixture
def moved_home(
    accepted_order: AcceptedOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of the accepted order's home in a path with characters that are special in URIs."""
    home = tmp_path / "a?b#c%41 d"
    use_copied_home(monkeypatch, accepted_order.home, home)
    return home


def test_order_is_found_or_read_from_the_cache_after_its_home_was_moved(
    accepted_order: AcceptedOrder, moved_home: Path
) -> None:
    first = accepted_order.result.finished
    completed = find_completed_result(accepted_order.order)
    assert completed is not None
    assert (completed.report, completed.release, completed.version) == (
        first.report,
        first.release,
        first.version,
    )
    shutil.rmtree(moved_home / "store" / "orders")
    assert find_completed_result(accepted_order.order) is None
    result = run_without_prefect(accepted_order.order)
    assert (result.finished.release, result.finished.version) == (first.release, first.version)
    # ``publish`` runs again, because its recorded result names the registry at the former path.
    states = {state for name, state in result.tasks if not name.startswith("publish")}
    assert states == {"Cached"}
    assert find_completed_result(accepted_order.order) == result.finished
    # No folder was created at another path, to which a URI with special characters may refer.
    assert {path.name for path in moved_home.parent.iterdir()} == {moved_home.name}


def test_order_is_compared_with_the_champion_promoted_in_the_moved_home(
    accepted_order: AcceptedOrder, moved_home: Path
) -> None:
    promote("clicks", accepted_order.result.finished.version, reason="before the order")
    limit = Limit.parse("auc vs champion >= -0.02")
    result = run_without_prefect(accepted_order.order.model_copy(update={"limits": (limit,)}))
    assert (result.state, result.finished.report.outcome) == ("Completed", "accepted")
    assert result.finished.report.champion == champion_graph("clicks", "onnxruntime")
    assert version_report("clicks", "@champion")[1] == accepted_order.result.finished.report
