"""Steps that break their contract are refused by the one place that runs them."""

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
from compressors.core.steps.decisions import Applied, Decision, StepPlan
from compressors.core.units import Unit
from compressors.errors.compression import ContractBroken, ModelRefused
from compressors.errors.steps import StepRefused
from compressors.quantize.dense import float16
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8


class Broken:
    """What a step declares, and a dry run of Float16's plan."""

    effect, trains, needs, wants = "format", False, (), ()

    def dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        return model

    smallest_dry_run = dry_run


@dataclass(frozen=True)
class Changed(Broken):
    """Float16, and something that the contract forbids."""

    what: Any
    chosen: Literal["as float16", "nothing but user", "everything"] = "as float16"
    kind: str = "changed"

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        taken = Decision("taken", (Reason("selected", step=self.kind),))
        if self.chosen == "nothing but user":
            return StepPlan({"user": taken}, None)
        if self.chosen == "everything":
            return StepPlan({unit.name: taken for unit in Unit.of(model.module)}, None)
        return Float16().plan(model, bench)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> Applied:
        self.what(model.module)
        return Applied(model)


def narrow(module: nn.Module, **settings: Any) -> None:
    """Float16 on a module of our own: its tensors are shared, its tree is not."""
    model = Model(module, type(module), Network(architecture=Architecture(path="models:Any")))
    bench, step = Bench(signature=RANKER.signature), Float16(**settings)
    step.apply(model, bench, step.plan(model, bench))


def writes_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module.user.weight.mul_(2)
    narrow(module)


def writes_a_buffer(module: nn.Module) -> None:
    module.norm.running_mean.add_(1)
    narrow(module)


def gives_nan(module: nn.Module) -> None:
    narrow(module)
    module.out.bias.fill_(torch.nan)


def does_more(module: nn.Module) -> None:
    narrow(module)


def does_less(module: nn.Module) -> None:
    narrow(module, layers=("out",))


def drops_a_table(module: nn.Module) -> None:
    narrow(module)
    module.user = nn.Identity()


@dataclass(frozen=True)
class Doubled:
    """A format that has the name of float16 and computes something else."""

    name: str = "float16"
    layout: Any = float16.LINEAR_FORMAT.layout

    def apply(self, stored: dict[str, Tensor], x: Tensor, settings: dict[str, Any]) -> Tensor:
        return 2 * float16.LINEAR_FORMAT.apply(stored, x, settings)


def hides_state(module: nn.Module) -> None:
    narrow(module)
    module.out.storage = Doubled()


def drops_the_weights_on_the_way(module: nn.Module) -> None:
    narrow(module)
    module.get_submodule("out")._non_persistent_buffers_set.add("bias")


