"""``channels``: how many channels each width keeps, and pruning in rounds with training.

A width is a number of the configuration. It counts groups, here single channels, of the layers that
have this width.
"""

import hypothesis.strategies as st
import pytest
import torch
from error_codes import raises_code, raises_value_error
from hypothesis import given
from models import NORMED, RANKER, SHORT_TRAINING, Reference
from narrow_networks import SIGNATURE, HiddenLayerNet, ResidualConcatNet
from reason_codes import codes_of, require_reason
from torch import nn
from torch.nn import functional as F

import compressors.distill.training.trainer
from compressors.core.batches import batches
from compressors.core.runner import run
from compressors.errors.steps import StepRefused
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.importance import weight_importance
from compressors.prune.dense.kept_shares import (
    equal_shares,
    kept_above_threshold,
    largest_counts_within,
    multiply_adds,
    normalized_importance,
    remaining_multiply_adds,
)
from compressors.prune.structure import prunable_widths
from compressors.prune.structure.channel_consumers import channel_layouts, find_consumers, trace
from compressors.prune.structure.config_widths import Width, find_widths

# The outputs of ``left`` and ``again`` are added, so both layers have the width ``left``. The sum
# and the output of ``right`` are the inputs of ``deep``.
WIDE = Reference(ResidualConcatNet, SIGNATURE, {"left": 32, "right": 48, "deep": 64})


def total_multiply_adds(module: nn.Module) -> float:
    return sum(multiply_adds(module, SIGNATURE).values())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("requested_share", [0.3, 0.5, 0.8])
def test_the_remaining_multiply_adds_are_at_most_the_requested_share_and_close_to_it(
    scope, requested_share, tmp_path
):
    source, bench = WIDE.model(), WIDE.bench(tmp_path / "data")
    step = Channels(flops=requested_share, multiple=4, scope=scope)
    result = run(step, source, bench, tmp_path / "out")
    remaining_share = total_multiply_adds(result.module) / total_multiply_adds(source.module)
    # Widths change in steps of four channels, at most 7 % of these layers' multiply-adds.
    assert requested_share - 0.07 < remaining_share <= requested_share
    require_reason(
        result.plan.of("deep").reasons,
        "multiply_adds_left",
        share=pytest.approx(remaining_share),
    )
    assert all(value % 4 == 0 for value in result.network.architecture.config.values())


def test_a_share_below_the_share_of_the_smallest_widths_raises_share_unreachable(tmp_path):
    with raises_code(StepRefused, "share_unreachable", units="multiply-adds"):
        run(Channels(flops=0.01), WIDE.model(), WIDE.bench(tmp_path), tmp_path / "out")


def test_remaining_multiply_adds_equal_the_multiply_adds_of_the_pruned_network(tmp_path):
    source = WIDE.model()
    widths = tuple(find_widths(source)[0].values())
    counts = {("left",): 8, ("right",): 20, ("deep",): 40}  # by path in the configuration
    macs_of_layers = multiply_adds(source.module, SIGNATURE)
    assert macs_of_layers["deep"] == 80 * 64
    built = ResidualConcatNet(left=8, right=20, deep=40).eval()
    assert remaining_multiply_adds(macs_of_layers, source.module, widths, counts) == pytest.approx(
        total_multiply_adds(built)
    )


def test_global_scope_removes_most_channels_from_the_layer_with_small_weights(tmp_path):
    source, bench = WIDE.model(), WIDE.bench(tmp_path / "data")
    with torch.no_grad():
        source.module.deep.weight[8:] *= 1e-3
        source.module.deep.bias[8:] *= 1e-3
        source.module.out.weight[:, 8:] *= 1e-3
    # ``least`` is the smallest share of its channels that each width keeps.
    step = Channels(scope="global", keep=0.7, multiple=4, least=0.125)
    result = run(step, source, bench, tmp_path / "out")
    config = result.network.architecture.config
    assert config["deep"] == 8  # the floor of one eighth, which is all channels with large weights
    # 70 % of 32 + 32 + 48 + 64 channels are 123, so the others keep what ``deep`` loses. Widths are
    # rounded to multiples of four, so up to 18 fewer are allowed.
    assert 2 * config["left"] + config["right"] + 8 > 105
    reasons = result.plan.of("deep").reasons
    share = total_multiply_adds(result.module) / total_multiply_adds(source.module)
    require_reason(reasons, "fewer_channels", before=64, after=8, width="deep")
    require_reason(reasons, "multiply_adds_left", share=pytest.approx(share))


