"""``channels``: removed channels, the matching inputs of consumers, and channels that are kept.

In the fields of reasons, ``producer`` is the layer that outputs channels, ``consumer`` a module
that reads them, and ``count`` a width that was tried. The networks are in ``tests/models.py`` and
``tests/narrow_networks.py``. By default, the step keeps half of the channels of a layer, rounded to
a multiple of 8.
"""

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
    SIGNATURE,
    BottleneckNet,
    FixedWidthNet,
    FlippedChannelsNet,
    GatedHeadsNet,
    HiddenLayerNet,
    ParallelLayersNet,
    ResidualConcatNet,
    ResidualSumNet,
    SharedLayerNet,
    SoftmaxNet,
    SplitConcatNet,
    StatefulNet,
    TableAndTowerNet,
    WeightReadingNet,
)
from reason_codes import require_reason
from safetensors.torch import load_file, save_file
from signatures import replace_output
from torch import Tensor

from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.importance import group_importance, select_kept_groups
from compressors.prune.dense.kept_shares import kept_width
from compressors.prune.structure.channel_consumers import (
    WidthConsumers,
    channel_layouts,
    find_consumers,
    trace,
)
from compressors.prune.structure.config_widths import find_widths
from compressors.quantize.dense.static_int8 import StaticInt8

# ``left`` and ``again`` have one width, because their outputs are added. The sum and the output of
# ``right``, after a norm and the PReLU ``slope``, are the inputs of ``deep``.
RESIDUAL_CONCAT = Reference(ResidualConcatNet, SIGNATURE)


def prune_reference(reference: Reference, folder, **settings) -> tuple[Model, Model]:
    """Run ``Channels`` with these settings on a reference model; return source and result."""
    source = reference.model()
    bench = reference.bench(folder / "data")
    return source, run(Channels(**settings), source, bench, folder / "out")


def consumers_of_width(argument: str, source: Model) -> WidthConsumers:
    """Return the consumers of the width ``argument``, with one channel per group."""
    widths, _ = find_widths(source)
    traces = trace(source.module, SIGNATURE, {"user": 30}, widths[argument])
    return find_consumers(widths[argument], traces, next(channel_layouts(widths[argument])))


def predictions(model: Model, reference: Reference) -> Tensor:
    inputs = models.generate_inputs(reference.signature, reference.rows_of_tables(), 50, seed=11)
    with torch.no_grad():
        return model.module(**inputs).reshape(-1)


@given(st.integers(1, 4096), st.floats(0.01, 0.99), st.integers(1, 64))
def test_kept_width_is_the_nearest_multiple_and_at_least_one_multiple(value, keep, multiple):
    width = kept_width(value, keep, multiple)
    assert width % multiple == 0
    assert width >= multiple
    assert abs(width - value * keep) <= multiple / 2 or width == multiple


@pytest.mark.parametrize("importance", ["l1", "l2", "gradient", "random"])
@pytest.mark.parametrize(
    "reference", [RESIDUAL_CONCAT, RANKER, NORMED], ids=lambda item: item.network.__name__
)
def test_a_pruned_network_has_the_remaining_weights_of_its_source(reference, importance, tmp_path):
    """``apply`` itself compares the scores, so this test checks only widths and weights."""
    source, result = prune_reference(reference, tmp_path, importance=importance)
    before, after = dict(source.module.named_parameters()), dict(result.module.named_parameters())
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert changed
    for name in before.keys() - changed:
        assert torch.equal(before[name], after[name]), name
    for name in changed:  # every remaining weight is one of the source
        assert torch.isin(after[name], before[name]).all(), name
    built = reference.network(**result.network.architecture.config)
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in result.module.state_dict().items()
    }


