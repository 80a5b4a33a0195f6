"""``magnitude``: the smallest weights of each layer, or of all layers, are set to zero.

``cross``, ``hidden`` and ``plain`` are dense layers of ``RANKER`` (``tests/models.py``).
"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from models import RANKER

from compressors.core.runner import run
from compressors.prune.dense.magnitude import Magnitude, zero_smallest

sizes = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 9)), min_size=1, max_size=4)


@given(sizes, st.floats(0, 1), st.integers(0, 2**20))
def test_zero_smallest_zeroes_the_smallest_weights_and_changes_no_others(shapes, share, seed):
    rng = np.random.default_rng(seed)
    weights = [torch.tensor(rng.normal(size=shape)) for shape in shapes]
    result = zero_smallest(weights, share)
    before = torch.cat([weight.flatten() for weight in weights])
    after = torch.cat([weight.flatten() for weight in result])
    is_zero = after == 0
    assert int(is_zero.sum()) == round(share * len(before))
    assert torch.equal(after[~is_zero], before[~is_zero])
    if bool(is_zero.any()) and not bool(is_zero.all()):
        assert before[is_zero].abs().max() <= before[~is_zero].abs().min()


def test_zero_smallest_of_equal_weights_zeroes_exactly_the_share():
    (result,) = zero_smallest([torch.full((4, 5), -2.0)], share=0.25)
    assert int((result == 0).sum()) == 5


def test_magnitude_zeroes_a_share_of_each_layer_or_of_all_layers_together(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    source = RANKER.model()
    with torch.no_grad():
        source.module.cross.weight.mul_(1e-6)
    layers = ("cross", "hidden")
    for scope in ("layer", "global"):
        step = Magnitude(share=0.5, scope=scope, layers=layers)
        result = run(step, source, bench, tmp_path / scope).module
        shares = [float((getattr(result, name).weight == 0).float().mean()) for name in layers]
        weights_of_layers = [getattr(result, name).weight.numel() for name in layers]
        if scope == "layer":
            assert shares == pytest.approx([0.5, 0.5], abs=0.01)
        else:  # all weights of ``cross`` are smaller than those of ``hidden``
            assert shares[0] == pytest.approx(
                min(1, 0.5 * sum(weights_of_layers) / weights_of_layers[0])
            )
            assert shares[1] == 0
        assert bool((result.plain.weight != 0).all())  # a layer that ``layers`` does not name
