"""Recipes with a quality budget: which steps are skipped, and what a second run has cached.

The budget is the largest loss of the bundle's metric (AUC) on validation rows. A stage of a report
is the untouched model or the model after an applied step; ``idle_reasons`` are the skipped steps.

``write_draft`` (``tests/drafts.py``) writes a draft: the folder that becomes a bundle when it is
packed. Its network has the tables ``user``, ``item`` and ``tags``; ``first`` is a dense layer.
"""

from pathlib import Path
from types import SimpleNamespace

from drafts import ROWS, write_draft
from error_codes import raises_code
from orders import AcceptedOrder, run_recipe
from reason_codes import require_reason

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

LOOSE_LIMIT = Limit.parse("auc vs baseline >= -0.4")
ONE_EPOCH = FineTune(training=Training(epochs=1, batch=256))
# Magnitude sets the smallest ``share`` of the weights of dense layers to zero.
STEPS = (
    Magnitude(share=0.1),
    ONE_EPOCH,
    Magnitude(share=0.99),  # destroys the network, so that it exceeds every budget
    Magnitude(share=0.995),
    ONE_EPOCH,
    Magnitude(share=0.2, layers=("first",)),
    RowwiseInt8(),
    StaticInt8(),
    Recalibrate(),
)


def order_with_budget(budget: float, steps: tuple = STEPS) -> Order:
    """Return a custom order with a quality budget."""
    return Order(
        model="clicks@1", preset="custom", steps=steps, limits=(LOOSE_LIMIT,), budget=budget
    )


def test_step_over_the_budget_is_skipped_with_the_training_that_follows_it(
    accepted_order: AcceptedOrder,
) -> None:
    order = order_with_budget(0.02)
    # A group has a step and the training after it; a budget keeps or skips a group as a whole.
    assert [len(group) for group in order.groups()] == [2, 1, 2, 1, 1, 1, 1]
    report = run_recipe(order)
    assert [stage.step for stage in report.stages[1:]] == [
        "magnitude",
        "fine_tune",
        "magnitude",  # prunes other layers than the skipped steps
        "rowwise_int8",
        "static_int8",
        "recalibrate",
    ]
    skipped = (("magnitude", 3), ("magnitude", 4), ("fine_tune", 5))
    reasons = report.idle_reasons
    assert set(reasons) == {f"{kind} (step {number} of the recipe)" for kind, number in skipped}
    (reason,) = set(reasons.values())
    loss = require_reason([reason], "over_budget", metric="auc", budget=0.02).fields["loss"]
    assert isinstance(loss, float)
    assert 0.02 < loss < 0.5  # more than the budget; chance level is an AUC of 0.5
    repeated = run_recipe(order)
    states = [
        state for name, state in repeated.tasks if name in {"magnitude", "fine_tune", "static_int8"}
    ]
    # "fine_tune", "static_int8", and "magnitude" three times: twice kept, at least once skipped.
    assert len(states) >= 5
    assert set(states) == {"Cached"}


def test_step_on_tables_that_a_skipped_step_would_have_created_is_skipped_too() -> None:
    # "tiers" splits a table into two, such as "item.hot" with the rows that are looked up often.
    order = order_with_budget(0.01, (Tiers(), RowwiseInt8(tables=("item.hot",)), StaticInt8()))
    # Steps read no rows in this test, so any positive number of training rows is enough. Results of
    # steps are texts here: the names of the applied steps after "model".
    bundle = SimpleNamespace(scores_rows=True, rows={"train": 9}, calibration=lambda: "train")
    missing = Reason("not_applicable", fault="needs a table named like 'item.hot'")
    over_budget = Reason("over_budget", loss=0.03, metric="auc", budget=0.01)

    def apply_step(step: AnyStep, source: str) -> str | NotApplicable:
        if step.kind == "rowwise_int8" and "tiers" not in source:
            return NotApplicable(reasons=(missing,))
        return f"{source} {step.kind}"

    def budget_violation(result: str) -> Reason | None:
        return over_budget if result.endswith("tiers") else None

    stages, skip_reasons = select_steps(order, bundle, "model", apply_step, budget_violation)
    assert [stage for _, stage in stages] == ["model", "model static_int8"]
    assert skip_reasons == {0: over_budget, 1: missing}
    # Without a budget no step is skipped, so a step without its table is refused. This function
    # hides the result of "tiers", so that the table "item.hot" is missing.
    with raises_code(OrderRefused, "step_not_applicable", reason=missing):
        select_steps(order, bundle, "model", lambda step, source: apply_step(step, ""), None)


def test_without_a_budget_every_step_is_applied(accepted_order: AcceptedOrder) -> None:
    order = order_with_budget(0.02, STEPS[:3]).model_copy(update={"budget": None})
    assert [len(group) for group in order.groups()] == [1, 1, 1]
    report = run_recipe(order)
    assert [stage.step for stage in report.stages[1:]] == ["magnitude", "fine_tune", "magnitude"]
    assert report.stages[-1].quality.point < report.stages[-2].quality.point - 0.02


def test_budget_that_every_step_exceeds_raises_no_step_fits(
    accepted_order: AcceptedOrder,
) -> None:
    with raises_code(OrderRefused, "no_step_fits") as caught:
        run_recipe(order_with_budget(0.0, (Magnitude(share=0.99),)))
    loss = require_reason(caught.value.fields["reasons"], "over_budget", budget=0.0).fields["loss"]
    assert isinstance(loss, float)
    assert loss > 0


def test_budget_without_validation_rows_is_refused(work_folder: Path) -> None:
    rows = {split: count for split, count in ROWS.items() if split != "validation"}
    pack(write_draft(work_folder / "draft", name="few", rows=rows))
    order = order_with_budget(0.01, (RowwiseInt8(),)).model_copy(update={"model": "few"})
    for function in (run_recipe, explain):
        with raises_code(OrderRefused, "budget_needs_validation"):
            function(order)


def test_only_presets_small_and_smallest_have_a_default_budget() -> None:
    for preset, expected in (("safe", None), ("fast", None), ("small", 0.001), ("smallest", 0.001)):
        order = Order(model="clicks", preset=preset, limits=(LOOSE_LIMIT,))
        assert order.quality_budget() == expected
        assert "--budget" not in order.reproduction("clicks@1").command
        order = order.model_copy(update={"budget": 0.02})
        assert order.quality_budget() == 0.02
        assert "--budget 0.02" in order.reproduction("clicks@1").command
