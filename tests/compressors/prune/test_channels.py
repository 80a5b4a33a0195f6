"""Channels removed together with all that reads them, and channels that have to stay."""

import hypothesis.strategies as st
import models
import pytest
import torch
from error_codes import HasReason, raises_code
from hypothesis import given
from models import ATTENTION, NORMED, RANKER, Reference
from narrow_networks import (
    RATE,
    RETRIEVAL,
    SCHEMA,
    Branched,
    Centred,
    Fixed,
    Halves,
    Heads,
    Leaking,
    Mixed,
    Plain,
    Remembering,
    Reversed,
    Softmaxed,
    Squeezed,
    Towers,
    Twice,
)
from reason_codes import with_code
from safetensors.torch import load_file, save_file
from signatures import with_output
from torch import Tensor

from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.importance import kept_units, unit_importance
from compressors.prune.dense.kept_shares import kept_width
from compressors.prune.structure.channel_consumers import Readers, layouts, readers_of, trace
from compressors.prune.structure.config_widths import find_widths
from compressors.quantize.dense.static_int8 import StaticInt8

BRANCHED = Reference(Branched, SCHEMA)


def narrowed(reference: Reference, folder, **settings) -> tuple[Model, Model]:
    source = reference.model()
    bench = reference.bench(folder / "data")
    return source, run(Channels(**settings), source, bench, folder / "out")


def readers_by(number: str, source: Model) -> Readers:
    """Who reads the width of that number, in the first order that fits."""
    widths, _ = find_widths(source)
    traces = trace(source.module, SCHEMA, {"user": 30}, widths[number])
    return readers_of(widths[number], traces, next(layouts(widths[number])))


def predictions(model: Model, reference: Reference) -> Tensor:
    inputs = models.example(reference.signature, reference.rows_of_tables(), 50, seed=11)
    with torch.no_grad():
        return model.module(**inputs).reshape(-1)


@given(st.integers(1, 4096), st.floats(0.01, 0.99), st.integers(1, 64))
def test_a_new_width_is_the_nearest_multiple_and_at_least_one_of_them(value, keep, multiple):
    width = kept_width(value, keep, multiple)
    assert width % multiple == 0
    assert width >= multiple
    assert abs(width - value * keep) <= multiple / 2 or width == multiple


@pytest.mark.parametrize("importance", ["l1", "l2", "gradient", "random"])
@pytest.mark.parametrize(
    "reference", [BRANCHED, RANKER, NORMED], ids=lambda item: item.network.__name__
)
def test_a_narrower_network_is_the_old_one_without_those_channels(reference, importance, tmp_path):
    """``apply`` compares with zeroed channels; here the widths and bytes are looked at."""
    source, result = narrowed(reference, tmp_path, importance=importance)
    before, after = dict(source.module.named_parameters()), dict(result.module.named_parameters())
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed
    for name in before.keys() - changed:
        assert torch.equal(before[name], after[name]), name
    for name in changed:  # every number that is left was there before
        assert torch.isin(after[name], before[name]).all(), name
    built = reference.network(**result.network.architecture.config)
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in result.module.state_dict().items()
    }


def test_zero_channels_are_found_and_nothing_changes_without_them(tmp_path):
    """Half the channels do nothing; a criterion of size must cut exactly those."""
    for importance in ("l1", "l2", "gradient"):
        source = BRANCHED.model()
        idle = {"left": slice(0, 8), "again": slice(0, 8), "right": slice(12, 24)}
        with torch.no_grad():
            for name, channels in idle.items():
                layer = getattr(source.module, name)
                layer.weight[channels] = 0
                layer.bias[channels] = 0
            # A norm moves a channel of zeros: its own numbers must be idle as well.
            source.module.norm.weight[12:] = 0
            source.module.norm.bias[12:] = 0
            source.module.slope.weight[12:] = 0
            source.module.again.weight[:, :8] = 0
            source.module.deep.weight[:, 12:32] = 0
            source.module.deep.weight[16:] = 0
            source.module.deep.bias[16:] = 0
            source.module.out.weight[:, 16:] = 0
        bench = BRANCHED.bench(tmp_path / "data")
        step = Channels(importance=importance, multiple=4)
        result = run(step, source, bench, tmp_path / importance)
        config = result.network.architecture.config
        assert config == {"left": 8, "right": 12, "deep": 16}
        difference = predictions(result, BRANCHED) - predictions(source, BRANCHED)
        # Sums of fewer terms round otherwise; a cut channel that was in use moves scores by 0.1.
        assert difference.abs().max() < 1e-5


