"""``recpress explain`` predicts the steps, bytes and memory of an order without running it.

Fields of an explanation: ``left_out`` of a step is the reason why it would be skipped,
``bytes_between`` are the fewest and most bytes that the order can result in, and ``earlier`` is the
version that the same order has produced before. A report has skipped steps in ``idle_reasons``. A
home is the folder with everything that recpress stores (``RECPRESS_HOME``). A draft is the folder
of a bundle before it is packed.

``accepted_order`` and ``session_order`` (``conftest.py``) are one order with preset ``small`` for
the model ``ClickNet`` (``tests/draft_network.py``). ``STEPS`` and ``recipe_run`` of
``test_recipe.py`` are a recipe that trains a smaller student, and its result.
"""

import json
from pathlib import Path

import pytest
from drafts import write_draft
from error_codes import raises_code
from orders import AcceptedOrder, RecipeRun, run_recipe, use_home
from test_recipe import LOOSE_LIMIT, STEPS, recipe_run  # noqa: F401 - a fixture

from compressors.contracts.reasons import Reason
from compressors.errors.orders import OrderRefused
from compressors.prune.dense.channels import Channels
from flows.explain import Explanation, explain
from flows.order import Order
from infra.errors import ArtifactMissing
from infra.settings import load_settings
from tasks.bundles.packing import pack


@pytest.fixture(scope="module")
def session_explanation(session_order: AcceptedOrder) -> Explanation:
    """The explanation of the accepted order, after the order has run."""
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, session_order.home)
        return explain(session_order.order)


def stored_files(home: Path) -> set[Path]:
    """Return all files of a home, except local copies of files in the store."""
    return {path for path in home.rglob("*") if path.is_file() and "cache" not in path.parts}


def skip_reasons(explanation: Explanation) -> dict[str, Reason]:
    """Return the reasons why steps would be skipped."""
    return {item.step: item.left_out for item in explanation.steps if item.left_out is not None}


def test_explain_predicts_stages_plan_and_skipped_steps_of_a_preset(
    accepted_order: AcceptedOrder,
) -> None:
    order = accepted_order.order.model_copy(update={"preset": "fast"})
    report, explanation = run_recipe(order), explain(order)
    assert explanation.plan == report.plan
    applied = [(item.step, item.bytes) for item in explanation.steps if item.left_out is None]
    assert applied == [(stage.step, stage.bytes) for stage in report.stages]
    assert skip_reasons(explanation) == report.idle_reasons
    assert explanation.bytes_between == (report.stages[-1].bytes, report.stages[-1].bytes)


def test_explain_bounds_the_bytes_of_an_order_with_a_budget(
    accepted_order: AcceptedOrder, session_explanation: Explanation
) -> None:
    report, explanation = accepted_order.result.finished.report, session_explanation
    assert explanation.bytes_between is not None
    lower_bound, upper_bound = explanation.bytes_between
    assert lower_bound < report.stages[-1].bytes <= upper_bound
    # Other steps were skipped because of the budget, which only a run can compare with a loss.
    assert {"channels", "distill", "fold"} <= set(report.idle_reasons)
    expected = {name: report.idle_reasons[name] for name in ("channels", "distill", "fold")}
    assert skip_reasons(explanation) == expected
    assert [target.target for target in explanation.targets] == ["onnxruntime", "tensorrt-rtx"]


def test_explain_names_the_version_of_a_completed_order(
    accepted_order: AcceptedOrder, session_explanation: Explanation
) -> None:
    assert session_explanation.earlier == accepted_order.result.finished.version


def test_explain_predicts_a_recipe_that_trains(
    recipe_run: tuple[AcceptedOrder, RecipeRun],  # noqa: F811
    accepted_order: AcceptedOrder,
) -> None:
    order = Order(model="clicks@1", preset="custom", steps=STEPS, limits=(LOOSE_LIMIT,))
    _, report = recipe_run
    explanation = explain(order)
    assert [(item.step, item.bytes) for item in explanation.steps] == [
        (stage.step, stage.bytes) for stage in report.stages
    ]
    predicted = {line.module: (line.format, line.bytes_after) for line in explanation.plan.lines}
    assert predicted == {line.module: (line.format, line.bytes_after) for line in report.plan.lines}


def test_explain_stores_no_file_and_runs_no_order(accepted_order: AcceptedOrder) -> None:
    before = stored_files(load_settings().home)
    order = Order(model="clicks@1", preset="fast", limits=(LOOSE_LIMIT,))
    assert explain(order).earlier is None
    assert stored_files(load_settings().home) == before


def test_explain_raises_the_error_that_the_order_would_raise(accepted_order: AcceptedOrder) -> None:
    order = Order(model="clicks@1", preset="custom", steps=(Channels(),), limits=(LOOSE_LIMIT,))
    with raises_code(OrderRefused, "step_not_applicable") as caught:
        explain(order)
    assert "does not grow in proportion to hidden" in str(caught.value.fields["reason"])
    with raises_code(ArtifactMissing, "bundle_missing", reference="nothing"):
        explain(Order(model="nothing", preset="fast", limits=(LOOSE_LIMIT,)))


def test_explain_names_the_missing_splits_of_each_skipped_step(work_folder: Path) -> None:
    pack(write_draft(work_folder / "draft", name="few", rows={"train": 500, "test": 500}))
    explanation = explain(Order(model="few", preset="small", limits=(LOOSE_LIMIT,)))
    reasons = skip_reasons(explanation)
    # "fold" is skipped for another reason: the model has no layer for it.
    assert set(reasons) == {"prune_rows", "channels", "distill", "fold"}
    splits = ("train", "test")
    assert reasons["distill"] == Reason(
        "data_missing", step="distill", missing=("validation",), splits=splits
    )


def test_explained_peak_memory_is_the_sum_of_libraries_weights_and_rows(
    session_explanation: Explanation,
) -> None:
    memory = session_explanation.memory
    assert memory.peak == memory.process + memory.weights + memory.rows
    assert memory.process > memory.weights  # the draft has 300 kB of weights


def test_explain_command_prints_text_or_json_and_exits_with_code_2_for_invalid_orders(
    accepted_order: AcceptedOrder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.cli import app

    def run_explain(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["recpress", "explain", *arguments])
        capsys.readouterr()
        code = 0
        try:
            app.main()
        except SystemExit as caught:
            code = int(caught.code or 0)
        return code, *capsys.readouterr()

    limit = ("--limit", "auc vs baseline >= -0.2")
    code, out, _ = run_explain("clicks@1", "--preset", "fast", *limit)
    assert code == 0
    for text in ("rowwise_int8", "static_int8", "Peak memory", "target onnxruntime, required"):
        assert text in out
    code, out, _ = run_explain("clicks@1", "--preset", "safe", *limit, "--json")
    assert code == 0
    assert json.loads(out)["steps"][0]["step"] == "as trained"
    code, _, err = run_explain("clicks@1", "--limit", "gauc vs baseline >= 0")
    assert code == 2
    assert "not measured for this bundle" in err
    code, _, err = run_explain("clicks@1")
    assert code == 2
    assert "at least one limit" in err
