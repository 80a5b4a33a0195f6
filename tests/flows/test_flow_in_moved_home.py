"""An order in a home that was moved: what was done there is found, and nothing runs twice."""

import shutil
from pathlib import Path

import pytest
from orders import AcceptedOrder, run_without_prefect, use_copied_home

from compressors.contracts import Limit
from flows.resolve import find_completed_result
from tasks.promotion.promotions import champion_graph, promote, version_report


@pytest.fixture
def moved(accepted_order: AcceptedOrder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished order's home under an odd name."""
    home = tmp_path / "a?b#c%41 d"
    use_copied_home(monkeypatch, accepted_order.home, home)
    return home


def test_an_order_carried_out_before_the_move_is_found_and_otherwise_cached(
    accepted_order: AcceptedOrder, moved: Path
) -> None:
    first = accepted_order.result.finished
    found = find_completed_result(accepted_order.order)
    assert found is not None
    assert (found.report, found.release, found.version) == (
        first.report,
        first.release,
        first.version,
    )
    shutil.rmtree(moved / "store" / "orders")
    assert find_completed_result(accepted_order.order) is None
    ran = run_without_prefect(accepted_order.order)
    assert (ran.finished.release, ran.finished.version) == (first.release, first.version)
    ended = {state for name, state in ran.tasks if not name.startswith("publish")}
    assert ended == {"Cached"}
    assert find_completed_result(accepted_order.order) == ran.finished
    assert {path.name for path in moved.parent.iterdir()} == {moved.name}


def test_an_order_is_compared_with_the_champion_of_before_the_move(
    accepted_order: AcceptedOrder, moved: Path
) -> None:
    promote("clicks", accepted_order.result.finished.version, "before")
    limit = Limit.parse("auc vs champion >= -0.02")
    ran = run_without_prefect(accepted_order.order.model_copy(update={"limits": (limit,)}))
    assert (ran.state, ran.finished.report.outcome) == ("Completed", "accepted")
    assert ran.finished.report.champion == champion_graph("clicks", "onnxruntime")
    assert version_report("clicks", "@champion")[1] == accepted_order.result.finished.report
