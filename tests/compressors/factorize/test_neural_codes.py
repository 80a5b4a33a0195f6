"""``neural_codes``: short codes per row and a decoder with one hidden layer, against low rank.

The decoder's tensors are ``inner`` and ``bias`` (hidden layer), ``outer`` and ``mean`` (output
layer) and ``projection`` (linear connection from the code to the output). The setting ``steps`` is
``adam_steps`` of ``fit``: the number of training steps of codes and decoder.

``RANKER`` of ``models.py`` has the tables ``item`` (300 rows of 7 numbers) and ``city`` (9 of 6).
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER, SHORT_TRAINING
from reason_codes import require_reason
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.distill.distill import Distill
from compressors.factorize import neural_codes
from compressors.factorize.low_rank import factorize
from compressors.factorize.neural_codes import NeuralCodes, decode, fit, squared_error
from compressors.quantize.calibration.lookup_counts import lookup_counts


def draw_normal(seed: int, rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def rows_on_a_curved_surface() -> Tensor:
    """500 rows of 10 numbers that are a nonlinear function of two random numbers per row."""
    hidden = torch.sin(draw_normal(0, 500, 2) @ draw_normal(1, 2, 32) * 1.5)
    return hidden @ draw_normal(2, 32, 10) / 6


def low_rank_error(table: Tensor, weight: Tensor, size: int) -> float:
    """Weighted squared error of the low-rank approximation with ``size`` numbers per row."""
    low_rank_codes, projection, mean = factorize(table, size, weight)
    difference = (low_rank_codes @ projection + mean - table).double()
    return float((weight / weight.mean() * difference.square().sum(dim=1)).sum())


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 30),
    size=st.integers(1, 5),
    hidden=st.integers(1, 8),
    adam_steps=st.sampled_from([0, 5]),
    power=st.floats(-3, 3),
)
def test_neural_codes_never_have_a_larger_error_than_low_rank_of_equal_size(
    seed, rows, size, hidden, adam_steps, power
):
    table, weight = (
        draw_normal(seed, rows, 6) * 10**power,
        draw_normal(seed + 1, rows, 1).abs()[:, 0] + 0.01,
    )
    weight = weight.double()
    codes, decoder = fit(table, weight, size=size, hidden=hidden, adam_steps=adam_steps, seed=seed)
    error = squared_error(table, weight / weight.mean(), codes, decoder)
    # Codes and decoder are float32, so sums of six products have relative errors of about 1e-7.
    assert (
        error <= low_rank_error(table, weight, size) * (1 + 1e-5) + 1e-11 * 10 ** (2 * power) * rows
    )


@given(seed=st.integers(0, 10**6), rows=st.integers(20, 40), power=st.floats(-3, 3))
def test_the_last_layer_of_the_decoder_is_the_least_squares_solution(seed, rows, power):
    """The reference is torch's least squares for the hidden units of the untrained decoder."""
    table, weight = (
        draw_normal(seed, rows, 6) * 10**power,
        10 ** draw_normal(seed + 1, rows, 1)[:, 0].double(),
    )
    codes, decoder = fit(table, weight, size=2, hidden=5, adam_steps=0, seed=seed)
    hidden_units = F.relu(codes @ decoder.inner + decoder.bias)
    decoder_inputs = torch.cat([codes, hidden_units, torch.ones(rows, 1)], dim=1).double()
    root = weight.sqrt().unsqueeze(1)
    # The fit adds a billionth to the diagonal, so it ignores directions that consist of float32
    # rounding errors. The reference ignores singular values below a hundredth of the largest.
    best = torch.linalg.lstsq(
        root * decoder_inputs, root * table.double(), rcond=1e-2, driver="gelsd"
    ).solution
    reference_error = float((root * (decoder_inputs @ best - table)).square().sum())
    table_energy = float((root * table.double()).square().sum())
    assert squared_error(table, weight, codes, decoder) <= reference_error + 1e-4 * table_energy


def test_fit_returns_the_untrained_decoder_if_training_increases_the_error(monkeypatch):
    table, weight = draw_normal(0, 50, 6), torch.ones(50).double()
    untrained_error = squared_error(
        table, weight, *fit(table, weight, size=2, hidden=8, adam_steps=0, seed=0)
    )
    monkeypatch.setattr("compressors.factorize.neural_codes.CODE_RATE", 1e4)
    monkeypatch.setattr("compressors.factorize.neural_codes.DECODER_RATE", 1e4)
    assert (
        squared_error(table, weight, *fit(table, weight, size=2, hidden=8, adam_steps=5, seed=0))
        == untrained_error
    )


