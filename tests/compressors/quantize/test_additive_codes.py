"""Additive codes: beam search, the joint fit of codebooks, and weights of rows and columns.

Calls of ``fit`` have the positional arguments table, weight of each row, number of codebooks, and
entries per codebook.

Calls of ``encode`` have the table, the concatenated codebooks, the number of codebooks
(``num_codebooks``) and the width of the beam. The errors that ``fit`` returns are those of residual
fitting, then of each round. ``shake`` is the noise added to the codebooks in the first round, in
their standard deviations, and ``draws`` the number of fits, each with other noise. The weight of a
row is its lookup count to the power ``lookup_power``; ``sensitive`` weights rows by gradients.

The table ``item`` of ``RANKER`` (``tests/models.py``) has 300 rows of 7 values, and ``user`` of
``NORMED`` 15 rows of 6.
"""

import itertools

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import NORMED, RANKER
from reason_codes import require_reason
from table_codes import clustered_rows
from torch import Tensor, nn

from compressors.contracts import Bench
from compressors.core.batches import batches
from compressors.core.runner import run
from compressors.core.units import Unit
from compressors.errors.compression import NothingToCompress
from compressors.metrics.validation_score import quality
from compressors.quantize.calibration.lookup_counts import lookup_counts, sensitivities
from compressors.quantize.calibration.loss_gradients import sensitivity
from compressors.quantize.kernels.lloyd import nearest_entries, squared_distance
from compressors.quantize.tables import residual_codes
from compressors.quantize.tables.additive_codes import (
    AdditiveCodes,
    encode,
    fit,
    lookup_weight,
    weighting_matrix,
)
from compressors.quantize.tables.residual_codes import decode


