"""The presets, on a model that consists mostly of tables with rarely used rows.

A home is the folder with everything that recpress stores (``RECPRESS_HOME``). A draft is the folder
of a bundle before it is packed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from error_codes import raises_code
from orders import RecipeRun, run_recipe, run_without_prefect, use_home
from reason_codes import codes_of, require_reason

from compressors.contracts import Limit
from compressors.contracts.reasons import Reason
from compressors.quantize.dense.static_int8 import StaticInt8
from examples.table_heavy import SMALL, write_draft
from flows.explain import Explanation, explain
from flows.order import Order
from flows.presets import PRESETS, PREVIOUS_PRESET
from flows.terms import DEFAULT_BUDGET, Preset
from tasks.bundles.packing import pack

LOOSE_LIMIT = Limit.parse("auc vs baseline >= -0.4")
PRESET_SEQUENCE: tuple[Preset, ...] = ("safe", "fast", "small", "smallest")


def weight_bytes(report: RecipeRun) -> int:
    """Return the bytes of all weights of a result."""
    return sum(line.bytes_after for line in report.plan.lines)


def loss_on_test_rows(report: RecipeRun) -> float:
    """Return the AUC of the untouched model minus that of the result, on test rows."""
    return report.stages[0].quality.point - report.stages[-1].quality.point


PresetResults = tuple[Path, dict[Preset, RecipeRun], dict[Preset, Explanation]]
"""The draft's folder, and the result and the explanation of each preset."""


@pytest.fixture(scope="module")
def session_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PresetResults]:
    """Explain and run each preset in a new home; return the home and the results."""
    home = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home / "recpress")
        patch.setenv("RECPRESS_ALLOWED_MODULES", "examples.table_heavy")
        draft = write_draft(home / "draft", SMALL)  # the smaller one of two sizes of the example
        pack(draft)
        reports, explained = {}, {}
        for preset in PRESET_SEQUENCE:
            order = Order(model="tableheavy", preset=preset, limits=(LOOSE_LIMIT,))
            explained[preset] = explain(order)
            reports[preset] = run_recipe(order)
    return home, (draft, reports, explained)


@pytest.fixture
def table_heavy(
    session_results: tuple[Path, PresetResults], monkeypatch: pytest.MonkeyPatch
) -> PresetResults:
    """The results of the presets; sets the environment of this test to their home."""
    home, results = session_results
    use_home(monkeypatch, home / "recpress")
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "examples.table_heavy")
    return results


def test_previous_preset_is_defined_for_all_presets_but_the_first() -> None:
    assert set(PRESETS) == set(PRESET_SEQUENCE)
    previous = [PREVIOUS_PRESET.get(preset) for preset in PRESET_SEQUENCE]
    assert previous == [None, *PRESET_SEQUENCE[:-1]]


def test_each_preset_results_in_no_more_bytes_than_the_previous_preset(table_heavy) -> None:
    _, reports, _ = table_heavy
    sizes = [weight_bytes(reports[preset]) for preset in PRESET_SEQUENCE]
    assert sizes == sorted(sizes, reverse=True)
    original_bytes = sum(line.bytes_before for line in reports["small"].plan.lines)
    # int8 rows alone are 3.2 times smaller than float32 rows: each field has a table of width 16
    # and one of width 1, so 64 + 4 bytes per row become (16 + 2) + (1 + 2), with float16 scales.
    # "small" and "smallest" also replace rows that training looks up at most once by one shared
    # row. Only 2,022 of 11,500 rows remain, so tables are 18 times smaller, dense layers less.
    assert original_bytes / sizes[PRESET_SEQUENCE.index("fast")] < 4
    assert original_bytes / sizes[PRESET_SEQUENCE.index("small")] > 9
    assert original_bytes / sizes[PRESET_SEQUENCE.index("smallest")] > 9


@pytest.mark.parametrize("preset", ["small", "smallest"])
def test_small_and_smallest_share_rare_rows_without_a_significant_loss(table_heavy, preset) -> None:
    """Rarely used rows of a table are replaced by one shared row (the step ``prune_rows``)."""
    _, reports, _ = table_heavy
    report = reports[preset]
    assert report.stages[1].step == "prune_rows"
    lines = [
        line for line in report.plan.lines if line.role == "table" and "prune_rows" in line.steps
    ]
    assert any("kept_rows_by_lookups" in codes_of(line.reasons) for line in lines)
    assert [step.kind for step in report.recipe].count("prune_rows") == 1
    # The preset would try a milder "prune_rows" only if the first one exceeded the budget.
    assert "prune_rows" not in report.idle_reasons
    # With 3,200 test rows, the 95 % interval of such a loss extends about 0.01 to each side.
    assert loss_on_test_rows(report) < 0.005


def budget_remarks(report: RecipeRun) -> list[Reason]:
    """Return the remarks of a report about the quality budget."""
    outcomes = {"quality_lost", "quality_gained", "quality_over_budget"}
    return [remark for remark in report.remark_reasons if remark.code in outcomes]


def test_report_of_small_and_smallest_states_the_budget_and_the_loss(table_heavy) -> None:
    _, reports, _ = table_heavy
    for preset in ("small", "smallest"):
        (remark,) = budget_remarks(reports[preset])
        assert remark.fields["budget"] == DEFAULT_BUDGET
        assert remark.fields["metric"] == "auc"
        # If "smallest" uses the result of "small", this is the remark of "small".
        require_reason([remark], "budget_of_preset")
    for preset in ("safe", "fast"):
        assert not budget_remarks(reports[preset])


