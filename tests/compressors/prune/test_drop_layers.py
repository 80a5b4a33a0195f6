"""Layer removal: the layers after a removed one move up, and some layers must stay."""

import models
import pytest
import torch
from error_codes import HasReason, raises_code
from models import QUICKLY, RANKER, Reference, prepared
from narrow_networks import HISTORY, RETRIEVAL, SCHEMA, Crossed, Towers, Transformer
from reason_codes import with_code
from torch import Tensor, nn

from compressors.contracts import DROPPED, Bench
from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.state.module_state import mapped
from compressors.core.units import stored_bytes
from compressors.distill.distill import Distill
from compressors.errors.compression import NothingToCompress
from compressors.errors.widths import NotAMember
from compressors.metrics.validation_score import quality
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.drop_layers import DropLayers
from compressors.prune.dense.magnitude import Magnitude
from compressors.prune.structure.config_depth import find_stacks, without_member
from compressors.quantize.dense.static_int8 import StaticInt8

DEEP = Reference(Crossed, SCHEMA, {"cross_layers": 3, "hidden": [20, 12, 12, 12]})
BLOCKS = Reference(Transformer, HISTORY, {"layers": 4})


def dropped(reference: Reference, folder, source: Model | None = None, **settings) -> Model:
    bench = reference.bench(folder / "data")
    return run(DropLayers(**settings), source or reference.model(), bench, folder / "out")


def predictions(module: nn.Module, reference: Reference) -> Tensor:
    inputs = models.example(reference.signature, reference.rows_of_tables(), 50, seed=11)
    with torch.no_grad():
        return module(**inputs).reshape(-1)


class Weighted(Crossed):
    """Each cross layer counts the less, the more there are."""

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        first = torch.cat([self.user(user), price], dim=1)
        x = first
        for down, up in zip(self.down, self.up, strict=True):
            x = first * up(down(x)) / len(self.down) + x
        score: Tensor = self.out(x)
        return score


def test_layers_are_found_by_number_and_by_list():
    found = {stack.description(): stack for stack in find_stacks(DEEP.model())}
    assert found.keys() == {"cross_layers", "hidden"}
    assert found["cross_layers"].containers == {"down": 1, "up": 1}
    assert found["hidden"].containers == {"deep": 3}
    assert found["hidden"].members == 4
    (blocks,) = find_stacks(BLOCKS.model())
    assert (blocks.description(), blocks.containers) == ("layers", {"blocks": 1})


@pytest.mark.parametrize("idle", [0, 1, 2])
def test_the_layer_that_does_nothing_goes_and_no_score_changes(idle, tmp_path):
    source = DEEP.model()
    with torch.no_grad():
        source.module.up[idle].weight.zero_()
        source.module.up[idle].bias.zero_()
    bench = DEEP.bench(tmp_path / "data")
    # Labels by the network itself: any other layer that went would cost something.
    tables = DEEP.rows_of_tables()
    rows = prepared(SCHEMA, tables, tmp_path / "own", 9, lambda x: source.module(**x).reshape(-1))
    bench = bench.model_copy(update={"validation": rows})
    step = DropLayers(layers=("down.*", "up.*"), most_loss=0.0)
    result = run(step, source, bench, tmp_path / "out")
    assert result.network.architecture.config["cross_layers"] == 2
    stay = [place for place in range(3) if place != idle]
    for new, old in enumerate(stay):
        assert torch.equal(result.module.up[new].weight, source.module.up[old].weight)
        assert torch.equal(result.module.down[new].weight, source.module.down[old].weight)
    assert torch.equal(predictions(result.module, DEEP), predictions(source.module, DEEP))
    reasons = result.plan.of("up.2").reasons
    dropped = with_code(reasons, "layers_dropped", count=1, members=3, importance="quality")
    assert dropped.fields["argument"] == "cross_layers"
    with_code(reasons, "layer_removed_measured", layer=idle, metric="auc", change=0.0)
    assert result.plan.of("up.2").format == result.plan.of("down.2").format == DROPPED
    with_code(reasons, "place_removed")
    for place in (0, 1):
        line = result.plan.of(f"up.{place}")
        assert line.format == "float32"
        moved = Reason("moved_from", layer=place + 1)
        assert (moved in line.reasons) == (place >= idle)


def test_only_hidden_layers_that_leave_a_network_that_fits_go(tmp_path):
    """Of 20-12-12-12 the first has other inputs and the second others' outputs."""
    source, bench = DEEP.model(), DEEP.bench(tmp_path / "data")
    step = DropLayers(layers=("deep.*",), count=5)
    result = run(step, source, bench, tmp_path / "out")
    assert result.network.architecture.config["hidden"] == [20, 12]
    assert torch.equal(result.module.deep[0].weight, source.module.deep[0].weight)
    assert torch.equal(result.module.deep[4].running_var, source.module.deep[4].running_var)
    skipped = source.private().module
    for place in range(6, 12):
        skipped.deep[place] = nn.Identity()
    torch.testing.assert_close(predictions(result.module, DEEP), predictions(skipped, DEEP))


