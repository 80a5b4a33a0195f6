"""Recipes that train and quantize: stages, the stored student, and steps that cannot be applied.

A stage is the untouched model or the model after an applied step. Skipped steps are in
``idle_reasons``. A draft is the folder that a user writes and ``pack`` stores as a bundle. A home
is the folder with everything that recpress stores (``RECPRESS_HOME``).

The model is ``ClickNet`` (``tests/draft_network.py``). Its argument ``hidden`` is the width of the
layer ``first``, and half of it the width of ``second``. ``accepted_order`` and ``session_order``
(``conftest.py``) are one order for this model with preset ``small``.
"""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from drafts import DENSE, ROWS, write_draft
from error_codes import raises_code
from orders import AcceptedOrder, RecipeRun, run_recipe, use_home
from reason_codes import codes_of, require_reason
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from compressors.contracts import Artifact, Limit
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.distill.training.settings import Training
from compressors.errors.orders import OrderRefused
from compressors.prune.dense.channels import Channels
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.order import Order
from infra.settings import load_settings
from tasks.bundles.loading import data_path, load_bundle
from tasks.bundles.packing import pack
from tasks.orchestration.workspace import local

LOOSE_LIMIT = Limit.parse("auc vs baseline >= -0.2")
TWO_EPOCHS = Training(epochs=2, patience=2, batch=256)
STEPS = (
    Distill(student={"hidden": 32}, training=TWO_EPOCHS),
    FineTune(training=TWO_EPOCHS),
    RowwiseInt8(),
)


@pytest.fixture(scope="module")
def recipe_run(session_order: AcceptedOrder) -> tuple[AcceptedOrder, RecipeRun]:
    """Run ``STEPS`` on the bundle of the accepted order, in its home."""
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, session_order.home)
        order = Order(model="clicks@1", preset="custom", steps=STEPS, limits=(LOOSE_LIMIT,))
        return session_order, run_recipe(order)


def auc_of(bundle: Artifact) -> float:
    """Return the AUC on the test rows, computed with scikit-learn."""
    loaded = load_bundle(bundle)
    rows = pq.read_table(data_path(loaded.manifest, "test"))
    tags = rows["tags"].combine_chunks()
    with torch.no_grad():
        scores = loaded.model.module(
            user=torch.tensor(rows["user"].to_numpy()),
            item=torch.tensor(rows["item"].to_numpy()),
            tags=torch.tensor(tags.values.to_numpy()),
            tags_offsets=torch.tensor(tags.offsets.to_numpy()[:-1].astype("int64")),
            dense=torch.stack(
                [torch.tensor(rows[f"d{index}"].to_numpy()) for index in range(DENSE)], dim=1
            ).float(),
        )
    return float(roc_auc_score(rows["label"].to_numpy(), scores.reshape(-1).numpy()))


def test_each_stage_reports_the_bytes_and_the_auc_of_its_bundle(
    recipe_run: tuple[AcceptedOrder, RecipeRun], accepted_order: AcceptedOrder
) -> None:
    _, report = recipe_run
    assert [stage.step for stage in report.stages] == [
        "as trained",
        *(step.kind for step in STEPS),
    ]
    for result in (report, accepted_order.result.finished.report):
        assert result.stages[0].bundle == result.source
        assert result.stages[-1].bundle == result.compressed
    for stage in report.stages:
        shards = local(stage.bundle).glob("*.safetensors")
        stored = [tensor for path in shards for tensor in load_file(path).values()]
        assert stage.bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)
        assert stage.quality.point == pytest.approx(auc_of(stage.bundle), abs=1e-6)
        assert stage.quality.rows == ROWS["test"]
    for before, after in zip(report.stages, report.stages[1:], strict=False):
        assert after.change is not None
        difference = after.quality.point - before.quality.point
        assert after.change.point == pytest.approx(difference, abs=1e-9)
        assert after.change.low <= after.change.point <= after.change.high
    assert report.stages[0].change is None


def test_student_is_stored_with_its_configuration_and_reasons(
    recipe_run: tuple[AcceptedOrder, RecipeRun], accepted_order: AcceptedOrder
) -> None:
    _, report = recipe_run
    loaded = load_bundle(report.compressed)
    assert loaded.manifest.network.architecture.config["hidden"] == 32
    assert loaded.model.module.first.out_features == 32
    line = report.plan.of("first")
    assert line is not None
    # "still_rising" (the metric improved in the last epoch) may differ between machines.
    assert codes_of(reason for reason in line.reasons if reason.code != "still_rising") == [
        "trained_on_rows",
        "smaller_in_student",
        "trained_to_epoch",
        "trained_on_rows",
        "trained_to_epoch",
    ]
    steps = [reason.fields["step"] for reason in line.reasons if reason.code == "trained_on_rows"]
    assert steps == ["distill", "fine_tune"]
    # outputs x inputs; the inputs are three embeddings of dimension 16 and four dense features
    require_reason(line.reasons, "smaller_in_student", before="64x52", after="32x52")
    assert line.bytes_after < line.bytes_before


def test_completed_recipe_leaves_no_progress_files(
    recipe_run: tuple[AcceptedOrder, RecipeRun], accepted_order: AcceptedOrder
) -> None:
    folder = load_settings().home / "progress"
    assert not list(folder.iterdir())


def test_preset_skips_steps_that_cannot_be_applied_with_a_reason(
    accepted_order: AcceptedOrder,
) -> None:
    """No channel can be pruned, since the width of ``second`` depends on ``hidden``, too."""
    report = accepted_order.result.finished.report
    # The preset has two options of "prune_rows": for rows looked up at most once, and for those
    # never looked up.
    pruning_steps = {f"prune_rows (step {number} of the recipe)" for number in (1, 2)}
    reasons = report.idle_reasons
    assert set(reasons) == {"channels", "distill", "fold", "rowwise_int4", *pruning_steps}
    # The draft's network is optimal for its synthetic data, so these lose more than the budget.
    for name in ("rowwise_int4", *pruning_steps):
        require_reason([reasons[name]], "over_budget", metric="auc", budget=0.001)
    assert reasons["channels"] == reasons["distill"]
    assert "'second' does not grow in proportion to hidden" in str(reasons["channels"])
    assert [stage.step for stage in report.stages] == ["as trained", "rowwise_int8", "static_int8"]
    assert {state for _, state in accepted_order.result.tasks} <= {"Completed", "Cached"}


def test_custom_step_that_cannot_be_applied_raises_an_error(accepted_order: AcceptedOrder) -> None:
    order = Order(model="clicks@1", preset="custom", steps=(Channels(),), limits=(LOOSE_LIMIT,))
    with raises_code(OrderRefused, "step_not_applicable") as caught:
        run_recipe(order)
    assert "does not grow in proportion to hidden" in str(caught.value.fields["reason"])


def test_custom_step_without_its_data_raises_an_error(
    work_folder: Path,
) -> None:
    rows = {split: count for split, count in ROWS.items() if split != "validation"}
    pack(write_draft(work_folder / "draft", name="few", rows=rows))
    order = Order(model="few", preset="custom", steps=STEPS[1:], limits=(LOOSE_LIMIT,))
    with raises_code(OrderRefused, "step_not_applicable") as caught:
        run_recipe(order)
    require_reason([caught.value.fields["reason"]], "data_missing", missing=("validation",))
