"""k-means: errors of rounds, weights, the nearest entry, and samples of large tables.

``levels`` is the number of entries of a codebook. The errors of a fit are the weighted sums of
squared errors at the start and after each round.
"""

import itertools

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compressors.quantize.kernels import lloyd
from compressors.quantize.kernels.lloyd import (
    kmeans,
    nearest_entries,
    nearest_with_weights,
    sample_rows,
    scalar_kmeans,
    squared_distance,
)


def points(max_count: int = 40) -> st.SearchStrategy[Tensor]:
    """Float32 points of size 1e-4, 1 or 1e4; of few values, so that some points are equal."""
    unit = st.floats(-1, 1, width=32, allow_subnormal=False).map(lambda x: round(x, 1))
    shapes = st.tuples(st.integers(1, max_count), st.integers(1, 4))
    values = arrays.arrays(np.float32, shapes, elements=st.builds(np.float32, unit))
    scales = st.sampled_from([1e-4, 1.0, 1e4])
    return st.tuples(values, scales).map(lambda sampled: torch.from_numpy(sampled[0]) * sampled[1])


def error(rows: Tensor, codebook: Tensor, weight: Tensor | None = None) -> float:
    """Squared error of the nearest entries, from the distances of all pairs in float64."""
    distances = rows.double()[:, None] - codebook.double()[None]
    smallest_distances = distances.square().sum(dim=2).amin(dim=1)
    return float(
        smallest_distances.sum() if weight is None else (smallest_distances * weight.double()).sum()
    )


def error_of_the_mean(rows: Tensor) -> float:
    """The squared error of one entry for all points, the mean: an upper bound for codebooks."""
    return float((rows.double() - rows.double().mean(dim=0)).square().sum())


@given(rows=points(), levels=st.integers(1, 9))
def test_kmeans_errors_never_increase_and_the_last_is_the_error_of_the_codebook(rows, levels):
    fit = kmeans(rows, levels)
    assert fit.codebook.shape == (levels, rows.shape[1])
    assert list(fit.errors) == sorted(fit.errors, reverse=True)
    # Differences are float32, so each has an error of 2^-24 of the largest number.
    largest = float(rows.abs().max())
    assert fit.errors[-1] == pytest.approx(
        error(rows, fit.codebook), rel=1e-4, abs=1e-9 * largest**2
    )


@given(rows=points(), levels=st.integers(1, 9))
def test_a_codebook_never_has_a_larger_error_than_the_mean_of_all_points(rows, levels):
    for fit in (kmeans(rows, levels), scalar_kmeans(rows.flatten(), levels)):
        flat = rows if fit.codebook.shape[1] == rows.shape[1] else rows.reshape(-1, 1)
        # With one entry, the entry is the mean, rounded to float32.
        slack = 1e-6 * float(flat.double().square().sum())
        assert error(flat, fit.codebook) <= error_of_the_mean(flat) + slack


@given(rows=points(), extra_entries=st.integers(0, 5))
def test_points_are_exact_if_there_are_as_many_entries_as_different_points(rows, extra_entries):
    different = len(torch.unique(rows, dim=0))
    fit = kmeans(rows, different + extra_entries)
    assert torch.equal(fit.codebook[nearest_entries(rows, fit.codebook)], rows)
    values = rows.flatten()
    scalar = scalar_kmeans(values, len(torch.unique(values)) + extra_entries).codebook
    assert torch.equal(scalar[nearest_entries(values[:, None], scalar)].flatten(), values)


def clustered_points(count: int, dim: int, clusters: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dim, generator=generator) * 10
    cluster_of_point = torch.arange(count) % clusters
    noise = 0.1 * torch.randn(count, dim, generator=generator)
    return centres[cluster_of_point] + noise, cluster_of_point


def test_kmeans_finds_well_separated_clusters():
    rows, cluster_of_point = clustered_points(800, 5, 20)
    codes = nearest_entries(rows, kmeans(rows, 20).codebook)
    assert len(torch.unique(codes)) == 20
    for cluster in range(20):
        assert len(torch.unique(codes[cluster_of_point == cluster])) == 1


@pytest.mark.parametrize("dim", [1, 3, 8])
def test_the_error_decreases_with_the_number_of_entries(dim):
    rows = torch.randn(2000, dim, generator=torch.Generator().manual_seed(1))
    losses = [kmeans(rows, levels).errors[-1] for levels in (1, 2, 4, 8, 16, 32, 64)]
    # Lloyd's algorithm finds a local minimum, so 1 % is allowed.
    assert all(later <= 1.01 * earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def test_scalar_kmeans_of_a_normal_sample_is_within_2_percent_of_the_optimum():
    """Max 1960 gives the least mean squared errors of a normal distribution for 4 and 16 levels."""
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(2))
    for levels, optimum in ((4, 0.1175), (16, 0.009497)):
        result = scalar_kmeans(values, levels).errors[-1] / len(values)
        assert result == pytest.approx(optimum, rel=0.02)  # sampling error of 200,000 values