def test_pruning_removes_zero_channels_first_and_predictions_do_not_change(tmp_path):
    """Half of the channels are zero; the importances l1, l2 and gradient remove exactly these."""
    for importance in ("l1", "l2", "gradient"):
        source = RESIDUAL_CONCAT.model()
        zeroed = {"left": slice(0, 8), "again": slice(0, 8), "right": slice(12, 24)}
        with torch.no_grad():
            for name, channels in zeroed.items():
                layer = getattr(source.module, name)
                layer.weight[channels] = 0
                layer.bias[channels] = 0
            # A norm adds its bias to a channel of zeros, so its weights are zeroed as well.
            source.module.norm.weight[12:] = 0
            source.module.norm.bias[12:] = 0
            source.module.slope.weight[12:] = 0
            source.module.again.weight[:, :8] = 0
            source.module.deep.weight[:, 12:32] = 0
            source.module.deep.weight[16:] = 0
            source.module.deep.bias[16:] = 0
            source.module.out.weight[:, 16:] = 0
        bench = RESIDUAL_CONCAT.bench(tmp_path / "data")
        step = Channels(importance=importance, multiple=4)
        result = run(step, source, bench, tmp_path / importance)
        config = result.network.architecture.config
        assert config == {"left": 8, "right": 12, "deep": 16}
        difference = predictions(result, RESIDUAL_CONCAT) - predictions(source, RESIDUAL_CONCAT)
        # Sums of fewer terms round differently; removing a used channel changes scores by 0.1.
        assert difference.abs().max() < 1e-5


def test_layers_whose_outputs_are_added_keep_the_same_channels():
    source = RESIDUAL_CONCAT.model()
    consumers = consumers_of_width("left", source)
    assert consumers.tied_producers == (("again", "left"),)
    importance = {"left": torch.zeros(16), "again": torch.zeros(16)}
    importance["left"][[3, 5]] = 1.0
    importance["again"][[5, 9]] = 2.0
    kept_channels = select_kept_groups(consumers, importance, 3)
    assert kept_channels["left"].nonzero().flatten().tolist() == [3, 5, 9]
    assert torch.equal(kept_channels["left"], kept_channels["again"])


def test_importance_is_the_norm_of_the_weights_of_the_channel_and_of_its_consumers():
    """``l2`` compares squares of norms, which have the order of the norms."""
    source = Reference(HiddenLayerNet, SIGNATURE).model()
    consumers = consumers_of_width("width", source)
    squared_weights = {
        name: weight.detach().square()
        for name, weight in source.module.named_parameters()
        if not name.startswith("user")
    }
    importance_of_hidden = group_importance(consumers, squared_weights, "l2")["hidden"]
    hidden, out = source.module.hidden, source.module.out
    producing = [(hidden.weight[c] ** 2).sum() + hidden.bias[c] ** 2 for c in range(16)]
    consuming = [(out.weight[:, c] ** 2).sum() for c in range(16)]
    expected = torch.stack(producing) + torch.stack(consuming)
    torch.testing.assert_close(importance_of_hidden, expected)


def test_a_consumer_that_reads_each_channel_twice_loses_both_inputs(tmp_path):
    reference = Reference(HiddenLayerNet, SIGNATURE, {"twice": True})
    _, result = prune_reference(reference, tmp_path)
    assert result.module.hidden.out_features == 8
    assert result.module.out.in_features == 16
    # Arguments that keep their default are not written to the config.
    assert result.network.architecture.config == {"twice": True, "width": 8}


def test_a_consumer_that_reads_channels_in_reverse_order_loses_the_matching_inputs(tmp_path):
    source, result = prune_reference(Reference(FlippedChannelsNet, SIGNATURE), tmp_path)
    weight_rows = {tuple(row) for row in source.module.hidden.weight.tolist()}
    kept_channels = [tuple(row) for row in result.module.hidden.weight.tolist()]
    assert set(kept_channels) < weight_rows
    # Column j of the consumer belongs to channel 15 - j of ``hidden``.
    positions = [source.module.hidden.weight.tolist().index(list(row)) for row in kept_channels]
    expected = source.module.out.weight[0, [15 - position for position in reversed(positions)]]
    assert torch.equal(result.module.out.weight[0], expected)


