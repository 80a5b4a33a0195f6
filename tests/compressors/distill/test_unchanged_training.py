"""Steps that change nothing, such as training without improvement, report it in the plan.

``RANKER`` is a click network of ``models.py``.
"""

from pathlib import Path

import pytest
from models import RANKER
from reason_codes import require_reason
from safetensors.torch import load_file, save_file

from compressors.contracts import Bench
from compressors.core.registries import AnyStep
from compressors.core.runner import run
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.distill.refit_codes import RefitCodes
from compressors.distill.training.settings import Training
from compressors.prune.dense.l1_training import L1Training
from compressors.prune.tables.merge_rows import MergeRows
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4

HARMFUL = Training(batch=16, learning_rate=30.0, warmup=0, epochs=1, patience=1)
"""A learning rate at which any epoch is worse than the start."""


def bench_with_predictions_as_labels(folder: Path) -> Bench:
    """A bench whose labels are the network's predictions, so that training cannot improve it."""
    bench = RANKER.bench(folder)
    for split in (bench.train, bench.validation):
        assert split is not None
        path = Path(split.path) / "data.safetensors"
        tensors = load_file(path)
        # The labels of the reference bench are the opposite of the predictions.
        tensors["@label"] = 1 - tensors["@label"]
        save_file(tensors, path)
    return bench


@pytest.mark.parametrize(
    "step",
    [Distill(training=HARMFUL), FineTune(training=HARMFUL), RefitCodes(training=HARMFUL, rounds=1)],
    ids=lambda step: step.kind,
)
def test_training_without_improvement_adds_a_reason_to_the_plan(
    step: AnyStep, tmp_path: Path
) -> None:
    bench, source = bench_with_predictions_as_labels(tmp_path / "data"), RANKER.model()
    if step.kind == "refit_codes":
        source = run(RowwiseInt4(), source, bench, tmp_path / "codes")
    plan = run(step, source, bench, tmp_path / "out").plan
    assert plan is not None
    (reason,) = plan.reasons
    assert reason.fields["step"] == step.kind
    # A step that reports no reason per unit gets "step_found_nothing". Otherwise the plan has
    # "step_changed_nothing", whose fields contain the reason of the step.
    if reason.code != "step_found_nothing":
        assert reason.code == "step_changed_nothing"
        require_reason([reason], "training_unchanged")


def test_training_that_changes_weights_adds_no_reason_to_the_plan(tmp_path: Path) -> None:
    settings = Training(batch=16, learning_rate=0.02, warmup=0)
    bench = RANKER.bench(tmp_path / "data")
    for step in (FineTune(training=settings), L1Training(training=settings)):
        plan = run(step, RANKER.model(), bench, tmp_path / step.kind).plan
        assert plan is not None
        assert plan.reasons == ()


def test_merge_rows_without_equal_rows_adds_a_reason_to_the_plan(tmp_path: Path) -> None:
    plan = run(MergeRows(), RANKER.model(), RANKER.bench(tmp_path / "data"), tmp_path / "out").plan
    assert plan is not None
    (remark,) = plan.remarks  # the reasons of the plan as sentences
    assert remark.startswith("merge_rows changed nothing: ")
