"""``l1_training``: penalties that make weights or channels exactly zero, and steps after it.

``RANKER`` has the dense layers ``hidden``, ``cross`` and ``out``, among others. ``NORMED`` has a
batch norm after ``hidden`` (both: ``tests/models.py``), and ``ResidualConcatNet`` after ``right``.
"""

import hypothesis.strategies as st
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from models import NORMED, RANKER, SHORT_TRAINING, Reference, generate_inputs, write_split
from narrow_networks import SIGNATURE, ResidualConcatNet
from reason_codes import codes_of, require_reason

from compressors.contracts.reasons import Reason
from compressors.core.runner import run
from compressors.distill.fine_tune import FineTune
from compressors.errors.compression import NothingToCompress
from compressors.prune.dense.channels import Channels
from compressors.prune.dense.l1_training import L1Training, group_threshold, soft_threshold
from compressors.quantize.dense.static_int8 import StaticInt8

RESIDUAL_CONCAT = Reference(ResidualConcatNet, SIGNATURE)
TWENTY_EPOCHS = SHORT_TRAINING.model_copy(update={"epochs": 20, "schedule": "cosine"})


def predictions(model, reference):
    inputs = generate_inputs(reference.signature, reference.rows_of_tables(), 50, seed=3)
    with torch.no_grad():
        return model.module(**inputs).reshape(-1)


numbers = st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=8)


@given(numbers, st.floats(0, 3))
def test_soft_threshold_minimizes_squared_distance_plus_l1_penalty(values, threshold):
    """It minimizes |x - w|^2 / 2 + threshold * |x|, compared with near values, zero and w."""
    weight = torch.tensor(values, dtype=torch.float64)

    def cost(x: torch.Tensor) -> torch.Tensor:
        return (x - weight).square() / 2 + threshold * x.abs()

    result = soft_threshold(weight, threshold)
    for other in (result + 1e-3, result - 1e-3, torch.zeros_like(weight), weight):
        assert (cost(result) <= cost(other) + 1e-12).all()


