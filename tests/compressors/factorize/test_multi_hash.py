"""Several hashes: functions that spread ids, and the closest sums that they allow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER, graph
from reason_codes import with_code
from torch import Tensor

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.factorize.multi_hash import (
    PRIME,
    MultiHash,
    best_fit,
    coefficients,
    fit,
    hashed,
    signs,
)
from compressors.lower.parity import compare
from compressors.quantize.calibration.lookup_counts import lookup_counts


def drawn(seed: int, rows: int, dim: int = 3) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@given(
    ids=st.lists(st.integers(0, PRIME - 1), min_size=1),
    seed=st.integers(0, 10**6),
    buckets=st.integers(1, 2**31),
    hashes=st.integers(1, 8),
)
def test_hashes_are_those_of_unbounded_integers(ids, seed, buckets, hashes):
    """Python's integers do not overflow; the largest ids and multipliers are where int64 would."""
    functions = coefficients(hashes, seed, signed=True)
    functions[0] = PRIME - 1
    where, sign = hashed(torch.tensor(ids), functions, buckets), signs(torch.tensor(ids), functions)
    for row, number in enumerate(ids):
        for j, (a, b, c, d) in enumerate(functions.tolist()):
            assert where[row, j] == (a * number + b) % PRIME % buckets
            assert sign[row, j] == 1 - 2 * ((c * number + d) % PRIME % 2)


def test_two_ids_meet_about_once_in_as_many_functions_as_there_are_buckets():
    """Universal: at most one in ``buckets``, over the functions that can be drawn."""
    buckets, functions = 50, 20_000
    drawn_ones = coefficients(functions, 3, signed=True)
    for pair in ((0, 1), (7, 57), (0, PRIME - 1)):
        where = hashed(torch.tensor(pair), drawn_ones, buckets)
        met = float((where[0] == where[1]).float().mean())
        # four standard deviations of a share of 1/50 in 20,000
        assert abs(met - 1 / buckets) < 4 * (0.02 * 0.98 / functions) ** 0.5
        same = float((signs(torch.tensor(pair), drawn_ones).prod(dim=0) > 0).float().mean())
        assert abs(same - 0.5) < 4 * (0.25 / functions) ** 0.5


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 40),
    buckets=st.integers(1, 20),
    hashes=st.integers(1, 4),
    signed=st.booleans(),
    even=st.booleans(),
)
def test_no_other_buckets_are_closer(seed, rows, buckets, hashes, signed, even):
    """Against the library's own least squares on the whole system, mean included."""
    table = drawn(seed, rows) + 1
    weight = torch.ones(rows).double() if even else 10 ** drawn(seed + 1, rows, 1)[:, 0].double()
    functions = coefficients(hashes, seed, signed=signed)
    ids = torch.arange(rows)
    where = hashed(ids, functions, buckets)
    sign = signs(ids, functions).double() if signed else torch.ones_like(where).double()
    system = torch.zeros(rows, buckets + 1, dtype=torch.float64)
    system[:, -1] = 1
    for j in range(hashes):
        system[ids, where[:, j]] += sign[:, j]
    root = weight.sqrt().unsqueeze(1)
    best = torch.linalg.lstsq(root * system, root * table.double(), driver="gelsd").solution
    least = float((root * (system @ best - table)).square().sum())
    made = fit(table, weight, functions, buckets)
    found = torch.cat([made.buckets, made.mean.unsqueeze(0)]).double()
    error = float((root * (system @ found - table)).square().sum())
    # the residual's millionth that may stay, squared, and results in float32
    assert error == pytest.approx(least, rel=1e-6, abs=1e-10 * float(weight.sum()))
    # what it says of itself, a difference of squares that are as large as the rows'
    assert made.error * float(weight.sum()) == pytest.approx(
        least, rel=1e-6, abs=1e-10 * float(weight.sum())
    )


@given(seed=st.integers(0, 10**6), rows=st.integers(2, 40))
def test_blocks_of_rows_give_what_one_block_gives(seed, rows):
    table, functions = drawn(seed, rows), coefficients(2, seed, signed=True)
    weight = torch.ones(rows).double()
    whole = fit(table, weight, functions, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressors.factorize.multi_hash.BLOCK", 3)
        again = fit(table, weight, functions, 7)
    # the same sums in another order, in float64
    torch.testing.assert_close(again.buckets, whole.buckets, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.mean, whole.mean, rtol=1e-4, atol=1e-5)
    assert again.error == pytest.approx(whole.error, rel=1e-6, abs=1e-10)


@given(seed=st.integers(0, 10**6), draws=st.integers(1, 5))
def test_of_several_draws_the_one_that_leaves_least_is_kept(seed, draws):
    table, weight = drawn(seed, 30), 10 ** drawn(seed + 1, 30, 1)[:, 0].double()
    drawn_ones = coefficients(2 * draws, seed, signed=False).split(2)
    functions, found = best_fit(table, weight, drawn_ones, 9)
    errors = [fit(table, weight, each, 9).error for each in drawn_ones]
    assert found.error == min(errors)
    assert torch.equal(functions, drawn_ones[errors.index(min(errors))])


def test_bucket_that_no_row_uses_is_zero():
    functions = coefficients(2, 0, signed=False)
    buckets = fit(drawn(0, 5), torch.ones(5).double(), functions, 50).buckets
    read = hashed(torch.arange(5), functions, 50).unique()
    empty = [number for number in range(50) if number not in read.tolist()]
    assert len(empty) >= 40
    assert not buckets[empty].any()


@pytest.mark.parametrize("signed", [False, True])
def test_what_is_stored_is_all_there_is(signed, tmp_path):
    step = MultiHash(hashes=3, buckets=0.25, signed=signed)
    result = run(step, RANKER.model(), Bench(signature=RANKER.signature, seed=5), tmp_path)
    line = result.plan.of("item")
    assert line.bytes_after == 3 * (4 if signed else 2) * 8 + 7 * 4
    assert result.plan.of("item.buckets").bytes_after == 75 * 7 * 4
    code = "signed_hashed_rows" if signed else "hashed_rows"
    with_code(line.reasons, code, buckets=75, hashes=3)
    other = run(
        step, RANKER.model(), Bench(signature=RANKER.signature, seed=6), tmp_path / "other"
    ).module.item
    assert not torch.equal(other.functions, result.module.item.functions)


def test_a_table_that_would_grow_stays(tmp_path):
    step = MultiHash(buckets=30)
    result = run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    with_code(result.plan.of("user").reasons, "hashed_rows", buckets=30, hashes=2)
    # as many rows as before, plus functions and a mean
    with_code(result.plan.of("tags").reasons, "not_smaller_composed", before=720, after=776)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_hashing_is_a_product_a_sum_and_two_remainders_on_every_target(target):
    made = graph("Buffered", ("multi_hash",), target)
    inputs = made.rows(600)
    compare(made.in_torch(inputs), made.in_onnx(inputs), made.model.plan, target)


def test_weighted_keeps_the_rows_of_the_data_better(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    seen = lookup_counts(source, bench, ["item"])["item"]
    gaps = {}
    for weighted in (False, True):
        step = MultiHash(tables=("item",), buckets=0.3, weighted=weighted)
        made = run(step, source, bench, tmp_path / str(weighted)).module.item
        with torch.no_grad():
            gap = (made(torch.arange(300)) - source.module.item.weight).square().sum(dim=1)
        gaps[weighted] = float((gap * seen).sum())
    assert gaps[True] < gaps[False]