@pytest.mark.parametrize(
    ("what", "chosen", "code", "fields"),
    [
        (writes_in_place, "as float16", "source_changed", {}),
        (gives_nan, "as float16", "scores_not_finite", {}),
        (does_more, "nothing but user", "unit_changed", {"unit": "item"}),
        (does_less, "everything", "unit_kept", {"unit": "cross"}),
        (drops_a_table, "as float16", "unit_lost", {"unit": "user"}),
        (hides_state, "as float16", "stored_scores_differ", {}),
    ],
)
def test_a_step_that_breaks_its_contract_is_refused(what, chosen, code, fields, tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    with raises_code(ContractBroken, code, step="changed", **fields):
        run(Changed(what, chosen), RANKER.model(), bench, tmp_path / "out")


def test_a_step_that_writes_a_buffer_is_refused(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    with raises_code(ContractBroken, "source_changed"):
        run(Changed(writes_a_buffer), NORMED.model(), bench, tmp_path / "out")


def test_a_step_whose_state_is_not_stored_is_refused(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    with raises_code(ModelRefused, "tensors_differ", missing=("out.bias",)):
        run(Changed(drops_the_weights_on_the_way), RANKER.model(), bench, tmp_path / "out")


def test_a_table_step_that_encodes_other_than_it_lays_out_is_refused(tmp_path):
    class Wide(RowwiseInt8):
        kind: Literal["wide"] = "wide"  # type: ignore[assignment]

        def encode(self, block: Tensor, params: Any) -> dict[str, Tensor]:
            return {k: v.to(torch.int32) for k, v in super().encode(block, params).items()}

    bench = RANKER.bench(tmp_path / "data")
    with raises_code(
        ContractBroken, "encoded_dtype_differs", step="wide", name="codes", got="torch.int32"
    ):
        run(Wide(), RANKER.model(), bench, tmp_path / "out")


class ReadsWeights(nn.Module):
    """Uses a layer's weight without calling the layer, as torch's own attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)
        self.out = nn.Linear(8, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        return nn.functional.linear(x, self.out.weight, self.out.bias)


class Offset(nn.Module):
    """Moves its ids itself, so that ids its signature allows lie outside the table."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)
        self.out = nn.Linear(8, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        return self.out(torch.cat([self.user(user + 10), price], dim=1))


def test_a_layer_whose_weight_is_read_around_it_is_named_as_such(tmp_path):
    reference = Reference(ReadsWeights, NORMED.signature)
    bench = reference.bench(tmp_path / "data")
    with raises_code(StepRefused, "network_fails", step="float16"):
        run(Float16(), reference.model(), bench, tmp_path / "out")
    run(RowwiseInt8(), reference.model(), bench, tmp_path / "tables")


def test_a_network_that_fails_on_ids_its_schema_allows_is_refused(tmp_path):
    reference = Reference(Offset, NORMED.signature)
    with raises_code(ModelRefused, "network_fails", architecture="models:Offset") as caught:
        run(RowwiseInt8(), reference.model(), Bench(signature=NORMED.signature), tmp_path / "out")
    assert "IndexError" in caught.value.fields["problem"]


@dataclass(frozen=True)
class PartialFloat16(Broken):
    """Float16 on all layers but one, with or without an outcome of that one."""

    outcomes: dict[str, Decision]
    kind: str = "partial_float16"

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        return Float16().plan(model, bench)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> Applied:
        step = Float16(layers=("cross", "hidden", "capped", "plain"))
        made = step.apply(model, bench, step.plan(model, bench))
        return Applied(made.model, self.outcomes)


def test_a_layer_may_stay_in_its_format_only_if_the_step_says_why(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    why = Reason("as_written", text="reaches 7e4")
    step = PartialFloat16({"out": Decision("skipped", (why,))})
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    line = result.plan.of("out")
    assert (line.format, line.steps) == ("float32", ())
    assert line.reasons == (Reason("kept_format", format="float32"), why)
    assert result.plan.of("cross").format == "float16"
    with raises_code(ContractBroken, "unit_kept", unit="out"):
        run(PartialFloat16({}), RANKER.model(), bench, tmp_path / "again")


@pytest.mark.parametrize(
    ("unit", "status", "code"),
    [("cross", "skipped", "unit_changed"), ("out", "taken", "unit_kept")],
)
def test_a_step_whose_outcome_differs_from_its_result_is_refused(unit, status, code, tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    kept = Decision("skipped", (Reason("as_written", text="reaches 7e4"),))
    outcome = Decision(status, (Reason("selected", step="partial_float16"),))
    step = PartialFloat16({"out": kept, unit: outcome})
    with raises_code(ContractBroken, code, unit=unit):
        run(step, RANKER.model(), bench, tmp_path / "out")


@dataclass(frozen=True)
class Deferring(Broken):
    """Float16 on one layer whose decision was deferred with these bounds."""

    bytes: tuple[int, int]
    works: bool = True
    kind: str = "deferring"

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        reasons = (Reason("selected", step=self.kind),)
        return StepPlan({"out": Decision("deferred", reasons, self.bytes)}, None)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> Applied:
        if not self.works:
            return Applied(model)
        step = Float16(tables=("!*",), layers=("out",))
        return step.apply(model, bench, step.plan(model, bench))


def test_a_deferred_decision_is_resolved_by_what_the_step_did(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    most = next(unit.bytes for unit in Unit.of(source.module) if unit.name == "out")
    changed = run(Deferring((0, most)), source, bench, tmp_path / "changed").plan.of("out")
    assert (changed.format, changed.steps) == ("float16", ("deferring",))
    kept = run(Deferring((0, most), works=False), source, bench, tmp_path / "kept")
    assert kept.plan.of("out").steps == ()


def test_a_deferred_unit_with_bytes_outside_the_bounds_of_the_plan_is_refused(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    with raises_code(ContractBroken, "bytes_out_of_bounds", unit="out", least=0, most=2):
        run(Deferring((0, 2)), source, bench, tmp_path / "out")
