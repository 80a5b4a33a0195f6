"""Tables with codebooks (k-means, product and residual codes): the error of the rows.

Residual codes are called additive if rounds of least squares refine their codebooks. ``refine`` is
the largest number of these rounds. Calls of ``residual_codes.fit`` have the number of
codebooks and the entries of each; those of ``product_codes.fit`` the number of parts and the
entries; those of ``kmeans.fit`` the bits of a code and the type of the row scale.
"""

from collections.abc import Callable

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from table_codes import clustered_rows, decode_rows, each_step, tables
from torch import Tensor

from compressors.core.steps.step import TableStep
from compressors.errors.steps import ValueNotStorable
from compressors.quantize.tables import kmeans, product_codes, residual_codes
from compressors.quantize.tables.kmeans import KMeans
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.residual_codes import ResidualCodes


def squared_error(step: TableStep, table: Tensor) -> float:
    """Return the squared error of the decoded rows, as a share of the error of their mean row."""
    error_of_mean = (table - table.mean(dim=0)).double().square().sum()
    return float((decode_rows(step, table) - table).double().square().sum() / error_of_mean)


# --- error -------------------------------------------------------------------------------------


@each_step
@given(table=tables())
def test_the_error_is_at_most_the_error_of_storing_the_mean_row(step, table):
    """One entry for all rows would be their mean, and a codebook has at least two entries."""
    difference = (decode_rows(step, table) - table).double().square().sum()
    mean = table.double().mean() if step.kind == "kmeans" else table.double().mean(dim=0)
    worst = (table.double() - mean).square().sum()
    if step.kind == "kmeans" and step.scale != "none":
        # Rows of equal values are exact; the error of others is at most that of zeros.
        worst = table.double().square().sum()
    # Codebooks and scales in float16 have a relative error of 2^-11, or an absolute one of 2^-25.
    assert (
        difference <= worst + table.numel() * (float(table.abs().max()) * 2.0**-11 + 2.0**-24) ** 2
    )


@each_step
def test_rows_of_twelve_clusters_have_a_small_error(step):
    """With the codes of other rows, the error would be about 2."""
    assert squared_error(step, clustered_rows(2000, 8)) < {2: 0.35, 4: 0.25, 8: 0.1}[step.bits]


@pytest.mark.parametrize(
    "family",
    [
        lambda bits: KMeans(bits=bits),
        lambda bits: KMeans(bits=bits, scale="none"),
        lambda bits: ProductCodes(bits=bits),
        lambda bits: ResidualCodes(bits=bits, refine=0),
        lambda bits: ResidualCodes(bits=bits),
    ],
    ids=["kmeans", "kmeans without scale", "product", "residual", "additive"],
)
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in (1, 2))]
)
def test_the_error_decreases_with_the_number_of_bits(family: Callable[[int], TableStep], seed):
    table = torch.randn(3000, 6, generator=torch.Generator().manual_seed(seed))
    two, four, eight = (squared_error(family(bits), table) for bits in (2, 4, 8))
    assert eight < four < two


def test_the_error_decreases_with_the_number_of_codes():
    table = torch.randn(3000, 8, generator=torch.Generator().manual_seed(1))
    for family in (
        lambda count: ProductCodes(parts=count, bits=4),
        lambda count: ResidualCodes(codebooks=count, bits=4),
    ):
        losses = [squared_error(family(count), table) for count in (1, 2, 4, 8)]
        assert losses == sorted(losses, reverse=True)


def test_rounds_of_additive_codes_never_increase_the_error_and_lower_it_in_total():
    table = clustered_rows(3000, 8, seed=2)
    fit = residual_codes.fit(table, 3, 16, refine=10)
    assert list(fit.errors) == sorted(fit.errors, reverse=True)
    assert fit.errors[-1] < 0.97 * fit.errors[0]
    codes = residual_codes.encode(table, fit.codebook, 3)
    difference = residual_codes.decode(codes, fit.codebook) - table
    assert float(difference.double().square().sum()) == pytest.approx(fit.errors[-1], rel=1e-6)


def test_least_squares_codebooks_equal_the_solution_of_lstsq():
    table = clustered_rows(400, 5)
    fit = residual_codes.fit(table, 2, 8)
    codes = residual_codes.encode(table, fit.codebook, 2)
    weight = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = residual_codes.least_squares(table, codes, fit.codebook, weight)
    onehot = torch.zeros(400, 16, dtype=torch.float64)
    onehot.scatter_(1, codes.long() + torch.tensor([0, 8]), 1.0)
    root = weight.sqrt().unsqueeze(1)
    best = torch.linalg.lstsq(root * onehot, root * table.double(), driver="gelsd").solution
    expected = (root * (onehot @ best - table)).square().sum()
    result = (root * (onehot @ solution.double() - table)).square().sum()
    assert float(result) == pytest.approx(float(expected), rel=1e-5)  # entries are float32


