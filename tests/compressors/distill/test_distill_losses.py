"""Distillation losses: the scores that minimize each, and the changes of scores that it ignores.

A list is the rows of one group, such as the items of one query. List losses compare the rows of a
list with each other.

The signatures are those of ``models.py``: the scores of ``RANKER`` are logits of clicks, those of
``NORMED`` are probabilities of clicks, and those of ``ATTENTION`` are scores of rankings.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from models import ATTENTION, NORMED, RANKER
from torch import Tensor

from compressors.core.batches import Batch
from compressors.distill import losses
from compressors.distill.losses import LIST_LOSSES, loss_of_teacher

numbers = st.floats(-6, 6, width=32)
rows_of_lists = st.lists(st.tuples(numbers, numbers, st.integers(0, 2)), min_size=1, max_size=12)
SHIFT_INVARIANT = ("margin", "listwise", "rankdistil")


def tensors_of(
    scores_and_lists: list[tuple[float, float, int]],
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Scores, teacher scores, the index of each row's list from 0, and the number of lists."""
    score, teacher, group = zip(*scores_and_lists, strict=True)
    list_index = np.unique(np.array(group), return_inverse=True)[1]
    return (
        torch.tensor(score, dtype=torch.float64),
        torch.tensor(teacher, dtype=torch.float64),
        torch.from_numpy(list_index),
        int(list_index.max()) + 1,
    )


def loss_named(
    name: str, score: Tensor, teacher: Tensor, list_index: Tensor, num_lists: int, top: int = 2
) -> Tensor:
    """One of the losses by its name; ``top`` is the number of top rows of ``rankdistil``."""
    if name == "pointwise":
        return losses.pointwise(score, teacher)
    more = (top,) if name == "rankdistil" else ()
    value: Tensor = getattr(losses, name)(score, teacher, list_index, num_lists, *more)
    return value


def gradient_of(
    name: str, score: Tensor, teacher: Tensor, list_index: Tensor, num_lists: int, top: int = 2
) -> Tensor:
    """The gradient of one of the losses with respect to the student's scores."""
    student = score.clone().requires_grad_(True)
    loss = loss_named(name, student, teacher, list_index, num_lists, top)
    (gradient,) = torch.autograd.grad(loss, student)
    return gradient


@pytest.mark.parametrize("name", ["pointwise", *LIST_LOSSES])
@given(scores_and_lists=rows_of_lists)
def test_loss_is_minimal_at_the_teachers_scores(name, scores_and_lists):
    score, teacher, list_index, num_lists = tensors_of(scores_and_lists)
    # The tolerance is float64 rounding of sums of twelve terms.
    assert float(gradient_of(name, teacher, teacher, list_index, num_lists).abs().max()) < 1e-12
    loss = loss_named(name, score, teacher, list_index, num_lists)
    loss_of_teacher_scores = loss_named(name, teacher, teacher, list_index, num_lists)
    assert float(loss) >= float(loss_of_teacher_scores) - 1e-12


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
@given(scores_and_lists=rows_of_lists, level=st.floats(-5, 5))
def test_ranking_losses_ignore_a_constant_added_to_a_list(name, scores_and_lists, level):
    score, teacher, list_index, num_lists = tensors_of(scores_and_lists)
    shifted = score + level * (list_index == 0)
    value = loss_named(name, shifted, teacher, list_index, num_lists)
    expected = loss_named(name, score, teacher, list_index, num_lists)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["pointwise", "calibrated_listwise"])
def test_probability_losses_grow_with_a_constant_added_to_a_list(name):
    teacher = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    list_index = torch.zeros(3, dtype=torch.int64)
    shifted = loss_named(name, teacher + 1, teacher, list_index, 1)
    assert float(shifted) > float(loss_named(name, teacher, teacher, list_index, 1)) + 1e-3


@given(rows_of_lists)
def test_margin_loss_is_the_mean_over_all_pairs_of_each_list(scores_and_lists):
    score, teacher, list_index, num_lists = tensors_of(scores_and_lists)
    losses_of_lists = []
    for number in range(num_lists):
        score_of_list, teacher_of_list = score[list_index == number], teacher[list_index == number]
        if len(score_of_list) < 2:
            continue
        differences = (score_of_list[:, None] - score_of_list[None]) - (
            teacher_of_list[:, None] - teacher_of_list[None]
        )
        losses_of_lists.append(
            float(differences.square().sum()) / (len(score_of_list) * (len(score_of_list) - 1))
        )
    value = float(losses.margin(score, teacher, list_index, num_lists))
    assert value == pytest.approx(
        np.mean(losses_of_lists) if losses_of_lists else 0.0, rel=1e-9, abs=1e-9
    )


@given(rows_of_lists)
def test_listwise_loss_is_the_cross_entropy_of_softmax_scores(scores_and_lists):
    score, teacher, list_index, num_lists = tensors_of(scores_and_lists)
    losses_of_lists = [
        -(teacher[list_index == k].softmax(0) * score[list_index == k].log_softmax(0)).sum()
        for k in range(num_lists)
    ]
    torch.testing.assert_close(
        losses.listwise(score, teacher, list_index, num_lists), torch.stack(losses_of_lists).mean()
    )


