"""The presets on a model that is nearly all tables, most rows of which training hardly looks up."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from error_codes import raises_code
from orders import RecipeRun, run_recipe, run_without_prefect, use_home
from reason_codes import codes_of, with_code

from compressors.contracts import Limit
from compressors.contracts.reasons import Reason
from compressors.quantize.dense.static_int8 import StaticInt8
from examples.table_heavy import SMALL, write_draft
from flows.explain import Explanation, explain
from flows.order import Order
from flows.presets import PRESETS, PREVIOUS_PRESET
from flows.terms import DEFAULT_BUDGET, Preset
from tasks.bundles.packing import pack

ANY = Limit.parse("auc vs baseline >= -0.4")
ORDER: tuple[Preset, ...] = ("safe", "fast", "small", "smallest")


def weights(report: RecipeRun) -> int:
    return sum(line.bytes_after for line in report.plan.lines)


def loss_on_test_rows(report: RecipeRun) -> float:
    return report.stages[0].quality.point - report.stages[-1].quality.point


Made = tuple[Path, dict[Preset, RecipeRun], dict[Preset, Explanation]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Made]:
    """The home, and of the draft every preset's report and explanation."""
    home = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home / "recpress")
        patch.setenv("RECPRESS_ALLOWED_MODULES", "examples.table_heavy")
        draft = write_draft(home / "draft", SMALL)
        pack(draft)
        reports, explained = {}, {}
        for preset in ORDER:
            order = Order(model="tableheavy", preset=preset, limits=(ANY,))
            explained[preset] = explain(order)
            reports[preset] = run_recipe(order)
    return home, (draft, reports, explained)


@pytest.fixture
def table_heavy(made: tuple[Path, Made], monkeypatch: pytest.MonkeyPatch) -> Made:
    """The same, with this test's environment in its home."""
    home, found = made
    use_home(monkeypatch, home / "recpress")
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "examples.table_heavy")
    return found


def test_every_preset_has_the_one_before_it() -> None:
    assert set(PRESETS) == set(ORDER)
    assert [PREVIOUS_PRESET.get(preset) for preset in ORDER] == [None, *ORDER[:-1]]


def test_no_preset_gives_more_bytes_than_the_one_before_it(table_heavy) -> None:
    _, reports, _ = table_heavy
    sizes = [weights(reports[preset]) for preset in ORDER]
    assert sizes == sorted(sizes, reverse=True)
    before = sum(line.bytes_before for line in reports["small"].plan.lines)
    # Of 11,500 rows 2,022 are looked up twice or more: int8 rows alone give 3.2 times.
    assert before / sizes[ORDER.index("fast")] < 4
    assert before / sizes[ORDER.index("small")] > 9
    assert before / sizes[ORDER.index("smallest")] > 9


@pytest.mark.parametrize("preset", ["small", "smallest"])
def test_rows_that_training_hardly_looks_up_share_one_at_no_loss(table_heavy, preset) -> None:
    _, reports, _ = table_heavy
    report = reports[preset]
    assert report.stages[1].step == "prune_rows"
    lines = [
        line for line in report.plan.lines if line.role == "table" and "prune_rows" in line.steps
    ]
    assert any("kept_rows_by_lookups" in codes_of(line.reasons) for line in lines)
    assert [step.kind for step in report.recipe].count("prune_rows") == 1
    assert "prune_rows" not in report.idle_reasons  # what is not needed is not reported
    # 3,200 test rows: the interval of such a change is about 0.01 wide to each side.
    assert loss_on_test_rows(report) < 0.005


def budget_remarks(report: RecipeRun) -> list[Reason]:
    """What a report says about the quality budget."""
    outcomes = {"quality_lost", "quality_gained", "quality_over_budget"}
    return [remark for remark in report.remark_reasons if remark.code in outcomes]


def test_the_budget_and_what_was_lost_of_it_are_in_the_report(table_heavy) -> None:
    _, reports, _ = table_heavy
    for preset in ("small", "smallest"):
        (remark,) = budget_remarks(reports[preset])
        assert remark.fields["budget"] == DEFAULT_BUDGET
        assert remark.fields["metric"] == "auc"
        with_code([remark], "budget_of_preset")  # of "small" where "smallest" fell back to it
    for preset in ("safe", "fast"):
        assert not budget_remarks(reports[preset])


def test_what_explain_foresees_is_kept_to(table_heavy) -> None:
    _, reports, explained = table_heavy
    for preset in ORDER:
        found = explained[preset]
        assert found.bytes_between is not None
        least, most = found.bytes_between
        assert least <= weights(reports[preset]) <= most
        if preset in ("safe", "fast"):
            assert least == most == found.steps[-1].bytes
            assert found.budget is None
        else:
            assert least < most
            assert found.budget == DEFAULT_BUDGET


