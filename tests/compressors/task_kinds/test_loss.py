"""What training minimises, and the rows that come in a batch."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from models import ATTENTION, BENCH_ROWS, NORMED, RANKER

from compressors.core.batches import Batch, Rows, batches
from compressors.task_kinds.loss import hard_loss, shuffled_rows, soft_loss
from compressors.task_kinds.outputs import logits

LISTS = ATTENTION.signature
CLICKS = RANKER.signature
PROBABILITIES = NORMED.signature


def batch(label: list[float], group: list[int] | None = None) -> Batch:
    held = None if group is None else torch.tensor(group)
    return Batch(inputs={}, label=torch.tensor(label), group=held)


# --- losses ----------------------------------------------------------------------------------

numbers = st.floats(-8, 8, width=32)
rows = st.lists(st.tuples(numbers, numbers, st.integers(0, 1)), min_size=1, max_size=12)


@given(rows, st.floats(0.5, 8))
def test_soft_loss_of_clicks_is_the_cross_entropy_of_softened_probabilities(made, temperature):
    score, teacher, _ = (np.array(column, np.float64) for column in zip(*made, strict=True))
    own, wanted = (1 / (1 + np.exp(-x / temperature)) for x in (score, teacher))
    expected = -np.mean(wanted * np.log(own) + (1 - wanted) * np.log1p(-own)) * temperature**2
    found = soft_loss(CLICKS, torch.tensor(score), torch.tensor(teacher), batch([0.0]), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@given(rows)
def test_a_probability_and_its_logit_have_the_same_loss(made):
    score, teacher, label = zip(*made, strict=True)
    of_logits, of_teacher = torch.tensor(score), torch.tensor(teacher)
    held = batch([float(value) for value in label])
    own = (
        hard_loss(CLICKS, of_logits, held),
        soft_loss(CLICKS, of_logits, of_teacher, held, 1.0),
    )
    probability = torch.sigmoid(of_logits), torch.sigmoid(of_teacher)
    other = (
        hard_loss(PROBABILITIES, probability[0], held),
        soft_loss(PROBABILITIES, *probability, held, 1.0),
    )
    # The sigmoid of 8 is stored in float32 with 2e-4 of relative error in 1 - p.
    torch.testing.assert_close(torch.stack(other), torch.stack(own), rtol=2e-3, atol=1e-4)


listed = st.lists(
    st.tuples(numbers, numbers, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=14
)


@given(listed)
def test_list_losses_are_cross_entropies_of_each_lists_shares(made):
    score, teacher, label, group = (np.array(c) for c in zip(*made, strict=True))
    held = batch(label.astype(np.float32).tolist(), group.tolist())

    def shares(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    hard, soft = [], []
    for one in np.unique(group):
        inside = group == one
        own = np.log(shares(score[inside].astype(np.float64)))
        soft.append(-(shares(teacher[inside].astype(np.float64)) * own).sum())
        gains = 2.0 ** label[inside] - 1
        if gains.sum():
            hard.append(-(gains / gains.sum() * own).sum())
    given_scores = torch.tensor(score.astype(np.float64))
    of_teacher = torch.tensor(teacher.astype(np.float64))
    found = (
        hard_loss(LISTS, given_scores, held),
        soft_loss(LISTS, given_scores, of_teacher, held, 1),
    )
    assert float(found[0]) == pytest.approx(np.mean(hard) if hard else 0.0, rel=1e-5, abs=1e-6)
    assert float(found[1]) == pytest.approx(np.mean(soft), rel=1e-5, abs=1e-6)


def test_soft_loss_is_minimal_at_the_teachers_scores():
    teacher = torch.randn(20, generator=torch.Generator().manual_seed(1))
    held = batch([0.0] * 20, [place // 5 for place in range(20)])
    for signature in (CLICKS, LISTS):
        own = teacher.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(soft_loss(signature, own, teacher, held, 2.0), own)
        assert grad.abs().max() < 1e-6
        assert soft_loss(signature, own + torch.arange(20) * 0.1, teacher, held, 2.0) > soft_loss(
            signature, own, teacher, held, 2.0
        )


def test_the_ends_of_a_probability_have_finite_logits():
    assert logits(PROBABILITIES.single_output, torch.tensor([0.0, 1.0])).isfinite().all()


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [RANKER, ATTENTION], ids=["rows", "lists"])
def test_every_row_comes_once_an_epoch_and_lists_stay_whole(reference, tmp_path):
    split = reference.bench(tmp_path).train
    held = Rows(split, reference.signature)
    drawn = list(shuffled_rows(held, reference.signature, 20, seed=3))
    assert sorted(torch.cat(drawn).tolist()) == list(range(BENCH_ROWS))
    assert torch.cat(drawn).tolist() != list(range(BENCH_ROWS))
    if held.group is not None:
        seen = [set(held.group[numbers].tolist()) for numbers in drawn]
        assert sum(map(len, seen)) == len(set().union(*seen))


def test_rows_taken_by_number_are_those_of_the_file(tmp_path):
    split = RANKER.bench(tmp_path).train
    (whole,) = batches(split, RANKER.signature, BENCH_ROWS)
    model = RANKER.model().module
    numbers = torch.tensor([5, 90, 0, 17])
    taken = Rows(split, RANKER.signature).take(numbers)
    with torch.no_grad():
        torch.testing.assert_close(model(**taken.inputs), model(**whole.inputs)[numbers])
    assert torch.equal(taken.label, whole.label[numbers])
