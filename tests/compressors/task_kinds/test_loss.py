"""Training losses of click and ranking models, and batches of rows in random order.

The hard loss compares scores with labels, the soft loss with the scores of a teacher.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from models import ATTENTION, BENCH_ROWS, NORMED, RANKER

from compressors.core.batches import Batch, Rows, batches
from compressors.task_kinds.loss import hard_loss, shuffled_rows, soft_loss
from compressors.task_kinds.outputs import logits

# Signatures of networks in ``tests/models.py``: scores of ranked lists, logits and probabilities.
LISTS = ATTENTION.signature
CLICKS = RANKER.signature
PROBABILITIES = NORMED.signature


def batch(label: list[float], group: list[int] | None = None) -> Batch:
    """Return a batch of rows without inputs."""
    group_tensor = None if group is None else torch.tensor(group)
    return Batch(inputs={}, label=torch.tensor(label), group=group_tensor)


# --- losses ----------------------------------------------------------------------------------

numbers = st.floats(-8, 8, width=32)
rows = st.lists(st.tuples(numbers, numbers, st.integers(0, 1)), min_size=1, max_size=12)


@given(rows, st.floats(0.5, 8))
def test_soft_loss_of_clicks_is_the_cross_entropy_at_the_temperature(values, temperature):
    score, teacher, _ = (np.array(column, np.float64) for column in zip(*values, strict=True))
    student_probability, teacher_probability = (
        1 / (1 + np.exp(-x / temperature)) for x in (score, teacher)
    )
    expected = (
        -np.mean(
            teacher_probability * np.log(student_probability)
            + (1 - teacher_probability) * np.log1p(-student_probability)
        )
        * temperature**2
    )
    # The soft loss does not depend on labels, so any batch is enough.
    loss = soft_loss(CLICKS, torch.tensor(score), torch.tensor(teacher), batch([0.0]), temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@given(rows)
def test_losses_of_a_probability_and_of_its_logit_are_equal(values):
    score, teacher, label = zip(*values, strict=True)
    logits_of_student, logits_of_teacher = torch.tensor(score), torch.tensor(teacher)
    labeled = batch([float(value) for value in label])
    losses_of_logits = (
        hard_loss(CLICKS, logits_of_student, labeled),
        soft_loss(CLICKS, logits_of_student, logits_of_teacher, labeled, 1.0),
    )
    probability = torch.sigmoid(logits_of_student), torch.sigmoid(logits_of_teacher)
    losses_of_probabilities = (
        hard_loss(PROBABILITIES, probability[0], labeled),
        soft_loss(PROBABILITIES, *probability, labeled, 1.0),
    )
    # In float32, 1 - sigmoid(8) has a relative error of 2e-4.
    torch.testing.assert_close(
        torch.stack(losses_of_probabilities), torch.stack(losses_of_logits), rtol=2e-3, atol=1e-4
    )


rows_of_lists = st.lists(
    st.tuples(numbers, numbers, st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=14
)


@given(rows_of_lists)
def test_losses_of_lists_are_mean_cross_entropies_of_softmax_shares(values):
    score, teacher, label, group = (np.array(c) for c in zip(*values, strict=True))
    labeled = batch(label.astype(np.float32).tolist(), group.tolist())

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    hard_losses, soft_losses = [], []
    for list_id in np.unique(group):
        in_list = group == list_id
        log_shares = np.log(softmax(score[in_list].astype(np.float64)))
        soft_losses.append(-(softmax(teacher[in_list].astype(np.float64)) * log_shares).sum())
        gains = 2.0 ** label[in_list] - 1
        if gains.sum():
            hard_losses.append(-(gains / gains.sum() * log_shares).sum())
    student_scores = torch.tensor(score.astype(np.float64))
    teacher_scores = torch.tensor(teacher.astype(np.float64))
    losses = (
        hard_loss(LISTS, student_scores, labeled),
        soft_loss(LISTS, student_scores, teacher_scores, labeled, 1),
    )
    assert float(losses[0]) == pytest.approx(
        np.mean(hard_losses) if hard_losses else 0.0, rel=1e-5, abs=1e-6
    )
    assert float(losses[1]) == pytest.approx(np.mean(soft_losses), rel=1e-5, abs=1e-6)


def test_soft_loss_is_minimal_at_the_teachers_scores():
    teacher = torch.randn(20, generator=torch.Generator().manual_seed(1))
    labeled = batch([0.0] * 20, [row // 5 for row in range(20)])
    for signature in (CLICKS, LISTS):
        student = teacher.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(soft_loss(signature, student, teacher, labeled, 2.0), student)
        assert grad.abs().max() < 1e-6
        assert soft_loss(
            signature, student + torch.arange(20) * 0.1, teacher, labeled, 2.0
        ) > soft_loss(signature, student, teacher, labeled, 2.0)


def test_logits_of_probabilities_0_and_1_are_finite():
    assert logits(PROBABILITIES.single_output, torch.tensor([0.0, 1.0])).isfinite().all()


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [RANKER, ATTENTION], ids=["rows", "lists"])
def test_shuffled_rows_has_every_row_once_and_no_list_in_two_batches(reference, tmp_path):
    split = reference.bench(tmp_path).train
    all_rows = Rows(split, reference.signature)
    batches_of_rows = list(shuffled_rows(all_rows, reference.signature, size=20, seed=3))
    assert sorted(torch.cat(batches_of_rows).tolist()) == list(range(BENCH_ROWS))
    assert torch.cat(batches_of_rows).tolist() != list(range(BENCH_ROWS))
    if all_rows.group is not None:
        groups_of_batches = [set(all_rows.group[numbers].tolist()) for numbers in batches_of_rows]
        assert sum(map(len, groups_of_batches)) == len(set().union(*groups_of_batches))


def test_take_returns_the_rows_of_the_given_numbers(tmp_path):
    split = RANKER.bench(tmp_path).train
    (whole,) = batches(split, RANKER.signature, BENCH_ROWS)
    model = RANKER.model().module
    numbers = torch.tensor([5, 90, 0, 17])
    batch_of_rows = Rows(split, RANKER.signature).take(numbers)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch_of_rows.inputs), model(**whole.inputs)[numbers])
    assert torch.equal(batch_of_rows.label, whole.label[numbers])