def test_gradient_importance_without_training_rows_raises_nothing_to_compress(tmp_path):
    bench = NORMED.bench(tmp_path / "data").model_copy(update={"train": None})
    with raises_code(NothingToCompress, "rows_missing", step="channels", missing=("train",)):
        run(Channels(importance="gradient"), NORMED.model(), bench, tmp_path / "out")


def test_random_importance_depends_on_the_seed_only(tmp_path):
    bench = RESIDUAL_CONCAT.bench(tmp_path / "data")
    kept_channels = []
    for index, seed in enumerate((1, 1, 2)):
        other = bench.model_copy(update={"seed": seed})
        step = Channels(importance="random")
        result = run(step, RESIDUAL_CONCAT.model(), other, tmp_path / str(index))
        kept_channels.append(result.module.deep.weight)
    assert torch.equal(kept_channels[0], kept_channels[1])
    assert not torch.equal(kept_channels[0], kept_channels[2])


@pytest.mark.parametrize(
    ("reference", "layer", "reason"),
    [
        (
            Reference(SoftmaxNet, SIGNATURE),
            "hidden",
            Reason("mixed_before_consumer", producer="hidden", consumer="out"),
        ),
        (
            Reference(ResidualSumNet, SIGNATURE),
            "hidden",
            Reason("channels_reach_score", producer="hidden"),
        ),
        (ATTENTION, "key", Reason("size_of_other", argument="dim", module="user")),
        (
            Reference(HiddenLayerNet, SIGNATURE, {"width": 8}),
            "hidden",
            Reason("no_fewer_channels", channels=8, share=0.5, multiple=8),
        ),
    ],
    ids=["softmax", "added to the score", "dimension of a table", "already one multiple"],
)
def test_a_layer_that_cannot_be_pruned_is_skipped_with_a_reason(reference, layer, reason, tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        prune_reference(reference, tmp_path)
    assert caught.value.fields["reasons"][layer] == (reason,)


def test_a_layer_without_a_width_argument_is_skipped_with_a_reason(tmp_path):
    reference = Reference(FixedWidthNet, SIGNATURE)
    with raises_code(NothingToCompress, "units_missing") as caught:
        prune_reference(reference, tmp_path)
    assert caught.value.fields["reasons"]["hidden"] == (Reason("no_width_argument", outputs=16),)


@pytest.mark.parametrize(
    ("network", "signature", "layer", "reason"),
    [
        (WeightReadingNet, SIGNATURE, "hidden", HasReason("channels_read")),
        (GatedHeadsNet, RATE, "value", HasReason("channels_read")),
        (SplitConcatNet, SIGNATURE, "hidden", HasReason("channels_read")),
        (StatefulNet, SIGNATURE, "hidden", HasReason("channels_read")),
        (BottleneckNet, SIGNATURE, "hidden", HasReason("narrower_fails", width="width", count=64)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_channels_that_code_outside_the_layers_depends_on_are_kept(
    network, signature, layer, reason, tmp_path
):
    with raises_code(NothingToCompress, "units_missing") as caught:
        prune_reference(Reference(network, signature), tmp_path)
    assert caught.value.fields["reasons"][layer] == reason


def test_shared_layers_and_norms_without_weights_are_pruned(tmp_path):
    """Default arguments without a JSON form are not written to the config."""
    _, result = prune_reference(Reference(SharedLayerNet, SIGNATURE), tmp_path)
    assert result.network.architecture.config == {"width": 8}
    assert result.module.first is result.module.second
    assert result.module.first.out_features == 8
    assert result.module.norm.running_mean.shape == (8,)
    assert result.module.out.in_features == 16


def test_a_layer_that_cannot_be_pruned_does_not_prevent_pruning_others(tmp_path):
    _, result = prune_reference(Reference(ParallelLayersNet, SIGNATURE), tmp_path)
    assert result.network.architecture.config == {"prunable": 8}
    require_reason(result.plan.of("fixed").reasons, "channels_read")


def test_gradient_importance_with_lists_of_one_row_raises_step_refused(tmp_path):
    """The softmax over a list of one row is 1 for any score."""
    ranking = replace_output(
        SIGNATURE.model_copy(update={"group": "g"}), kind="ranking", form="score", metric="ndcg@10"
    )
    reference = Reference(HiddenLayerNet, ranking)
    bench = reference.bench(tmp_path / "data")
    path = tmp_path / "data" / "train" / "data.safetensors"
    single_row_lists = {**load_file(path), "@group": torch.arange(models.BENCH_ROWS)}
    save_file(single_row_lists, path)
    with raises_code(StepRefused, "channel_gradients_zero"):
        run(Channels(importance="gradient"), reference.model(), bench, tmp_path / "out")


def test_the_hidden_layer_of_a_tower_is_pruned_and_its_output_vector_is_not(tmp_path):
    source = Reference(TableAndTowerNet, RETRIEVAL).model()
    bench = models.Bench(signature=RETRIEVAL)
    result = run(Channels(), source, bench, tmp_path / "out")
    assert result.network.architecture.config == {"hidden": 8}
    assert result.module.query[3].in_features == 8
    assert result.module.query[3].out_features == 6
    with raises_code(NothingToCompress, "loss_missing"):
        Channels(importance="gradient").plan(source, bench)


def test_tracing_channels_in_batches_gives_the_same_network(tmp_path, monkeypatch):
    in_one_batch = prune_reference(RESIDUAL_CONCAT, tmp_path / "whole")[1]
    monkeypatch.setattr("compressors.prune.structure.channel_consumers.CHANNELS_PER_BATCH", 5)
    in_batches = prune_reference(RESIDUAL_CONCAT, tmp_path / "batches")[1]
    torch.testing.assert_close(
        dict(in_batches.module.state_dict()),
        dict(in_one_batch.module.state_dict()),
        rtol=0,
        atol=0,
    )


def test_pruning_quantized_layers_raises_nothing_to_compress(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    packed = run(StaticInt8(), NORMED.model(), bench, tmp_path / "packed")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(Channels(), packed, bench, tmp_path / "out")
    assert caught.value.fields["reasons"]["hidden"] == (
        Reason("already_stored", format="static_int8"),
    )


def test_a_layer_that_shares_its_width_with_an_excluded_layer_is_skipped(tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        prune_reference(RESIDUAL_CONCAT, tmp_path, layers=("left",))
    reasons = caught.value.fields["reasons"]["left"]
    require_reason(reasons, "shares_width", width="left", layer="again")
    require_reason(reasons, "not_matched", patterns=("left",))


def test_the_plan_has_a_reason_for_every_layer(tmp_path):
    _, result = prune_reference(RESIDUAL_CONCAT, tmp_path)
    reasons = {line.module: line.reasons for line in result.plan.lines}
    fewer = Reason("fewer_channels", before=16, after=8, width="left")
    cut = Reason("channels_cut", step="channels", what=fewer, importance="l2")
    assert reasons["left"] == (cut,)
    require_reason(reasons["again"], "inputs_follow")
    require_reason(reasons["again"], "fewer_channels", before=16, after=8)
    assert reasons["out"] == (Reason("inputs_follow", producers=("deep",)),)
    assert reasons["user"] == (Reason("wrong_role", step="channels", role="table"),)
    assert result.plan.of("user").steps == ()


@given(st.integers(2, 6), st.integers(2, 6), st.integers(2, 6), st.integers(0, 99))
def test_networks_of_random_widths_and_weights_are_pruned_to_the_expected_widths(
    left, right, deep, seed
):
    """``apply`` raises if the scores differ from those of the source without these channels."""
    config = {"left": left * 4, "right": right * 4, "deep": deep * 4}
    # ``private`` returns a copy of the module tree in evaluation mode.
    model = Reference(ResidualConcatNet, SIGNATURE, config).model(seed).private()
    bench = models.Bench(signature=SIGNATURE)
    result = models.plan_and_apply(Channels(multiple=4), model, bench).model
    expected = {name: kept_width(value, 0.5, 4) for name, value in config.items()}
    assert result.network.architecture.config == expected
