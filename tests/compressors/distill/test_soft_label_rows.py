"""Training on rows with and without labels, and the mean predictions of several teachers.

Traffic rows are logged requests, which have no labels. ``soft_share`` is the weight of the
teacher's loss; the loss on labels has the rest. A list is the rows of one group, such as the items
of one query; a batch contains whole lists if the loss compares rows of a list.

The networks are those of ``models.py``: ``RANKER`` predicts clicks and has jagged inputs;
``ATTENTION`` ranks lists of eight rows. Each split of their benches has 96 rows (``BENCH_ROWS``).
"""

from pathlib import Path

import hypothesis.strategies as st
import models
import numpy as np
import pytest
import torch
from error_codes import raises_code, raises_value_error
from hypothesis import given
from models import ATTENTION, BENCH_ROWS, RANKER, SHORT_TRAINING, Reference
from reason_codes import codes_of, require_reason
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressors.contracts import Bench, Split
from compressors.contracts.reasons import Reason
from compressors.core.batches import JoinedRows, Rows, batches
from compressors.core.dry_run import dry_run
from compressors.core.runner import run
from compressors.core.state.module_state import map_tensors
from compressors.distill.distill import PROBE_ROWS, Distill
from compressors.distill.soft_labels import mean_predictions, soft_label_loss, soft_label_rows
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import RowsMissing
from compressors.task_kinds.loss import hard_loss, shuffled_rows


def bench_with_traffic(reference: Reference, folder: Path, label: float = 1.0) -> Bench:
    """A bench with traffic rows, which have no labels, and the teacher's scores for them.

    In the file, the label of every traffic row is ``label``, which training must ignore.
    """
    bench = reference.bench(folder)
    folder_of_traffic = folder / f"traffic-{label}"
    split = models.write_split(
        reference.signature, reference.rows_of_tables(), folder_of_traffic, seed=21
    )
    tensors = load_file(folder_of_traffic / "data.safetensors")
    tensors["@label"] = torch.full((BENCH_ROWS,), label)
    save_file(tensors, folder_of_traffic / "data.safetensors")
    (rows,) = batches(split, reference.signature, BENCH_ROWS)
    (folder_of_traffic / "soft").mkdir()
    scores = reference.label_scores(rows.inputs)
    save_file({"score": scores}, folder_of_traffic / "soft" / "data.safetensors")
    soft = Split(path=str(folder_of_traffic / "soft"), sha256="3" * 64, rows=BENCH_ROWS)
    return bench.model_copy(update={"traffic": split, "traffic_soft_labels": soft})


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [RANKER, ATTENTION], ids=["jagged", "lists"])
def test_predictions_of_joined_rows_equal_the_predictions_of_each_part(reference, tmp_path):
    bench = bench_with_traffic(reference, tmp_path)
    labelled, traffic = (
        Rows(bench.train, reference.signature),
        Rows(bench.traffic, reference.signature),
    )
    joined = JoinedRows(labelled, traffic)
    model = reference.model().module
    row_numbers = torch.tensor([BENCH_ROWS + 3, 5, 0, BENCH_ROWS, 7])
    row_numbers_in_order = joined.order_rows(row_numbers)
    assert row_numbers_in_order.tolist() == [5, 0, 7, BENCH_ROWS + 3, BENCH_ROWS]
    batch = joined.take(row_numbers_in_order)
    with torch.no_grad():
        predictions = model(**batch.inputs).reshape(-1)
        first = model(**labelled.take(torch.tensor([5, 0, 7])).inputs).reshape(-1)
        second = model(**traffic.take(torch.tensor([3, 0])).inputs).reshape(-1)
    torch.testing.assert_close(predictions, torch.cat([first, second]))
    assert torch.equal(batch.label[:3], labelled.label[[5, 0, 7]])
    assert batch.label[3:].isnan().all()


def test_a_batch_with_rows_of_one_part_only_has_the_rows_of_that_part(tmp_path):
    bench = bench_with_traffic(RANKER, tmp_path)
    joined = JoinedRows(Rows(bench.train, RANKER.signature), Rows(bench.traffic, RANKER.signature))
    model = RANKER.model().module
    for row_numbers in (torch.arange(4), torch.arange(BENCH_ROWS, BENCH_ROWS + 4)):
        batch = joined.take(row_numbers)
        assert len(model(**batch.inputs)) == len(batch.label) == 4


