"""A unit that does not allow a step is skipped with its reason, and the others are compressed."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from error_codes import raises_code
from models import Reference
from reason_codes import require_reason
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from compressors.contracts import Bench, DenseInput, IdInput, Output, Signature
from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.registries import AnyStep
from compressors.core.skipping import run_or_skip
from compressors.core.steps.decisions import StepPlan
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.prune.dense.channels import Channels
from compressors.prune.tables.prune_rows import PruneRows
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.rewrite.fold import Fold

STEPS = (
    RowwiseInt8(),
    RowwiseInt4(),
    PruneRows(pruned="shared"),  # one row, their mean, replaces all pruned rows
    Fold(),
    Channels(keep=0.5),
    StaticInt8(),
    Float16(),
)


class BaseNet(nn.Module):
    """Two tables, three dense layers and a norm; subclasses use one unit in an unusual way."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(60, 8), nn.Embedding(40, 8)
        self.first, self.norm = nn.Linear(18, width), nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)

    def look_up_item(self, item: Tensor) -> Tensor:
        rows: Tensor = self.item(item)
        return rows

    def hidden_layers(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.norm(self.first(x)))))

    def forward(self, user: Tensor, item: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), self.look_up_item(item), price], dim=1)
        score: Tensor = self.last(self.hidden_layers(x)).squeeze(1)
        return score


class SlicedTable(BaseNet):
    """Reads a slice of the weight of ``item`` in addition to calling the table."""

    def look_up_item(self, item: Tensor) -> Tensor:
        return self.item(item) + self.item.weight[:10].mean(dim=0)


class TableAsArgument(BaseNet):
    """Passes the weight of ``item`` to a function instead of calling the table."""

    def look_up_item(self, item: Tensor) -> Tensor:
        return F.embedding(item, self.item.weight)


class TableAsMatrix(BaseNet):
    """Calls ``item`` and also multiplies by its weight, as an attention over all rows does."""

    def look_up_item(self, item: Tensor) -> Tensor:
        rows = self.item(item)
        near = torch.softmax((self.item.weight @ rows.T).T, dim=1)
        return rows + near @ self.item.weight


class ReadsWidth(BaseNet):
    """Reads the width of ``item``, which a compressed table does not have under torch's name."""

    def look_up_item(self, item: Tensor) -> Tensor:
        return self.item(item) / self.item.embedding_dim


