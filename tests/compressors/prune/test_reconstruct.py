"""Reconstruction: layers refitted after channel pruning keep their outputs closely."""

import hypothesis.strategies as st
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from models import RANKER, Reference
from narrow_networks import HISTORY, SCHEMA, Branched, Plain, Transformer

from compressors.core.batches import batches
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.reconstruct import reconstruct, ridge_weights
from compressors.prune.structure.channel_consumers import layouts, readers_of, trace
from compressors.prune.structure.config_widths import find_widths
from compressors.prune.structure.narrowing import Cut, without_channels


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99), st.floats(1e-6, 1.0))
def test_no_other_weights_are_nearer(inputs, outputs, seed, ridge):
    """The slope of distance to the outputs plus distance to the prior is zero there."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(20, inputs, generator=drawn, dtype=torch.float64)
    wanted = torch.randn(20, outputs, generator=drawn, dtype=torch.float64)
    prior = torch.randn(outputs, inputs, generator=drawn, dtype=torch.float64)
    gram = x.T @ x
    found = ridge_weights(gram, x.T @ wanted, prior, ridge)
    held = ridge * gram.diagonal().mean()
    slope = (x @ found.T - wanted).T @ x + held * (found - prior)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_inputs_that_are_always_zero_leave_the_weights_as_they_were():
    prior = torch.randn(3, 4, dtype=torch.float64)
    none = torch.zeros(4, 4, dtype=torch.float64)
    torch.testing.assert_close(ridge_weights(none, torch.zeros(4, 3).double(), prior), prior)


@pytest.mark.parametrize("importance", ["l2", "random"])
@pytest.mark.parametrize(
    "reference",
    [Reference(Branched, SCHEMA), RANKER, Reference(Transformer, HISTORY)],
    ids=lambda item: item.network.__name__,
)
def test_scores_come_nearer_to_what_they_were(reference, importance, tmp_path):
    source, bench = reference.model(), reference.bench(tmp_path / "data")
    (rows,) = batches(bench.calibration, reference.signature, 10_000)
    gaps = {}
    with torch.no_grad():
        wanted = source.module(**rows.inputs).reshape(-1)
        for solved in (False, True):
            step = Channels(importance=importance, reconstruct=solved)
            result = run(step, source, bench, tmp_path / f"{solved}")
            gaps[solved] = float((result.module(**rows.inputs).reshape(-1) - wanted).norm())
    # Half of the channels explain most of what the other half said; these nets are small.
    assert gaps[True] < 0.7 * gaps[False]


def test_reconstruct_adds_the_weights_of_removed_duplicate_channels(tmp_path):
    """Each hidden channel has a removed duplicate, whose weight in the consumer is added to it."""
    reference = Reference(Plain, SCHEMA)
    source, bench = reference.model(), reference.bench(tmp_path / "data")
    with torch.no_grad():
        source.module.hidden.weight[8:] = source.module.hidden.weight[:8]
        source.module.hidden.bias[8:] = source.module.hidden.bias[:8]
    width = find_widths(source)[0]["width"]
    traces = trace(source.module, SCHEMA, {"user": 30}, width)
    cut = Cut(width, readers_of(width, traces, next(layouts(width))), 8)
    first = {"hidden": torch.arange(16) < 8}
    narrow, _ = without_channels(source.private(), SCHEMA, [cut], first)
    reconstruct(narrow.module, source.module, bench, ["out"], {}, 1000)
    both = source.module.out.weight[:, :8] + source.module.out.weight[:, 8:]
    # Some inputs are much larger than others, so that a thousandth of the mean square damps some.
    torch.testing.assert_close(narrow.module.out.weight, both, rtol=0, atol=0.02)
    assert (both - source.module.out.weight[:, :8]).abs().max() > 0.1


def test_reconstruction_needs_rows(tmp_path):
    bench = RANKER.bench(tmp_path / "data").model_copy(update={"calibration": None})
    with raises_code(NothingToCompress, "rows_missing", step="channels", missing=("calibration",)):
        run(Channels(reconstruct=True), RANKER.model(), bench, tmp_path / "out")
