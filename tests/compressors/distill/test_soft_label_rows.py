"""Training on rows with and without labels, and the mean predictions of several teachers."""

from pathlib import Path

import hypothesis.strategies as st
import models
import numpy as np
import pytest
import torch
from error_codes import raises_code, raises_value_error
from hypothesis import given
from models import ATTENTION, BENCH_ROWS, QUICKLY, RANKER, Reference
from reason_codes import codes_of, with_code
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressors.contracts import Bench, Split
from compressors.contracts.reasons import Reason
from compressors.core.batches import JoinedRows, Rows, batches
from compressors.core.dry_run import dry_run
from compressors.core.runner import run
from compressors.core.state.module_state import mapped
from compressors.distill.distill import Distill
from compressors.distill.soft_labels import mean_predictions, soft_label_loss, soft_label_rows
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import RowsMissing
from compressors.task_kinds.loss import hard_loss, shuffled_rows


def with_traffic(reference: Reference, folder: Path, label: float = 1.0) -> Bench:
    """A bench with rows of traffic, all with one label, and the teacher's scores of them."""
    bench = reference.bench(folder)
    place = folder / f"traffic-{label}"
    split = models.prepared(reference.signature, reference.rows_of_tables(), place, 21)
    tensors = load_file(place / "data.safetensors")
    tensors["@label"] = torch.full((BENCH_ROWS,), label)
    save_file(tensors, place / "data.safetensors")
    (rows,) = batches(split, reference.signature, BENCH_ROWS)
    (place / "soft").mkdir()
    scores = reference._opposite(rows.inputs)
    save_file({"score": scores}, place / "soft" / "data.safetensors")
    soft = Split(path=str(place / "soft"), sha256="3" * 64, rows=BENCH_ROWS)
    return bench.model_copy(update={"traffic": split, "traffic_soft_labels": soft})


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [RANKER, ATTENTION], ids=["jagged", "lists"])
def test_joined_rows_answer_as_each_part_does(reference, tmp_path):
    bench = with_traffic(reference, tmp_path)
    labelled, traffic = (
        Rows(bench.train, reference.signature),
        Rows(bench.traffic, reference.signature),
    )
    both = JoinedRows(labelled, traffic)
    model = reference.model().module
    drawn = torch.tensor([BENCH_ROWS + 3, 5, 0, BENCH_ROWS, 7])
    ordered = both.in_order(drawn)
    assert ordered.tolist() == [5, 0, 7, BENCH_ROWS + 3, BENCH_ROWS]
    taken = both.take(ordered)
    with torch.no_grad():
        found = model(**taken.inputs).reshape(-1)
        first = model(**labelled.take(torch.tensor([5, 0, 7])).inputs).reshape(-1)
        second = model(**traffic.take(torch.tensor([3, 0])).inputs).reshape(-1)
    torch.testing.assert_close(found, torch.cat([first, second]))
    assert torch.equal(taken.label[:3], labelled.label[[5, 0, 7]])
    assert taken.label[3:].isnan().all()


def test_a_batch_of_one_part_alone_is_that_part(tmp_path):
    bench = with_traffic(RANKER, tmp_path)
    both = JoinedRows(Rows(bench.train, RANKER.signature), Rows(bench.traffic, RANKER.signature))
    model = RANKER.model().module
    for numbers in (torch.arange(4), torch.arange(BENCH_ROWS, BENCH_ROWS + 4)):
        batch = both.take(numbers)
        assert len(model(**batch.inputs)) == len(batch.label) == 4


def test_traffic_lists_stay_separate_from_training_lists_with_equal_numbers(tmp_path):
    bench = with_traffic(ATTENTION, tmp_path)
    both = soft_label_rows(bench, "both", "distill")
    known, seen = both.group[:BENCH_ROWS], both.group[BENCH_ROWS:]
    assert not set(known.tolist()) & set(seen.tolist())
    assert len(seen.unique()) == BENCH_ROWS // 8  # as the file has it
    for numbers in shuffled_rows(both, ATTENTION.signature, 20, seed=1):
        nan = both.label[numbers].isnan()
        inside = both.group[numbers]
        assert all(len(nan[inside == group].unique()) == 1 for group in inside.unique())