class LayerAsArgument(BaseNet):
    """Passes the weight of ``second`` to a function instead of calling the layer."""

    def hidden_layers(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return torch.relu(F.linear(x, self.second.weight, self.second.bias))


class ChecksForAttribute(BaseNet):
    """Doubles the output if ``second`` has no attribute ``weight``, without an error."""

    def hidden_layers(self, x: Tensor) -> Tensor:
        y = super().hidden_layers(x)
        return y if hasattr(self.second, "weight") else 2 * y


class CastsToWeight(BaseNet):
    """Reads the dtype of the weight of ``second``."""

    def hidden_layers(self, x: Tensor) -> Tensor:
        return super().hidden_layers(x.to(self.second.weight.dtype))


class CalledTwice(BaseNet):
    """Calls the layer ``second`` twice."""

    def hidden_layers(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(super().hidden_layers(x)))


class NeverCalled(BaseNet):
    """Has a layer and a table that its forward method does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.training_head = nn.Linear(18, 3)
        self.unused = nn.Embedding(20, 8)


class TiedLayers(BaseNet):
    """Has two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(16, 16)
        self.third.weight = self.second.weight

    def hidden_layers(self, x: Tensor) -> Tensor:
        return torch.relu(self.third(super().hidden_layers(x)))


class SameLayerTwice(BaseNet):
    """Has the layer ``second`` under two names, and calls it under both."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = self.second

    def hidden_layers(self, x: Tensor) -> Tensor:
        return torch.relu(self.alias(super().hidden_layers(x)))


class WeightNormed(BaseNet):
    """Computes the weight of ``second`` by weight normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.second = parametrizations.weight_norm(nn.Linear(16, 16))


class SpectralNormed(BaseNet):
    """Computes the weight of ``first`` by spectral normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Linear(18, 16))


class MultiheadAttended(BaseNet):
    """Has torch's attention, which reads the weight of its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def hidden_layers(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x))).unsqueeze(1)
        return torch.relu(self.second(self.attention(x, x, x)[0].squeeze(1)))


class DoublingLinear(nn.Linear):
    """Has a custom forward method."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return 2 * super().forward(input)


class Subclassed(BaseNet):
    """Has a subclass of ``nn.Linear`` with a custom forward method."""

    def __init__(self) -> None:
        super().__init__()
        self.second = DoublingLinear(16, 16)


class Hooked(BaseNet):
    """Has a table and a layer with hooks that change their output or input."""

    def __init__(self) -> None:
        super().__init__()
        self.second.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        self.item.register_forward_hook(lambda module, args, output: 2 * output)


class NormStatisticRead(BaseNet):
    """Reads the running variance of its norm."""

    def hidden_layers(self, x: Tensor) -> Tensor:
        return super().hidden_layers(x) + self.norm.running_var.mean()


class ValueDependent(BaseNet):
    """Raises if row 0 of a table has other values than in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first_row", self.item.weight[0].detach().clone())

    def look_up_item(self, item: Tensor) -> Tensor:
        if not torch.equal(self.item(torch.zeros(1, dtype=torch.int64))[0], self.first_row):
            raise ValueError("row 0 of the table was changed")
        return super().look_up_item(item)


SIGNATURE = Signature(
    inputs=(
        IdInput(name="user", table="user"),
        IdInput(name="item", table="item"),
        DenseInput(name="price", shape=(2,)),
    ),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
NETWORKS: tuple[type[BaseNet], ...] = (
    ReadsWidth,
    SlicedTable,
    TableAsArgument,
    TableAsMatrix,
    LayerAsArgument,
    ChecksForAttribute,
    CastsToWeight,
    CalledTwice,
    NeverCalled,
    TiedLayers,
    SameLayerTwice,
    WeightNormed,
    SpectralNormed,
    MultiheadAttended,
    Subclassed,
    Hooked,
    NormStatisticRead,
)
# By network, the unit that every format has to skip, because the network reads its weight or
# attributes.
SKIPPED_UNIT: dict[type[BaseNet], str] = {
    ReadsWidth: "item",
    LayerAsArgument: "second",
    ChecksForAttribute: "second",
    CastsToWeight: "second",
    MultiheadAttended: "attention.out_proj",
}


def reference_and_model(network: type[BaseNet]) -> tuple[Reference, Model]:
    return (reference := Reference(network, SIGNATURE)), reference.model()


def run_step(step: AnyStep, source: Model, bench: Bench, folder: Path) -> Model:
    """Run a step and return its result, or ``source`` if the step has nothing to compress."""
    try:
        return run_or_skip(step, source, bench, folder)
    except NothingToCompress:
        return source


_SCRATCH = tempfile.TemporaryDirectory(prefix="skipping-")


@functools.cache
def pack_and_fold(network: type[BaseNet]) -> tuple[Model, Bench]:
    """Return a network with its tables in int8 and its norms folded, and its bench; cached."""
    folder = Path(tempfile.mkdtemp(dir=_SCRATCH.name))
    reference, model = reference_and_model(network)
    bench = reference.bench(folder / "data")
    for number, step in enumerate((RowwiseInt8(), Fold())):
        model = run_step(step, model, bench, folder / str(number))
    return model, bench


@pytest.mark.parametrize(
    ("network", "step"),
    [
        # Without the marker ``nightly`` one step runs on each network: the steps take turns.
        pytest.param(
            network,
            step,
            id=f"{network.__name__}-{step.kind}",
            marks=() if place % len(STEPS) == turn else pytest.mark.nightly,
        )
        for place, network in enumerate(NETWORKS)
        for turn, step in enumerate(STEPS)
    ],
)
def test_each_step_runs_on_a_network_with_one_unusual_unit(
    network: type[BaseNet], step: AnyStep, tmp_path: Path
) -> None:
    reference, source = reference_and_model(network)
    run_step(step, source, reference.bench(tmp_path / "data"), tmp_path / "out")


@pytest.mark.parametrize(
    "network",
    [
        # Without ``nightly`` every second network; the test above runs on all of them.
        pytest.param(network, id=network.__name__, marks=pytest.mark.nightly if place % 2 else ())
        for place, network in enumerate(NETWORKS)
    ],
)
def test_two_steps_skip_only_the_unusual_unit(network: type[BaseNet], tmp_path: Path) -> None:
    model, bench = pack_and_fold(network)
    for number, step in enumerate((StaticInt8(), Float16())):
        model = run_step(step, model, bench, tmp_path / f"then{number}")
    formats = {line.module: line.format for line in model.plan.lines} if model.plan else {}
    skipped = SKIPPED_UNIT.get(network)
    for name in ("user", "item", "last"):
        # A table with a hook is kept, too, with the reason ``has_hooks``.
        if name != skipped and not (name == "item" and network is Hooked):
            assert formats[name] != "float32", f"{name} of {network.__name__} was left out"
    if skipped is not None:
        assert formats[skipped] == "float32"


@pytest.mark.parametrize("network", SKIPPED_UNIT, ids=lambda n: n.__name__)
def test_a_skipped_unit_has_its_reason_in_its_plan_line_and_in_the_plans_reasons(
    network: type[BaseNet], tmp_path: Path
) -> None:
    reference, source = reference_and_model(network)
    bench, name = reference.bench(tmp_path / "data"), SKIPPED_UNIT[network]
    step = Float16()
    result = run_or_skip(step, source, bench, tmp_path / "out")
    assert result.plan is not None
    line = result.plan.of(name)
    assert line is not None
    assert (line.format, line.steps) == ("float32", ())
    skipped = require_reason(line.reasons, "skipped", step="float16")
    reason = skipped.fields["why"]
    assert reason.code in ("weight_read", "attributes_read")
    assert result.plan.reasons == (Reason("unit_skipped", step="float16", unit=name, why=reason),)
    # The dry run gives the same plan, and a later step keeps the reason.
    assert dry_run(step, source, bench).plan == result.plan
    if name == "item":
        earlier = run_or_skip(StaticInt8(), source, bench, tmp_path / "then")
        later = run_or_skip(RowwiseInt8(), earlier, bench, tmp_path / "later")
        assert later.plan is not None
        remark = require_reason(
            later.plan.reasons[:1], "unit_skipped", step="rowwise_int8", unit="item"
        )
        assert remark.fields["why"] == reason


@pytest.mark.parametrize(
    ("network", "step", "unit"),
    [
        (ReadsWidth, RowwiseInt8(tables=("item",)), "item"),
        (TableAsMatrix, RowwiseInt4(tables=("user", "item")), "item"),
        (LayerAsArgument, StaticInt8(layers=("second",)), "second"),
        (MultiheadAttended, Float16(layers=("attention.out_proj", "l*")), "attention.out_proj"),
    ],
    ids=lambda value: getattr(value, "__name__", str(getattr(value, "kind", value))),
)
def test_a_step_that_names_an_unusual_unit_raises_step_refused(
    network: type[BaseNet], step: AnyStep, unit: str, tmp_path: Path
) -> None:
    reference, source = reference_and_model(network)
    with raises_code(StepRefused, "unit_not_changeable", unit=unit) as caught:
        run_or_skip(step, source, reference.bench(tmp_path / "data"), tmp_path / "out")
    reasons = {"weight_read", "attributes_read", "not_multiplied"}
    assert caught.value.fields["reason"].code in reasons


@pytest.mark.parametrize("tables", [("*",), ("*", "!us*r"), ("it*",)], ids=str)
def test_a_unit_that_a_pattern_matches_is_skipped_without_an_error(
    tables: tuple[str, ...], tmp_path: Path
) -> None:
    reference, source = reference_and_model(ReadsWidth)
    bench = reference.bench(tmp_path / "data")
    model = run_step(RowwiseInt8(tables=tables), source, bench, tmp_path / "out")
    formats = {} if model.plan is None else {x.module: x.format for x in model.plan.lines}
    assert formats.get("item", "float32") == "float32"
    assert (formats.get("user") == "rowwise_int8") == (tables == ("*",))


def test_a_pattern_with_an_exclamation_mark_excludes_units(tmp_path: Path) -> None:
    reference, source = reference_and_model(BaseNet)
    bench = reference.bench(tmp_path / "data")
    for tables in (("*", "!item"), ("!item",), ("user", "it*", "!i*")):
        plan = run_or_skip(RowwiseInt8(tables=tables), source, bench, tmp_path / str(tables)).plan
        assert plan is not None
        assert [line.format for line in plan.lines[:2]] == ["rowwise_int8", "float32"]
        require_reason(plan.lines[1].reasons, "not_matched", patterns=tables)
        assert plan.reasons == ()


@pytest.mark.parametrize("step", [RowwiseInt8(), Float16(), RowwiseInt4()], ids=lambda s: s.kind)
def test_a_unit_that_makes_the_compressed_network_fail_is_skipped(
    step: AnyStep, tmp_path: Path
) -> None:
    """The failure depends on values, so it does not occur with placeholders."""
    reference, source = reference_and_model(ValueDependent)
    bench = reference.bench(tmp_path / "data")
    result = run_or_skip(step, source, bench, tmp_path / "out")
    assert result.plan is not None
    formats = {line.module: line.format for line in result.plan.lines}
    assert (formats["user"], formats["item"]) == (step.kind, "float32")
    (skipped,) = result.plan.reasons
    require_reason([skipped], "unit_skipped", step=step.kind, unit="item")
    fault = require_reason([skipped], "step_failed").fields["fault"]
    assert fault.startswith(f"After '{step.kind}' the network no")
    naming_step = step.model_copy(update={"tables": ("item", "user")})
    with raises_code(StepRefused, "unit_not_changeable", unit="item"):
        run_or_skip(naming_step, source, bench, tmp_path / "named")


def test_a_fold_that_changes_scores_at_one_layer_skips_that_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressors.rewrite import fold

    class TwoNorms(BaseNet):
        def __init__(self) -> None:
            super().__init__()
            self.second_norm = nn.BatchNorm1d(16)

        def hidden_layers(self, x: Tensor) -> Tensor:
            x = torch.relu(self.norm(self.first(x)))
            return torch.relu(self.second_norm(self.second(x)))

    original: Callable[..., tuple[Tensor, Tensor]] = fold.scale_outputs

    def doubled_for_second_layer(weight: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        scaled, bias = original(weight, *others)
        # ``second`` has 16 inputs, ``first`` has 18.
        return (2 * scaled, bias) if weight.shape[1] == 16 else (scaled, bias)

    monkeypatch.setattr(fold, "scale_outputs", doubled_for_second_layer)
    reference, source = reference_and_model(TwoNorms)
    result = run_or_skip(Fold(), source, reference.bench(tmp_path / "data"), tmp_path / "out")
    assert result.plan is not None
    assert [line.module for line in result.plan.lines if line.steps == ("fold",)] == ["first"]
    (skipped,) = result.plan.reasons
    require_reason([skipped], "unit_skipped", step="fold", unit="second")
    fault = require_reason([skipped], "step_failed").fields["fault"]
    assert fault.startswith("After 'fold' the network's scores differ")


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.__name__)
def test_scores_stay_close_if_units_are_skipped(network: type[BaseNet], tmp_path: Path) -> None:
    _, source = reference_and_model(network)
    folded, bench = pack_and_fold(network)
    model = run_step(Float16(), folded, bench, tmp_path / "out")
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "user": torch.randint(60, (300,), generator=generator),
        "item": torch.randint(40, (300,), generator=generator),
        "price": torch.randn(300, 2, generator=generator),
    }
    with torch.no_grad():
        # ``private`` returns a copy of the module tree in evaluation mode.
        before, after = source.private().module(**inputs), model.module(**inputs)
    # The error of row-wise int8 is at most 1/254 of the largest number of a row. The limit leaves a
    # margin for the later layers; it is meant to detect an operation that a step has lost.
    assert float((after - before).abs().max()) < 0.05 * float(before.std())


def test_a_step_is_planned_once_and_again_only_without_units_that_it_skips(tmp_path, monkeypatch):
    plans: list[tuple[str, ...]] = []
    original = Float16.plan

    def counting_plan(step: Float16, model: Model, bench: Bench) -> StepPlan[None]:
        plans.append(step.tables)
        return original(step, model, bench)

    monkeypatch.setattr(Float16, "plan", counting_plan)
    for network in (BaseNet, ReadsWidth):
        reference = Reference(network, SIGNATURE)
        folder = tmp_path / network.__name__
        run_or_skip(Float16(), reference.model(), reference.bench(folder / "data"), folder / "out")
    assert plans == [("*",), ("*",), ("*", "!item")]
