"""Neural codes: never further from a table than low rank, nearer where it is bent."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import QUICKLY, RANKER
from reason_codes import with_code
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.distill.distill import Distill
from compressors.factorize import neural_codes
from compressors.factorize.low_rank import factors
from compressors.factorize.neural_codes import NeuralCodes, decode, fit, squared_error
from compressors.quantize.calibration.lookup_counts import lookup_counts


def drawn(seed: int, rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def of_low_rank(table: Tensor, weight: Tensor, size: int) -> float:
    narrow, projection, mean = factors(table, size, weight)
    gap = (narrow @ projection + mean - table).double()
    return float((weight / weight.mean() * gap.square().sum(dim=1)).sum())


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 30),
    size=st.integers(1, 5),
    hidden=st.integers(1, 8),
    steps=st.sampled_from([0, 5]),
    power=st.floats(-3, 3),
)
def test_never_further_than_low_rank_of_as_many_numbers(seed, rows, size, hidden, steps, power):
    table, weight = drawn(seed, rows, 6) * 10**power, drawn(seed + 1, rows, 1).abs()[:, 0] + 0.01
    weight = weight.double()
    codes, decoder = fit(table, weight, size, hidden, steps, seed)
    error = squared_error(table, weight / weight.mean(), codes, decoder)
    # codes and decoder are stored in float32, so sums of six products move in the seventh digit
    assert error <= of_low_rank(table, weight, size) * (1 + 1e-5) + 1e-11 * 10 ** (2 * power) * rows


@given(seed=st.integers(0, 10**6), rows=st.integers(20, 40), power=st.floats(-3, 3))
def test_the_last_layer_is_the_least_squares_optimum(seed, rows, power):
    """Against the library's own, of what the hidden layer as drawn gives."""
    table, weight = drawn(seed, rows, 6) * 10**power, 10 ** drawn(seed + 1, rows, 1)[:, 0].double()
    codes, decoder = fit(table, weight, 2, 5, 0, seed)
    bent = F.relu(codes @ decoder.inner + decoder.bias)
    read = torch.cat([codes, bent, torch.ones(rows, 1)], dim=1).double()
    root = weight.sqrt().unsqueeze(1)
    # Directions that differ only by rounding to float32 are not to be used: the damping,
    # a billionth, costs at most what those below a hundredth of the largest could win.
    best = torch.linalg.lstsq(
        root * read, root * table.double(), rcond=1e-2, driver="gelsd"
    ).solution
    enough = float((root * (read @ best - table)).square().sum())
    whole = float((root * table.double()).square().sum())
    assert squared_error(table, weight, codes, decoder) <= enough + 1e-4 * whole


def test_a_training_that_harms_is_not_kept(monkeypatch):
    table, weight = drawn(0, 50, 6), torch.ones(50).double()
    start = squared_error(table, weight, *fit(table, weight, 2, 8, 0, 0))
    monkeypatch.setattr("compressors.factorize.neural_codes.CODE_RATE", 1e4)
    monkeypatch.setattr("compressors.factorize.neural_codes.DECODER_RATE", 1e4)
    assert squared_error(table, weight, *fit(table, weight, 2, 8, 5, 0)) == start


def test_weights_reach_the_training_too(monkeypatch):
    """Not only the first rows and the last layer, which are solved for."""
    table = torch.sin(drawn(0, 500, 2) @ drawn(1, 2, 32) * 1.5) @ drawn(2, 32, 10) / 6
    weight = torch.ones(500).double()
    weight[:50] = 100
    found = squared_error(table, weight, *fit(table, weight, 2, 32, 300, 0))
    trained = neural_codes._trained

    def unweighted(rows: Tensor, weight: Tensor, *rest: Any) -> Any:
        return trained(rows, torch.ones_like(weight), *rest)

    monkeypatch.setattr(neural_codes, "_trained", unweighted)
    without = squared_error(table, weight, *fit(table, weight, 2, 32, 300, 0))
    assert found < 0.93 * without  # 0.86 was measured


