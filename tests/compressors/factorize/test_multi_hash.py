"""``multi_hash``: a row is a sum of shared rows ("buckets") that hash functions of its id select.

The shared rows are fitted by least squares. ``Buffered`` of ``models.py`` is a network whose table
of positions is read at the same rows by every call.
``RANKER`` of ``models.py`` has the tables ``item`` (300 rows of 7 numbers), ``user`` (40 rows of 6)
and ``tags`` (30 rows of 6), among others.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER, lower_reference
from reason_codes import require_reason
from torch import Tensor

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.factorize.multi_hash import (
    PRIME,
    MultiHash,
    best_fit,
    coefficients,
    fit,
    hash_ids,
    hash_signs,
)
from compressors.lower.comparison.parity import check_parity
from compressors.quantize.calibration.lookup_counts import lookup_counts


def draw_normal(seed: int, rows: int, dim: int = 3) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@given(
    ids=st.lists(st.integers(0, PRIME - 1), min_size=1),
    seed=st.integers(0, 10**6),
    buckets=st.integers(1, 2**31),
    hashes=st.integers(1, 8),
)
def test_hashes_and_signs_equal_a_computation_with_python_integers(ids, seed, buckets, hashes):
    """Python integers cannot overflow; the largest ids and multipliers test int64 overflow."""
    functions = coefficients(hashes, seed, signed=True)
    functions[0] = PRIME - 1
    buckets_of_ids, sign = (
        hash_ids(torch.tensor(ids), functions, buckets),
        hash_signs(torch.tensor(ids), functions),
    )
    for row, number in enumerate(ids):
        for j, (a, b, c, d) in enumerate(functions.tolist()):
            assert buckets_of_ids[row, j] == (a * number + b) % PRIME % buckets
            assert sign[row, j] == 1 - 2 * ((c * number + d) % PRIME % 2)


def test_two_ids_collide_with_probability_one_over_buckets():
    """The hash functions are a universal family: two ids collide in 1 / ``buckets`` of them."""
    buckets, count = 50, 20_000
    functions = coefficients(count, 3, signed=True)
    for pair in ((0, 1), (7, 57), (0, PRIME - 1)):
        buckets_of_ids = hash_ids(torch.tensor(pair), functions, buckets)
        collision_rate = float((buckets_of_ids[0] == buckets_of_ids[1]).float().mean())
        # four standard deviations of a rate of 1/50 that is measured with 20,000 functions
        assert abs(collision_rate - 1 / buckets) < 4 * (0.02 * 0.98 / count) ** 0.5
        equal_sign_rate = float(
            (hash_signs(torch.tensor(pair), functions).prod(dim=0) > 0).float().mean()
        )
        assert abs(equal_sign_rate - 0.5) < 4 * (0.25 / count) ** 0.5


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(2, 40),
    buckets=st.integers(1, 20),
    hashes=st.integers(1, 4),
    signed=st.booleans(),
    has_equal_weights=st.booleans(),
)
def test_fit_has_the_error_of_the_least_squares_solution(
    seed, rows, buckets, hashes, signed, has_equal_weights
):
    """The reference is torch's least squares for the whole system, with the mean of all rows."""
    table = draw_normal(seed, rows) + 1
    weight = (
        torch.ones(rows).double()
        if has_equal_weights
        else 10 ** draw_normal(seed + 1, rows, 1)[:, 0].double()
    )
    functions = coefficients(hashes, seed, signed=signed)
    ids = torch.arange(rows)
    buckets_of_ids = hash_ids(ids, functions, buckets)
    sign = (
        hash_signs(ids, functions).double() if signed else torch.ones_like(buckets_of_ids).double()
    )
    system = torch.zeros(rows, buckets + 1, dtype=torch.float64)
    system[:, -1] = 1
    for j in range(hashes):
        system[ids, buckets_of_ids[:, j]] += sign[:, j]
    root = weight.sqrt().unsqueeze(1)
    solution = torch.linalg.lstsq(root * system, root * table.double(), driver="gelsd").solution
    smallest_error = float((root * (system @ solution - table)).square().sum())
    fitted = fit(table, weight, functions, buckets)
    solution_of_fit = torch.cat([fitted.buckets, fitted.mean.unsqueeze(0)]).double()
    error = float((root * (system @ solution_of_fit - table)).square().sum())
    # The solver stops at a relative residual of 1e-6, and results are float32.
    assert error == pytest.approx(smallest_error, rel=1e-6, abs=1e-10 * float(weight.sum()))
    # ``fitted.error`` is a difference of large sums of squares, so it has rounding errors.
    assert fitted.error * float(weight.sum()) == pytest.approx(
        smallest_error, rel=1e-6, abs=1e-10 * float(weight.sum())
    )


