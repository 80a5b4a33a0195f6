"""Factors that move between layers: the same scores, and less lost in int8."""

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from chained_networks import BLOCK, CHAIN, LOUD, NORM_FIRST
from error_codes import raises_code
from hypothesis import given
from model_scores import float32_rounding, scores_of
from models import COMPACT, NORMED, Reference, Step
from torch import Tensor

from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.prune.dense.magnitude import Magnitude
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.rewrite.equalize import CONVERGED, DEAD, Equalize, equalization_factors
from compressors.rewrite.fold import Fold
from compressors.rewrite.smooth_quant import SmoothQuant, best_smoothing, int8_error, smoothing

RANGES = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=6)


@given(RANGES, RANGES)
def test_after_equalizing_both_ranges_are_equal(first, second):
    count = min(len(first), len(second))
    made, read = torch.tensor(first[:count]).double(), torch.tensor(second[:count]).double()
    scale = equalization_factors(made, read)
    both = (made > DEAD * made.max()) & (read > DEAD * read.max())
    assert bool((scale > 0).all())
    assert bool((scale[~both] == 1).all())
    torch.testing.assert_close((made / scale)[both], (read * scale)[both])


@given(RANGES, RANGES, st.floats(0, 1))
def test_smoothing_is_equation_4(first, second, alpha):
    count = min(len(first), len(second))
    inputs, weights = torch.tensor(first[:count]).double(), torch.tensor(second[:count]).double()
    scale = smoothing(inputs, weights, alpha)
    both = (inputs > 0) & (weights > 0)
    assert bool((scale > 0).all())
    expected = inputs[both].pow(alpha) / weights[both].pow(1 - alpha)
    torch.testing.assert_close(scale[both], expected)
    if alpha == 0.5:  # both sides are equally hard to round
        torch.testing.assert_close((inputs / scale)[both], (weights * scale)[both])


@given(st.integers(0, 2**31), st.floats(1, 1000))
def test_a_searched_strength_is_never_worse_than_none(seed, loud):
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn((64, 8), generator=drawn)
    x[:, 3] *= loud
    weight = torch.randn((5, 8), generator=drawn)
    read = [(x, weight)]
    scale = best_smoothing(x.abs().amax(dim=0), weight.abs().amax(dim=0), read)
    assert int8_error(read, scale) <= int8_error(read, torch.ones(8, dtype=torch.float64))


ONES = [
    (Equalize(), COMPACT),
    (Equalize(), CHAIN),
    (Equalize(), LOUD),
    (SmoothQuant(), COMPACT),
    (SmoothQuant(), NORMED),
    (SmoothQuant(), CHAIN),
    (SmoothQuant(), LOUD),
    (SmoothQuant(), NORM_FIRST),
    (SmoothQuant(alpha=0.8), BLOCK),
    (SmoothQuant(search=True), LOUD),
]