def draw_normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(table: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
    return squared_distance(table, decode(codes, codebook))


@given(seed=st.integers(0, 10**6), num_codebooks=st.integers(1, 3), rows=st.integers(1, 20))
def test_encode_with_a_beam_of_all_sums_finds_the_smallest_error(seed, num_codebooks, rows):
    table, codebook = draw_normal(seed, rows, 5), draw_normal(seed + 1, num_codebooks * 3, 5)
    all_codes = torch.tensor(
        list(itertools.product(range(3), repeat=num_codebooks)), dtype=torch.uint8
    )
    sums = decode(all_codes, codebook)  # (3 ** num_codebooks, dim)
    best = torch.cdist(table.double(), sums.double()).square().amin(dim=1)
    result = error(table, encode(table, codebook, num_codebooks, beam=3**num_codebooks), codebook)
    # float32 sums of squares of numbers near 1; two codes may have almost equal errors
    torch.testing.assert_close(result.double(), best, atol=1e-4, rtol=1e-4)


@given(seed=st.integers(0, 10**6), num_codebooks=st.integers(1, 4))
def test_encode_with_a_beam_of_one_has_the_error_of_greedy_codes(seed, num_codebooks):
    table, codebook = draw_normal(seed, 15, 6), draw_normal(seed + 1, num_codebooks * 4, 6)
    residual, greedy = table, []
    for book in codebook.reshape(num_codebooks, 4, 6):
        greedy.append(nearest_entries(residual, book))
        residual = residual - book[greedy[-1]]
    expected = error(table, torch.stack(greedy, dim=1).to(torch.uint8), codebook)
    result = error(table, encode(table, codebook, num_codebooks, beam=1), codebook)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


def test_encode_in_small_blocks_has_the_error_of_encoding_all_rows_at_once(monkeypatch):
    table, codebook = draw_normal(0, 50, 6), draw_normal(1, 12, 6)
    at_once = error(table, encode(table, codebook, 3, beam=4), codebook)
    monkeypatch.setattr("compressors.quantize.tables.additive_codes.BLOCK", 7)
    in_blocks = encode(table, codebook, 3, beam=4)
    assert in_blocks.shape == (50, 3)
    torch.testing.assert_close(error(table, in_blocks, codebook), at_once)


@pytest.mark.parametrize("seed", range(3))
def test_fit_has_a_smaller_error_than_residual_and_plain_additive_codes(seed):
    """The references are residual fitting, and additive codes without noise and beam search."""
    table, weight = clustered_rows(400, 10, seed), torch.ones(400)
    # The first error of ``errors`` is that of residual fitting. Residual codes whose codebooks are
    # refined (here in up to eight rounds) are additive codes.
    _, errors = fit(table, weight, 4, 8)
    error_of_plain_additive_codes = residual_codes.fit(table, 4, 8, refine=8).errors[-1]
    # For five tables, the error was 0.72 to 0.79 of that of residual fitting, and 0.78 to 0.84 of
    # that of additive codes without noise and beam search.
    assert min(errors) < 0.85 * errors[0]
    assert min(errors) < 0.9 * error_of_plain_additive_codes


def test_fit_returns_the_codebook_of_the_best_round_not_of_the_last():
    table, weight = clustered_rows(200, 8), torch.rand(200) + 0.1
    codebook, errors = fit(table, weight, 3, 4, rounds=1, shake=3.0)
    assert errors[1] > 2 * errors[0]  # noise three times as large as the entries
    weighted_error = (error(table, encode(table, codebook, 3, 16), codebook) * weight).sum()
    assert float(weighted_error) == pytest.approx(errors[0], rel=1e-4)


def test_rounds_lower_the_weighted_error():
    """The codes before the rounds are weighted too, so only weighted rounds lower the error."""
    table, weight = draw_normal(3, 300, 8), torch.ones(300)
    weight[:30] = 50
    _, errors = fit(table, weight, 2, 8)
    assert min(errors) < 0.9 * errors[0]  # 0.84 was measured


@given(seed=st.integers(0, 10**6), factor=st.sampled_from([1e-4, 1.0, 1e3]))
def test_fit_has_the_same_relative_error_for_a_table_multiplied_by_a_constant(seed, factor):
    """Trained tables have weights of any magnitude; damping and noise must be relative to it."""
    table, weight = clustered_rows(60, 5, seed), torch.ones(60)
    first, _ = fit(table, weight, 2, 4, rounds=5)
    second, _ = fit(table * factor, weight, 2, 4, rounds=5)
    first_error = error(table, encode(table, first, 2, 8), first).sum()
    second_error = (
        error(table * factor, encode(table * factor, second, 2, 8), second).sum() / factor**2
    )
    # rounding may change codes
    assert float(second_error) == pytest.approx(float(first_error), rel=0.05, abs=1e-6)


def test_rows_of_larger_weight_have_a_smaller_error_than_with_equal_weights():
    table = draw_normal(3, 300, 8)
    weight = torch.ones(300)
    weight[:30] = 50
    unweighted, _ = fit(table, torch.ones(300), 2, 8)
    weighted, _ = fit(table, weight, 2, 8)
    errors = [
        error(table, encode(table, codebook, 2, 16), codebook)[:30].sum()
        for codebook in (unweighted, weighted)
    ]
    assert errors[1] < 0.6 * errors[0]


@given(seed=st.integers(0, 10**6))
def test_squared_error_after_the_weighting_matrix_is_the_error_weighted_by_sensitivity(seed):
    gradients, difference = draw_normal(seed, 40, 5).double(), draw_normal(seed + 1, 3, 5)
    matrix = gradients.T @ gradients  # the sensitivity
    # Half of the weight of a column is equal for all columns.
    identity = torch.eye(5, dtype=torch.float64) * matrix.diagonal().mean()
    expected = ((difference.double() @ (matrix + identity)) * difference.double()).sum(dim=1)
    result = (difference @ weighting_matrix(matrix)).square().sum(
        dim=1
    ).double() * matrix.diagonal().mean()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


def test_without_sensitivity_or_lookups_rows_and_columns_have_equal_weights():
    assert torch.equal(weighting_matrix(torch.zeros(4, 4)), torch.eye(4))
    assert torch.equal(lookup_weight(torch.zeros(5), 10, 0.5), torch.ones(5, dtype=torch.float64))


def test_lookup_weight_is_a_power_of_the_lookups_and_positive_without_lookups():
    weight = lookup_weight(torch.tensor([0.0, 4.0, 12.0]), 16, 0.5)
    torch.testing.assert_close(weight, torch.tensor([0.5, 4.5, 12.5]).double().sqrt())


def test_sensitivity_equals_sums_of_torchs_squared_output_gradients(tmp_path):
    """The expected sums are computed with autograd, one data row at a time."""
    model, bench = NORMED.model(), NORMED.bench(tmp_path)
    assert bench.train is not None
    table = model.module.user
    (result,) = sensitivity(model.module, bench.signature, bench.train, {"user": table}).values()
    (batch,) = batches(bench.train, bench.signature, bench.train.rows)
    rows = batch.inputs
    columns, by_row = torch.zeros(6, 6), torch.zeros(15)
    for index in range(len(rows["user"])):
        single_row = {name: tensor[index : index + 1] for name, tensor in rows.items()}
        (gradient,) = torch.autograd.grad(model.module(**single_row).sum(), table.weight)
        row = gradient[single_row["user"]].squeeze(0)
        columns += torch.outer(row, row)
        by_row[single_row["user"]] += row.square().sum()
    torch.testing.assert_close(result.columns.float(), columns, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(result.rows.float(), by_row, rtol=1e-4, atol=1e-7)
    assert result.lookups == len(rows["user"])


def test_additive_codes_are_stored_as_residual_codes_with_the_expected_bytes(tmp_path):
    model, bench = RANKER.model(), RANKER.bench(tmp_path)
    step = AdditiveCodes(tables=("item",), codebooks=3, bits=4, rounds=2)
    packed = run(step, model, bench, tmp_path / "out")
    unit = next(unit for unit in Unit.of(packed.module) if unit.name == "item")
    assert unit.format == "residual_codes"
    assert unit.bytes == 300 * 2 + 3 * 16 * 7 * 2  # 3 codes of 4 bits, padded; float16 entries


def test_training_rows_are_required_only_for_lookup_counts_or_gradients(tmp_path):
    model, bench = RANKER.model(), RANKER.bench(tmp_path)
    bench_without_rows = Bench(signature=bench.signature)
    for step in (AdditiveCodes(), AdditiveCodes(lookup_power=0), AdditiveCodes(sensitive=False)):
        with raises_code(NothingToCompress, "rows_missing", missing=("train",)):
            run(step, model, bench_without_rows, tmp_path / "refused")
    unweighted_step = AdditiveCodes(lookup_power=0, sensitive=False, rounds=1)
    packed = run(unweighted_step, model, bench_without_rows, tmp_path / "out")
    assert not any(isinstance(part, nn.Embedding) for part in packed.module.modules())


def test_plan_skips_a_table_whose_codes_would_take_more_bytes(tmp_path):
    """``city`` has nine rows of six numbers: 216 bytes.

    The 16 codebooks of two float16 entries would take 384 bytes, the codes 36.
    """
    model, bench = RANKER.model(), RANKER.bench(tmp_path)
    choices = AdditiveCodes(codebooks=16).plan(model, bench).decisions
    assert not choices["city"].selected
    require_reason(choices["city"].reasons, "not_smaller", bytes=420, present=216)
    assert choices["item"].selected


def test_sensitivity_counts_the_same_lookups_as_lookup_counts_without_bag_padding(tmp_path):
    model, bench = RANKER.model(), RANKER.bench(tmp_path)
    expected = lookup_counts(model, bench, ["genres", "history"])
    result = sensitivities(model, bench, ["genres", "history"])
    for name, counts in expected.items():
        assert result[name].lookups == int(counts.sum()), name


def test_of_several_draws_the_fit_with_the_best_validation_metric_is_used(tmp_path):
    model, bench = RANKER.model(), RANKER.bench(tmp_path)
    step = AdditiveCodes(tables=("item",), codebooks=2, bits=2, rounds=8, shake=0.5)

    def quality_with_draws(draws: int) -> float:
        result_with_draws = run(
            step.model_copy(update={"draws": draws}), model, bench, tmp_path / str(draws)
        )
        return quality(result_with_draws.module, bench.signature, bench.validation)

    qualities = [quality_with_draws(draws) for draws in (1, 2, 6)]
    assert qualities == sorted(qualities)
    assert qualities[-1] > qualities[0]  # with this much noise, fits differ
    assert step.needs == ("train",)
    assert AdditiveCodes(draws=2).needs == ("train", "validation")
