"""Distillation losses: where each is minimal, and which changes of the scores it ignores."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from models import ATTENTION, NORMED, RANKER
from torch import Tensor

from compressors.core.batches import Batch
from compressors.distill import losses
from compressors.distill.losses import OF_LISTS, loss_of_teacher

numbers = st.floats(-6, 6, width=32)
listed = st.lists(st.tuples(numbers, numbers, st.integers(0, 2)), min_size=1, max_size=12)
FREE_OF_LEVEL = ("margin", "listwise", "rankdistil")


def columns(made: list[tuple[float, float, int]]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Scores, teacher's scores, numbers of lists without a gap, and how many lists."""
    score, teacher, group = zip(*made, strict=True)
    segment = np.unique(np.array(group), return_inverse=True)[1]
    return (
        torch.tensor(score, dtype=torch.float64),
        torch.tensor(teacher, dtype=torch.float64),
        torch.from_numpy(segment),
        int(segment.max()) + 1,
    )


def loss_named(
    name: str, score: Tensor, teacher: Tensor, segment: Tensor, lists: int, top: int = 2
) -> Tensor:
    """One of the losses by its name."""
    if name == "pointwise":
        return losses.pointwise(score, teacher)
    more = (top,) if name == "rankdistil" else ()
    found: Tensor = getattr(losses, name)(score, teacher, segment, lists, *more)
    return found


def slope(name: str, score: Tensor, *rest: object) -> Tensor:
    own = score.clone().requires_grad_(True)
    (found,) = torch.autograd.grad(loss_named(name, own, *rest), own)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", ["pointwise", *OF_LISTS])
@given(made=listed)
def test_loss_is_minimal_at_the_teachers_scores(name, made):
    score, teacher, segment, lists = columns(made)
    # Exact but for rounding of float64 sums of a dozen terms.
    assert float(slope(name, teacher, teacher, segment, lists).abs().max()) < 1e-12
    here = loss_named(name, score, teacher, segment, lists)
    assert float(here) >= float(loss_named(name, teacher, teacher, segment, lists)) - 1e-12


@pytest.mark.parametrize("name", FREE_OF_LEVEL)
@given(made=listed, level=st.floats(-5, 5))
def test_ranking_losses_ignore_a_constant_added_to_a_list(name, made, level):
    score, teacher, segment, lists = columns(made)
    moved = score + level * (segment == 0)
    found = loss_named(name, moved, teacher, segment, lists)
    expected = loss_named(name, score, teacher, segment, lists)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["pointwise", "calibrated_listwise"])
def test_probability_losses_grow_with_a_constant_added_to_a_list(name):
    teacher = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    segment = torch.zeros(3, dtype=torch.int64)
    moved = loss_named(name, teacher + 1, teacher, segment, 1)
    assert float(moved) > float(loss_named(name, teacher, teacher, segment, 1)) + 1e-3


@given(listed)
def test_the_margin_loss_is_the_mean_over_all_pairs_of_a_list(made):
    score, teacher, segment, lists = columns(made)
    each = []
    for number in range(lists):
        own, known = score[segment == number], teacher[segment == number]
        if len(own) < 2:
            continue
        gaps = (own[:, None] - own[None]) - (known[:, None] - known[None])
        each.append(float(gaps.square().sum()) / (len(own) * (len(own) - 1)))
    found = float(losses.margin(score, teacher, segment, lists))
    assert found == pytest.approx(np.mean(each) if each else 0.0, rel=1e-9, abs=1e-9)


@given(listed)
def test_the_listwise_loss_is_a_cross_entropy_of_shares(made):
    score, teacher, segment, lists = columns(made)
    each = [
        -(teacher[segment == k].softmax(0) * score[segment == k].log_softmax(0)).sum()
        for k in range(lists)
    ]
    torch.testing.assert_close(
        losses.listwise(score, teacher, segment, lists), torch.stack(each).mean()
    )


@given(listed)
def test_the_calibrated_loss_is_a_cross_entropy_of_shares_of_probabilities(made):
    score, teacher, segment, lists = columns(made)
    each = []
    for k in range(lists):
        p, q = torch.sigmoid(score[segment == k]), torch.sigmoid(teacher[segment == k])
        each.append(-(q * (p / p.sum()).log()).mean())
    torch.testing.assert_close(
        losses.calibrated_listwise(score, teacher, segment, lists), torch.stack(each).mean()
    )