@pytest.mark.parametrize(
    ("step", "reference"),
    ONES,
    ids=[
        f"{step.kind}-{reference.network.__name__}-{n}" for n, (step, reference) in enumerate(ONES)
    ],
)
def test_scores_stay_the_same_and_weights_do_not(step, reference, tmp_path):
    source = reference.model()
    result = run(step, source, reference.bench(tmp_path / "data"), tmp_path / "out")
    before, after = scores_of(source.private(), reference), scores_of(result, reference)
    assert (after - before).abs().max() <= float32_rounding(before)
    old, new = source.module.state_dict(), result.module.state_dict()
    moved = {name.rpartition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    reported = {line.module for line in result.plan.lines if step.kind in line.steps}
    assert reported <= moved
    assert len(moved) >= 2


def ranges(model: Model, maker: str, readers: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    layers = model.module
    made = layers.get_submodule(maker).weight.abs().amax(dim=1)
    read = [layers.get_submodule(name).weight.abs().amax(dim=0) for name in readers]
    return made.detach(), torch.stack(read).amax(dim=0).detach()


def test_equalize_settles_in_a_chain_where_a_layer_is_on_both_sides(tmp_path):
    source = CHAIN.model()
    with torch.no_grad():
        source.module.b.weight[5] *= 300
        source.module.b.weight[:, 2] *= 50
    result = run(Equalize(), source, CHAIN.bench(tmp_path / "data"), tmp_path / "out")
    for maker, readers in (("a", ("b",)), ("b", ("c", "d"))):
        made, read = ranges(result, maker, readers)
        # each round leaves factors no further from 1 than this, on both sides of a square root
        torch.testing.assert_close(made, read, rtol=4 * CONVERGED, atol=0)
    assert result.plan.of("b").reasons == (
        Reason("inputs_scaled", step="equalize", maker="a"),
        Reason("outputs_scaled", step="equalize", readers=("c", "d")),
    )


def test_layers_that_equalize_skips_have_a_reason(tmp_path):
    bench = CHAIN.bench(tmp_path / "data")
    plan = run(Equalize(), CHAIN.model(), bench, tmp_path / "out").plan
    called_again = Reason("called_again")
    assert plan.of("e").reasons == (Reason("reader_closed", reader="twice", why=called_again),)
    assert plan.of("looked").reasons == (Reason("weight_read_elsewhere"),)
    assert plan.of("out").reasons == (Reason("output_enters", operator="squeeze"),)
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(Equalize(), NORMED.model(), NORMED.bench(tmp_path / "n"), tmp_path / "n/out")
    assert caught.value.fields["reasons"]["hidden"] == (Reason("reader_is_norm", reader="norm"),)


def test_layers_that_are_not_named_keep_what_they_have(tmp_path):
    bench = CHAIN.bench(tmp_path / "data")
    source = CHAIN.model()
    result = run(Equalize(layers=("a", "b", "c")), source, bench, tmp_path / "out")
    assert torch.equal(result.module.d.weight, source.module.d.weight)
    assert torch.equal(result.module.c.weight, source.module.c.weight)  # d would have to follow
    assert not torch.equal(result.module.b.weight, source.module.b.weight)


def test_zeros_stay_zeros(tmp_path):
    bench = COMPACT.bench(tmp_path / "data")
    pruned = run(Magnitude(), COMPACT.model(), bench, tmp_path / "0")
    result = run(Equalize(), pruned, bench, tmp_path / "1")
    for name in ("hidden", "capped"):
        before, after = (m.module.get_submodule(name).weight for m in (pruned, result))
        assert torch.equal(before == 0, after == 0)


# --- what it is for --------------------------------------------------------------------------


def lost(reference: Reference, steps: tuple[Step, ...], folder: Path) -> float:
    """Error of the scores in int8 after some steps, against their spread."""
    bench, model = reference.bench(folder / "data"), reference.model()
    before = scores_of(model.private(), reference)
    for number, step in enumerate((*steps, StaticInt8())):
        model = run(step, model, bench, folder / str(number))
    error = scores_of(model, reference) - before
    return float(error.square().mean().sqrt() / before.std())


@pytest.mark.parametrize(
    "steps",
    [(SmoothQuant(),), (SmoothQuant(search=True),), (Fold(), SmoothQuant())],
    ids=["alpha", "search", "folded"],
)
def test_a_transformer_with_loud_channels_loses_less_in_int8(steps, tmp_path):
    """Two of sixteen channels are 40 times as large as the others, as in trained ones."""
    plain = lost(LOUD, (), tmp_path / "plain")
    assert lost(LOUD, steps, tmp_path / "smooth") < plain / 2


def test_a_loud_channel_between_two_layers_loses_less_when_equalized(tmp_path):
    """Inside the feed-forward part one channel is made loud and read quietly."""
    plain = lost(LOUD, (), tmp_path / "plain")
    assert lost(LOUD, (Equalize(),), tmp_path / "equal") < plain


def test_a_quiet_transformer_is_not_made_worse_by_searching(tmp_path):
    plain = lost(BLOCK, (), tmp_path / "plain")
    assert lost(BLOCK, (SmoothQuant(search=True),), tmp_path / "smooth") < 1.2 * plain


def test_a_channel_that_is_next_to_dead_is_left_alone(tmp_path):
    """Its bias would grow with the factor, and the range of what the next layer reads with it."""
    source = CHAIN.model()
    with torch.no_grad():
        source.module.a.weight[3] *= 1e-6
        source.module.a.bias[3] = 0.3
    made = run(Equalize(), source, CHAIN.bench(tmp_path / "data"), tmp_path / "out")
    assert made.module.a.bias[3] == source.module.a.bias[3]
