"""``recpress explain`` predicts the result of carrying out the order."""

import json
from pathlib import Path

import pytest
from drafts import write_draft
from error_codes import raises_code
from orders import AcceptedOrder, RecipeRun, run_recipe, use_home
from test_recipe import ANY, STEPS, recipe  # noqa: F401 - a fixture

from compressors.contracts.reasons import Reason
from compressors.errors.orders import OrderRefused
from compressors.prune.dense.channels import Channels
from flows.explain import Explanation, explain
from flows.order import Order
from infra.errors import ArtifactMissing
from infra.settings import load_settings
from tasks.bundles.packing import pack


@pytest.fixture(scope="module")
def explained(session_order: AcceptedOrder) -> Explanation:
    """The world's order, explained after it was carried out."""
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, session_order.home)
        return explain(session_order.order)


def stored(home: Path) -> set[Path]:
    """Every file of a home but the local copies of what is in the store."""
    return {path for path in home.rglob("*") if path.is_file() and "cache" not in path.parts}


def left_out(found: Explanation) -> dict[str, Reason]:
    """Why steps would be left out."""
    return {item.step: item.left_out for item in found.steps if item.left_out is not None}


def test_a_presets_stages_plan_and_skipped_steps_are_known_before(
    accepted_order: AcceptedOrder,
) -> None:
    order = accepted_order.order.model_copy(update={"preset": "fast"})
    report, found = run_recipe(order), explain(order)
    assert found.plan == report.plan
    done = [(item.step, item.bytes) for item in found.steps if item.left_out is None]
    assert done == [(stage.step, stage.bytes) for stage in report.stages]
    assert left_out(found) == report.idle_reasons
    assert found.bytes_between == (report.stages[-1].bytes, report.stages[-1].bytes)


def test_what_a_budget_decides_is_known_within_bounds(
    accepted_order: AcceptedOrder, explained: Explanation
) -> None:
    report, found = accepted_order.result.finished.report, explained
    assert found.bytes_between is not None
    least, most = found.bytes_between
    assert least < report.stages[-1].bytes <= most
    assert {"channels", "distill", "fold"} <= set(report.idle_reasons)
    expected = {name: report.idle_reasons[name] for name in ("channels", "distill", "fold")}
    assert left_out(found) == expected
    assert [target.target for target in found.targets] == ["onnxruntime", "tensorrt-rtx"]


def test_explain_names_the_version_of_an_order_that_was_carried_out_before(
    accepted_order: AcceptedOrder, explained: Explanation
) -> None:
    assert explained.earlier == accepted_order.result.finished.version


def test_a_recipe_that_trains_is_known_before(
    recipe: tuple[AcceptedOrder, RecipeRun],  # noqa: F811
    accepted_order: AcceptedOrder,
) -> None:
    order = Order(model="clicks@1", preset="custom", steps=STEPS, limits=(ANY,))
    _, report = recipe
    found = explain(order)
    assert [(item.step, item.bytes) for item in found.steps] == [
        (stage.step, stage.bytes) for stage in report.stages
    ]
    predicted = {line.module: (line.format, line.bytes_after) for line in found.plan.lines}
    assert predicted == {line.module: (line.format, line.bytes_after) for line in report.plan.lines}


def test_nothing_is_stored_and_nothing_is_run(accepted_order: AcceptedOrder) -> None:
    before = stored(load_settings().home)
    order = Order(model="clicks@1", preset="fast", limits=(ANY,))
    assert explain(order).earlier is None
    assert stored(load_settings().home) == before


def test_what_would_be_refused_is_refused_now(accepted_order: AcceptedOrder) -> None:
    order = Order(model="clicks@1", preset="custom", steps=(Channels(),), limits=(ANY,))
    with raises_code(OrderRefused, "step_not_applicable") as caught:
        explain(order)
    assert "does not grow in proportion to hidden" in str(caught.value.fields["reason"])
    with raises_code(ArtifactMissing, "bundle_missing", reference="nothing"):
        explain(Order(model="nothing", preset="fast", limits=(ANY,)))


def test_explain_names_the_missing_splits_of_each_skipped_step(empty_home: Path) -> None:
    pack(write_draft(empty_home / "draft", name="few", rows={"train": 500, "test": 500}))
    found = explain(Order(model="few", preset="small", limits=(ANY,)))
    reasons = left_out(found)
    assert set(reasons) == {"prune_rows", "channels", "distill", "fold"}
    splits = ("train", "test")
    assert reasons["distill"] == Reason(
        "data_missing", step="distill", missing=("validation",), splits=splits
    )


def test_a_model_of_any_size_is_explained_in_the_memory_of_its_libraries(
    explained: Explanation,
) -> None:
    memory = explained.memory
    assert memory.peak == memory.process + memory.weights + memory.rows
    assert memory.process > memory.weights  # the draft has 300 kB of weights


def test_the_command_prints_it_and_speaks_json(
    accepted_order: AcceptedOrder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.cli import app

    def called(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["recpress", "explain", *arguments])
        capsys.readouterr()
        code = 0
        try:
            app.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    limit = ("--limit", "auc vs baseline >= -0.2")
    code, out, _ = called("clicks@1", "--preset", "fast", *limit)
    assert code == 0
    for text in ("rowwise_int8", "static_int8", "Peak memory", "target onnxruntime, required"):
        assert text in out
    code, out, _ = called("clicks@1", "--preset", "safe", *limit, "--json")
    assert code == 0
    assert json.loads(out)["steps"][0]["step"] == "as trained"
    code, _, err = called("clicks@1", "--limit", "gauc vs baseline >= 0")
    assert code == 2
    assert "not measured for this bundle" in err
    code, _, err = called("clicks@1")
    assert code == 2
    assert "at least one limit" in err
