"""``quotient_remainder``: rows as sums or products of a quotient row and a remainder row.

For an id and a number of buckets, these are row ``id // buckets`` of the table ``quotient`` and row
``id % buckets`` of the table ``remainder``, which has one row per bucket.

``RANKER`` of ``models.py`` has the tables ``item`` (300 rows), ``user`` (40) and ``city`` (9).
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER, compress_reference
from reason_codes import require_reason
from torch import Tensor

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.factorize.quotient_remainder import (
    QuotientRemainder,
    divided_by,
    fit_product,
    fit_sum,
)
from compressors.quantize.calibration.lookup_counts import lookup_counts

given_tables = given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 40),
    share=st.floats(0, 1),
    has_equal_weights=st.booleans(),
)


def draw_normal(seed: int, rows: int, dim: int = 3) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def random_weights(seed: int, rows: int, *, has_equal_weights: bool) -> Tensor:
    """Weights of rows, float64: ones, or numbers as different as lookup counts."""
    if has_equal_weights:
        return torch.ones(rows, dtype=torch.float64)
    return 10 ** (2 * draw_normal(seed + 1, rows, 1).squeeze(1).double())


def buckets_of(rows: int, share: float) -> int:
    """A number of remainder rows: 1 for a ``share`` of 0, ``rows`` for 1."""
    return 1 + round(share * (rows - 1))


def combined_rows(tables: tuple[Tensor, Tensor], rows: int, operation: str) -> Tensor:
    """The rows that a quotient table and a remainder table represent, float64."""
    ids, buckets = torch.arange(rows), len(tables[1])
    quotient_rows = tables[0][ids // buckets].double()
    remainder_rows = tables[1][ids % buckets].double()
    if operation == "add":
        return quotient_rows + remainder_rows
    return quotient_rows * remainder_rows


def error(table: Tensor, weight: Tensor, fitted: tuple[Tensor, Tensor], operation: str) -> float:
    """Return the squared error of the two tables, summed with the weights of the rows."""
    difference = combined_rows(fitted, len(table), operation) - table
    return float((weight * difference.square().sum(dim=1)).sum())


@given_tables
def test_fit_sum_has_the_error_of_the_least_squares_solution(seed, rows, share, has_equal_weights):
    """The reference is torch's least squares for the whole system of equations."""
    table, weight = (
        draw_normal(seed, rows),
        random_weights(seed, rows, has_equal_weights=has_equal_weights),
    )
    buckets = buckets_of(rows, share)
    ids, quotients = torch.arange(rows), -(-rows // buckets)
    system = torch.zeros(rows, quotients + buckets, dtype=torch.float64)
    system[ids, ids // buckets] = 1
    system[ids, quotients + ids % buckets] = 1
    root = weight.sqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(root * system, root * table.double(), driver="gelsd").solution
    smallest_error = float((root * (system @ solution - table)).square().sum())
    fitted_error = error(table, weight, fit_sum(table, weight, buckets), "add")
    # Results are float32: rows near 1 have errors of 2^-24, which are squared and weighted.
    assert fitted_error == pytest.approx(smallest_error, rel=1e-6, abs=1e-11 * float(weight.sum()))


@given(seed=st.integers(0, 10**6), rows=st.integers(4, 40))
def test_fit_sum_reproduces_a_table_of_sums(seed, rows):
    buckets = max(1, round(rows**0.5))
    table = combined_rows(
        (draw_normal(seed, -(-rows // buckets)), draw_normal(seed + 1, buckets)), rows, "add"
    ).float()
    weight = random_weights(seed, rows, has_equal_weights=False)
    error_of_fit = error(table, weight, fit_sum(table, weight, buckets), "add")
    energy = float((weight * table.square().sum(dim=1)).sum())
    assert error_of_fit < 1e-10 * energy  # squared rounding errors of float32


@given(seed=st.integers(0, 10**6), quotients=st.integers(1, 12), buckets=st.integers(1, 12))
def test_fit_product_reproduces_a_table_of_products(seed, quotients, buckets):
    """Each pair of quotient and remainder has a row, and weights are equal.

    Otherwise alternating least squares may stop at another result.
    """
    rows = quotients * buckets
    table = combined_rows(
        (draw_normal(seed, quotients), draw_normal(seed + 1, buckets)), rows, "multiply"
    ).float()
    weight = torch.ones(rows, dtype=torch.float64)
    error_of_fit = error(table, weight, fit_product(table, weight, buckets), "multiply")
    assert error_of_fit < 1e-10 * float(table.double().square().sum())  # rounding


@given_tables
def test_rounds_of_fit_product_never_increase_the_error(seed, rows, share, has_equal_weights):
    table, weight = (
        draw_normal(seed, rows),
        random_weights(seed, rows, has_equal_weights=has_equal_weights),
    )
    buckets = buckets_of(rows, share)
    errors = [
        error(table, weight, fit_product(table, weight, buckets, rounds), "multiply")
        for rounds in range(1, 8)
    ]
    table_energy = float((weight * table.square().sum(dim=1)).sum())
    for before, after in zip([table_energy, *errors], errors, strict=False):
        assert after <= before * (1 + 1e-6)  # results are rounded to float32 at the end


@given(seed=st.integers(0, 10**6), rows=st.integers(6, 40))
def test_fit_product_converges_to_the_best_rank_one_approximation(seed, rows):
    """Each dimension is a matrix of quotients and remainders; singular values are compared."""
    buckets = 3
    table = draw_normal(seed, rows // buckets * buckets)
    grid = table.reshape(-1, buckets, 3).permute(2, 0, 1).double()
    spectrum = torch.linalg.svdvals(grid)  # (dim, 3)
    smallest_error = float(spectrum[:, 1:].square().sum())
    weight = torch.ones(len(table), dtype=torch.float64)
    fitted = fit_product(table, weight, buckets, rounds=2000)
    fitted_error = error(table, weight, fitted, "multiply")
    # The fit stops when a round lowers the error by less than a millionth. If the first two
    # singular values are close, a small difference to the optimum remains.
    assert (
        smallest_error * (1 - 1e-6)
        <= fitted_error
        <= smallest_error + 2e-3 * float(table.square().sum())
    )


@given(ids=st.lists(st.integers(0, 2**62), min_size=1), divisor=st.integers(1, 2**31))
def test_divided_by_is_exact_for_ids_above_the_exact_range_of_floats(ids, divisor):
    result = divided_by(torch.tensor(ids), divisor)
    assert result.tolist() == [number // divisor for number in ids]


@pytest.mark.parametrize(
    ("setting", "buckets"), [(0, 17), (0.1, 30), (2, 2)], ids=["square root", "share", "number"]
)
def test_buckets_is_the_square_root_a_share_or_a_number(setting, buckets, tmp_path):
    """The table has 300 rows; the setting 0 means the square root of the number of rows."""
    step = QuotientRemainder(buckets=setting)
    result = run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    item, quotients = result.module.item, math.ceil(300 / buckets)
    assert (item.quotient.num_embeddings, item.remainder.num_embeddings) == (quotients, buckets)
    require_reason(
        result.plan.of("item").reasons,
        "quotient_and_remainder",
        operation="add",
        quotients=quotients,
        buckets=buckets,
    )


def test_quotient_remainder_skips_a_table_that_would_grow(tmp_path):
    step = QuotientRemainder(tables=("item", "user"), buckets=50)
    result = run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    # 40 rows of 24 bytes would become one quotient row and 40 remainder rows.
    require_reason(result.plan.of("user").reasons, "not_smaller_composed", before=960, after=984)


def test_weighted_quotient_remainder_has_a_smaller_error_on_looked_up_rows(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    counts = lookup_counts(source, bench, ["item"])["item"]
    for operation in ("add", "multiply"):
        errors = {}
        for weighted in (False, True):
            step = QuotientRemainder(tables=("item",), operation=operation, weighted=weighted)
            folder = tmp_path / f"{operation}-{weighted}"
            module = run(step, source, bench, folder).module.item
            with torch.no_grad():
                difference = (
                    (module(torch.arange(300)) - source.module.item.weight).square().sum(dim=1)
                )
            errors[weighted] = float((difference * counts).sum())
        assert errors[True] < errors[False]


def test_int32_ids_look_up_the_same_rows_as_int64_ids():
    table = compress_reference("Ranker", ("quotient_remainder",)).module.city
    with torch.no_grad():
        assert torch.equal(table(torch.arange(9, dtype=torch.int32)), table(torch.arange(9)))