@given(st.integers(1, 5), st.integers(0, 99), st.floats(0, 2))
def test_group_threshold_minimizes_squared_distance_plus_group_penalty(count, seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    group_of_row = torch.randint(count, (7,), generator=generator)
    first = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    second = torch.randn(count, generator=generator, dtype=torch.float64)
    all_groups = torch.arange(count)
    result = group_threshold([(first, group_of_row), (second, all_groups)], count, threshold)
    for group in range(count):
        is_in_group = group_of_row == group
        group_before = torch.cat([first[is_in_group].flatten(), second[group : group + 1]])
        group_after = torch.cat([result[0][is_in_group].flatten(), result[1][group : group + 1]])
        group_threshold_norm = threshold * len(group_before) ** 0.5
        if group_before.norm() <= group_threshold_norm:
            assert not group_after.any()
        else:  # the gradients of distance and penalty add to zero
            torch.testing.assert_close(
                group_after
                - group_before
                + group_threshold_norm * group_after / group_after.norm(),
                torch.zeros_like(group_after),
            )


def test_a_larger_penalty_gives_more_zeros_and_the_plan_has_their_share(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    shares = []
    for strength in (0.01, 0.05, 0.2):
        step = L1Training(penalty_strength=strength, training=TWENTY_EPOCHS)
        result = run(step, RANKER.model(), bench, tmp_path / f"{strength}")
        zeros = float((result.module.hidden.weight == 0).float().mean())
        shares.append(zeros)
        line = result.plan.of("hidden")
        require_reason(line.reasons, "zeros", share=pytest.approx(zeros))
        assert line.bytes_after == line.bytes_before
    assert 0 < shares[0] < shares[1] < shares[2] <= 1
    # Without a penalty, Adam does not make weights exactly zero.
    fine_tuned = run(FineTune(training=TWENTY_EPOCHS), RANKER.model(), bench, tmp_path / "plain")
    assert not (fine_tuned.module.hidden.weight == 0).any()


def test_only_matching_layers_are_penalized_and_all_layers_are_trained(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    step = L1Training(layers=("hidden",), penalty_strength=0.1, training=TWENTY_EPOCHS)
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    assert (result.module.hidden.weight == 0).any()
    assert not (result.module.cross.weight == 0).any()
    assert not torch.equal(result.module.cross.weight, RANKER.model().module.cross.weight)
    assert codes_of(result.plan.of("cross").reasons)[:2] == ["trained_on_rows", "trained_to_epoch"]
    # ``part`` is what the penalty makes zero: single weights here, or whole channels.
    require_reason(result.plan.of("hidden").reasons, "penalty", strength=0.1, part="weight")


def test_training_returns_the_last_epoch_if_an_earlier_one_had_a_better_metric(tmp_path, caplog):
    """The labels are the network's predictions: every epoch with a penalty lowers the metric."""
    source = NORMED.model()
    rows = write_split(
        NORMED.signature,
        NORMED.rows_of_tables(),
        tmp_path / "own",
        seed=9,
        score_function=lambda inputs: source.module(**inputs).reshape(-1),
    )
    bench = NORMED.bench(tmp_path / "data").model_copy(update={"validation": rows})
    training = SHORT_TRAINING.model_copy(update={"epochs": 4, "patience": 1})
    result = run(
        L1Training(penalty_strength=1.0, training=training), source, bench, tmp_path / "out"
    )
    assert (result.module.hidden.weight == 0).any()
    assert [r.message for r in caplog.records if r.message.startswith("epoch 4")]


def test_fine_tuning_keeps_zero_weights(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    step = L1Training(
        penalty_strength=0.5, training=SHORT_TRAINING.model_copy(update={"epochs": 3})
    )
    sparse = run(step, RANKER.model(), bench, tmp_path / "sparse")
    tuned = run(FineTune(training=SHORT_TRAINING), sparse, bench, tmp_path / "tuned")
    for name in ("hidden", "cross", "out"):
        before = sparse.module.get_submodule(name).weight
        after = tuned.module.get_submodule(name).weight
        assert torch.equal(before == 0, after == 0)
        assert (before == 0).any()
        assert not torch.equal(before, after)


@pytest.mark.parametrize(("reference", "layer"), [(RESIDUAL_CONCAT, "right"), (NORMED, "hidden")])
def test_channels_removes_zero_channels_without_changing_predictions(reference, layer, tmp_path):
    """The weights of a norm after a zero channel become zero as well."""
    bench = reference.bench(tmp_path / "data")
    # ``soft_share`` is the weight of the original model's predictions; the labels get the rest.
    step = L1Training(penalty="group", penalty_strength=0.4, training=TWENTY_EPOCHS, soft_share=0.5)
    sparse = run(step, reference.model(), bench, tmp_path / "sparse")
    weights = dict(sparse.module.named_parameters())
    zero = (weights[f"{layer}.weight"] == 0).all(dim=1)
    zero_count = int(zero.sum())
    assert zero_count > 0
    reasons = sparse.plan.of(layer).reasons
    width = len(weights[f"{layer}.bias"])
    require_reason(reasons, "zero_outputs", count=zero_count, outputs=width)
    assert not weights[f"{layer}.bias"][zero].any()
    assert not weights["norm.weight"][zero].any()
    if reference is RESIDUAL_CONCAT:
        # The outputs of ``left`` and ``again`` are added, so the same channels become zero.
        left, again = ((weights[f"{n}.weight"] == 0).all(dim=1) for n in ("left", "again"))
        assert torch.equal(left, again)
    keep = 1 - zero_count / width
    step = Channels(importance="activation", layers=(layer,), keep=keep, multiple=1)
    narrow = run(step, sparse, bench, tmp_path / "narrow")
    assert narrow.module.get_submodule(layer).out_features == width - zero_count
    # Sums of fewer terms round differently.
    torch.testing.assert_close(
        predictions(narrow, reference), predictions(sparse, reference), rtol=1e-5, atol=1e-6
    )


def test_l1_training_of_packed_layers_raises_nothing_to_compress(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    # ``packed`` has layers with int8 codes in place of float weights.
    packed = run(StaticInt8(), NORMED.model(), bench, tmp_path / "packed")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(L1Training(training=SHORT_TRAINING), packed, bench, tmp_path / "out")
    assert caught.value.fields["reasons"]["hidden"] == (
        Reason("already_stored", format="static_int8"),
    )
