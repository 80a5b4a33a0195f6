"""``runner.run`` raises an error for each way in which a step can break its contract.

A plan has a decision for each unit: ``taken`` (the step changes it), ``skipped``, or ``deferred``
(the step decides while it runs). The second argument of ``StepPlan`` is data for ``apply``; the
steps in this file need none, so it is None.

The networks are those of ``models.py``. ``RANKER`` has the tables ``user`` and ``item``, among
others, and the dense layers ``cross``, ``hidden``, ``capped``, ``plain`` and ``out``. ``NORMED``
has the table ``user``, the layers ``hidden`` and ``out``, and a batch norm.
"""

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from error_codes import raises_code
from models import NORMED, RANKER, Reference
from torch import Tensor, nn

from compressors.contracts import Architecture, Bench, Network
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan
from compressors.core.units import Unit
from compressors.errors.compression import ContractBroken, ModelRefused
from compressors.errors.steps import StepRefused
from compressors.quantize.dense import float16
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8


class StepAttributes:
    """Class attributes that every step declares, and a dry run that changes nothing.

    ``effect`` is what a step changes, here the format in which units are stored. ``trains`` is
    whether it trains. ``needs`` and ``wants`` are the parts of the bench that it requires, and
    those that it uses if they exist. ``smallest_dry_run`` predicts the smallest possible result.
    """

    effect, trains, needs, wants = "format", False, (), ()

    def dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        return model

    smallest_dry_run = dry_run


@dataclass(frozen=True)
class ChangingStep(StepAttributes):
    """Runs ``change`` on the model's module; ``planned`` sets which units its plan selects.

    ``as float16`` selects the same units as the step ``Float16``.
    """

    change: Any
    planned: Literal["as float16", "only user", "all units"] = "as float16"
    kind: str = "changed"

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        taken = Decision("taken", (Reason("selected", step=self.kind),))
        if self.planned == "only user":
            return StepPlan({"user": taken}, None)
        if self.planned == "all units":
            return StepPlan({unit.name: taken for unit in Unit.of(model.module)}, None)
        return Float16().plan(model, bench)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        self.change(model.module)
        return AppliedStep(model)


def apply_float16(module: nn.Module, **settings: Any) -> None:
    """Apply Float16 in place to the module, which shares its tensors with the source model."""
    model = Model(module, type(module), Network(architecture=Architecture(path="models:Any")))
    bench, step = Bench(signature=RANKER.signature), Float16(**settings)
    step.apply(model, bench, step.plan(model, bench))


def write_weight_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.user.weight.mul_(2)
    apply_float16(module)


def write_buffer_in_place(module: nn.Module) -> None:
    module.norm.running_mean.add_(1)
    apply_float16(module)


def set_bias_to_nan(module: nn.Module) -> None:
    apply_float16(module)
    module.out.bias.fill_(torch.nan)


def apply_to_all_units(module: nn.Module) -> None:
    apply_float16(module)


def apply_to_one_layer(module: nn.Module) -> None:
    apply_float16(module, layers=("out",))


def remove_table(module: nn.Module) -> None:
    apply_float16(module)
    module.user = nn.Identity()


@dataclass(frozen=True)
class DoublingFormat:
    """A format named float16 that returns twice the output."""

    name: str = "float16"
    layout: Any = float16.LINEAR_FORMAT.layout

    def apply(self, stored: dict[str, Tensor], x: Tensor, settings: dict[str, Any]) -> Tensor:
        return 2 * float16.LINEAR_FORMAT.apply(stored, x, settings)


def replace_format(module: nn.Module) -> None:
    apply_float16(module)
    module.out.storage = DoublingFormat()


def exclude_bias_from_state(module: nn.Module) -> None:
    apply_float16(module)
    module.get_submodule("out")._non_persistent_buffers_set.add("bias")


@pytest.mark.parametrize(
    ("change", "planned", "code", "fields"),
    [
        (write_weight_in_place, "as float16", "source_changed", {}),
        (set_bias_to_nan, "as float16", "scores_not_finite", {}),
        (apply_to_all_units, "only user", "unit_changed", {"unit": "item"}),
        (apply_to_one_layer, "all units", "unit_kept", {"unit": "cross"}),
        (remove_table, "as float16", "unit_lost", {"unit": "user"}),
        (replace_format, "as float16", "stored_scores_differ", {}),
    ],
)
def test_a_step_that_breaks_its_contract_raises_contract_broken(
    change, planned, code, fields, tmp_path
):
    bench = RANKER.bench(tmp_path / "data")
    with raises_code(ContractBroken, code, step="changed", **fields):
        run(ChangingStep(change, planned), RANKER.model(), bench, tmp_path / "out")