def test_normalized_importance_is_decreasing_with_mean_one_and_independent_of_scale():
    """Without normalization, a layer with large weights would keep all of its channels."""
    source = WIDE.model()
    width = find_widths(source)[0]["left"]
    traces = trace(source.module, SIGNATURE, {"user": 30}, width)
    # The first of the possible assignments of channels to groups: here, one channel per group.
    consumers = find_consumers(width, traces, next(channel_layouts(width)))
    random_values = torch.rand(32, generator=torch.Generator().manual_seed(0))
    importance = {"left": random_values, "again": random_values.flip(0)}
    normalized = normalized_importance([consumers], importance)[width.path]
    assert float(normalized.mean()) == pytest.approx(1.0)
    assert bool((normalized.diff() <= 0).all())
    larger = {name: 100 * value for name, value in importance.items()}
    torch.testing.assert_close(normalized_importance([consumers], larger)[width.path], normalized)


def test_global_widths_do_not_depend_on_the_scale_of_a_layer(tmp_path):
    """The network stays equal: one layer is multiplied and its consumer divided by a factor."""
    configs = []
    for factor in (1.0, 16.0):  # a power of two, so that no product is rounded
        source = WIDE.model()
        with torch.no_grad():
            source.module.deep.weight.mul_(factor)
            source.module.deep.bias.mul_(factor)
            source.module.out.weight.div_(factor)
        step = Channels(scope="global", importance="activation", multiple=4)
        bench = WIDE.bench(tmp_path / f"{factor}")
        result = run(step, source, bench, tmp_path / f"{factor}" / "out")
        configs.append(result.network.architecture.config)
    assert configs[0] == configs[1]


def test_activation_importance_is_the_share_of_energy_that_a_channel_adds_to_its_consumer(tmp_path):
    reference = Reference(HiddenLayerNet, SIGNATURE)
    source, bench = reference.model(), reference.bench(tmp_path / "data")
    importance = weight_importance(source, bench, "activation", rows=8192)
    contribution = importance["out.weight"].sum(dim=0)
    (rows,) = batches(bench.calibration, SIGNATURE, 10_000)
    module = source.module
    with torch.no_grad():
        x = torch.cat([module.user(rows.inputs["user"]), rows.inputs["price"]], dim=1)
        hidden = F.relu(module.hidden(x))
        contributions = hidden * module.out.weight  # (rows, channels)
    energy = contributions.square().mean(dim=0)
    torch.testing.assert_close(contribution, energy / energy.sum())


# Two widths of consecutive layers: 40 outputs of ``a`` into ``b``, 24 outputs of ``b`` into ``c``.
# ``value`` is the number of groups. The dictionaries have the channels of one group of each layer:
# 1.
WIDTHS = (
    Width(path=("a",), value=40, producers={"a": 1}, consumers={"b": 1}),
    Width(path=("b",), value=24, producers={"b": 1}, consumers={"c": 1}),
)


@given(st.integers(0, 99), st.sampled_from([1, 4, 8]), st.floats(0, 3), st.floats(0, 3))
def test_a_lower_threshold_keeps_at_least_as_many_channels(
    seed, multiple, threshold, other_threshold
):
    random_values = torch.Generator().manual_seed(seed)
    importance = {w.path: torch.rand(w.value, generator=random_values) * 2 for w in WIDTHS}
    floors = {w.path: 0.1 * w.value for w in WIDTHS}
    low, high = sorted((threshold, other_threshold))
    more, fewer = (
        kept_above_threshold(importance, WIDTHS, floors, t, multiple) for t in (low, high)
    )
    for width in WIDTHS:
        assert 0.1 * width.value <= fewer[width.path] <= more[width.path] <= width.value
        assert fewer[width.path] % multiple == 0


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(0, 60))
def test_largest_counts_within_finds_the_largest_cost_within_the_limit(costs, limit):
    costs = sorted(costs)
    within_limit = [cost for cost in costs if cost <= limit]
    width = ("n",)  # the only width; its count is also the cost

    def search() -> int:
        counts = largest_counts_within(
            lambda index: {width: costs[index]},
            len(costs),
            lambda counts: counts[width],
            limit,
            "units of cost",
        )
        return counts[width]

    if within_limit:
        assert search() == within_limit[-1]
    else:
        with raises_code(StepRefused, "share_unreachable"):
            search()