def test_traffic_lists_stay_separate_from_training_lists_with_equal_numbers(tmp_path):
    bench = bench_with_traffic(ATTENTION, tmp_path)
    joined = soft_label_rows(bench, rows="both", kind="distill")
    training_lists, traffic_lists = joined.group[:BENCH_ROWS], joined.group[BENCH_ROWS:]
    assert not set(training_lists.tolist()) & set(traffic_lists.tolist())
    assert len(traffic_lists.unique()) == BENCH_ROWS // 8  # each list in the file has 8 rows
    for row_numbers in shuffled_rows(joined, ATTENTION.signature, 20, seed=1):
        is_unlabelled = joined.label[row_numbers].isnan()
        groups = joined.group[row_numbers]
        assert all(len(is_unlabelled[groups == group].unique()) == 1 for group in groups.unique())


# --- training on labelled rows and traffic ---------------------------------------------------


def correlation_with_teacher(model: torch.nn.Module, bench: Bench, reference: Reference) -> float:
    """The correlation of a model's scores with the teacher's on validation rows.

    The teacher's scores, ``label_scores``, are the opposite of the scores before training.
    """
    (batch,) = batches(bench.validation, reference.signature, BENCH_ROWS)
    with torch.no_grad():
        scores = [reference.label_scores(batch.inputs), model(**batch.inputs).reshape(-1)]
    return float(torch.corrcoef(torch.stack(scores))[0, 1])


def test_student_learns_from_the_split_traffic_without_using_its_labels(tmp_path):
    step = Distill(rows="traffic", soft_share=1, training=SHORT_TRAINING)
    results = []
    for label in (1.0, 0.0):
        bench = bench_with_traffic(RANKER, tmp_path / str(label), label)
        bench = bench.model_copy(update={"train": None, "soft_labels": None})
        result = run(step, RANKER.model(), bench, tmp_path / str(label) / "out")
        results.append(map_tensors(tmp_path / str(label) / "out"))
        assert correlation_with_teacher(result.module, bench, RANKER) > 0.5  # -1 before training
        reasons = result.plan.of("hidden").reasons
        assert codes_of(reasons)[:2] == ["trained_on_traffic", "trained_to_epoch"]
        require_reason(reasons, "trained_on_traffic", traffic=BENCH_ROWS)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("reference", [RANKER, ATTENTION], ids=["clicks", "lists"])
def test_the_label_loss_uses_only_labelled_rows(reference, tmp_path):
    """The batch also has traffic rows; the loss on labels is a mean over the labelled rows."""
    bench = bench_with_traffic(reference, tmp_path)
    rows = soft_label_rows(bench, rows="both", kind="distill")
    loss, teacher_loss_only = (
        soft_label_loss(bench, soft_share, temperature=1.0, kind="distill", rows="both")
        for soft_share in (0.25, 1.0)
    )
    row_numbers = torch.arange(BENCH_ROWS - 16, BENCH_ROWS + 24)
    batch = rows.take(row_numbers)
    with torch.no_grad():
        output = reference.model().module(**batch.inputs).reshape(-1)
    labelled = Rows(bench.train, reference.signature).take(row_numbers[:16])
    label_loss = hard_loss(reference.signature, output[:16], labelled)
    expected = 0.25 * teacher_loss_only(output, batch, row_numbers) + 0.75 * label_loss
    torch.testing.assert_close(loss(output, batch, row_numbers), expected)
    traffic = rows.take(row_numbers[16:])
    torch.testing.assert_close(
        loss(output[16:], traffic, row_numbers[16:]),
        0.25 * teacher_loss_only(output[16:], traffic, row_numbers[16:]),
    )


def test_distill_with_rows_both_trains_on_labelled_rows_and_traffic(tmp_path):
    bench = bench_with_traffic(RANKER, tmp_path)
    step = Distill(rows="both", training=SHORT_TRAINING)
    predicted = dry_run(step, RANKER.model(), bench).plan
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    assert [line.format for line in result.plan.lines] == [line.format for line in predicted.lines]
    reason = Reason("trained_on_both", step="distill", rows=BENCH_ROWS, traffic=BENCH_ROWS)
    assert predicted.of("hidden").reasons == (reason,)
    reasons = result.plan.of("hidden").reasons
    assert reasons[0] == reason
    assert reasons[1].code == "trained_to_epoch"
    assert correlation_with_teacher(result.module, bench, RANKER) > 0.5


def test_distill_without_traffic_rows_raises_nothing_to_compress(tmp_path):
    step = Distill(rows="traffic", soft_share=1, training=SHORT_TRAINING)
    missing = ("traffic", "traffic_soft_labels")
    with raises_code(NothingToCompress, "rows_missing", missing=missing):
        run(step, RANKER.model(), RANKER.bench(tmp_path), tmp_path / "out")
    with raises_code(RowsMissing, "traffic_rows_missing"):
        soft_label_rows(RANKER.bench(tmp_path), rows="both", kind="distill")