def test_a_step_that_writes_a_buffer_of_its_source_raises_source_changed(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    with raises_code(ContractBroken, "source_changed"):
        run(ChangingStep(write_buffer_in_place), NORMED.model(), bench, tmp_path / "out")


def test_a_step_whose_result_has_a_non_persistent_bias_raises_tensors_differ(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    with raises_code(ModelRefused, "tensors_differ", missing=("out.bias",)):
        run(ChangingStep(exclude_bias_from_state), RANKER.model(), bench, tmp_path / "out")


def test_a_table_step_that_encodes_another_dtype_than_its_layout_raises_contract_broken(tmp_path):
    class Int32CodesStep(RowwiseInt8):
        kind: Literal["wide"] = "wide"  # type: ignore[assignment]

        def encode(self, block: Tensor, params: Any) -> dict[str, Tensor]:
            return {k: v.to(torch.int32) for k, v in super().encode(block, params).items()}

    bench = RANKER.bench(tmp_path / "data")
    with raises_code(
        ContractBroken, "encoded_dtype_differs", step="wide", name="codes", got="torch.int32"
    ):
        run(Int32CodesStep(), RANKER.model(), bench, tmp_path / "out")


class WeightReadingNet(nn.Module):
    """Uses a layer's weight without calling the layer, as torch's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)
        self.out = nn.Linear(8, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        return nn.functional.linear(x, self.out.weight, self.out.bias)


class OffsetIdsNet(nn.Module):
    """Adds 10 to its ids, so that some ids that the signature allows lie outside the table."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)
        self.out = nn.Linear(8, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        return self.out(torch.cat([self.user(user + 10), price], dim=1))


def test_a_layer_whose_weight_the_network_reads_directly_raises_step_refused(tmp_path):
    reference = Reference(WeightReadingNet, NORMED.signature)
    bench = reference.bench(tmp_path / "data")
    with raises_code(StepRefused, "network_fails", step="float16"):
        run(Float16(), reference.model(), bench, tmp_path / "out")
    run(RowwiseInt8(), reference.model(), bench, tmp_path / "tables")


def test_a_network_that_fails_on_ids_of_its_signature_raises_model_refused(tmp_path):
    reference = Reference(OffsetIdsNet, NORMED.signature)
    with raises_code(ModelRefused, "network_fails", architecture="models:OffsetIdsNet") as caught:
        run(RowwiseInt8(), reference.model(), Bench(signature=NORMED.signature), tmp_path / "out")
    assert "IndexError" in caught.value.fields["problem"]


@dataclass(frozen=True)
class PartialFloat16Step(StepAttributes):
    """Plans Float16 for all units, changes all but ``out``, and returns ``outcomes``.

    ``outcomes`` are the final decisions by unit.
    """

    outcomes: dict[str, Decision]
    kind: str = "partial_float16"

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        return Float16().plan(model, bench)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        step = Float16(layers=("cross", "hidden", "capped", "plain"))
        changed = step.apply(model, bench, step.plan(model, bench))
        return AppliedStep(changed.model, self.outcomes)


def test_a_planned_layer_may_keep_its_format_only_if_the_step_gives_a_reason(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    # ``as_written`` is a reason with a free text; 7e4 is larger than any float16 number.
    reason = Reason("as_written", text="reaches 7e4")
    step = PartialFloat16Step({"out": Decision("skipped", (reason,))})
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    line = result.plan.of("out")
    assert (line.format, line.steps) == ("float32", ())
    assert line.reasons == (Reason("kept_format", format="float32"), reason)
    assert result.plan.of("cross").format == "float16"
    with raises_code(ContractBroken, "unit_kept", unit="out"):
        run(PartialFloat16Step({}), RANKER.model(), bench, tmp_path / "again")


@pytest.mark.parametrize(
    ("unit", "status", "code"),
    [("cross", "skipped", "unit_changed"), ("out", "taken", "unit_kept")],
)
def test_a_step_whose_final_decision_differs_from_its_result_raises_contract_broken(
    unit, status, code, tmp_path
):
    bench = RANKER.bench(tmp_path / "data")
    kept = Decision("skipped", (Reason("as_written", text="reaches 7e4"),))
    outcome = Decision(status, (Reason("selected", step="partial_float16"),))
    step = PartialFloat16Step({"out": kept, unit: outcome})
    with raises_code(ContractBroken, code, unit=unit):
        run(step, RANKER.model(), bench, tmp_path / "out")


@dataclass(frozen=True)
class DeferringStep(StepAttributes):
    """Defers the decision for ``out``; may then store it in float16.

    ``bytes`` are the smallest and the largest size of ``out`` that the plan states.
    """

    bytes: tuple[int, int]
    applies_float16: bool = True
    kind: str = "deferring"

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        reasons = (Reason("selected", step=self.kind),)
        return StepPlan({"out": Decision("deferred", reasons, self.bytes)}, None)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        if not self.applies_float16:
            return AppliedStep(model)
        step = Float16(tables=("!*",), layers=("out",))
        return step.apply(model, bench, step.plan(model, bench))


def test_a_deferred_decision_is_resolved_by_the_result_of_apply(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    largest_bytes = next(unit.bytes for unit in Unit.of(source.module) if unit.name == "out")
    changed = run(DeferringStep((0, largest_bytes)), source, bench, tmp_path / "changed").plan.of(
        "out"
    )
    assert (changed.format, changed.steps) == ("float16", ("deferring",))
    kept = run(
        DeferringStep((0, largest_bytes), applies_float16=False), source, bench, tmp_path / "kept"
    )
    assert kept.plan.of("out").steps == ()


def test_a_deferred_unit_with_bytes_outside_the_planned_bounds_raises_contract_broken(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    with raises_code(ContractBroken, "bytes_out_of_bounds", unit="out", least=0, most=2):
        run(DeferringStep((0, 2)), source, bench, tmp_path / "out")