# --- what is learned -------------------------------------------------------------------------


def likeness(model: torch.nn.Module, bench: Bench, reference: Reference) -> float:
    """The correlation of a model's scores with the teacher's on validation rows."""
    (held,) = batches(bench.validation, reference.signature, BENCH_ROWS)
    with torch.no_grad():
        both = [reference._opposite(held.inputs), model(**held.inputs).reshape(-1)]
    return float(torch.corrcoef(torch.stack(both))[0, 1])


def test_student_learns_from_traffic_alone_and_ignores_its_labels(tmp_path):
    step = Distill(rows="traffic", soft_share=1, training=QUICKLY)
    results = []
    for label in (1.0, 0.0):
        bench = with_traffic(RANKER, tmp_path / str(label), label)
        bench = bench.model_copy(update={"train": None, "soft_labels": None})
        result = run(step, RANKER.model(), bench, tmp_path / str(label) / "out")
        results.append(mapped(tmp_path / str(label) / "out"))
        assert likeness(result.module, bench, RANKER) > 0.5  # it was -1
        reasons = result.plan.of("hidden").reasons
        assert codes_of(reasons)[:2] == ["trained_on_traffic", "trained_to_epoch"]
        with_code(reasons, "trained_on_traffic", traffic=BENCH_ROWS)
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("reference", [RANKER, ATTENTION], ids=["clicks", "lists"])
def test_labels_count_where_there_are_some_and_only_there(reference, tmp_path):
    """The labels' part of the loss is that of the labelled rows of the batch alone."""
    bench = with_traffic(reference, tmp_path)
    rows = soft_label_rows(bench, "both", "distill")
    loss = soft_label_loss(bench, 0.25, 1.0, "distill", rows="both")
    only = soft_label_loss(bench, 1.0, 1.0, "distill", rows="both")
    numbers = torch.arange(BENCH_ROWS - 16, BENCH_ROWS + 24)
    batch = rows.take(numbers)
    with torch.no_grad():
        output = reference.model().module(**batch.inputs).reshape(-1)
    known = Rows(bench.train, reference.signature).take(numbers[:16])
    hard = hard_loss(reference.signature, output[:16], known)
    expected = 0.25 * only(output, batch, numbers) + 0.75 * hard
    torch.testing.assert_close(loss(output, batch, numbers), expected)
    traffic = rows.take(numbers[16:])
    torch.testing.assert_close(
        loss(output[16:], traffic, numbers[16:]), 0.25 * only(output[16:], traffic, numbers[16:])
    )


def test_a_student_of_both_is_planned_and_trained_on_both(tmp_path):
    bench = with_traffic(RANKER, tmp_path)
    step = Distill(rows="both", training=QUICKLY)
    foreseen = dry_run(step, RANKER.model(), bench).plan
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    assert [line.format for line in result.plan.lines] == [line.format for line in foreseen.lines]
    both = Reason("trained_on_both", step="distill", rows=96, traffic=96)
    assert foreseen.of("hidden").reasons == (both,)
    reasons = result.plan.of("hidden").reasons
    assert reasons[0] == both
    assert reasons[1].code == "trained_to_epoch"
    assert likeness(result.module, bench, RANKER) > 0.5


def test_without_rows_of_traffic_nothing_is_learned_from_them(tmp_path):
    step = Distill(rows="traffic", soft_share=1, training=QUICKLY)
    missing = ("traffic", "traffic_soft_labels")
    with raises_code(NothingToCompress, "rows_missing", missing=missing):
        run(step, RANKER.model(), RANKER.bench(tmp_path), tmp_path / "out")
    with raises_code(RowsMissing, "train_rows_missing"):
        soft_label_rows(RANKER.bench(tmp_path), "both", "distill")