def test_layers_whose_channels_meet_keep_the_same_ones():
    source = BRANCHED.model()
    readers = readers_by("left", source)
    assert readers.tied == (("again", "left"),)
    importance = {"left": torch.zeros(16), "again": torch.zeros(16)}
    importance["left"][[3, 5]] = 1.0
    importance["again"][[5, 9]] = 2.0
    kept = kept_units(readers, importance, 3)
    assert kept["left"].nonzero().flatten().tolist() == [3, 5, 9]
    assert torch.equal(kept["left"], kept["again"])


def test_a_channels_importance_is_its_own_weights_and_those_that_read_it():
    source = Reference(Plain, SCHEMA).model()
    readers = readers_by("width", source)
    sizes = {
        name: weight.detach().square()
        for name, weight in source.module.named_parameters()
        if not name.startswith("user")
    }
    found = unit_importance(readers, sizes, "l2")["hidden"]
    hidden, out = source.module.hidden, source.module.out
    own = [(hidden.weight[c] ** 2).sum() + hidden.bias[c] ** 2 for c in range(16)]
    read = [(out.weight[:, c] ** 2).sum() for c in range(16)]
    torch.testing.assert_close(found, torch.stack(own) + torch.stack(read))


def test_a_layer_that_reads_every_channel_twice_loses_both(tmp_path):
    reference = Reference(Plain, SCHEMA, {"twice": True})
    _, result = narrowed(reference, tmp_path)
    assert result.module.hidden.out_features == 8
    assert result.module.out.in_features == 16
    # Unchanged defaults of the class are not written out.
    assert result.network.architecture.config == {"twice": True, "width": 8}


def test_channels_in_another_order_are_followed(tmp_path):
    source, result = narrowed(Reference(Reversed, SCHEMA), tmp_path)
    rows = {tuple(row) for row in source.module.hidden.weight.tolist()}
    kept = [tuple(row) for row in result.module.hidden.weight.tolist()]
    assert set(kept) < rows
    # Column j of the reader belongs to the maker's channel 15 - j.
    places = [source.module.hidden.weight.tolist().index(list(row)) for row in kept]
    expected = source.module.out.weight[0, [15 - place for place in reversed(places)]]
    assert torch.equal(result.module.out.weight[0], expected)


def test_gradient_importance_needs_training_rows(tmp_path):
    bench = NORMED.bench(tmp_path / "data").model_copy(update={"train": None})
    with raises_code(NothingToCompress, "rows_missing", step="channels", missing=("train",)):
        run(Channels(importance="gradient"), NORMED.model(), bench, tmp_path / "out")


def test_random_channels_follow_the_seed(tmp_path):
    bench = BRANCHED.bench(tmp_path / "data")
    kept = []
    for number, seed in enumerate((1, 1, 2)):
        other = bench.model_copy(update={"seed": seed})
        step = Channels(importance="random")
        result = run(step, BRANCHED.model(), other, tmp_path / str(number))
        kept.append(result.module.deep.weight)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


