"""``equalize`` and ``smooth_quant`` move factors between layers: equal scores, less int8 loss.

The networks ``CHAIN``, ``BLOCK``, ``LOUD`` and ``NORM_FIRST`` are in ``tests/chained_networks.py``.
In ``CHAIN``, ``b`` reads the output of ``a``, and ``c`` and ``d`` read that of ``b``. No factor can
be moved from ``c`` and ``d`` to ``e``, because a gelu and a tanh follow them. ``LOUD`` is ``BLOCK``
(one transformer block) with two channels that are 40 times as large as the others.

The range of a channel is its largest absolute value. With ``search``, the strength ``alpha`` of
each layer is searched for the smallest int8 error. The int8 loss is the change of scores by int8,
see ``int8_loss``.

In the fields of reasons, ``producer`` outputs channels, and ``consumer`` reads them. The reason
``consumer_fixed`` means that the weights of the consumer must not change.
"""

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
from compressors.quantize.dense.smoothing import best_smoothing, int8_error, smoothing_factors
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.rewrite.equalize import CONVERGED, DEAD, Equalize, equalization_factors
from compressors.rewrite.fold import Fold
from compressors.rewrite.smooth_quant import SmoothQuant

RANGES = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=6)


@given(RANGES, RANGES)
def test_equalization_factors_make_output_and_input_ranges_equal(output_ranges, input_ranges):
    count = min(len(output_ranges), len(input_ranges))
    outputs, inputs = (
        torch.tensor(output_ranges[:count]).double(),
        torch.tensor(input_ranges[:count]).double(),
    )
    scale = equalization_factors(outputs, inputs)
    is_scaled = (outputs > DEAD * outputs.max()) & (inputs > DEAD * inputs.max())
    assert bool((scale > 0).all())
    assert bool((scale[~is_scaled] == 1).all())
    torch.testing.assert_close((outputs / scale)[is_scaled], (inputs * scale)[is_scaled])


@given(RANGES, RANGES, st.floats(0, 1))
def test_smoothing_factors_equal_equation_4_of_the_paper(input_ranges, weight_ranges, alpha):
    count = min(len(input_ranges), len(weight_ranges))
    inputs, weights = (
        torch.tensor(input_ranges[:count]).double(),
        torch.tensor(weight_ranges[:count]).double(),
    )
    scale = smoothing_factors(inputs, weights, alpha)
    is_scaled = (inputs > 0) & (weights > 0)
    assert bool((scale > 0).all())
    expected = inputs[is_scaled].pow(alpha) / weights[is_scaled].pow(1 - alpha)
    torch.testing.assert_close(scale[is_scaled], expected)
    if alpha == 0.5:  # inputs and weights then have equal ranges
        torch.testing.assert_close((inputs / scale)[is_scaled], (weights * scale)[is_scaled])