@pytest.mark.parametrize(
    "left",
    [
        ("train", "test"),
        pytest.param(("calibration", "validation", "test"), marks=pytest.mark.nightly),
    ],
    ids=len,
)
def test_presets_work_without_rows_and_say_what_was_left_out(
    table_heavy, left, tmp_path, monkeypatch
) -> None:
    draft, _, _ = table_heavy
    few = tmp_path / "draft"
    shutil.copytree(draft, few)
    document = json.loads((few / "model.json").read_text())
    document["name"] = "few"
    shutil.copy(few / "train.parquet", few / "calibration.parquet")
    document["data"] = {split: f"{split}.parquet" for split in left}
    (few / "model.json").write_text(json.dumps(document))
    use_home(monkeypatch, tmp_path / "recpress")
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "examples.table_heavy")
    pack(few)
    order = Order(model="few", preset="small", limits=(ANY,))
    report = run_recipe(order)
    why = report.idle_reasons["prune_rows (step 1 of the recipe)"]
    if "validation" in left:
        with_code([why], "data_missing", step="prune_rows", missing=("train",))
    else:
        with_code([why], "pruning_not_judged", splits=left)
    steps = {step for line in report.plan.lines for step in line.steps}
    # Without validation rows int4 is not judged; with them it may cost more than the budget.
    assert steps & ({"rowwise_int4", "rowwise_int8"} if "validation" in left else {"rowwise_int4"})
    explain(order)


@pytest.mark.parametrize("preset", ["small", pytest.param("smallest", marks=pytest.mark.nightly)])
def test_a_budget_that_nothing_fits_leaves_what_the_earlier_preset_does(
    table_heavy, monkeypatch, preset
) -> None:
    """Every cut counts as over the budget: the result has the bytes of preset 'fast'."""
    _, reports, _ = table_heavy
    lost = Reason("over_budget", loss=1.0, metric="auc", budget=DEFAULT_BUDGET)
    monkeypatch.setattr("flows.recipe.over_budget", lambda *_: lost)
    order = Order(model="tableheavy", preset=preset, limits=(ANY,))
    report = run_recipe(order)
    assert weights(report) <= weights(reports["fast"])
    assert "rowwise_int8" in {step for line in report.plan.lines for step in line.steps}


def test_orders_with_different_budgets_are_different_orders(table_heavy) -> None:
    from flows.resolve import order_digest
    from tasks.bundles.bundle_ref import find

    subject = find("tableheavy")
    orders = [
        Order(model="tableheavy", preset="small", limits=(ANY,), budget=budget)
        for budget in (None, DEFAULT_BUDGET, 0.01, 0.0)
    ]
    digests = [order_digest(order, subject, {}) for order in orders]
    assert digests[0] == digests[1]  # the default, written out
    assert len(set(digests)) == 3


def test_a_unit_that_a_target_refuses_is_excluded_and_the_recipe_runs_again(
    table_heavy: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is injected: no network here has a unit that only the graph shows to be one."""
    from compressors.errors.compression import AuditFailed
    from compressors.lower import export

    real: Callable[..., None] = export._require_packed

    def refuse_one_layer(packed: Any, graph: Any, target: Any) -> None:
        if any(weight.module == "layers.0" for weight in packed):
            raise AuditFailed(
                "weight_replaced", target=target, unit="layers.0", expected=1, format="static_int8"
            ).caused_by("layers.0")
        real(packed, graph, target)

    monkeypatch.setattr(export, "_require_packed", refuse_one_layer)
    order = Order(model="tableheavy", preset="fast", limits=(ANY,))
    report = run_without_prefect(order).finished.report
    line = report.plan.of("layers.0")
    assert line is not None
    assert (line.format, line.steps) == ("float32", ())
    why = with_code(line.reasons, "skipped", step="static_int8").fields["why"]
    assert isinstance(why, Reason)
    assert why.code == "not_servable"
    assert "The onnxruntime graph has another tensor" in str(why)
    skipped = Reason("unit_skipped", step="static_int8", unit="layers.0", why=why)
    assert skipped in report.plan.reasons
    assert str(skipped) in report.remarks
    other = report.plan.of("layers.1")
    assert other is not None
    assert other.format == "static_int8"
    custom = Order(model="tableheavy", preset="custom", steps=(StaticInt8(),), limits=(ANY,))
    with raises_code(AuditFailed, "weight_replaced", unit="layers.0"):
        run_without_prefect(custom)
