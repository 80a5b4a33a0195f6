"""Heads, feed-forward widths and ranks: what a number of the configuration may count."""

import pytest
import torch
from error_codes import raises_code
from models import Reference
from narrow_networks import HISTORY, SCHEMA, Crossed, Plain, Split, Transformer
from reason_codes import with_code
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.kept_shares import multiply_adds


def cut(reference: Reference, folder, **settings):
    bench = reference.bench(folder / "data")
    return run(Channels(**settings), reference.model(), bench, folder / "out")


@pytest.mark.parametrize("importance", ["l2", "gradient", "activation"])
@pytest.mark.parametrize("fused", [False, True])
def test_whole_heads_go(fused, importance, tmp_path):
    """``apply`` compares with silenced heads; here it is looked at which stay."""
    reference = Reference(Transformer, HISTORY, {"fused": fused})
    source = reference.model()
    with torch.no_grad():  # silence two heads of the first block, two others of the second
        for block, heads in zip(source.module.blocks, ((0, 2), (1, 3)), strict=True):
            for head in heads:
                places = slice(4 * head, 4 * head + 4)
                block.mix.weight[:, places] = 0
                for made in [block.qkv] if fused else [block.q, block.k, block.v]:
                    for part in range(3 if fused else 1):
                        made.weight[16 * part : 16 * part + 16][places] = 0
                        made.bias[16 * part : 16 * part + 16][places] = 0
    bench = reference.bench(tmp_path / "data")
    layers = ("*.qkv",) if fused else ("*.q", "*.k", "*.v")
    step = Channels(importance=importance, layers=layers)
    result = run(step, source, bench, tmp_path / "out")
    assert result.network.architecture.config["heads"] == 2
    for new, old, heads in zip(
        result.module.blocks, source.module.blocks, ((1, 3), (0, 2)), strict=True
    ):
        places = torch.cat([torch.arange(4 * head, 4 * head + 4) for head in heads])
        assert torch.equal(new.mix.weight, old.mix.weight[:, places])
        if fused:
            places = torch.cat([places + 16 * part for part in range(3)])
            assert torch.equal(new.qkv.weight, old.qkv.weight[places])
        else:
            assert torch.equal(new.q.bias, old.q.bias[places])
    name = "blocks.0.qkv" if fused else "blocks.0.q"
    before, after = (48, 24) if fused else (16, 8)
    fewer = with_code(result.plan.of(name).reasons, "fewer_groups", before=before, after=after)
    assert fewer.fields["width"] == "heads"
    assert (fewer.fields["units_before"], fewer.fields["units_after"]) == (4, 2)


def test_heads_are_counted_so_that_channels_are_a_multiple(tmp_path):
    """4 channels a head: a multiple of 16 channels is 4 heads, of 8 two of them."""
    reference = Reference(Transformer, HISTORY, {"heads": 8})
    for multiple, heads in ((8, 2), (16, 4), (4, 2)):
        result = cut(reference, tmp_path / f"{multiple}", keep=0.2, multiple=multiple)
        assert result.network.architecture.config["heads"] == heads


def test_feed_forward_widths_and_ranks_are_widths(tmp_path):
    result = cut(Reference(Transformer, HISTORY), tmp_path / "ffn", layers=("*.up",))
    assert result.network.architecture.config == {"ffn": 16}
    with_code(result.plan.of("blocks.0.q").reasons, "not_matched", patterns=("*.up",))
    low = cut(Reference(Crossed, SCHEMA), tmp_path / "rank")
    assert low.network.architecture.config == {"cross_rank": 8}
    assert [layer.out_features for layer in low.module.down] == [8, 8, 8]
    assert [layer.in_features for layer in low.module.up] == [8, 8, 8]


def test_heads_that_share_out_another_width_stay_with_that_reason(tmp_path):
    result = cut(Reference(Split, HISTORY), tmp_path)
    assert result.network.architecture.config == {"ffn": 16}
    reasons = result.plan.of("blocks.0.q").reasons
    with_code(reasons, "size_of_other", module="item")
    with_code(reasons, "split_width", argument="heads")


def test_a_layer_over_a_sequence_works_once_a_position():
    reference = Reference(Transformer, HISTORY)
    work = multiply_adds(reference.model().module, HISTORY)
    assert work["blocks.0.up"] == 6 * 12 * 32
    assert work["out"] == 17


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_half_of_a_transformers_multiply_adds_stay(scope, tmp_path):
    reference = Reference(Transformer, HISTORY, {"ffn": 64, "heads": 8})
    before = sum(multiply_adds(reference.model().module, HISTORY).values())
    result = cut(reference, tmp_path, flops=0.5, scope=scope, multiple=4)
    after = sum(multiply_adds(result.module, HISTORY).values())
    # One head of two blocks is 2 * 4 * 4 * 12 * 6 of 41,489 multiply-adds: a step of 5.6 %.
    assert 0.4 < after / before <= 0.5
    reasons = result.plan.of("blocks.0.up").reasons
    with_code(reasons, "multiply_adds_left", share=pytest.approx(after / before))
    predicted = dry_run(
        Channels(flops=0.5, multiple=4), reference.model(), reference.bench(tmp_path)
    )
    share = sum(multiply_adds(predicted.module, HISTORY).values()) / before
    assert 0.4 < share <= 0.5


def test_a_head_cannot_go_without_its_queries(tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        cut(Reference(Transformer, HISTORY), tmp_path, layers=("*.k",))
    reasons = caught.value.fields["reasons"]["blocks.0.k"]
    with_code(reasons, "shares_width", width="heads", layer="blocks.0.q")
    with_code(reasons, "not_matched", patterns=("*.k",))


class Halved(Plain):
    """A second layer of half the width: no whole channel of it follows a channel of the first."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.second = nn.Linear(width, width // 2)
        self.out = nn.Linear(width // 2, 1)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(x)))


def test_half_a_channel_is_no_group(tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        cut(Reference(Halved, SCHEMA), tmp_path)
    assert caught.value.fields["reasons"]["hidden"] == (
        Reason("grows_differently", module="out", argument="width"),
    )
