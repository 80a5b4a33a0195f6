"""What a step is predicted to make is what it makes."""

import models
import pytest
import torch
from error_codes import raises_code
from models import NORMED, RANKER, SEARCHES, TIED, Reference, Step
from test_steps import every_pair, ran

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
    (Channels(), Distill(training=models.QUICKLY), RowwiseInt4(), StaticInt8()),
    (RowwiseInt8(), Channels(), StaticInt8()),
    (Distill(student={"width": 8}, training=models.QUICKLY), RowwiseInt4()),
)


def without_files(bench: Bench) -> Bench:
    """The same rows, of which no file can be read."""
    parts = ("train", "validation", "calibration", "soft_labels")
    nowhere = {
        part: Split(path="/nowhere", sha256="0" * 64, rows=getattr(bench, part).rows)
        for part in parts
    }
    return bench.model_copy(update=nowhere)


def without_notes(made: Plan, predicted: Plan) -> Plan:
    """A plan without what its step measured while it worked."""

    def foreseen(line: PlanLine) -> PlanLine:
        before = predicted.of(line.module)
        if before is not None and line.reasons[: len(before.reasons)] == before.reasons:
            return line.model_copy(update={"reasons": before.reasons})
        return line

    return Plan(lines=tuple(map(foreseen, made.lines)))


@every_pair
def test_a_steps_plan_is_known_before(method, reference: Reference):
    done = ran(method, reference.network.__name__)
    predicted = dry_run(models.default(method), reference.model(), without_files(done.bench))
    made = done.result
    assert predicted.network.architecture == made.network.architecture
    if method in SEARCHES:  # how much they find is not known before, only that it is no loss
        assert stored_bytes(predicted.module) >= stored_bytes(made.module)
        return
    assert predicted.plan == without_notes(made.plan, predicted.plan)
    assert stored_bytes(predicted.module) == stored_bytes(made.module)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda steps: "-".join(s.kind for s in steps))
def test_a_recipes_plan_is_known_before(recipe, tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    predicted = made = RANKER.model()
    for number, step in enumerate(recipe):
        predicted = dry_run(step, predicted, without_files(bench))
        made = run(step, made, bench, tmp_path / str(number))
        assert predicted.plan == without_outcome(made.plan)


def without_outcome(plan):
    """The plan without the outcome of training, which is not known before."""
    outcome = {"trained_to_epoch", "still_rising"}
    lines = (
        line.model_copy(
            update={"reasons": tuple(why for why in line.reasons if why.code not in outcome)}
        )
        for line in plan.lines
    )
    return plan.model_copy(update={"lines": tuple(lines)})


def test_a_prediction_holds_no_weights_of_its_own():
    """A table of a terabyte is predicted as quickly as any."""
    reference = NORMED.model()
    with torch.device("meta"):
        table = torch.nn.Embedding(10**10, 64)
    reference.module.user = table
    bench = Bench(signature=NORMED.signature)
    predicted = dry_run(RowwiseInt4(), reference, bench)
    assert predicted.plan.of("user").bytes_after == 10**10 * (32 + 2)
    own = [t.untyped_storage().nbytes() for t in predicted.module.user.buffers()]
    assert max(own) <= 4


def test_a_model_is_left_as_it_is():
    source = RANKER.model()
    before = models.tensors_apart(source.module)
    dry_run(Channels(), source, Bench(signature=RANKER.signature))
    torch.testing.assert_close(models.tensors_apart(source.module), before, rtol=0, atol=0)


def test_what_has_nothing_to_do_says_so():
    with raises_code(NothingToCompress, "units_missing") as caught:
        dry_run(Channels(), TIED.model(), Bench(signature=TIED.signature))
    assert caught.value.fields["reasons"]["out"] == (Reason("one_output"),)