@given(rows=points(), levels=st.integers(1, 9), seed=st.integers(0, 5))
def test_scalar_kmeans_treats_an_integer_weight_as_that_many_copies(rows, levels, seed):
    times = torch.randint(1, 4, (len(rows),), generator=torch.Generator().manual_seed(seed))
    copies = rows.repeat_interleave(times, dim=0)
    values, weight = rows[:, 0], times.double()
    weighted = scalar_kmeans(values, levels, weight)
    repeated = scalar_kmeans(copies[:, 0], levels)
    torch.testing.assert_close(weighted.codebook, repeated.codebook, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("levels", [2, 8, 30])
def test_one_more_update_of_the_means_lowers_the_error_by_almost_nothing(levels):
    """So each entry is close to the weighted mean of its points."""
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(600, 3, generator=generator)
    weight = torch.rand(600, generator=generator, dtype=torch.float64) ** 4
    fit = kmeans(rows, levels, weight, rounds=200)
    result = error(rows, fit.codebook, weight)
    assert result == pytest.approx(fit.errors[-1], rel=1e-6)
    codes = nearest_entries(rows, fit.codebook)
    means = [
        np.average(rows[codes == code].numpy(), axis=0, weights=weight[codes == code].numpy())
        for code in range(levels)
    ]
    error_after_update = error(rows, torch.from_numpy(np.stack(means)).float(), weight)
    assert error_after_update > (1 - 2 * lloyd.MIN_IMPROVEMENT) * result


def test_a_point_of_large_weight_is_close_to_an_entry():
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(3))
    weight = torch.ones(500)
    weight[7] = 1e6
    codebook = kmeans(rows, 4, weight).codebook
    assert float((codebook - rows[7]).norm(dim=1).min()) < 1e-3
    assert float((kmeans(rows, 4).codebook - rows[7]).norm(dim=1).min()) > 1e-2


def test_points_of_weight_zero_do_not_affect_the_codebook():
    rows, _ = clustered_points(200, 3, 4)
    weight = (torch.arange(200) % 4 < 2).float()
    fit = kmeans(rows, 2, weight)
    assert fit.errors[-1] == pytest.approx(error(rows[weight > 0], fit.codebook), rel=1e-4)
    assert fit.errors[-1] < 0.01 * error_of_the_mean(rows[weight > 0])


def test_entries_without_points_are_moved_to_points(monkeypatch):
    rows, _ = clustered_points(400, 2, 8)
    equal_entries = rows[:1].expand(8, 2).clone()  # seven of the eight have no points
    monkeypatch.setattr(lloyd, "_draw_entries", lambda *_: equal_entries)
    fit = kmeans(rows, 8)
    assert len(torch.unique(nearest_entries(rows, fit.codebook))) == 8
    # Two clusters may share one entry.
    assert fit.errors[-1] < 0.2 * fit.errors[0]


def test_kmeans_does_not_depend_on_the_global_random_state():
    rows = torch.randn(3000, 6, generator=torch.Generator().manual_seed(4))
    state = torch.random.get_rng_state()
    first = kmeans(rows, 16)
    torch.manual_seed(99)
    second = kmeans(rows, 16)
    assert torch.equal(first.codebook, second.codebook)
    torch.random.set_rng_state(state)


# --- the nearest entry -------------------------------------------------------------------------


@given(rows=points(), levels=st.integers(1, 20), seed=st.integers(0, 9))
def test_nearest_equals_a_float64_search_of_all_entries(rows, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    codebook = rows[torch.randint(len(rows), (levels,), generator=generator)] * 0.9
    distances = (rows.double()[:, None] - codebook.double()[None]).square().sum(dim=2)
    assert torch.equal(nearest_entries(rows, codebook), distances.argmin(dim=1))
    ones = torch.ones_like(rows)
    weighted_entries = nearest_with_weights(rows, ones, codebook)
    result = distances.gather(1, weighted_entries[:, None]).flatten()
    size = float(rows.double().square().sum(dim=1).amax())
    assert torch.all(result <= distances.amin(dim=1) + 1e-5 * size)  # float32 products


def test_columns_of_weight_zero_do_not_affect_the_nearest_entry():
    rows, codebook = torch.tensor([[0.0, 9.0]]), torch.tensor([[1.0, 9.0], [0.0, -9.0]])
    assert nearest_with_weights(rows, torch.tensor([[1.0, 0.0]]), codebook).tolist() == [1]
    assert nearest_with_weights(rows, torch.tensor([[1.0, 1.0]]), codebook).tolist() == [0]


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_nearest_does_not_depend_on_the_block_size(block, monkeypatch):
    """For nearly equal distances, rounding that depends on blocks would change the result."""
    generator = torch.Generator().manual_seed(5)
    codebook = torch.randn(200, 7, generator=generator)
    codebook[100:] = codebook[:100] * (1 + 2.0**-22)
    pairs = torch.randint(200, (1000, 2), generator=generator)
    rows = codebook[pairs].mean(dim=1)  # halfway between two entries
    at_once = nearest_entries(rows, codebook)
    monkeypatch.setattr(lloyd, "BLOCK", block)
    assert torch.equal(nearest_entries(rows, codebook), at_once)
    parts = [nearest_entries(part, codebook) for part in rows.split(block)]
    assert torch.equal(torch.cat(parts), at_once)


def test_squared_distance_is_within_float32_rounding_of_float64():
    rows, others = torch.randn(50, 4), torch.randn(50, 4)
    expected = (rows.double() - others.double()).square().sum(dim=1)
    torch.testing.assert_close(squared_distance(rows, others), expected, rtol=1e-6, atol=1e-12)


# --- samples -----------------------------------------------------------------------------------


@given(count=st.integers(1, 500), max_count=st.integers(1, 50))
def test_a_sample_has_one_row_of_each_section_of_the_table(count, max_count):
    rows = torch.arange(count, dtype=torch.float32).unsqueeze(1)
    sampled = sample_rows(rows, max_count).flatten()
    assert len(sampled) == min(count, max_count)
    if count <= max_count:
        assert torch.equal(sampled, rows.flatten())
    else:
        section_starts = (torch.arange(max_count + 1) * count // max_count).float()
        assert torch.all(sampled >= section_starts[:-1])
        assert torch.all(sampled < section_starts[1:])
