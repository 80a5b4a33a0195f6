"""Reconstruction: refitting layers after channel pruning keeps their outputs almost unchanged.

``HiddenLayerNet`` (``tests/narrow_networks.py``) has a layer ``hidden`` with 16 channels, which
only the layer ``out`` reads.
"""

import hypothesis.strategies as st
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from models import RANKER, Reference
from narrow_networks import HISTORY, SIGNATURE, HiddenLayerNet, ResidualConcatNet, Transformer

from compressors.core.batches import batches
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.reconstruct import reconstruct, ridge_weights
from compressors.prune.structure.channel_consumers import channel_layouts, find_consumers, trace
from compressors.prune.structure.config_widths import find_widths
from compressors.prune.structure.narrowing import WidthCut, remove_channels


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99), st.floats(1e-6, 1.0))
def test_ridge_weights_have_zero_gradient_of_the_ridge_objective(inputs, outputs, seed, ridge):
    """The objective is the squared error of the outputs plus the squared distance to a prior.

    The prior is the weights before the refit.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, inputs, generator=generator, dtype=torch.float64)
    expected = torch.randn(20, outputs, generator=generator, dtype=torch.float64)
    prior = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    gram = x.T @ x
    solved_weights = ridge_weights(gram, x.T @ expected, prior, ridge)
    damping = ridge * gram.diagonal().mean()
    gradient = (x @ solved_weights.T - expected).T @ x + damping * (solved_weights - prior)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_ridge_weights_of_zero_inputs_are_the_prior():
    prior = torch.randn(3, 4, dtype=torch.float64)
    zero_gram = torch.zeros(4, 4, dtype=torch.float64)
    torch.testing.assert_close(ridge_weights(zero_gram, torch.zeros(4, 3).double(), prior), prior)


@pytest.mark.parametrize("importance", ["l2", "random"])
@pytest.mark.parametrize(
    "reference",
    [Reference(ResidualConcatNet, SIGNATURE), RANKER, Reference(Transformer, HISTORY)],
    ids=lambda item: item.network.__name__,
)
def test_reconstruction_reduces_the_change_of_scores_by_30_percent(reference, importance, tmp_path):
    source, bench = reference.model(), reference.bench(tmp_path / "data")
    (rows,) = batches(bench.calibration, reference.signature, 10_000)
    distances = {}
    with torch.no_grad():
        expected = source.module(**rows.inputs).reshape(-1)
        for reconstruct_weights in (False, True):
            step = Channels(importance=importance, reconstruct=reconstruct_weights)
            result = run(step, source, bench, tmp_path / f"{reconstruct_weights}")
            distances[reconstruct_weights] = float(
                (result.module(**rows.inputs).reshape(-1) - expected).norm()
            )
    # In these small networks, the outputs of the removed half can mostly be predicted from those of
    # the kept half.
    assert distances[True] < 0.7 * distances[False]


def test_reconstruct_adds_the_weights_of_removed_duplicate_channels(tmp_path):
    """Each kept hidden channel has a removed duplicate; ``out`` adds the weights of both."""
    reference = Reference(HiddenLayerNet, SIGNATURE)
    source, bench = reference.model(), reference.bench(tmp_path / "data")
    with torch.no_grad():
        source.module.hidden.weight[8:] = source.module.hidden.weight[:8]
        source.module.hidden.bias[8:] = source.module.hidden.bias[:8]
    width = find_widths(source)[0]["width"]
    traces = trace(source.module, SIGNATURE, {"user": 30}, width)
    # A group is a set of channels that are removed together, such as an attention head. The first
    # possible assignment of channels to groups has one channel per group here.
    consumers = find_consumers(width, traces, next(channel_layouts(width)))
    cut = WidthCut(width, consumers, count=8)  # keeps 8
    kept_channels = {"hidden": torch.arange(16) < 8}
    # ``private`` returns a copy of the module tree, so that ``source`` keeps its channels.
    narrow, _ = remove_channels(source.private(), SIGNATURE, [cut], kept_channels)
    # ``outputs``: the kept outputs of refitted layers that lost some; ``out`` lost only inputs.
    reconstruct(narrow.module, source.module, bench, layers=["out"], outputs={}, rows=1000)
    summed_weights = source.module.out.weight[:, :8] + source.module.out.weight[:, 8:]
    # The damping is a thousandth of the mean square of the inputs, which affects small inputs.
    torch.testing.assert_close(narrow.module.out.weight, summed_weights, rtol=0, atol=0.02)
    assert (summed_weights - source.module.out.weight[:, :8]).abs().max() > 0.1


def test_reconstruction_without_calibration_rows_raises_nothing_to_compress(tmp_path):
    bench = RANKER.bench(tmp_path / "data").model_copy(update={"calibration": None})
    with raises_code(NothingToCompress, "rows_missing", step="channels", missing=("calibration",)):
        run(Channels(reconstruct=True), RANKER.model(), bench, tmp_path / "out")
