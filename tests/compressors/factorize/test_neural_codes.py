"""``neural_codes``: short codes per row and a decoder with one hidden layer, against low rank."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import QUICKLY, RANKER
from reason_codes import require_reason
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.distill.distill import Distill
from compressors.factorize import neural_codes
from compressors.factorize.low_rank import factors
from compressors.factorize.neural_codes import NeuralCodes, decode, fit, squared_error
from compressors.quantize.calibration.lookup_counts import lookup_counts


def random_normal(seed: int, rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def low_rank_error(table: Tensor, weight: Tensor, size: int) -> float:
    narrow, projection, mean = factors(table, size, weight)
    difference = (narrow @ projection + mean - table).double()
    return float((weight / weight.mean() * difference.square().sum(dim=1)).sum())


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 30),
    size=st.integers(1, 5),
    hidden=st.integers(1, 8),
    steps=st.sampled_from([0, 5]),
    power=st.floats(-3, 3),
)
def test_neural_codes_never_have_a_larger_error_than_low_rank_of_equal_size(
    seed, rows, size, hidden, steps, power
):
    table, weight = (
        random_normal(seed, rows, 6) * 10**power,
        random_normal(seed + 1, rows, 1).abs()[:, 0] + 0.01,
    )
    weight = weight.double()
    codes, decoder = fit(table, weight, size, hidden, steps, seed)
    error = squared_error(table, weight / weight.mean(), codes, decoder)
    # codes and decoder are float32, so sums of six products have an error in the seventh digit
    assert (
        error <= low_rank_error(table, weight, size) * (1 + 1e-5) + 1e-11 * 10 ** (2 * power) * rows
    )


@given(seed=st.integers(0, 10**6), rows=st.integers(20, 40), power=st.floats(-3, 3))
def test_the_last_layer_of_the_decoder_is_the_least_squares_solution(seed, rows, power):
    """Compared with torch's least squares for the hidden units of the untrained decoder."""
    table, weight = (
        random_normal(seed, rows, 6) * 10**power,
        10 ** random_normal(seed + 1, rows, 1)[:, 0].double(),
    )
    codes, decoder = fit(table, weight, 2, 5, 0, seed)
    hidden_units = F.relu(codes @ decoder.inner + decoder.bias)
    decoder_inputs = torch.cat([codes, hidden_units, torch.ones(rows, 1)], dim=1).double()
    root = weight.sqrt().unsqueeze(1)
    # The fit is damped by a billionth, so it does not use directions that float32 rounding
    # dominates. The reference ignores singular values below a hundredth of the largest.
    best = torch.linalg.lstsq(
        root * decoder_inputs, root * table.double(), rcond=1e-2, driver="gelsd"
    ).solution
    reference_error = float((root * (decoder_inputs @ best - table)).square().sum())
    table_energy = float((root * table.double()).square().sum())
    assert squared_error(table, weight, codes, decoder) <= reference_error + 1e-4 * table_energy


def test_fit_discards_a_training_that_increases_the_error(monkeypatch):
    table, weight = random_normal(0, 50, 6), torch.ones(50).double()
    start = squared_error(table, weight, *fit(table, weight, 2, 8, 0, 0))
    monkeypatch.setattr("compressors.factorize.neural_codes.CODE_RATE", 1e4)
    monkeypatch.setattr("compressors.factorize.neural_codes.DECODER_RATE", 1e4)
    assert squared_error(table, weight, *fit(table, weight, 2, 8, 5, 0)) == start


def test_training_minimizes_the_weighted_error(monkeypatch):
    """Without weights in the training, only the initial codes and the last layer have them."""
    table = (
        torch.sin(random_normal(0, 500, 2) @ random_normal(1, 2, 32) * 1.5)
        @ random_normal(2, 32, 10)
        / 6
    )
    weight = torch.ones(500).double()
    weight[:50] = 100
    weighted_error = squared_error(table, weight, *fit(table, weight, 2, 32, 300, 0))
    trained = neural_codes._trained

    def trained_without_weights(rows: Tensor, weight: Tensor, *rest: Any) -> Any:
        return trained(rows, torch.ones_like(weight), *rest)

    monkeypatch.setattr(neural_codes, "_trained", trained_without_weights)
    unweighted_error = squared_error(table, weight, *fit(table, weight, 2, 32, 300, 0))
    assert weighted_error < 0.93 * unweighted_error  # 0.86 was measured