def test_batches_have_whole_groups_only_for_listwise_losses(tmp_path, monkeypatch):
    """The signature of RANKER has no group column; the test adds groups of three rows."""
    signature = RANKER.signature.model_copy(update={"group": "user"})
    bench = RANKER.bench(tmp_path / "data").model_copy(update={"signature": signature})
    file = Path(bench.train.path) / "data.safetensors"
    tensors = load_file(file)
    tensors["@group"] = torch.arange(BENCH_ROWS) % 32
    save_file(tensors, file)
    for loss, has_whole_lists in (("listwise", True), ("pointwise", False)):
        batches_taken = []

        def recording_take(self, rows, batches_taken=batches_taken, take=Rows.take):
            batches_taken.append(rows)
            return take(self, rows)

        monkeypatch.setattr(Rows, "take", recording_take)
        training = SHORT_TRAINING.model_copy(update={"epochs": 1})
        run(Distill(loss=loss, training=training), RANKER.model(), bench, tmp_path / loss)
        monkeypatch.undo()
        counts = [
            torch.unique(rows % 32, return_counts=True)[1]
            for rows in batches_taken
            if len(rows) > PROBE_ROWS  # without the forward pass before the training
        ]
        assert bool((torch.cat(counts) == 3).all()) == has_whole_lists


# --- several teachers ------------------------------------------------------------------------

logits = st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3)


@given(st.lists(logits, min_size=1, max_size=4))
def test_mean_predictions_average_logits_independent_of_order(logits_of_teachers):
    tensors = [torch.tensor(scores) for scores in logits_of_teachers]
    predictions = mean_predictions(tensors, ("logit",))
    np.testing.assert_allclose(
        predictions, np.mean(logits_of_teachers, axis=0), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(mean_predictions(tensors[::-1], ("logit",)), predictions)
    probabilities = [torch.sigmoid(scores) for scores in tensors]
    mean_of_probabilities = mean_predictions(probabilities, ("probability",))
    # For a logit of 10, the rounding of p to float32 changes 1 - p by 1e-3 of its value.
    torch.testing.assert_close(
        torch.logit(mean_of_probabilities), predictions, rtol=2e-2, atol=2e-2
    )


def test_mean_of_one_teachers_predictions_is_the_same_tensor():
    probabilities = torch.tensor([0.1, 1.0, 0.0])
    assert mean_predictions([probabilities], ("probability",)) is probabilities


def test_mean_of_probabilities_zero_and_one_is_finite():
    probabilities = [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])]
    predictions = mean_predictions(probabilities, ("probability",))
    assert predictions.isfinite().all()
    assert 0 < float(predictions[0]) < 0.5 < float(predictions[1]) < 1


def test_the_plan_has_the_number_of_teachers(tmp_path):
    bench = RANKER.bench(tmp_path)
    other = {"uri": "file:///a", "sha256": "4" * 64, "bytes": 1}
    # ``teachers`` are those in addition to the first one.
    bench = Bench.model_validate({**dict(bench), "teachers": [other, other]})
    plan = dry_run(Distill(), RANKER.model(), bench).plan
    assert codes_of(plan.of("hidden").reasons) == ["trained_on_rows", "several_teachers"]
    require_reason(plan.of("hidden").reasons, "several_teachers", teachers=3)


# --- invalid settings, and every loss --------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"rows": "traffic"}, "traffic_without_labels"),
        ({"auxiliary": "hidden", "soft_share": 1}, "auxiliary_without_labels"),
        ({"loss": "margin", "temperature": 2}, "temperature_of_margin"),
        ({"dense": False}, "nothing_to_train"),
        (
            {"dense": False, "training": {"tables": True}, "student": {"width": 8}},
            "student_without_dense",
        ),
    ],
)
def test_contradicting_settings_raise_a_value_error(fields, code):
    with raises_value_error(code):
        Distill(**fields)


def test_calibrated_listwise_loss_without_probabilities_raises_nothing_to_compress(tmp_path):
    step = Distill(loss="calibrated_listwise")
    with raises_code(NothingToCompress, "loss_without_probability"):
        dry_run(step, ATTENTION.model(), ATTENTION.bench(tmp_path))


def test_training_with_each_loss_gives_a_different_student_close_to_the_teacher(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    weights: dict[str, Tensor] = {}
    for loss in ("pointwise", "margin", "listwise", "rankdistil", "calibrated_listwise"):
        step = Distill(loss=loss, soft_share=1, training=SHORT_TRAINING)
        result = run(step, RANKER.model(), bench, tmp_path / loss)
        weights[loss] = result.module.hidden.weight
        # The correlation before training is -1. rankdistil trains only the order of the top rows.
        assert correlation_with_teacher(result.module, bench, RANKER) > (
            0 if loss == "rankdistil" else 0.3
        ), loss
    assert len({tuple(weight.flatten().tolist()) for weight in weights.values()}) == len(weights)