def test_least_squares_does_not_change_entries_without_rows():
    table = clustered_rows(50, 4)
    codebook = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    # All rows have the first entry of both codebooks, which have four entries each.
    codes = torch.zeros(50, 2, dtype=torch.uint8)
    solution = residual_codes.least_squares(table, codes, codebook, torch.ones(50).double())
    assert torch.allclose(solution[[1, 2, 3, 5, 6, 7]], codebook[[1, 2, 3, 5, 6, 7]])


def test_refined_codes_have_no_larger_error_than_greedy_codes(monkeypatch):
    table = clustered_rows(500, 6)
    codebook = torch.randn(3 * 16, 6, generator=torch.Generator().manual_seed(0))

    def compute_errors() -> Tensor:
        codes = residual_codes.encode(table, codebook, 3)
        return (residual_codes.decode(codes, codebook) - table).double().square().sum(dim=1)

    refined = compute_errors()
    # Passes, which select each code of a row again, follow the greedy selection.
    monkeypatch.setattr(residual_codes, "MAX_PASSES", 0)
    greedy = compute_errors()
    assert torch.all(refined <= greedy * (1 + 1e-5))
    assert refined.sum() < 0.9 * greedy.sum()


@pytest.mark.parametrize("scale", ["float16", "float32"])
def test_with_a_row_scale_small_rows_have_a_small_relative_error(scale):
    """Half of the rows are 1000 times smaller than the others."""
    table = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    table[::2] *= 1e-3
    small = table[::2]
    with_scale = decode_rows(KMeans(scale=scale), table)[::2]
    without_scale = decode_rows(KMeans(scale="none"), table)[::2]
    assert (with_scale - small).square().sum() < 0.01 * small.square().sum()
    assert (without_scale - small).square().sum() > 0.5 * small.square().sum()


def test_kmeans_with_row_scales_keeps_rows_of_zeros_exact():
    table = torch.randn(50, 6)
    table[[3, 17]] = 0
    for bits in (2, 4, 8):
        rows = decode_rows(KMeans(bits=bits), table)
        assert not rows[[3, 17]].any()
        assert rows.isfinite().all()
    assert not decode_rows(KMeans(), torch.zeros(9, 3)).any()


@each_step
def test_two_different_rows_are_exact(step):
    table = torch.tensor([[1.0, -2.0, 0.5, 0.25], [3.0, 0.0, 1.0, -1.0]]).repeat(40, 1)
    if step.kind == "kmeans":  # encodes single numbers, so the rows have only the numbers 0, 1, 2
        table = table.sign().abs() * torch.tensor([[1.0], [2.0]]).repeat(40, 1)
    torch.testing.assert_close(decode_rows(step, table), table, rtol=1e-6, atol=1e-6)


def test_rows_of_larger_weight_have_a_smaller_error():
    table = torch.randn(600, 6, generator=torch.Generator().manual_seed(3))
    weight = torch.ones(600)
    weight[:30] = 1000

    def measure_error_of_weighted_rows(
        codebook: Tensor, encode_and_decode: Callable[[Tensor], Tensor]
    ) -> float:
        return float((encode_and_decode(codebook) - table)[:30].square().sum())

    def encode_with_product_codes(codebook: Tensor) -> Tensor:
        return product_codes.decode(product_codes.encode(table, codebook, 3), codebook, 6)

    def encode_with_residual_codes(codebook: Tensor) -> Tensor:
        return residual_codes.decode(residual_codes.encode(table, codebook, 2), codebook)

    def encode_with_kmeans(codebook: Tensor) -> Tensor:
        codes, scale = kmeans.encode(table, codebook, "none")
        return kmeans.decode(codes, codebook, scale)

    for fit, encode_and_decode in (
        (lambda w: product_codes.fit(table, 3, 8, w), encode_with_product_codes),
        (lambda w: residual_codes.fit(table, 2, 8, 4, w).codebook, encode_with_residual_codes),
        (lambda w: kmeans.fit(table, 2, "none", w), encode_with_kmeans),
    ):
        weighted, unweighted = (
            measure_error_of_weighted_rows(fit(row_weights), encode_and_decode)
            for row_weights in (weight, None)
        )
        assert weighted < 0.97 * unweighted


def test_row_weights_for_a_sampled_table_raise_a_value_error(monkeypatch):
    monkeypatch.setattr(kmeans, "FITTED_VALUES", 60)  # 10 rows of 6 values
    with pytest.raises(ValueError, match="at most 10 rows, got 20"):
        kmeans.fit(torch.randn(20, 6), 2, "none", torch.ones(20))


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (ProductCodes(codebook_type="float16"), "codebook_beyond_float16"),
        (KMeans(), "weight_beyond_float16"),
    ],
    ids=["product_codes", "kmeans"],
)
def test_weights_beyond_float16_raise_value_not_storable(step, code):
    with raises_code(ValueNotStorable, code):
        decode_rows(step, torch.full((20, 4), 1e5))