@given(rows_of_lists)
def test_calibrated_listwise_loss_is_the_cross_entropy_of_normalized_probabilities(
    scores_and_lists,
):
    score, teacher, list_index, num_lists = tensors_of(scores_and_lists)
    losses_of_lists = []
    for k in range(num_lists):
        p, q = torch.sigmoid(score[list_index == k]), torch.sigmoid(teacher[list_index == k])
        losses_of_lists.append(-(q * (p / p.sum()).log()).mean())
    torch.testing.assert_close(
        losses.calibrated_listwise(score, teacher, list_index, num_lists),
        torch.stack(losses_of_lists).mean(),
    )


def test_only_the_calibrated_listwise_loss_is_minimal_at_the_mean_of_different_teachers():
    """Two teachers score the same rows differently; the student has their mean probabilities."""
    probabilities = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.6, 0.4]], dtype=torch.float64)
    teachers, list_index = torch.logit(probabilities), torch.zeros(3, dtype=torch.int64)
    student = torch.logit(probabilities.mean(dim=0))
    gradients = {}
    for name in ("calibrated_listwise", "listwise"):
        by_teacher = [gradient_of(name, student, teacher, list_index, 1) for teacher in teachers]
        gradients[name] = float(torch.stack(by_teacher).mean(dim=0).abs().max())
    assert gradients["calibrated_listwise"] < 1e-12
    assert gradients["listwise"] > 0.01


def test_rankdistil_gradient_orders_the_top_and_keeps_other_rows_below():
    teacher = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    list_index = torch.zeros(5, dtype=torch.int64)

    def gradient(score: list[float]) -> Tensor:
        return gradient_of(
            "rankdistil",
            torch.tensor(score, dtype=torch.float64),
            teacher,
            list_index,
            num_lists=1,
            top=2,
        )

    # Other rows have no gradient in any order, if none is closer to the top than for the teacher.
    assert float(gradient([3.0, 2.0, -1.0, 0.0, -3.0]).abs().max()) < 1e-12
    of_wrong_order = gradient([2.0, 3.0, 1.0, 0.0, 2.9])
    assert of_wrong_order[0] < 0  # the teacher's first row must rise
    assert of_wrong_order[4] > 0  # a row near the top must fall
    assert of_wrong_order[3] == 0  # a row far enough below gets no gradient
    # A row below the top, but closer to it than for the teacher, gets a gradient.
    assert gradient([3.0, 2.0, 1.9, 0.0, -1.0])[2] > 0


def test_equal_teacher_scores_get_different_ranks():
    list_index = torch.tensor([0, 1, 0, 1, 0])
    teacher = torch.tensor([1.0, 5.0, 1.0, 6.0, 2.0])
    ranks = losses._rank_by_teacher(teacher, list_index, num_lists=2)
    assert ranks.tolist() == [1, 1, 2, 0, 0]


def batch(group: list[int] | None, rows: int = 6) -> Batch:
    groups = None if group is None else torch.tensor(group)
    return Batch(inputs={}, label=torch.zeros(rows), group=groups)


def test_click_rows_without_groups_are_one_list():
    generator = torch.Generator().manual_seed(0)
    score, teacher = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    single_list = torch.zeros(6, dtype=torch.int64)

    def loss_with(group: list[int] | None) -> Tensor:
        return loss_of_teacher(
            "listwise", RANKER.signature, score, teacher, batch(group), temperature=1, top=3
        )

    assert loss_with(None) == losses.listwise(score, teacher, single_list, 1)
    two_lists = torch.tensor([0, 0, 0, 1, 1, 1])
    assert loss_with([4, 4, 4, 9, 9, 9]) == losses.listwise(score, teacher, two_lists, 2)


@pytest.mark.parametrize("name", ["pointwise", *LIST_LOSSES])
def test_probabilities_are_compared_as_logits(name):
    generator = torch.Generator().manual_seed(0)
    score, teacher = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    # Steps refuse a temperature for the margin loss.
    options = {"temperature": 2.0 if name != "margin" else 1.0, "top": 3}
    of_logits = loss_of_teacher(name, RANKER.signature, score, teacher, batch(None), **options)
    as_probabilities = torch.sigmoid(score), torch.sigmoid(teacher)
    of_probabilities = loss_of_teacher(
        name, NORMED.signature, *as_probabilities, batch(None), **options
    )
    # The probabilities are float32.
    torch.testing.assert_close(of_probabilities, of_logits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["pointwise", "listwise"])
def test_task_loss_is_pointwise_for_clicks_and_listwise_for_rankings(name):
    generator = torch.Generator().manual_seed(0)
    score, teacher = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    signature, groups = (
        (RANKER.signature, None)
        if name == "pointwise"
        else (ATTENTION.signature, [1, 1, 1, 2, 2, 2])
    )
    values = [
        loss_of_teacher(loss_name, signature, score, teacher, batch(groups), temperature=3.0, top=3)
        for loss_name in ("task", name)
    ]
    torch.testing.assert_close(*values)


def test_pointwise_loss_of_rankings_compares_scores_without_temperature():
    score, teacher = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    value = loss_of_teacher(
        "pointwise", ATTENTION.signature, score, teacher, batch(None, 2), temperature=2.0, top=1
    )
    assert float(value) == pytest.approx(2.0)  # (2^2 + 0) / 2, at any temperature