def test_codes_of_a_curved_surface_have_less_than_half_the_error_of_low_rank():
    """The rows are a curved function of two numbers, so rank 2 cannot represent them."""
    table = (
        torch.sin(random_normal(0, 500, 2) @ random_normal(1, 2, 32) * 1.5)
        @ random_normal(2, 32, 10)
        / 6
    )
    weight = torch.ones(500).double()
    error_of_low_rank = low_rank_error(table, weight, 2)
    errors = [
        squared_error(table, weight, *fit(table, weight, 2, 32, steps, 0)) for steps in (0, 300)
    ]
    # 0.62 and 0.29 of the error of low rank were measured
    assert errors[0] < 0.8 * error_of_low_rank
    assert errors[1] < 0.5 * error_of_low_rank


def test_training_in_batches_lowers_the_error_and_is_deterministic(monkeypatch):
    monkeypatch.setattr("compressors.factorize.neural_codes.BATCH", 64)
    table = (
        torch.sin(random_normal(0, 500, 2) @ random_normal(1, 2, 32) * 1.5)
        @ random_normal(2, 32, 10)
        / 6
    )
    weight = torch.ones(500).double()
    errors = [
        squared_error(table, weight, *fit(table, weight, 2, 32, steps, 0)) for steps in (0, 600)
    ]
    assert errors[1] < 0.8 * errors[0]
    codes_and_decoder = fit(table, weight, 2, 32, 20, 0)
    torch.testing.assert_close(codes_and_decoder, fit(table, weight, 2, 32, 20, 0), rtol=0, atol=0)


def test_fit_in_blocks_of_rows_has_the_error_of_one_block(monkeypatch):
    table, weight = random_normal(0, 50, 6), torch.ones(50).double()
    at_once = fit(table, weight, 3, 8, 0, 0)
    monkeypatch.setattr("compressors.factorize.neural_codes.BLOCK", 7)
    error, error_in_blocks = (
        squared_error(table, weight, *fitted)
        for fitted in (at_once, fit(table, weight, 3, 8, 0, 0))
    )
    assert error_in_blocks == pytest.approx(error, rel=1e-4)  # the same sums in another order


def test_the_hidden_width_grows_with_the_rows_and_short_tables_are_skipped(tmp_path):
    step = NeuralCodes(steps=0)
    plan = run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path).plan
    # a quarter of 300 * 4 numbers over 4 + 1 + 7 for each hidden unit
    require_reason(plan.of("item").reasons, "decoded_codes", dim=7, codes=4, hidden=25)
    assert plan.of("item").bytes_after == 4 * (4 * 7 + 4 * 25 + 25 + 25 * 7 + 7)
    require_reason(plan.of("city").reasons, "too_short_for_decoder", rows=9, dim=6, codes=3)
    assert plan.of("city").format == "float32"


def test_distillation_trains_codes_and_decoder_only_with_tables_true(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    coded = run(NeuralCodes(steps=5), RANKER.model(), bench, tmp_path / "made")
    step = Distill(training=QUICKLY.model_copy(update={"tables": True}))
    trained_tables = run(step, coded, bench, tmp_path / "taught")
    before, after = coded.module.item, trained_tables.module.item
    assert trained_tables.plan.of("item").steps == ("neural_codes", "distill")
    for name in ("codes.weight", "projection", "inner", "bias", "outer", "mean"):
        assert not torch.equal(after.state_dict()[name], before.state_dict()[name]), name
    trained_dense = run(Distill(training=QUICKLY), coded, bench, tmp_path / "still")
    torch.testing.assert_close(
        trained_dense.module.item.state_dict(), before.state_dict(), rtol=0, atol=0
    )


def test_weighted_neural_codes_have_a_smaller_error_on_looked_up_rows(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    counts = lookup_counts(source, bench, ["item"])["item"]
    errors = {}
    for weighted in (False, True):
        step = NeuralCodes(tables=("item",), codes=2, steps=200, weighted=weighted)
        table = run(step, source, bench, tmp_path / str(weighted)).module.item
        with torch.no_grad():
            difference = (table(torch.arange(300)) - source.module.item.weight).square().sum(dim=1)
        errors[weighted] = float((difference * counts).sum())
    assert errors[True] < errors[False]


def test_decode_equals_the_formula_written_out():
    table, weight = random_normal(0, 20, 5), torch.ones(20).double()
    codes, d = fit(table, weight, 2, 4, 3, 0)
    by_hand = torch.stack(
        [
            sum((c[i] * d.projection[i] for i in range(2)), d.mean)
            + sum(max(float(c @ d.inner[:, h] + d.bias[h]), 0.0) * d.outer[h] for h in range(4))
            for c in codes
        ]
    )
    torch.testing.assert_close(decode(codes, d), by_hand, rtol=1e-5, atol=1e-5)
