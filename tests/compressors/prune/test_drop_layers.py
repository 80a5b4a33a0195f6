"""``drop_layers``: which layers of a stack are removed, and the new indices of later layers.

A stack is a sequence of layers, its members, whose number is an argument of the network or the
length of such an argument. ``most_loss`` is the largest allowed decrease of the metric for all
removed layers together, and ``count`` the largest number of layers to remove from a stack.
"""

from collections.abc import Callable

import models
import pytest
import torch
from error_codes import HasReason, raises_code
from models import RANKER, SHORT_TRAINING, Reference, write_split
from narrow_networks import (
    HISTORY,
    RETRIEVAL,
    SIGNATURE,
    LowRankCrossNet,
    TableAndTowerNet,
    Transformer,
)
from reason_codes import require_reason
from torch import Tensor, nn

from compressors.contracts import DROPPED, Bench
from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.state.module_state import map_tensors
from compressors.core.units import stored_bytes
from compressors.distill.distill import Distill
from compressors.errors.compression import NothingToCompress
from compressors.errors.widths import NotAMember
from compressors.metrics.validation_score import quality
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.drop_layers import DropLayers
from compressors.prune.dense.magnitude import Magnitude
from compressors.prune.structure.config_depth import find_stacks, remove_member
from compressors.quantize.dense.static_int8 import StaticInt8

# Networks of ``tests/narrow_networks.py``. ``down`` and ``up`` are the low-rank factors of the
# cross layers. ``deep`` has three modules for each hidden layer: linear, norm and relu.
DEEP = Reference(LowRankCrossNet, SIGNATURE, {"cross_layers": 3, "hidden": [20, 12, 12, 12]})
BLOCKS = Reference(Transformer, HISTORY, {"layers": 4})


def drop_layers(reference: Reference, folder, source: Model | None = None, **settings) -> Model:
    """Run ``DropLayers`` on the source, by default the reference's model; return the result."""
    bench = reference.bench(folder / "data")
    return run(DropLayers(**settings), source or reference.model(), bench, folder / "out")


def predictions(module: nn.Module, reference: Reference) -> Tensor:
    inputs = models.generate_inputs(reference.signature, reference.rows_of_tables(), 50, seed=11)
    with torch.no_grad():
        return module(**inputs).reshape(-1)