@given(seed=st.integers(0, 10**6), rows=st.integers(2, 40))
def test_fit_in_blocks_of_rows_equals_fit_at_once(seed, rows):
    table, functions = draw_normal(seed, rows), coefficients(2, seed, signed=True)
    weight = torch.ones(rows).double()
    at_once = fit(table, weight, functions, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressors.factorize.multi_hash.BLOCK", 3)
        in_blocks = fit(table, weight, functions, 7)
    # float64 sums in another order
    torch.testing.assert_close(in_blocks.buckets, at_once.buckets, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(in_blocks.mean, at_once.mean, rtol=1e-4, atol=1e-5)
    assert in_blocks.error == pytest.approx(at_once.error, rel=1e-6, abs=1e-10)


@given(seed=st.integers(0, 10**6), draws=st.integers(1, 5))
def test_best_fit_returns_the_functions_with_the_smallest_error(seed, draws):
    table, weight = draw_normal(seed, 30), 10 ** draw_normal(seed + 1, 30, 1)[:, 0].double()
    functions_drawn = coefficients(2 * draws, seed, signed=False).split(2)
    functions, best = best_fit(table, weight, functions_drawn, 9)
    errors = [fit(table, weight, drawn, 9).error for drawn in functions_drawn]
    assert best.error == min(errors)
    assert torch.equal(functions, functions_drawn[errors.index(min(errors))])


def test_a_bucket_that_no_row_uses_is_zero():
    functions = coefficients(2, 0, signed=False)
    buckets = fit(draw_normal(0, 5), torch.ones(5).double(), functions, 50).buckets
    used_buckets = hash_ids(torch.arange(5), functions, 50).unique()
    empty = [number for number in range(50) if number not in used_buckets.tolist()]
    assert len(empty) >= 40
    assert not buckets[empty].any()


@pytest.mark.parametrize("signed", [False, True])
def test_stored_bytes_are_the_bytes_of_hash_functions_mean_and_buckets(signed, tmp_path):
    step = MultiHash(hashes=3, buckets=0.25, signed=signed)
    result = run(step, RANKER.model(), Bench(signature=RANKER.signature, seed=5), tmp_path)
    line = result.plan.of("item")
    # int64 coefficients of three functions (two each, four with signs), and a float32 mean
    assert line.bytes_after == 3 * (4 if signed else 2) * 8 + 7 * 4
    # The buckets are float32 rows of 7 columns, a quarter of the 300 rows of the table.
    assert result.plan.of("item.buckets").bytes_after == 75 * 7 * 4
    code = "signed_hashed_rows" if signed else "hashed_rows"
    require_reason(line.reasons, code, buckets=75, hashes=3)
    other = run(
        step, RANKER.model(), Bench(signature=RANKER.signature, seed=6), tmp_path / "other"
    ).module.item
    assert not torch.equal(other.functions, result.module.item.functions)


def test_multi_hash_skips_a_table_that_would_grow(tmp_path):
    step = MultiHash(buckets=30)
    result = run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    require_reason(result.plan.of("user").reasons, "hashed_rows", buckets=30, hashes=2)
    # The buckets have as many bytes as the table, 30 * 6 * 4. Two functions of two int64
    # coefficients and a mean of 6 float32 numbers are added: 32 + 24 bytes.
    require_reason(result.plan.of("tags").reasons, "not_smaller_composed", before=720, after=776)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_the_graph_of_hashed_tables_has_the_scores_of_its_module(target):
    hashed_graph = lower_reference("Buffered", ("multi_hash",), target)
    inputs = hashed_graph.rows(600)
    check_parity(
        hashed_graph.run_in_torch(inputs),
        hashed_graph.run_in_onnx(inputs),
        hashed_graph.model.plan,
        target,
    )


def test_weighted_multi_hash_has_a_smaller_error_on_looked_up_rows(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    counts = lookup_counts(source, bench, ["item"])["item"]
    errors = {}
    for weighted in (False, True):
        step = MultiHash(tables=("item",), buckets=0.3, weighted=weighted)
        hashed_table = run(step, source, bench, tmp_path / str(weighted)).module.item
        with torch.no_grad():
            difference = (
                (hashed_table(torch.arange(300)) - source.module.item.weight).square().sum(dim=1)
            )
        errors[weighted] = float((difference * counts).sum())
    assert errors[True] < errors[False]
