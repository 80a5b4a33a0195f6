"""An order in a home that was moved: what was done there is found, and nothing runs twice."""

import shutil
from pathlib import Path

import pytest
from orders import World, carry_out, copied_home

from compressors.contracts import Limit
from flows.resolve import find_completed_result
from tasks.promotion.promotions import champion_graph, promote, version_report


@pytest.fixture
def moved(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished order's home under an odd name."""
    home = tmp_path / "a?b#c%41 d"
    copied_home(monkeypatch, world.home, home)
    return home


def test_an_order_carried_out_before_the_move_is_found_and_otherwise_cached(
    world: World, moved: Path
) -> None:
    first = world.first.finished
    found = find_completed_result(world.order)
    assert found is not None
    assert (found.report, found.release, found.version) == (
        first.report,
        first.release,
        first.version,
    )
    shutil.rmtree(moved / "store" / "orders")
    assert find_completed_result(world.order) is None
    ran = carry_out(world.order)
    assert (ran.finished.release, ran.finished.version) == (first.release, first.version)
    ended = {state for name, state in ran.tasks if not name.startswith("publish")}
    assert ended == {"Cached"}
    assert find_completed_result(world.order) == ran.finished
    assert {path.name for path in moved.parent.iterdir()} == {moved.name}


def test_an_order_is_compared_with_the_champion_of_before_the_move(
    world: World, moved: Path
) -> None:
    promote("clicks", world.first.finished.version, "before")
    limit = Limit.parse("auc vs champion >= -0.02")
    ran = carry_out(world.order.model_copy(update={"limits": (limit,)}))
    assert (ran.state, ran.finished.report.outcome) == ("Completed", "accepted")
    assert ran.finished.report.champion == champion_graph("clicks", "onnxruntime")
    assert version_report("clicks", "@champion")[1] == world.first.finished.report