def test_click_lists_stay_whole_where_lists_are_compared(tmp_path, monkeypatch):
    """RANKER has no groups of its own; here three rows make one."""
    signature = RANKER.signature.model_copy(update={"group": "user"})
    bench = RANKER.bench(tmp_path / "data").model_copy(update={"signature": signature})
    place = Path(bench.train.path) / "data.safetensors"
    tensors = load_file(place)
    tensors["@group"] = torch.arange(BENCH_ROWS) % 32
    save_file(tensors, place)
    for loss, whole in (("listwise", True), ("pointwise", False)):
        seen = []

        def keep(self, rows, seen=seen, take=Rows.take):
            seen.append(rows)
            return take(self, rows)

        monkeypatch.setattr(Rows, "take", keep)
        how = QUICKLY.model_copy(update={"epochs": 1})
        run(Distill(loss=loss, training=how), RANKER.model(), bench, tmp_path / loss)
        monkeypatch.undo()
        counts = [torch.unique(rows % 32, return_counts=True)[1] for rows in seen if len(rows) > 8]
        assert bool((torch.cat(counts) == 3).all()) == whole


# --- several teachers ------------------------------------------------------------------------

logits = st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3)


@given(st.lists(logits, min_size=1, max_size=4))
def test_teachers_are_averaged_as_logits_in_any_order(made):
    held = [torch.tensor(scores) for scores in made]
    found = mean_predictions(held, "logit")
    np.testing.assert_allclose(found, np.mean(made, axis=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean_predictions(held[::-1], "logit"), found)
    given_as = [torch.sigmoid(scores) for scores in held]
    of_chances = mean_predictions(given_as, "probability")
    # float32 holds 1 - p of a logit of 10 to 1e-3 of itself.
    torch.testing.assert_close(torch.logit(of_chances), found, rtol=2e-2, atol=2e-2)


def test_mean_of_one_teachers_predictions_is_the_same_tensor():
    probabilities = torch.tensor([0.1, 1.0, 0.0])
    assert mean_predictions([probabilities], "probability") is probabilities


def test_certain_teachers_give_no_infinite_mean():
    probabilities = [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])]
    found = mean_predictions(probabilities, "probability")
    assert found.isfinite().all()
    assert 0 < float(found[0]) < 0.5 < float(found[1]) < 1


def test_the_plan_says_how_many_models_taught(tmp_path):
    bench = RANKER.bench(tmp_path)
    other = {"uri": "file:///a", "sha256": "4" * 64, "bytes": 1}
    bench = Bench.model_validate({**dict(bench), "teachers": [other, other]})
    plan = dry_run(Distill(), RANKER.model(), bench).plan
    assert codes_of(plan.of("hidden").reasons) == ["trained_on_rows", "several_teachers"]
    with_code(plan.of("hidden").reasons, "several_teachers", teachers=3)


# --- orders that contradict themselves -------------------------------------------------------


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
def test_settings_that_contradict_each_other_are_refused(fields, code):
    with raises_value_error(code):
        Distill(**fields)


def test_shares_of_probabilities_need_probabilities(tmp_path):
    step = Distill(loss="calibrated_listwise")
    with raises_code(NothingToCompress, "loss_without_probability"):
        dry_run(step, ATTENTION.model(), ATTENTION.bench(tmp_path))


def test_every_loss_trains(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    found: dict[str, Tensor] = {}
    for loss in ("pointwise", "margin", "listwise", "rankdistil", "calibrated_listwise"):
        step = Distill(loss=loss, soft_share=1, training=QUICKLY)
        result = run(step, RANKER.model(), bench, tmp_path / loss)
        found[loss] = result.module.hidden.weight
        # It was -1; a loss on the order of the top alone leaves the rows below it free.
        assert likeness(result.module, bench, RANKER) > (0 if loss == "rankdistil" else 0.3), loss
    assert len({tuple(weight.flatten().tolist()) for weight in found.values()}) == len(found)
