"""``channels`` where a config argument counts attention heads, feed-forward widths or ranks.

The argument ``heads`` counts groups of channels. With ``fused``, one layer ``qkv`` computes
queries, keys and values. ``mix`` is the output projection of the attention, and ``up`` the first
feed-forward layer. By default, the ``Transformer`` of ``tests/narrow_networks.py`` has two blocks
with 4 heads of 4 channels, 12 inputs of each layer and 32 feed-forward channels.
"""

import pytest
import torch
from error_codes import raises_code
from models import Reference
from narrow_networks import (
    HISTORY,
    SIGNATURE,
    HiddenLayerNet,
    LowRankCrossNet,
    SplitHeadsTransformer,
    Transformer,
)
from reason_codes import require_reason
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.kept_shares import multiply_adds


def prune_reference(reference: Reference, folder, **settings):
    """Run ``Channels`` with these settings on a reference model and return the result."""
    bench = reference.bench(folder / "data")
    return run(Channels(**settings), reference.model(), bench, folder / "out")


@pytest.mark.parametrize("importance", ["l2", "gradient", "activation"])
@pytest.mark.parametrize("fused", [False, True])
def test_pruning_heads_removes_whole_heads_of_zero_weights(fused, importance, tmp_path):
    """``apply`` itself compares the scores, so this test checks only which heads are kept."""
    reference = Reference(Transformer, HISTORY, {"fused": fused})
    source = reference.model()
    # Zero two heads of the first block and two others of the second. A head has 4 of 16 channels;
    # with ``fused``, queries, keys and values are three parts of 16 channels.
    with torch.no_grad():
        for block, heads in zip(source.module.blocks, ((0, 2), (1, 3)), strict=True):
            for head in heads:
                channels = slice(4 * head, 4 * head + 4)
                block.mix.weight[:, channels] = 0
                for layer in [block.qkv] if fused else [block.q, block.k, block.v]:
                    for part in range(3 if fused else 1):
                        layer.weight[16 * part : 16 * part + 16][channels] = 0
                        layer.bias[16 * part : 16 * part + 16][channels] = 0
    bench = reference.bench(tmp_path / "data")
    layers = ("*.qkv",) if fused else ("*.q", "*.k", "*.v")
    step = Channels(importance=importance, layers=layers)
    result = run(step, source, bench, tmp_path / "out")
    assert result.network.architecture.config["heads"] == 2
    for new, old, heads in zip(
        result.module.blocks, source.module.blocks, ((1, 3), (0, 2)), strict=True
    ):
        channels = torch.cat([torch.arange(4 * head, 4 * head + 4) for head in heads])
        assert torch.equal(new.mix.weight, old.mix.weight[:, channels])
        if fused:
            channels = torch.cat([channels + 16 * part for part in range(3)])
            assert torch.equal(new.qkv.weight, old.qkv.weight[channels])
        else:
            assert torch.equal(new.q.bias, old.q.bias[channels])
    name = "blocks.0.qkv" if fused else "blocks.0.q"
    before, after = (48, 24) if fused else (16, 8)
    fewer = require_reason(result.plan.of(name).reasons, "fewer_groups", before=before, after=after)
    assert fewer.fields["width"] == "heads"
    assert (fewer.fields["units_before"], fewer.fields["units_after"]) == (4, 2)


def test_the_number_of_heads_is_pruned_so_that_channels_are_a_multiple_of_the_setting(tmp_path):
    """A head has 4 channels, so a multiple of 16 channels is 4 heads and one of 8 is 2 heads.

    ``keep`` requests 0.2 * 8 = 1.6 heads, which are rounded to one of these multiples.
    """
    reference = Reference(Transformer, HISTORY, {"heads": 8})
    for multiple, heads in ((8, 2), (16, 4), (4, 2)):
        result = prune_reference(reference, tmp_path / f"{multiple}", keep=0.2, multiple=multiple)
        assert result.network.architecture.config["heads"] == heads


def test_feed_forward_widths_and_ranks_are_pruned(tmp_path):
    result = prune_reference(Reference(Transformer, HISTORY), tmp_path / "ffn", layers=("*.up",))
    # The config has only arguments that differ from their default.
    assert result.network.architecture.config == {"ffn": 16}
    require_reason(result.plan.of("blocks.0.q").reasons, "not_matched", patterns=("*.up",))
    low_rank_result = prune_reference(Reference(LowRankCrossNet, SIGNATURE), tmp_path / "rank")
    assert low_rank_result.network.architecture.config == {"cross_rank": 8}
    assert [layer.out_features for layer in low_rank_result.module.down] == [8, 8, 8]
    assert [layer.in_features for layer in low_rank_result.module.up] == [8, 8, 8]


def test_heads_that_split_another_width_are_skipped_with_a_reason(tmp_path):
    result = prune_reference(Reference(SplitHeadsTransformer, HISTORY), tmp_path)
    assert result.network.architecture.config == {"ffn": 16}
    reasons = result.plan.of("blocks.0.q").reasons
    require_reason(reasons, "size_of_other", module="item")
    require_reason(reasons, "split_width", argument="heads")


def test_multiply_adds_of_a_layer_over_a_sequence_are_counted_per_position():
    reference = Reference(Transformer, HISTORY)
    macs = multiply_adds(reference.model().module, HISTORY)
    assert macs["blocks.0.up"] == 6 * 12 * 32  # positions x inputs x outputs
    assert macs["out"] == 17  # called once: 17 inputs and one output


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_flops_target_of_a_half_keeps_at_most_half_of_the_multiply_adds(scope, tmp_path):
    reference = Reference(Transformer, HISTORY, {"ffn": 64, "heads": 8})
    before = sum(multiply_adds(reference.model().module, HISTORY).values())
    result = prune_reference(reference, tmp_path, flops=0.5, scope=scope, multiple=4)
    after = sum(multiply_adds(result.module, HISTORY).values())
    # Widths change in steps: one head less in both blocks saves 2 * 4 * 4 * 12 * 6 (blocks, layers,
    # channels of a head, inputs, positions) of 41,489 multiply-adds, 5.6 %.
    assert 0.4 < after / before <= 0.5
    reasons = result.plan.of("blocks.0.up").reasons
    require_reason(reasons, "multiply_adds_left", share=pytest.approx(after / before))
    predicted = dry_run(
        Channels(flops=0.5, multiple=4), reference.model(), reference.bench(tmp_path)
    )
    share = sum(multiply_adds(predicted.module, HISTORY).values()) / before
    assert 0.4 < share <= 0.5


def test_keys_without_their_queries_are_not_pruned(tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        prune_reference(Reference(Transformer, HISTORY), tmp_path, layers=("*.k",))
    reasons = caught.value.fields["reasons"]["blocks.0.k"]
    require_reason(reasons, "shares_width", width="heads", layer="blocks.0.q")
    require_reason(reasons, "not_matched", patterns=("*.k",))


class HalfWidthLayerNet(HiddenLayerNet):
    """Has a layer of ``width // 2`` outputs, which may stay the same if ``width`` grows by one."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.second = nn.Linear(width, width // 2)
        self.out = nn.Linear(width // 2, 1)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(x)))


def test_a_layer_followed_by_one_of_half_its_width_is_skipped_with_a_reason(tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        prune_reference(Reference(HalfWidthLayerNet, SIGNATURE), tmp_path)
    assert caught.value.fields["reasons"]["hidden"] == (
        Reason("grows_differently", module="out", argument="width"),
    )