def test_whole_members_move_up():
    """A hidden layer is three modules: each takes the place of its like."""
    source = DEEP.model()
    (stack,) = (item for item in find_stacks(source) if item.description() == "hidden")
    shorter, left = without_member(source.private(), SCHEMA, stack, 2)
    assert left.members == 3
    before, after = source.module.deep, shorter.module.deep
    assert torch.equal(after[6].weight, before[9].weight)
    assert torch.equal(after[7].running_mean, before[10].running_mean)
    assert torch.equal(after[3].weight, before[3].weight)
    with pytest.raises(NotAMember) as caught:
        without_member(source.private(), SCHEMA, stack, 1)
    with_code([caught.value.reason], "rest_does_not_fit", layer=1)


def test_the_plans_bytes_are_those_of_the_stored_tensors(tmp_path):
    result = dropped(BLOCKS, tmp_path, count=2)
    assert result.network.architecture.config == {"layers": 2}
    stored = sum(t.numel() * t.element_size() for t in mapped(tmp_path / "out").values())
    assert sum(line.bytes_after for line in result.plan.lines) == stored
    predicted = dry_run(DropLayers(count=2), BLOCKS.model(), BLOCKS.bench(tmp_path / "data"))
    assert stored_bytes(predicted.module) == stored
    assert predicted.network.architecture == result.network.architecture
    foreseen = predicted.plan.of("blocks.3.up").reasons
    assert result.plan.of("blocks.3.up").reasons[: len(foreseen)] == foreseen
    then = run(Channels(layers=("*.up",)), result, BLOCKS.bench(tmp_path / "d"), tmp_path / "then")
    assert then.plan.of("blocks.3.up").format == DROPPED
    assert then.plan.of("blocks.1.up").steps == ("drop_layers", "channels")


def test_greedy_quality_beats_no_random_draw_on_its_own_rows(tmp_path):
    bench = BLOCKS.bench(tmp_path / "data")

    def worth(step: DropLayers, seed: int) -> float:
        seeded = bench.model_copy(update={"seed": seed})
        made = run(step, BLOCKS.model(), seeded, tmp_path / f"{step.importance}{seed}")
        return quality(made.module, HISTORY, bench.validation)

    best = worth(DropLayers(), 0)
    drawn = [worth(DropLayers(importance="random"), seed) for seed in range(4)]
    assert best >= max(drawn)
    assert len(set(drawn)) > 1


def test_a_loss_that_is_not_allowed_keeps_the_layer(tmp_path):
    source = DEEP.model()
    tables = DEEP.rows_of_tables()
    rows = prepared(SCHEMA, tables, tmp_path / "own", 9, lambda x: source.module(**x).reshape(-1))
    bench = DEEP.bench(tmp_path / "data").model_copy(update={"validation": rows})
    step = DropLayers(layers=("down.*", "up.*"), most_loss=0.0)
    result = run(step, source, bench, tmp_path / "out")
    assert result.network.architecture == source.network.architecture
    reasons = result.plan.of("up.0").reasons
    assert with_code(reasons, "layer_kept", metric="auc").fields["change"] < 0
    with_code(reasons, "nothing_better")
    assert result.plan.of("up.0").steps == ()


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        (Reference(Weighted, SCHEMA), "not_the_skipping_network"),
        (RANKER, "no_layer_count"),
        (Reference(Crossed, SCHEMA, {"cross_layers": 1, "hidden": [20, 12]}), "rest_does_not_fit"),
    ],
    ids=["weighted", "uncounted", "unequal"],
)
def test_layers_that_have_to_stay_say_why(reference, code, tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        dropped(reference, tmp_path)
    assert HasReason(code) in caught.value.fields["reasons"].values()


def test_layers_that_earlier_steps_treat_unlike_stay(tmp_path):
    bench = DEEP.bench(tmp_path / "data")
    one = run(Magnitude(layers=("up.1",)), DEEP.model(), bench, tmp_path / "one")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(DropLayers(layers=("up.*", "down.*")), one, bench, tmp_path / "out")
    reasons = caught.value.fields["reasons"]["down.0"]
    assert reasons == HasReason("treated_differently", argument="cross_layers")
    packed = run(StaticInt8(), DEEP.model(), bench, tmp_path / "packed")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(DropLayers(), packed, bench, tmp_path / "out")
    assert caught.value.fields["reasons"]["down.0"] == (
        Reason("already_stored", format="static_int8"),
    )


def test_a_shorter_network_is_distilled_and_quantized_like_any_other(tmp_path):
    bench = DEEP.bench(tmp_path / "data")
    model = dropped(DEEP, tmp_path, layers=("down.*", "up.*"))
    for step in (Distill(training=QUICKLY), StaticInt8()):
        model = run(step, model, bench, tmp_path / step.kind)
    assert model.plan.of("up.0").steps[-2:] == ("distill", "static_int8")
    assert model.plan.of("up.2").steps == ("drop_layers",)
    assert model.plan.of("up.2").format == DROPPED


def test_towers_are_judged_by_chance_only():
    source = Reference(Towers, RETRIEVAL).model()
    with raises_code(NothingToCompress, "row_metric_for_layers_missing"):
        DropLayers().plan(source, Bench(signature=RETRIEVAL))
    chosen = DropLayers(importance="random").plan(source, Bench(signature=RETRIEVAL)).decisions
    assert not any(choice.selected for choice in chosen.values())