def predict_with(source: Model) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return a function from inputs to the predictions of a model."""
    return lambda inputs: source.module(**inputs).reshape(-1)


class AveragedCrossNet(LowRankCrossNet):
    """Divides each cross layer by the number of layers, so that removing one changes the others."""

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        features = torch.cat([self.user(user), price], dim=1)
        x = features
        for down, up in zip(self.down, self.up, strict=True):
            x = features * up(down(x)) / len(self.down) + x
        score: Tensor = self.out(x)
        return score


def test_find_stacks_finds_layers_counted_by_a_number_or_a_list():
    """``containers`` has, by name of a module list, how many modules belong to one layer."""
    result = {stack.description(): stack for stack in find_stacks(DEEP.model())}
    assert result.keys() == {"cross_layers", "hidden"}
    assert result["cross_layers"].containers == {"down": 1, "up": 1}
    assert result["hidden"].containers == {"deep": 3}
    assert result["hidden"].members == 4
    (blocks,) = find_stacks(BLOCKS.model())
    assert (blocks.description(), blocks.containers) == ("layers", {"blocks": 1})


@pytest.mark.parametrize("zero_layer", [0, 1, 2])
def test_a_layer_of_zeros_is_dropped_and_predictions_do_not_change(zero_layer, tmp_path):
    source = DEEP.model()
    with torch.no_grad():
        source.module.up[zero_layer].weight.zero_()
        source.module.up[zero_layer].bias.zero_()
    bench = DEEP.bench(tmp_path / "data")
    # Labels are the network's predictions, so removing any other layer lowers the metric.
    tables = DEEP.rows_of_tables()
    rows = write_split(
        SIGNATURE, tables, tmp_path / "own", seed=9, score_function=predict_with(source)
    )
    bench = bench.model_copy(update={"validation": rows})
    step = DropLayers(layers=("down.*", "up.*"), most_loss=0.0)
    result = run(step, source, bench, tmp_path / "out")
    assert result.network.architecture.config["cross_layers"] == 2
    kept_indices = [index for index in range(3) if index != zero_layer]
    for new, old in enumerate(kept_indices):
        assert torch.equal(result.module.up[new].weight, source.module.up[old].weight)
        assert torch.equal(result.module.down[new].weight, source.module.down[old].weight)
    assert torch.equal(predictions(result.module, DEEP), predictions(source.module, DEEP))
    reasons = result.plan.of("up.2").reasons
    planned = require_reason(reasons, "layers_dropped", count=1, members=3, importance="quality")
    assert planned.fields["argument"] == "cross_layers"
    require_reason(reasons, "layer_removed_measured", layer=zero_layer, metric="auc", change=0.0)
    assert result.plan.of("up.2").format == result.plan.of("down.2").format == DROPPED
    require_reason(reasons, "place_removed")
    for index in (0, 1):
        line = result.plan.of(f"up.{index}")
        assert line.format == "float32"
        moved = Reason("moved_from", layer=index + 1)
        assert (moved in line.reasons) == (index >= zero_layer)


def test_only_layers_whose_previous_and_next_layers_fit_each_other_are_dropped(tmp_path):
    """Of widths 20-12-12-12 only the last two layers have equal inputs and outputs."""
    source, bench = DEEP.model(), DEEP.bench(tmp_path / "data")
    step = DropLayers(layers=("deep.*",), count=5)
    result = run(step, source, bench, tmp_path / "out")
    assert result.network.architecture.config["hidden"] == [20, 12]
    assert torch.equal(result.module.deep[0].weight, source.module.deep[0].weight)
    assert torch.equal(result.module.deep[4].running_var, source.module.deep[4].running_var)
    skipping = source.private().module  # a copy of the module tree
    for index in range(6, 12):  # the modules of the last two layers
        skipping.deep[index] = nn.Identity()
    torch.testing.assert_close(predictions(result.module, DEEP), predictions(skipping, DEEP))


def test_removing_a_layer_decreases_the_index_of_all_modules_of_later_layers():
    """A hidden layer is three modules (linear, norm, relu), and all three get a new index."""
    source = DEEP.model()
    (stack,) = (item for item in find_stacks(source) if item.description() == "hidden")
    shorter, shorter_stack = remove_member(source.private(), SIGNATURE, stack, member=2)
    assert shorter_stack.members == 3
    before, after = source.module.deep, shorter.module.deep
    assert torch.equal(after[6].weight, before[9].weight)
    assert torch.equal(after[7].running_mean, before[10].running_mean)
    assert torch.equal(after[3].weight, before[3].weight)
    with pytest.raises(NotAMember) as caught:
        remove_member(source.private(), SIGNATURE, stack, member=1)
    require_reason([caught.value.reason], "rest_does_not_fit", layer=1)


def test_bytes_in_the_plan_equal_the_bytes_of_the_stored_tensors_after_dropped_layers(tmp_path):
    result = drop_layers(BLOCKS, tmp_path, count=2)
    assert result.network.architecture.config == {"layers": 2}
    stored = sum(t.numel() * t.element_size() for t in map_tensors(tmp_path / "out").values())
    assert sum(line.bytes_after for line in result.plan.lines) == stored
    predicted = dry_run(DropLayers(count=2), BLOCKS.model(), BLOCKS.bench(tmp_path / "data"))
    assert stored_bytes(predicted.module) == stored
    assert predicted.network.architecture == result.network.architecture
    predicted_reasons = predicted.plan.of("blocks.3.up").reasons
    assert result.plan.of("blocks.3.up").reasons[: len(predicted_reasons)] == predicted_reasons
    pruned = run(
        Channels(layers=("*.up",)), result, BLOCKS.bench(tmp_path / "d"), tmp_path / "then"
    )
    assert pruned.plan.of("blocks.3.up").format == DROPPED
    assert pruned.plan.of("blocks.1.up").steps == ("drop_layers", "channels")


def test_greedy_selection_is_at_least_as_good_as_random_selections_on_validation_rows(tmp_path):
    bench = BLOCKS.bench(tmp_path / "data")

    def quality_after(step: DropLayers, seed: int) -> float:
        seeded = bench.model_copy(update={"seed": seed})
        result = run(step, BLOCKS.model(), seeded, tmp_path / f"{step.importance}{seed}")
        return quality(result.module, HISTORY, bench.validation)

    best = quality_after(DropLayers(), 0)
    random_results = [quality_after(DropLayers(importance="random"), seed) for seed in range(4)]
    assert best >= max(random_results)
    assert len(set(random_results)) > 1


def test_a_layer_whose_removal_loses_more_than_most_loss_is_kept(tmp_path):
    source = DEEP.model()
    tables = DEEP.rows_of_tables()
    rows = write_split(
        SIGNATURE, tables, tmp_path / "own", seed=9, score_function=predict_with(source)
    )
    bench = DEEP.bench(tmp_path / "data").model_copy(update={"validation": rows})
    step = DropLayers(layers=("down.*", "up.*"), most_loss=0.0)
    result = run(step, source, bench, tmp_path / "out")
    assert result.network.architecture == source.network.architecture
    reasons = result.plan.of("up.0").reasons
    assert require_reason(reasons, "layer_kept", metric="auc").fields["change"] < 0
    require_reason(reasons, "nothing_better")
    assert result.plan.of("up.0").steps == ()


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        (Reference(AveragedCrossNet, SIGNATURE), "not_the_skipping_network"),
        (RANKER, "no_layer_count"),
        (
            Reference(LowRankCrossNet, SIGNATURE, {"cross_layers": 1, "hidden": [20, 12]}),
            "rest_does_not_fit",
        ),
    ],
    ids=["divided by the number", "no layer count", "unequal widths"],
)
def test_layers_that_cannot_be_dropped_are_kept_with_a_reason(reference, code, tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        drop_layers(reference, tmp_path)
    assert HasReason(code) in caught.value.fields["reasons"].values()


def test_layers_that_earlier_steps_changed_differently_are_kept(tmp_path):
    bench = DEEP.bench(tmp_path / "data")
    with_pruned_layer = run(Magnitude(layers=("up.1",)), DEEP.model(), bench, tmp_path / "one")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(DropLayers(layers=("up.*", "down.*")), with_pruned_layer, bench, tmp_path / "out")
    reasons = caught.value.fields["reasons"]["down.0"]
    assert reasons == HasReason("treated_differently", argument="cross_layers")
    packed = run(StaticInt8(), DEEP.model(), bench, tmp_path / "packed")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(DropLayers(), packed, bench, tmp_path / "out")
    assert caught.value.fields["reasons"]["down.0"] == (
        Reason("already_stored", format="static_int8"),
    )


def test_a_network_with_dropped_layers_can_be_distilled_and_quantized(tmp_path):
    bench = DEEP.bench(tmp_path / "data")
    model = drop_layers(DEEP, tmp_path, layers=("down.*", "up.*"))
    for step in (Distill(training=SHORT_TRAINING), StaticInt8()):
        model = run(step, model, bench, tmp_path / step.kind)
    assert model.plan.of("up.0").steps[-2:] == ("distill", "static_int8")
    assert model.plan.of("up.2").steps == ("drop_layers",)
    assert model.plan.of("up.2").format == DROPPED


def test_retrieval_models_support_only_random_importance():
    source = Reference(TableAndTowerNet, RETRIEVAL).model()
    with raises_code(NothingToCompress, "row_metric_for_layers_missing"):
        DropLayers().plan(source, Bench(signature=RETRIEVAL))
    # No error, although this network has no layer that can be dropped.
    decisions = DropLayers(importance="random").plan(source, Bench(signature=RETRIEVAL)).decisions
    assert not any(decision.selected for decision in decisions.values())