@given(st.floats(0.05, 0.99), st.sampled_from([1, 4, 8, 16]))
def test_equal_shares_keep_between_one_and_all_channels(keep, multiple):
    initial_values = {width.path: width.value for width in WIDTHS}
    counts = equal_shares(WIDTHS, initial_values, keep, multiple)
    for width in WIDTHS:
        assert 1 <= counts[width.path] <= width.value


# --- rounds and training ---------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_three_rounds_and_one_round_keep_nearly_the_same_multiply_adds(scope, tmp_path):
    bench = WIDE.bench(tmp_path / "data")
    sizes = []
    for rounds in (1, 3):
        step = Channels(flops=0.4, multiple=4, rounds=rounds, scope=scope, importance="gradient")
        result = run(step, WIDE.model(), bench, tmp_path / f"{rounds}")
        sizes.append(total_multiply_adds(result.module) / total_multiply_adds(WIDE.model().module))
    assert max(sizes) <= 0.4
    assert abs(sizes[0] - sizes[1]) < 0.07
    require_reason(result.plan.of("deep").reasons, "in_rounds", rounds=3)


def test_each_round_prunes_the_network_that_the_previous_round_trained(tmp_path, monkeypatch):
    """Two rounds prune, train, prune and train.

    ``soft_share`` is the weight of the original model's predictions in training; labels get the
    rest. The field ``what`` of the reason ``last_round`` has the reasons of that round's training.
    """
    bench = RANKER.bench(tmp_path / "data")
    training = SHORT_TRAINING.model_copy(update={"epochs": 2})
    step = Channels(multiple=4, rounds=2, importance="gradient", training=training, soft_share=0.5)
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    widths: list[int] = []
    original_train = Channels._train

    def recording_train(self, model, *args):
        widths.append(model.module.hidden.out_features)
        return original_train(self, model, *args)

    monkeypatch.setattr(Channels, "_train", recording_train)
    second_result = run(step, RANKER.model(), bench, tmp_path / "again")
    assert widths == [12, 8]  # of 16 channels: first the square root of a half, then a half
    for name, tensor in result.module.state_dict().items():
        assert torch.equal(tensor, second_result.module.state_dict()[name]), name
    untrained = run(Channels(multiple=4, rounds=2), RANKER.model(), bench, tmp_path / "plain")
    assert not torch.equal(untrained.module.cross.weight, result.module.cross.weight)
    for name in ("cross", "hidden"):
        reasons = result.plan.of(name).reasons
        index = codes_of(reasons).index("trained_each_round")
        (outcome,) = require_reason(reasons[index + 1 :], "last_round").fields["what"][:1]
        assert outcome.code in ("trained_to_epoch", "training_unchanged"), name


def test_a_killed_run_resumes_in_its_round_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    bench = NORMED.bench(tmp_path / "data")
    training = SHORT_TRAINING.model_copy(update={"epochs": 2, "patience": 5})
    step = Channels(multiple=2, rounds=2, training=training)
    uninterrupted = run(step, NORMED.model(), bench, tmp_path / "whole")
    resumable_bench = bench.model_copy(update={"checkpoints": str(tmp_path / "progress")})
    run_epoch, count = compressors.distill.training.trainer._Run.epoch, []

    def epoch_until_killed(self):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        run_epoch(self)

    monkeypatch.setattr("compressors.distill.training.trainer._Run.epoch", epoch_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(step, NORMED.model(), resumable_bench, tmp_path / "killed")
    count.clear()
    count.extend([0] * 10)  # no further epoch is interrupted
    second_result = run(step, NORMED.model(), resumable_bench, tmp_path / "again")
    assert len(count) == 11  # only the last epoch of the second round was missing
    for name, tensor in uninterrupted.module.state_dict().items():
        assert torch.equal(tensor, second_result.module.state_dict()[name]), name


def test_soft_share_without_training_raises_a_value_error():
    with raises_value_error("soft_share_without_training"):
        Channels(soft_share=0.5)


def test_each_width_is_checked_once(tmp_path, monkeypatch):
    checked = []
    require_narrowable = prunable_widths.require_narrowable
    monkeypatch.setattr(
        prunable_widths,
        "require_narrowable",
        lambda *args: checked.append(1) or require_narrowable(*args),
    )
    run(Channels(), WIDE.model(), WIDE.bench(tmp_path / "data"), tmp_path / "out")
    assert len(checked) == 3
