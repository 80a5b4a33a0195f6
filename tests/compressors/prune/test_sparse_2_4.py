"""``sparse_2_4``: two zeros among every four inputs, refitted weights, and steps after it."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from models import RANKER, SHORT_TRAINING, Ranker, Reference
from reason_codes import codes_of, require_reason
from torch import Tensor, nn

from compressors.contracts import Bench
from compressors.core.runner import run
from compressors.distill.fine_tune import FineTune
from compressors.errors.compression import NothingToCompress
from compressors.prune.dense.sparse_2_4 import (
    DAMPING,
    Sparse24,
    is_2_4,
    kept_2_4,
    refit_kept_weights,
    sparse_layers,
)
from compressors.quantize.calibration.input_moments import squared_error
from compressors.quantize.dense.bfloat16_dense import BFloat16Dense
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.dense.weight_int4 import WeightInt4

sizes = st.tuples(st.integers(1, 12).map(lambda n: 4 * n), st.integers(1, 9))
seeds = st.integers(0, 2**20)
LAYERS = ("cross", "hidden", "capped", "plain", "out")  # all dense layers of RANKER


def draw_normal(outputs: int, inputs: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(outputs, inputs)), dtype=torch.float32)


def gram_of(rows: int, inputs: int, seed: int) -> Tensor:
    """Compute the gram matrix, float64 ``(inputs, inputs)``, of correlated random inputs."""
    x = (draw_normal(rows, inputs, seed) @ draw_normal(inputs, inputs, seed + 1)).relu().double()
    return x.T @ x


@given(size=sizes, seed=seeds, has_norms=st.booleans())
def test_kept_2_4_keeps_the_two_most_important_of_every_four_inputs(size, seed, has_norms):
    inputs, outputs = size
    weight = draw_normal(outputs, inputs, seed)
    norms = torch.tensor(np.random.default_rng(seed).random(inputs)).float() if has_norms else None
    is_kept = kept_2_4(weight, norms)
    groups = is_kept.reshape(-1, 4)
    assert (groups.sum(dim=1) == 2).all()
    importance = (weight.abs() if norms is None else weight.abs() * norms).reshape(-1, 4)
    smallest_kept = importance.masked_fill(~groups, torch.inf).amin(dim=1)
    largest_removed = importance.masked_fill(groups, -1).amax(dim=1)
    assert (smallest_kept >= largest_removed).all()
    assert is_2_4(torch.where(is_kept, weight, 0.0))


def test_kept_2_4_multiplies_weights_by_the_norms_of_their_inputs():
    weight = torch.tensor([[0.1, 1.0, 2.0, 3.0]])
    assert kept_2_4(weight).tolist() == [[False, False, True, True]]
    norms = torch.tensor([100.0, 1.0, 1.0, 1.0])
    assert kept_2_4(weight, norms).tolist() == [[True, False, False, True]]


def test_kept_2_4_keeps_the_first_of_equal_weights():
    assert kept_2_4(torch.ones(2, 8)).tolist() == [[True, True, False, False] * 2] * 2


@given(size=sizes, rows=st.integers(1, 40), seed=seeds)
def test_refit_kept_weights_keeps_zeros_and_never_increases_the_error_of_an_output(
    size, rows, seed
):
    inputs, outputs = size
    weight, gram = draw_normal(outputs, inputs, seed), gram_of(rows, inputs, seed)
    is_kept = kept_2_4(weight)
    refitted = refit_kept_weights(weight, is_kept, gram)
    assert refitted.dtype == weight.dtype
    assert not refitted[~is_kept].any()
    removed = squared_error(torch.where(is_kept, weight, 0.0) - weight, gram)
    # The refitted weights are rounded to float32.
    assert (squared_error(refitted - weight, gram) <= removed * (1 + 1e-4) + 1e-9).all()


@given(size=sizes, seed=seeds)
def test_refit_kept_weights_equals_the_damped_least_squares_solution(size, seed):
    inputs, outputs = size
    weight, gram = draw_normal(outputs, inputs, seed), gram_of(60, inputs, seed)
    is_kept = kept_2_4(weight)
    refitted = refit_kept_weights(weight, is_kept, gram)
    damped_gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(inputs)
    for channel in range(outputs):
        kept = is_kept[channel]
        removed = damped_gram[kept][:, ~kept] @ weight[channel][~kept].double()
        exact = weight[channel][kept].double() + torch.linalg.solve(
            damped_gram[kept][:, kept], removed
        )
        # Weights are float32, and conjugate gradients stop at a millionth of the initial residual.
        torch.testing.assert_close(refitted[channel][kept].double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_all_layers_of_a_model_become_2_4_sparse_with_reasons_in_the_plan(importance, tmp_path):
    source, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    result = run(Sparse24(importance=importance), source, bench, tmp_path / "out")
    for name in LAYERS:
        layer = getattr(result.module, name)
        assert isinstance(layer, nn.Linear)
        assert is_2_4(layer.weight)
        assert codes_of(result.plan.of(name).reasons) == ["two_of_four", "reconstruction_error"]
    assert sparse_layers(result.module, result.plan) == LAYERS
    assert sparse_layers(source.module, source.plan) == ()


def test_magnitude_importance_without_reconstruction_reads_no_rows(tmp_path):
    step = Sparse24(importance="magnitude", reconstruct=False)
    source = RANKER.model()
    result = run(step, source, Bench(signature=RANKER.signature), tmp_path / "out")
    is_kept = result.module.hidden.weight != 0
    assert torch.equal(result.module.hidden.weight[is_kept], source.module.hidden.weight[is_kept])
    with raises_code(NothingToCompress, "rows_missing", missing=("calibration",)):
        run(Sparse24(), source, Bench(signature=RANKER.signature), tmp_path / "not")


def test_a_layer_whose_inputs_are_not_a_multiple_of_four_is_skipped_with_a_reason(tmp_path):
    wide = Reference(Ranker, RANKER.signature, {"width": 18})
    plan = run(Sparse24(), wide.model(), wide.bench(tmp_path / "data"), tmp_path / "out").plan
    require_reason(plan.of("plain").reasons, "inputs_not_multiple", inputs=18)
    assert plan.of("plain").steps == ()
    assert plan.of("hidden").steps == ("sparse_2_4",)


def test_training_and_formats_with_sparse_kernels_keep_the_2_4_pattern(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    sparse = run(Sparse24(), RANKER.model(), bench, tmp_path / "sparse")
    tuned = run(FineTune(training=SHORT_TRAINING), sparse, bench, tmp_path / "tuned")
    assert tuned.plan.of("hidden").steps == ("sparse_2_4", "fine_tune")
    assert not torch.equal(tuned.module.hidden.weight, sparse.module.hidden.weight)
    assert sparse_layers(tuned.module, tuned.plan) == LAYERS
    for step in (StaticInt8(), Float16(), BFloat16Dense()):
        packed = run(step, tuned, bench, tmp_path / step.kind)
        assert sparse_layers(packed.module, packed.plan) == LAYERS
    # Kernels for weight-only codes are dense, so the zeros save nothing.
    packed = run(WeightInt4(), tuned, bench, tmp_path / "int4")
    assert sparse_layers(packed.module, packed.plan) == ()


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (torch.tensor([[1, 0, 0, 2, 0, 0, 0, 0]], dtype=torch.int8), True),
        (torch.tensor([[1, 0, 0, 2, 3, 4, 5, 0]], dtype=torch.int8), False),
        (torch.zeros(2, 6), False),
    ],
)
def test_is_2_4_is_true_only_for_the_2_4_pattern(weight, expected):
    assert is_2_4(weight) == expected