def test_only_the_calibrated_listwise_loss_is_least_at_the_mean_of_teachers_who_differ():
    """Two teachers have more inputs than the student, which learns their mean probability."""
    chances = torch.tensor([[0.9, 0.2, 0.4], [0.1, 0.6, 0.4]], dtype=torch.float64)
    teachers, segment = torch.logit(chances), torch.zeros(3, dtype=torch.int64)
    student = torch.logit(chances.mean(dim=0))
    size = {}
    for name in ("calibrated_listwise", "listwise"):
        slopes = [slope(name, student, teacher, segment, 1) for teacher in teachers]
        size[name] = float(torch.stack(slopes).mean(dim=0).abs().max())
    assert size["calibrated_listwise"] < 1e-12
    assert size["listwise"] > 0.01


def test_rankdistil_gradient_orders_the_top_and_keeps_the_rest_below():
    teacher = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    segment = torch.zeros(5, dtype=torch.int64)

    def gradient(score: list[float]) -> Tensor:
        return slope("rankdistil", torch.tensor(score, dtype=torch.float64), teacher, segment, 1, 2)

    # The rest may be in any order, as long as it stays below as far as the teacher says.
    assert float(gradient([3.0, 2.0, -1.0, 0.0, -3.0]).abs().max()) < 1e-12
    found = gradient([2.0, 3.0, 1.0, 0.0, 2.9])
    assert found[0] < 0  # the teacher's first is to rise,
    assert found[4] > 0  # what comes near the top is to fall
    assert found[3] == 0  # and a row far enough below gets no gradient
    assert gradient([3.0, 2.0, 1.9, 0.0, -1.0])[2] > 0  # below, but not as far as the teacher says


def test_ties_of_the_teacher_are_ranked_once_each():
    segment = torch.tensor([0, 1, 0, 1, 0])
    places = losses._places(torch.tensor([1.0, 5.0, 1.0, 6.0, 2.0]), segment, 2)
    assert places.tolist() == [1, 1, 2, 0, 0]


def batch(group: list[int] | None, rows: int = 6) -> Batch:
    held = None if group is None else torch.tensor(group)
    return Batch(inputs={}, label=torch.zeros(rows), group=held)


def test_clicks_without_groups_are_one_list_and_with_groups_several():
    draw = torch.Generator().manual_seed(0)
    score, teacher = torch.randn(6, generator=draw), torch.randn(6, generator=draw)
    one = torch.zeros(6, dtype=torch.int64)

    def found(group: list[int] | None) -> Tensor:
        return loss_of_teacher(
            "listwise", RANKER.signature, score, teacher, batch(group), temperature=1, top=3
        )

    assert found(None) == losses.listwise(score, teacher, one, 1)
    halves = torch.tensor([0, 0, 0, 1, 1, 1])
    assert found([4, 4, 4, 9, 9, 9]) == losses.listwise(score, teacher, halves, 2)


@pytest.mark.parametrize("name", ["pointwise", *OF_LISTS])
def test_a_probability_is_compared_by_its_logit(name):
    draw = torch.Generator().manual_seed(0)
    score, teacher = torch.randn(6, generator=draw), torch.randn(6, generator=draw)
    how = {"temperature": 2.0 if name != "margin" else 1.0, "top": 3}
    own = loss_of_teacher(name, RANKER.signature, score, teacher, batch(None), **how)
    given_as = torch.sigmoid(score), torch.sigmoid(teacher)
    other = loss_of_teacher(name, NORMED.signature, *given_as, batch(None), **how)
    torch.testing.assert_close(other, own, rtol=1e-4, atol=1e-6)  # sigmoids are float32


@pytest.mark.parametrize("name", ["pointwise", "listwise"])
def test_the_loss_of_the_task_is_pointwise_for_clicks_and_listwise_for_rankings(name):
    draw = torch.Generator().manual_seed(0)
    score, teacher = torch.randn(6, generator=draw), torch.randn(6, generator=draw)
    signature, groups = (
        (RANKER.signature, None)
        if name == "pointwise"
        else (ATTENTION.signature, [1, 1, 1, 2, 2, 2])
    )
    found = [
        loss_of_teacher(which, signature, score, teacher, batch(groups), temperature=3.0, top=3)
        for which in ("task", name)
    ]
    torch.testing.assert_close(*found)


def test_scores_of_rankings_are_compared_as_they_are_row_by_row():
    score, teacher = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    found = loss_of_teacher(
        "pointwise", ATTENTION.signature, score, teacher, batch(None, 2), temperature=2.0, top=1
    )
    assert float(found) == pytest.approx(2.0)  # (2^2 + 0) / 2, at any temperature