def test_bytes_of_a_preset_are_within_the_bounds_of_explain(table_heavy) -> None:
    _, reports, explained = table_heavy
    for preset in PRESET_SEQUENCE:
        explanation = explained[preset]
        assert explanation.bytes_between is not None
        lower_bound, upper_bound = explanation.bytes_between
        assert lower_bound <= weight_bytes(reports[preset]) <= upper_bound
        if preset in ("safe", "fast"):
            assert lower_bound == upper_bound == explanation.steps[-1].bytes
            assert explanation.budget is None
        else:
            assert lower_bound < upper_bound
            assert explanation.budget == DEFAULT_BUDGET


@pytest.mark.parametrize(
    "splits",
    [
        ("train", "test"),
        pytest.param(("calibration", "validation", "test"), marks=pytest.mark.nightly),
    ],
    ids=len,
)
def test_preset_without_some_splits_skips_pruning_with_a_reason(
    table_heavy, splits, tmp_path, monkeypatch
) -> None:
    draft, _, _ = table_heavy
    copied_draft = tmp_path / "draft"
    shutil.copytree(draft, copied_draft)
    document = json.loads((copied_draft / "model.json").read_text())
    document["name"] = "few"
    shutil.copy(copied_draft / "train.parquet", copied_draft / "calibration.parquet")
    document["data"] = {split: f"{split}.parquet" for split in splits}
    (copied_draft / "model.json").write_text(json.dumps(document))
    use_home(monkeypatch, tmp_path / "recpress")
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "examples.table_heavy")
    pack(copied_draft)
    order = Order(model="few", preset="small", limits=(LOOSE_LIMIT,))
    report = run_recipe(order)
    reason = report.idle_reasons["prune_rows (step 1 of the recipe)"]
    if "validation" in splits:
        require_reason([reason], "data_missing", step="prune_rows", missing=("train",))
    else:
        require_reason([reason], "pruning_not_judged", splits=splits)
    steps = {step for line in report.plan.lines for step in line.steps}
    # Without validation rows the budget cannot exclude int4; with them int4 may exceed it.
    assert steps & (
        {"rowwise_int4", "rowwise_int8"} if "validation" in splits else {"rowwise_int4"}
    )
    explain(order)


@pytest.mark.parametrize("preset", ["small", pytest.param("smallest", marks=pytest.mark.nightly)])
def test_preset_whose_pruning_is_over_the_budget_has_at_most_the_bytes_of_fast(
    table_heavy, monkeypatch, preset
) -> None:
    """All pruning counts as over the budget, so the result is at most as large as that of fast.

    Every other result counts as over the budget, too. But the last option of some choices, such as
    row-wise int8 for tables, is not compared with the default budget of a preset.
    """
    _, reports, _ = table_heavy
    over_budget = Reason("over_budget", loss=1.0, metric="auc", budget=DEFAULT_BUDGET)
    monkeypatch.setattr("flows.recipe.find_budget_violation", lambda *_: over_budget)
    order = Order(model="tableheavy", preset=preset, limits=(LOOSE_LIMIT,))
    report = run_recipe(order)
    assert weight_bytes(report) <= weight_bytes(reports["fast"])
    assert "rowwise_int8" in {step for line in report.plan.lines for step in line.steps}


def test_order_digest_differs_for_other_budgets(table_heavy) -> None:
    from flows.resolve import order_digest
    from tasks.bundles.bundle_ref import find_bundle

    bundle = find_bundle("tableheavy")
    orders = [
        Order(model="tableheavy", preset="small", limits=(LOOSE_LIMIT,), budget=budget)
        for budget in (None, DEFAULT_BUDGET, 0.01, 0.0)
    ]
    digests = [order_digest(order, bundle, {}) for order in orders]
    assert digests[0] == digests[1]  # None means the default
    assert len(set(digests)) == 3


@pytest.mark.slow
def test_unit_that_cannot_be_lowered_is_excluded_and_the_preset_is_applied_again(
    table_heavy: PresetResults, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is injected: no test network has a unit that fails only in the graph.

    ``_require_packed`` checks that the graph has the stored tensors of each compressed unit.
    """
    from compressors.errors.compression import AuditFailed
    from compressors.lower import export

    require_packed: Callable[..., None] = export._require_packed

    def refuse_one_layer(packed: Any, graph: Any, target: Any) -> None:
        if any(weight.module == "layers.0" for weight in packed):
            raise AuditFailed(
                "weight_replaced", target=target, unit="layers.0", expected=1, format="static_int8"
            ).name_cause("layers.0")
        require_packed(packed, graph, target)

    monkeypatch.setattr(export, "_require_packed", refuse_one_layer)
    order = Order(model="tableheavy", preset="fast", limits=(LOOSE_LIMIT,))
    report = run_without_prefect(order).finished.report
    line = report.plan.of("layers.0")
    assert line is not None
    assert (line.format, line.steps) == ("float32", ())
    reason = require_reason(line.reasons, "skipped", step="static_int8").fields["why"]
    assert isinstance(reason, Reason)
    assert reason.code == "not_servable"
    assert "The onnxruntime graph does not contain" in str(reason)
    skipped = Reason("unit_skipped", step="static_int8", unit="layers.0", why=reason)
    assert skipped in report.plan.reasons
    assert str(skipped) in report.remarks
    other = report.plan.of("layers.1")
    assert other is not None
    assert other.format == "static_int8"
    custom = Order(
        model="tableheavy", preset="custom", steps=(StaticInt8(),), limits=(LOOSE_LIMIT,)
    )
    with raises_code(AuditFailed, "weight_replaced", unit="layers.0"):
        run_without_prefect(custom)
