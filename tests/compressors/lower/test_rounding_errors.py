"""The context ``rounding_errors`` adds random relative errors to the outputs of all modules.

``DeepInt8`` (``deep_int8.py``) is a chain of int8 layers, in which small differences grow.
"""

import pytest
import torch
from deep_int8 import DeepInt8
from torch import nn

from compressors.lower.comparison.rounding_errors import rounding_errors

SIZE = 2.0**-10


def run(network: nn.Module, x: torch.Tensor, seed: int | None = None, size: float = SIZE):
    """Return the output of a network, with rounding errors if there is a seed."""
    with torch.no_grad():
        if seed is None:
            return network(x)
        with rounding_errors(network, size, seed):
            return network(x)


def test_output_of_a_layer_changes_by_the_size_of_the_error_with_random_signs():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 100), torch.randn(50, 8)
    share = run(layer, x, seed=0) / run(layer, x) - 1
    # One float32 rounding of the sum has a relative error of 2^-24.
    torch.testing.assert_close(share.abs(), torch.full_like(share, SIZE), rtol=0, atol=2.0**-22)
    # 5,000 random signs: the share of one sign has a deviation of 0.7 %.
    assert (share > 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_a_seed_gives_the_same_errors_and_another_seed_others():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(50, 8)
    assert torch.equal(run(network, x, seed=1), run(network, x, seed=1))
    assert not torch.equal(run(network, x, seed=1), run(network, x, seed=2))


def test_network_has_no_errors_afterwards_even_if_it_raised():
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(50, 8)
    expected = run(network, x)
    run(network, x, seed=0)
    with pytest.raises(RuntimeError), rounding_errors(network, SIZE, 0):
        network(x[:, :3])
    assert torch.equal(run(network, x), expected)


def test_errors_grow_with_the_number_of_int8_layers():
    x = torch.rand(500, 32, generator=torch.Generator().manual_seed(1)) - 0.5

    def measure(depth: int) -> float:
        network = DeepInt8(depth, width=32)
        changes = run(network, x, seed=0, size=2.0**-21) - run(network, x)
        return float(changes.square().mean().sqrt())

    # One layer keeps the size of the error, 5e-7, except for a few values at the boundary of two
    # levels. Each following layer moves more values to other levels, which are 1/127 apart.
    assert measure(12) > 10 * measure(1)
    assert measure(24) > 1e-3