def test_a_bent_surface_is_learned_where_a_plane_does_not_fit():
    """Two numbers a row make these rows, but no plane of two dimensions holds them."""
    table = torch.sin(drawn(0, 500, 2) @ drawn(1, 2, 32) * 1.5) @ drawn(2, 32, 10) / 6
    weight = torch.ones(500).double()
    plane = of_low_rank(table, weight, 2)
    errors = [
        squared_error(table, weight, *fit(table, weight, 2, 32, steps, 0)) for steps in (0, 300)
    ]
    # 0.62 and 0.29 of the plane's error were measured
    assert errors[0] < 0.8 * plane
    assert errors[1] < 0.5 * plane


def test_a_table_longer_than_a_batch_is_trained_by_its_rows(monkeypatch):
    monkeypatch.setattr("compressors.factorize.neural_codes.BATCH", 64)
    table = torch.sin(drawn(0, 500, 2) @ drawn(1, 2, 32) * 1.5) @ drawn(2, 32, 10) / 6
    weight = torch.ones(500).double()
    errors = [
        squared_error(table, weight, *fit(table, weight, 2, 32, steps, 0)) for steps in (0, 600)
    ]
    assert errors[1] < 0.8 * errors[0]
    again = fit(table, weight, 2, 32, 20, 0)
    torch.testing.assert_close(again, fit(table, weight, 2, 32, 20, 0), rtol=0, atol=0)


def test_blocks_of_rows_give_what_one_block_gives(monkeypatch):
    table, weight = drawn(0, 50, 6), torch.ones(50).double()
    whole = fit(table, weight, 3, 8, 0, 0)
    monkeypatch.setattr("compressors.factorize.neural_codes.BLOCK", 7)
    error, other = (
        squared_error(table, weight, *each) for each in (whole, fit(table, weight, 3, 8, 0, 0))
    )
    assert other == pytest.approx(error, rel=1e-4)  # the same sums in another order


def test_the_hidden_layer_follows_the_rows_and_short_tables_stay(tmp_path):
    step = NeuralCodes(steps=0)
    plan = run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path).plan
    # a quarter of 300 * 4 numbers over 4 + 1 + 7 for each hidden unit
    with_code(plan.of("item").reasons, "decoded_codes", dim=7, codes=4, hidden=25)
    assert plan.of("item").bytes_after == 4 * (4 * 7 + 4 * 25 + 25 + 25 * 7 + 7)
    with_code(plan.of("city").reasons, "too_short_for_decoder", rows=9, dim=6, codes=3)
    assert plan.of("city").format == "float32"


def test_distillation_trains_codes_and_decoder_on_the_task(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    made = run(NeuralCodes(steps=5), RANKER.model(), bench, tmp_path / "made")
    step = Distill(training=QUICKLY.model_copy(update={"tables": True}))
    taught = run(step, made, bench, tmp_path / "taught")
    before, after = made.module.item, taught.module.item
    assert taught.plan.of("item").steps == ("neural_codes", "distill")
    for name in ("codes.weight", "projection", "inner", "bias", "outer", "mean"):
        assert not torch.equal(after.state_dict()[name], before.state_dict()[name]), name
    still = run(Distill(training=QUICKLY), made, bench, tmp_path / "still")
    torch.testing.assert_close(still.module.item.state_dict(), before.state_dict(), rtol=0, atol=0)


def test_weighted_keeps_the_rows_of_the_data_better(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    seen = lookup_counts(source, bench, ["item"])["item"]
    gaps = {}
    for weighted in (False, True):
        step = NeuralCodes(tables=("item",), codes=2, steps=200, weighted=weighted)
        made = run(step, source, bench, tmp_path / str(weighted)).module.item
        with torch.no_grad():
            gap = (made(torch.arange(300)) - source.module.item.weight).square().sum(dim=1)
        gaps[weighted] = float((gap * seen).sum())
    assert gaps[True] < gaps[False]


def test_decoding_is_the_formula():
    table, weight = drawn(0, 20, 5), torch.ones(20).double()
    codes, d = fit(table, weight, 2, 4, 3, 0)
    by_hand = torch.stack(
        [
            sum((c[i] * d.projection[i] for i in range(2)), d.mean)
            + sum(max(float(c @ d.inner[:, h] + d.bias[h]), 0.0) * d.outer[h] for h in range(4))
            for c in codes
        ]
    )
    torch.testing.assert_close(decode(codes, d), by_hand, rtol=1e-5, atol=1e-5)
