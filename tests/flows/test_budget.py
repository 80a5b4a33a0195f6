"""A recipe that stops where its quality budget is used, and goes on from where it was."""

from pathlib import Path
from types import SimpleNamespace

from drafts import ROWS, write_draft
from error_codes import raises_code
from orders import AcceptedOrder, run_recipe
from reason_codes import with_code

from compressors.contracts import Limit
from compressors.contracts.reasons import Reason
from compressors.core.registries import AnyStep
from compressors.distill.fine_tune import FineTune
from compressors.distill.recalibrate import Recalibrate
from compressors.distill.training.settings import Training
from compressors.errors.orders import OrderRefused
from compressors.prune.dense.magnitude import Magnitude
from compressors.prune.tables.tiers import Tiers
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.explain import explain
from flows.order import Order
from flows.step_selection import select_steps
from tasks.bundles.packing import pack
from tasks.orchestration.documents import NotApplicable

ANY = Limit.parse("auc vs baseline >= -0.4")
BRIEF = FineTune(training=Training(epochs=1, batch=256))
CUTS = (
    Magnitude(share=0.1),
    BRIEF,
    Magnitude(share=0.99),  # nothing is left of the network
    Magnitude(share=0.995),
    BRIEF,
    Magnitude(share=0.2, layers=("first",)),
    RowwiseInt8(),
    StaticInt8(),
    Recalibrate(),
)


def budgeted(budget: float, steps: tuple = CUTS) -> Order:
    return Order(model="clicks@1", preset="custom", steps=steps, limits=(ANY,), budget=budget)


def test_what_costs_more_than_the_budget_is_left_out_with_what_follows_it(
    accepted_order: AcceptedOrder,
) -> None:
    order = budgeted(0.02)
    assert [len(group) for group in order.groups()] == [2, 1, 2, 1, 1, 1, 1]
    report = run_recipe(order)
    assert [stage.step for stage in report.stages[1:]] == [
        "magnitude",
        "fine_tune",
        "magnitude",  # of other layers: that is another cut
        "rowwise_int8",
        "static_int8",
        "recalibrate",
    ]
    left_out = (("magnitude", 3), ("magnitude", 4), ("fine_tune", 5))
    reasons = report.idle_reasons
    assert set(reasons) == {f"{kind} (step {place} of the recipe)" for kind, place in left_out}
    (why,) = set(reasons.values())
    loss = with_code([why], "over_budget", metric="auc", budget=0.02).fields["loss"]
    assert isinstance(loss, float)
    assert 0.02 < loss < 0.5
    # Every stage that counts is found again: an order that was stopped goes on where it was.
    again = run_recipe(order)
    cut = [
        state for name, state in again.tasks if name in {"magnitude", "fine_tune", "static_int8"}
    ]
    assert len(cut) >= 5
    assert set(cut) == {"Cached"}


def test_what_works_on_parts_that_were_taken_back_is_left_out_with_them() -> None:
    order = budgeted(0.01, (Tiers(), RowwiseInt8(tables=("item.hot",)), StaticInt8()))
    subject = SimpleNamespace(task="ctr", rows={"train": 9}, calibration=lambda: "train")
    missing = Reason("not_applicable", fault="needs a table named like 'item.hot'")
    lost = Reason("over_budget", loss=0.03, metric="auc", budget=0.01)

    def attempt(step: AnyStep, source: str) -> str | NotApplicable:
        if step.kind == "rowwise_int8" and "tiers" not in source:
            return NotApplicable(reasons=(missing,))
        return f"{source} {step.kind}"

    def spent(made: str) -> Reason | None:
        return lost if made.endswith("tiers") else None

    stages, left_out = select_steps(order, subject, "model", attempt, spent)
    assert [stage for _, stage in stages] == ["model", "model static_int8"]
    assert left_out == {0: lost, 1: missing}
    with raises_code(OrderRefused, "step_not_applicable", reason=missing):
        select_steps(order, subject, "model", lambda step, source: attempt(step, ""), None)


def test_without_a_budget_the_same_steps_are_all_carried_out(accepted_order: AcceptedOrder) -> None:
    order = budgeted(0.02, CUTS[:3]).model_copy(update={"budget": None})
    assert [len(group) for group in order.groups()] == [1, 1, 1]
    report = run_recipe(order)
    assert [stage.step for stage in report.stages[1:]] == ["magnitude", "fine_tune", "magnitude"]
    assert report.stages[-1].quality.point < report.stages[-2].quality.point - 0.02


def test_a_budget_that_nothing_keeps_to_is_an_error_that_says_so(
    accepted_order: AcceptedOrder,
) -> None:
    with raises_code(OrderRefused, "no_step_fits") as caught:
        run_recipe(budgeted(0.0, (Magnitude(share=0.99),)))
    loss = with_code(caught.value.fields["reasons"], "over_budget", budget=0.0).fields["loss"]
    assert isinstance(loss, float)
    assert loss > 0


def test_a_budget_needs_rows_to_weigh_on(empty_home: Path) -> None:
    rows = {split: count for split, count in ROWS.items() if split != "validation"}
    pack(write_draft(empty_home / "draft", name="few", rows=rows))
    order = budgeted(0.01, (RowwiseInt8(),)).model_copy(update={"model": "few"})
    for function in (run_recipe, explain):
        with raises_code(OrderRefused, "budget_needs_validation"):
            function(order)


def test_small_and_smallest_have_a_budget_where_the_order_sets_none() -> None:
    for preset, expected in (("safe", None), ("fast", None), ("small", 0.001), ("smallest", 0.001)):
        order = Order(model="clicks", preset=preset, limits=(ANY,))
        assert order.quality_budget() == expected
        assert "--budget" not in order.reproduction("clicks@1").command
        order = order.model_copy(update={"budget": 0.02})
        assert order.quality_budget() == 0.02
        assert "--budget 0.02" in order.reproduction("clicks@1").command