def test_training_minimizes_the_weighted_error(monkeypatch):
    """The reference trains with equal weights; its initial codes and last layer are weighted."""
    table = rows_on_a_curved_surface()
    weight = torch.ones(500).double()
    weight[:50] = 100
    weighted_error = squared_error(
        table, weight, *fit(table, weight, size=2, hidden=32, adam_steps=300, seed=0)
    )
    train = neural_codes._train

    def train_without_weights(rows: Tensor, weight: Tensor, *rest: Any) -> Any:
        return train(rows, torch.ones_like(weight), *rest)

    monkeypatch.setattr(neural_codes, "_train", train_without_weights)
    unweighted_error = squared_error(
        table, weight, *fit(table, weight, size=2, hidden=32, adam_steps=300, seed=0)
    )
    assert weighted_error < 0.93 * unweighted_error  # 0.86 was measured


def test_codes_of_a_curved_surface_have_less_than_half_the_error_of_low_rank():
    """The surface has two dimensions, but rank 2 represents only a plane."""
    table = rows_on_a_curved_surface()
    weight = torch.ones(500).double()
    error_of_low_rank = low_rank_error(table, weight, 2)
    errors = [
        squared_error(
            table, weight, *fit(table, weight, size=2, hidden=32, adam_steps=adam_steps, seed=0)
        )
        for adam_steps in (0, 300)
    ]
    # The measured ratios to the error of low rank are 0.62 without training and 0.29 with training.
    assert errors[0] < 0.8 * error_of_low_rank
    assert errors[1] < 0.5 * error_of_low_rank


def test_training_in_batches_lowers_the_error_and_is_deterministic(monkeypatch):
    monkeypatch.setattr("compressors.factorize.neural_codes.BATCH", 64)
    table = rows_on_a_curved_surface()
    weight = torch.ones(500).double()
    errors = [
        squared_error(
            table, weight, *fit(table, weight, size=2, hidden=32, adam_steps=adam_steps, seed=0)
        )
        for adam_steps in (0, 600)
    ]
    assert errors[1] < 0.8 * errors[0]
    codes_and_decoder = fit(table, weight, size=2, hidden=32, adam_steps=20, seed=0)
    torch.testing.assert_close(
        codes_and_decoder,
        fit(table, weight, size=2, hidden=32, adam_steps=20, seed=0),
        rtol=0,
        atol=0,
    )


def test_fit_in_blocks_of_rows_has_the_error_of_one_block(monkeypatch):
    table, weight = draw_normal(0, 50, 6), torch.ones(50).double()
    at_once = fit(table, weight, size=3, hidden=8, adam_steps=0, seed=0)
    monkeypatch.setattr("compressors.factorize.neural_codes.BLOCK", 7)
    error, error_in_blocks = (
        squared_error(table, weight, *fitted)
        for fitted in (at_once, fit(table, weight, size=3, hidden=8, adam_steps=0, seed=0))
    )
    # Fits in blocks add the same numbers in another order.
    assert error_in_blocks == pytest.approx(error, rel=1e-4)


def test_the_hidden_width_grows_with_the_rows_and_short_tables_are_skipped(tmp_path):
    step = NeuralCodes(steps=0)
    plan = run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path).plan
    # A hidden unit has 4 weights, a bias, and 7 weights to the output: 12 numbers. All units
    # together may have a quarter of the codes' numbers, 300 * 4 / 4 = 300, so there are 300 / 12.
    require_reason(plan.of("item").reasons, "decoded_codes", dim=7, codes=4, hidden=25)
    # The line of ``item`` counts the float32 decoder: projection, inner, bias, outer and mean. The
    # codes are a separate table, ``item.codes``, with its own line.
    assert plan.of("item").bytes_after == 4 * (4 * 7 + 4 * 25 + 25 + 25 * 7 + 7)
    assert plan.of("item.codes").bytes_after == 4 * 300 * 4
    require_reason(plan.of("city").reasons, "too_short_for_decoder", rows=9, dim=6, codes=3)
    assert plan.of("city").format == "float32"


def test_distillation_trains_codes_and_decoder_only_with_tables_true(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    with_codes = run(NeuralCodes(steps=5), RANKER.model(), bench, tmp_path / "with codes")
    step = Distill(training=SHORT_TRAINING.model_copy(update={"tables": True}))
    trained_tables = run(step, with_codes, bench, tmp_path / "tables")
    before, after = with_codes.module.item, trained_tables.module.item
    assert trained_tables.plan.of("item").steps == ("neural_codes", "distill")
    for name in ("codes.weight", "projection", "inner", "bias", "outer", "mean"):
        assert not torch.equal(after.state_dict()[name], before.state_dict()[name]), name
    trained_dense = run(Distill(training=SHORT_TRAINING), with_codes, bench, tmp_path / "dense")
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
    table, weight = draw_normal(0, 20, 5), torch.ones(20).double()
    codes, d = fit(table, weight, size=2, hidden=4, adam_steps=3, seed=0)
    expected = torch.stack(
        [
            sum((c[i] * d.projection[i] for i in range(2)), d.mean)
            + sum(max(float(c @ d.inner[:, h] + d.bias[h]), 0.0) * d.outer[h] for h in range(4))
            for c in codes
        ]
    )
    torch.testing.assert_close(decode(codes, d), expected, rtol=1e-5, atol=1e-5)
