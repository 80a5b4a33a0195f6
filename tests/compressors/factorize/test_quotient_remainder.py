"""Quotient and remainder: the closest sums there are, and products that only get closer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER, compressed
from reason_codes import with_code
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

tables = given(
    seed=st.integers(0, 10**6), rows=st.integers(2, 40), share=st.floats(0, 1), even=st.booleans()
)


def drawn(seed: int, rows: int, dim: int = 3) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, rows: int, *, even: bool) -> Tensor:
    """All alike, or over four powers of ten, as lookups are."""
    if even:
        return torch.ones(rows, dtype=torch.float64)
    return 10 ** (2 * drawn(seed + 1, rows, 1).squeeze(1).double())


def buckets_of(rows: int, share: float) -> int:
    return 1 + round(share * (rows - 1))


def made(sides: tuple[Tensor, Tensor], rows: int, operation: str) -> Tensor:
    ids, buckets = torch.arange(rows), len(sides[1])
    first, second = sides[0][ids // buckets].double(), sides[1][ids % buckets].double()
    return first + second if operation == "add" else first * second


def error(table: Tensor, weight: Tensor, sides: tuple[Tensor, Tensor], operation: str) -> float:
    gap = made(sides, len(table), operation) - table
    return float((weight * gap.square().sum(dim=1)).sum())


@tables
def test_no_other_sums_are_closer(seed, rows, share, even):
    """Against the library's own least squares on the whole system."""
    table, weight = drawn(seed, rows), weights(seed, rows, even=even)
    buckets = buckets_of(rows, share)
    ids, quotients = torch.arange(rows), -(-rows // buckets)
    system = torch.zeros(rows, quotients + buckets, dtype=torch.float64)
    system[ids, ids // buckets] = 1
    system[ids, quotients + ids % buckets] = 1
    root = weight.sqrt().unsqueeze(1)
    best = torch.linalg.lstsq(root * system, root * table.double(), driver="gelsd").solution
    least = float((root * (system @ best - table)).square().sum())
    found = error(table, weight, fit_sum(table, weight, buckets), "add")
    # results are float32: 2^-24 of rows of size one, squared, times the weights
    assert found == pytest.approx(least, rel=1e-6, abs=1e-11 * float(weight.sum()))


@given(seed=st.integers(0, 10**6), rows=st.integers(4, 40))
def test_sums_are_found_again(seed, rows):
    buckets = max(1, round(rows**0.5))
    table = made((drawn(seed, -(-rows // buckets)), drawn(seed + 1, buckets)), rows, "add").float()
    weight = weights(seed, rows, even=False)
    left = error(table, weight, fit_sum(table, weight, buckets), "add")
    assert left < 1e-10 * float((weight * table.square().sum(dim=1)).sum())  # float32, squared


@given(seed=st.integers(0, 10**6), quotients=st.integers(1, 12), buckets=st.integers(1, 12))
def test_products_are_found_again_where_the_grid_is_full(seed, quotients, buckets):
    """With holes in it, or under uneven weights, alternating may stop short of a product."""
    rows = quotients * buckets
    table = made((drawn(seed, quotients), drawn(seed + 1, buckets)), rows, "multiply").float()
    weight = torch.ones(rows, dtype=torch.float64)
    left = error(table, weight, fit_product(table, weight, buckets), "multiply")
    assert left < 1e-10 * float(table.double().square().sum())  # float32, squared


@tables
def test_every_round_of_products_is_as_close_or_closer(seed, rows, share, even):
    table, weight = drawn(seed, rows), weights(seed, rows, even=even)
    buckets = buckets_of(rows, share)
    errors = [
        error(table, weight, fit_product(table, weight, buckets, rounds), "multiply")
        for rounds in range(1, 8)
    ]
    nothing = float((weight * table.square().sum(dim=1)).sum())
    for before, after in zip([nothing, *errors], errors, strict=False):
        assert after <= before * (1 + 1e-6)  # results are rounded to float32 at the end


@given(seed=st.integers(0, 10**6), rows=st.integers(6, 40))
def test_products_end_at_the_closest_of_rank_one_where_the_grid_is_full(seed, rows):
    """Each dimension is a matrix of quotients by remainders; its largest singular value says."""
    buckets = 3
    table = drawn(seed, rows // buckets * buckets)
    grid = table.reshape(-1, buckets, 3).permute(2, 0, 1).double()
    spectrum = torch.linalg.svdvals(grid)  # (dim, 3)
    least = float(spectrum[:, 1:].square().sum())
    weight = torch.ones(len(table), dtype=torch.float64)
    found = error(table, weight, fit_product(table, weight, buckets, 2000), "multiply")
    # A round that wins less than a millionth is the last, wherever the second value is near the
    # first: what is left then is a small part of the table.
    assert least * (1 - 1e-6) <= found <= least + 2e-3 * float(table.square().sum())


@given(ids=st.lists(st.integers(0, 2**62), min_size=1), divisor=st.integers(1, 2**31))
def test_division_is_whole_beyond_what_floats_hold(ids, divisor):
    found = divided_by(torch.tensor(ids), divisor)
    assert found.tolist() == [number // divisor for number in ids]


@pytest.mark.parametrize(
    ("ordered", "short"), [(0, (17, 17)), (0.1, (10, 30)), (2, (150, 2)), (1000, None)]
)
def test_buckets_are_a_root_a_share_or_a_number(ordered, short, tmp_path):
    step = QuotientRemainder(buckets=ordered)
    if short is None:
        step = step.model_copy(update={"tables": ("item", "user"), "buckets": 50})
    result = run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    if short is None:
        with_code(result.plan.of("user").reasons, "not_smaller_composed", before=960, after=984)
        return
    item = result.module.item
    assert (item.quotient.num_embeddings, item.remainder.num_embeddings) == (
        -(-300 // short[1]),
        short[1],
    )
    made = with_code(result.plan.of("item").reasons, "quotient_and_remainder", operation="add")
    assert (made.fields["quotients"], made.fields["buckets"]) == (-(-300 // short[1]), short[1])


def test_weighted_keeps_the_rows_of_the_data_better(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    seen = lookup_counts(source, bench, ["item"])["item"]
    for operation in ("add", "multiply"):
        gaps = {}
        for weighted in (False, True):
            step = QuotientRemainder(tables=("item",), operation=operation, weighted=weighted)
            folder = tmp_path / f"{operation}-{weighted}"
            module = run(step, source, bench, folder).module.item
            with torch.no_grad():
                gap = (module(torch.arange(300)) - source.module.item.weight).square().sum(dim=1)
            gaps[weighted] = float((gap * seen).sum())
        assert gaps[True] < gaps[False]


def test_ids_of_int32_are_looked_up_like_those_of_int64():
    table = compressed("Ranker", ("quotient_remainder",)).module.city
    with torch.no_grad():
        assert torch.equal(table(torch.arange(9, dtype=torch.int32)), table(torch.arange(9)))