@given(st.integers(0, 2**31), st.floats(1, 1000))
def test_best_smoothing_has_no_larger_int8_error_than_no_smoothing(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((64, 8), generator=generator)
    x[:, 3] *= factor
    weight = torch.randn((5, 8), generator=generator)
    layers = [(x, weight)]
    scale = best_smoothing(x.abs().amax(dim=0), weight.abs().amax(dim=0), layers)
    unscaled = torch.ones(8, dtype=torch.float64)
    assert int8_error(layers, scale) <= int8_error(layers, unscaled)


STEPS_AND_REFERENCES = [
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
    STEPS_AND_REFERENCES,
    ids=[
        f"{step.kind}-{reference.network.__name__}-{n}"
        for n, (step, reference) in enumerate(STEPS_AND_REFERENCES)
    ],
)
def test_equalize_and_smooth_quant_change_weights_and_keep_scores(step, reference, tmp_path):
    source = reference.model()
    result = run(step, source, reference.bench(tmp_path / "data"), tmp_path / "out")
    # ``private`` returns a copy in evaluation mode.
    before, after = scores_of(source.private(), reference), scores_of(result, reference)
    assert (after - before).abs().max() <= float32_rounding(before)
    old, new = source.module.state_dict(), result.module.state_dict()
    changed_layers = {
        name.rpartition(".")[0] for name in old if not torch.equal(old[name], new[name])
    }
    reported = {line.module for line in result.plan.lines if step.kind in line.steps}
    assert reported <= changed_layers
    assert len(changed_layers) >= 2


def weight_ranges(model: Model, producer: str, consumers: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Return the largest weight of each output of a layer, and of each input of its consumers."""
    module = model.module
    output_ranges = module.get_submodule(producer).weight.abs().amax(dim=1)
    input_ranges = [module.get_submodule(name).weight.abs().amax(dim=0) for name in consumers]
    return output_ranges.detach(), torch.stack(input_ranges).amax(dim=0).detach()


def test_equalize_converges_in_a_chain_in_which_a_layer_is_producer_and_consumer(tmp_path):
    source = CHAIN.model()
    with torch.no_grad():
        source.module.b.weight[5] *= 300
        source.module.b.weight[:, 2] *= 50
    result = run(Equalize(), source, CHAIN.bench(tmp_path / "data"), tmp_path / "out")
    for producer, consumers in (("a", ("b",)), ("b", ("c", "d"))):
        output_ranges, input_ranges = weight_ranges(result, producer, consumers)
        # at convergence each factor, a square root, is within CONVERGED of 1
        torch.testing.assert_close(output_ranges, input_ranges, rtol=4 * CONVERGED, atol=0)
    assert result.plan.of("b").reasons == (
        Reason("inputs_scaled", step="equalize", producer="a"),
        Reason("outputs_scaled", step="equalize", consumers=("c", "d")),
    )


def test_layers_that_equalize_skips_have_a_reason(tmp_path):
    bench = CHAIN.bench(tmp_path / "data")
    plan = run(Equalize(), CHAIN.model(), bench, tmp_path / "out").plan
    called_again = Reason("called_again")
    assert plan.of("e").reasons == (
        Reason("consumer_fixed", consumer="called_twice", why=called_again),
    )
    assert plan.of("weight_read").reasons == (Reason("weight_read_elsewhere"),)
    assert plan.of("out").reasons == (Reason("output_enters", operator="squeeze"),)
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(Equalize(), NORMED.model(), NORMED.bench(tmp_path / "n"), tmp_path / "n/out")
    assert caught.value.fields["reasons"]["hidden"] == (
        Reason("consumer_is_norm", consumer="norm"),
    )


def test_equalize_changes_only_layers_that_match_the_patterns(tmp_path):
    bench = CHAIN.bench(tmp_path / "data")
    source = CHAIN.model()
    result = run(Equalize(layers=("a", "b", "c")), source, bench, tmp_path / "out")
    assert torch.equal(result.module.d.weight, source.module.d.weight)
    assert torch.equal(result.module.c.weight, source.module.c.weight)  # d would have to follow
    assert not torch.equal(result.module.b.weight, source.module.b.weight)


def test_equalize_keeps_zero_weights(tmp_path):
    bench = COMPACT.bench(tmp_path / "data")
    pruned = run(Magnitude(), COMPACT.model(), bench, tmp_path / "0")
    result = run(Equalize(), pruned, bench, tmp_path / "1")
    for name in ("hidden", "capped"):
        before, after = (m.module.get_submodule(name).weight for m in (pruned, result))
        assert torch.equal(before == 0, after == 0)


# --- loss of int8 with and without these steps -----------------------------------------------


def int8_loss(reference: Reference, steps: tuple[Step, ...], folder: Path) -> float:
    """Apply steps and int8; return the scores' root mean squared change / standard deviation."""
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
def test_smooth_quant_halves_the_int8_loss_of_a_transformer_with_large_channels(steps, tmp_path):
    """Two of sixteen channels are 40 times as large as the others, as in trained transformers."""
    without_step = int8_loss(LOUD, (), tmp_path / "plain")
    assert int8_loss(LOUD, steps, tmp_path / "smooth") < without_step / 2


def test_equalize_lowers_the_int8_loss_of_a_network_with_a_large_channel(tmp_path):
    """In the feed-forward part one channel has large outputs and small weights that read them."""
    without_step = int8_loss(LOUD, (), tmp_path / "plain")
    assert int8_loss(LOUD, (Equalize(),), tmp_path / "equal") < without_step


def test_smooth_quant_with_search_hardly_increases_the_int8_loss_without_large_channels(tmp_path):
    without_step = int8_loss(BLOCK, (), tmp_path / "plain")
    assert int8_loss(BLOCK, (SmoothQuant(search=True),), tmp_path / "smooth") < 1.2 * without_step


def test_equalize_does_not_scale_a_channel_with_almost_zero_weights(tmp_path):
    """The factor would multiply its bias, and widen the input range of the next layer."""
    source = CHAIN.model()
    with torch.no_grad():
        source.module.a.weight[3] *= 1e-6
        source.module.a.bias[3] = 0.3
    result = run(Equalize(), source, CHAIN.bench(tmp_path / "data"), tmp_path / "out")
    assert result.module.a.bias[3] == source.module.a.bias[3]
