"""The dry run of every step predicts the plan, the bytes and the architecture of its result.

The networks are those of ``models.py``. ``width``, an argument of ``RANKER``, is the number of
outputs of its hidden layers. ``TIED`` has only one dense layer, ``out``, with one output.
"""

import models
import pytest
import torch
from error_codes import raises_code
from models import NORMED, RANKER, SEARCHES, TIED, Reference, Step
from test_steps import cached_run, each_method_on_references

from compressors.contracts import Bench, Plan, PlanLine, Split
from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.runner import run
from compressors.core.units import stored_bytes
from compressors.distill.distill import Distill
from compressors.errors.compression import NothingToCompress
from compressors.prune.dense.channels import Channels
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

RECIPES: tuple[tuple[Step, ...], ...] = (
    (Channels(), Distill(training=models.SHORT_TRAINING), RowwiseInt4(), StaticInt8()),
    (RowwiseInt8(), Channels(), StaticInt8()),
    (Distill(student={"width": 8}, training=models.SHORT_TRAINING), RowwiseInt4()),
)


def with_missing_files(bench: Bench) -> Bench:
    """Return a bench of as many rows whose files do not exist: a dry run must not read them."""
    parts = ("train", "validation", "calibration", "soft_labels")
    missing_splits = {
        part: Split(path="/nowhere", sha256="0" * 64, rows=getattr(bench, part).rows)
        for part in parts
    }
    return bench.model_copy(update=missing_splits)


def without_measured_reasons(result: Plan, predicted: Plan) -> Plan:
    """Return ``result`` without the reasons that follow the predicted ones in its lines.

    Those come from measurements, which a dry run does not make. A line that does not begin with the
    predicted reasons stays as it is, so that the comparison fails.
    """

    def with_predicted_reasons(line: PlanLine) -> PlanLine:
        expected = predicted.of(line.module)
        if expected is not None and line.reasons[: len(expected.reasons)] == expected.reasons:
            return line.model_copy(update={"reasons": expected.reasons})
        return line

    return Plan(lines=tuple(map(with_predicted_reasons, result.lines)))


@each_method_on_references
def test_the_dry_run_of_a_step_has_the_plan_and_bytes_of_its_result(method, reference: Reference):
    run_of_method = cached_run(method, reference.network.__name__)
    predicted = dry_run(
        models.default_step(method), reference.model(), with_missing_files(run_of_method.bench)
    )
    result = run_of_method.result
    assert predicted.network.architecture == result.network.architecture
    # What the methods in ``SEARCHES`` remove depends on values and data, so their dry run gives an
    # upper bound of the bytes.
    if method in SEARCHES:
        assert stored_bytes(predicted.module) >= stored_bytes(result.module)
        return
    assert predicted.plan == without_measured_reasons(result.plan, predicted.plan)
    assert stored_bytes(predicted.module) == stored_bytes(result.module)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda steps: "-".join(s.kind for s in steps))
def test_dry_runs_of_a_recipe_have_the_plans_of_its_results(recipe, tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    predicted = result = RANKER.model()
    for number, step in enumerate(recipe):
        predicted = dry_run(step, predicted, with_missing_files(bench))
        result = run(step, result, bench, tmp_path / str(number))
        assert predicted.plan == without_training_reasons(result.plan)


def without_training_reasons(plan):
    """Return the plan without the reasons that training adds, which a dry run cannot predict."""
    # ``still_rising``: the metric improved until the last epoch.
    training_codes = {"trained_to_epoch", "still_rising"}
    lines = (
        line.model_copy(
            update={
                "reasons": tuple(
                    reason for reason in line.reasons if reason.code not in training_codes
                )
            }
        )
        for line in plan.lines
    )
    return plan.model_copy(update={"lines": tuple(lines)})


def test_the_dry_run_of_a_table_of_ten_billion_rows_allocates_no_weights():
    """Its tensors are placeholders: each has the memory of one element."""
    source = NORMED.model()
    with torch.device("meta"):
        table = torch.nn.Embedding(10**10, 64)
    source.module.user = table
    bench = Bench(signature=NORMED.signature)
    predicted = dry_run(RowwiseInt4(), source, bench)
    # 64 codes of 4 bits and a float16 scale per row
    assert predicted.plan.of("user").bytes_after == 10**10 * (32 + 2)
    sizes = [t.untyped_storage().nbytes() for t in predicted.module.user.buffers()]
    assert max(sizes) <= 4


def test_a_dry_run_does_not_change_the_tensors_of_its_model():
    source = RANKER.model()
    before = models.copy_state(source.module)  # a copy of each tensor
    dry_run(Channels(), source, Bench(signature=RANKER.signature))
    torch.testing.assert_close(models.copy_state(source.module), before, rtol=0, atol=0)


def test_the_dry_run_of_a_step_without_prunable_layers_raises_nothing_to_compress():
    with raises_code(NothingToCompress, "units_missing") as caught:
        dry_run(Channels(), TIED.model(), Bench(signature=TIED.signature))
    assert caught.value.fields["reasons"]["out"] == (Reason("one_output"),)