@pytest.mark.parametrize(
    ("reference", "layer", "reason"),
    [
        (
            Reference(Softmaxed, SCHEMA),
            "hidden",
            Reason("mixed_before_reader", maker="hidden", reader="out"),
        ),
        (
            Reference(Leaking, SCHEMA),
            "hidden",
            Reason("channels_reach_score", maker="hidden"),
        ),
        (ATTENTION, "key", Reason("size_of_other", argument="dim", module="user")),
        (
            Reference(Plain, SCHEMA, {"width": 8}),
            "hidden",
            Reason("no_fewer_channels", channels=8, share=0.5, multiple=8),
        ),
    ],
    ids=["softmax", "past the layers", "a table's dimension", "narrow already"],
)
def test_a_layer_that_cannot_be_narrower_says_why(reference, layer, reason, tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        narrowed(reference, tmp_path)
    assert caught.value.fields["reasons"][layer] == (reason,)


def test_a_layer_without_a_number_in_the_configuration_says_so(tmp_path):
    reference = Reference(Fixed, SCHEMA)
    with raises_code(NothingToCompress, "units_missing") as caught:
        narrowed(reference, tmp_path)
    assert caught.value.fields["reasons"]["hidden"] == (Reason("no_width_argument", outputs=16),)


@pytest.mark.parametrize(
    ("network", "signature", "layer", "reason"),
    [
        (Centred, SCHEMA, "hidden", HasReason("channels_read")),
        (Heads, RATE, "value", HasReason("channels_read")),
        (Halves, SCHEMA, "hidden", HasReason("channels_read")),
        (Remembering, SCHEMA, "hidden", HasReason("channels_read")),
        (Squeezed, SCHEMA, "hidden", HasReason("narrower_fails", width="width", count=64)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_channels_that_code_reads_past_the_layers_stay(network, signature, layer, reason, tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        narrowed(Reference(network, signature), tmp_path)
    assert caught.value.fields["reasons"][layer] == reason


def test_shared_layers_and_norms_without_weights_are_cut(tmp_path):
    """Its defaults have no JSON form, and stay unwritten."""
    _, result = narrowed(Reference(Twice, SCHEMA), tmp_path)
    assert result.network.architecture.config == {"width": 8}
    assert result.module.first is result.module.second
    assert result.module.first.out_features == 8
    assert result.module.norm.running_mean.shape == (8,)
    assert result.module.out.in_features == 16


def test_one_layer_that_cannot_be_cut_does_not_keep_the_others(tmp_path):
    _, result = narrowed(Reference(Mixed, SCHEMA), tmp_path)
    assert result.network.architecture.config == {"free": 8}
    with_code(result.plan.of("held").reasons, "channels_read")


def test_lists_of_one_row_give_no_gradient(tmp_path):
    """The softmax over a list of one row is 1 for any score."""
    ranking = with_output(
        SCHEMA.model_copy(update={"group": "g"}), kind="ranking", form="score", metric="ndcg@10"
    )
    reference = Reference(Plain, ranking)
    bench = reference.bench(tmp_path / "data")
    path = tmp_path / "data" / "train" / "data.safetensors"
    alone = {**load_file(path), "@group": torch.arange(models.BENCH_ROWS)}
    save_file(alone, path)
    with raises_code(StepRefused, "channel_gradients_zero"):
        run(Channels(importance="gradient"), reference.model(), bench, tmp_path / "out")


def test_a_towers_hidden_layer_is_cut_and_its_vector_is_not(tmp_path):
    source = Reference(Towers, RETRIEVAL).model()
    bench = models.Bench(signature=RETRIEVAL)
    result = run(Channels(), source, bench, tmp_path / "out")
    assert result.network.architecture.config == {"hidden": 8}
    assert result.module.query[3].in_features == 8
    assert result.module.query[3].out_features == 6
    with raises_code(NothingToCompress, "loss_missing"):
        Channels(importance="gradient").plan(source, bench)


def test_wide_layers_are_traced_in_slices(tmp_path, monkeypatch):
    whole = narrowed(BRANCHED, tmp_path / "whole")[1]
    monkeypatch.setattr("compressors.prune.structure.channel_consumers.CHANNELS_PER_BATCH", 5)
    sliced = narrowed(BRANCHED, tmp_path / "sliced")[1]
    torch.testing.assert_close(
        dict(sliced.module.state_dict()), dict(whole.module.state_dict()), rtol=0, atol=0
    )


def test_quantized_layers_are_pruned_before(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    packed = run(StaticInt8(), NORMED.model(), bench, tmp_path / "packed")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(Channels(), packed, bench, tmp_path / "out")
    assert caught.value.fields["reasons"]["hidden"] == (
        Reason("already_stored", format="static_int8"),
    )


def test_a_layer_that_shares_its_width_with_one_left_out_stays(tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        narrowed(BRANCHED, tmp_path, layers=("left",))
    reasons = caught.value.fields["reasons"]["left"]
    with_code(reasons, "shares_width", width="left", layer="again")
    with_code(reasons, "not_matched", patterns=("left",))


def test_the_plan_says_what_became_of_every_layer(tmp_path):
    _, result = narrowed(BRANCHED, tmp_path)
    reasons = {line.module: line.reasons for line in result.plan.lines}
    fewer = Reason("fewer_channels", before=16, after=8, width="left")
    cut = Reason("channels_cut", step="channels", what=fewer, importance="l2")
    assert reasons["left"] == (cut,)
    with_code(reasons["again"], "inputs_follow")
    with_code(reasons["again"], "fewer_channels", before=16, after=8)
    assert reasons["out"] == (Reason("inputs_follow", makers=("deep",)),)
    assert reasons["user"] == (Reason("wrong_role", step="channels", role="table"),)
    assert result.plan.of("user").steps == ()


@given(st.integers(2, 6), st.integers(2, 6), st.integers(2, 6), st.integers(0, 99))
def test_any_widths_and_weights_survive_the_cut(left, right, deep, seed):
    """The check inside ``apply`` compares with zeroed channels on every call."""
    config = {"left": left * 4, "right": right * 4, "deep": deep * 4}
    model = Reference(Branched, SCHEMA, config).model(seed).private()
    bench = models.Bench(signature=SCHEMA)
    result = models.planned_and_applied(Channels(multiple=4), model, bench).model
    expected = {name: kept_width(value, 0.5, 4) for name, value in config.items()}
    assert result.network.architecture.config == expected
