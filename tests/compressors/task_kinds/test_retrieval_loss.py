"""Losses of retrieval: each query's item against the other items of the batch.

The hard loss compares scores with labels, the soft loss with the scores of a teacher.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from compressors.contracts import Output
from compressors.core.batches import Batch
from compressors.task_kinds.protocol import DistillationRows
from compressors.task_kinds.retrieval import Retrieval, margin_loss

OUTPUT = Output(name="score", kind="retrieval", form="score", metric="recall@20")
LOSSES = Retrieval(OUTPUT)
DIM = 3

Array = NDArray[Any]


def vectors_of(rows: int, seed: int, scale: float = 1.0) -> Tensor:
    """Draw vectors of the query and of the item of each row, float64 ``(rows, 2, DIM)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, DIM, generator=generator, dtype=torch.float64) * scale


def batch_of(
    item: list[int], query: list[int], label: list[int], share: list[float] | None = None
) -> Batch:
    """Return a batch; ``share`` is the share of the training rows that have the item of a row."""
    return Batch(
        {},
        torch.tensor(label),
        torch.tensor(query),
        item=torch.tensor(item),
        item_log_share=None if share is None else torch.tensor(share, dtype=torch.float64).log(),
    )


batches = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 1), st.floats(0.01, 1)),
    min_size=1,
    max_size=9,
)


@given(batches, st.integers(0, 1000))
def test_hard_loss_is_the_softmax_over_other_items_of_other_queries(rows, seed):
    item, query, label, share = (list(column) for column in zip(*rows, strict=True))
    vectors = vectors_of(len(rows), seed)
    scores = (vectors[:, 0] @ vectors[:, 1].T).numpy() - np.log(np.array(share))
    losses = []
    for row in range(len(rows)):
        negatives = [
            other
            for other in range(len(rows))
            if item[other] != item[row] and not (query[other] == query[row] and label[other])
        ]
        candidates = scores[row, [row, *negatives]]
        if label[row]:
            losses.append(np.log(np.exp(candidates - scores[row, row]).sum()))
    expected = np.mean(losses) if losses else 0.0
    actual = LOSSES.hard_loss(vectors, batch_of(item, query, label, share))
    assert float(actual) == pytest.approx(expected, abs=1e-9)


@given(batches, st.integers(0, 1000), st.floats(0.5, 4))
def test_soft_loss_is_the_cross_entropy_over_different_items(rows, seed, temperature):
    item, query, label, _ = (list(column) for column in zip(*rows, strict=True))
    student, teacher = vectors_of(len(rows), seed), vectors_of(len(rows), seed + 1)
    first = [item.index(value) for value in dict.fromkeys(item)]
    losses = []
    for row in range(len(rows)):
        logits = [(v[row, 0] @ v[first, 1].T).numpy() / temperature for v in (student, teacher)]
        shares = [np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in logits]
        losses.append(-(shares[1] * np.log(shares[0])).sum())
    distillation_rows = DistillationRows(student, teacher, batch_of(item, query, label))
    actual = float(LOSSES.soft_loss(distillation_rows, temperature))
    assert actual == pytest.approx(np.mean(losses) * temperature**2, rel=1e-9)


@pytest.mark.parametrize("loss", ["soft", "margin"])
def test_gradient_of_a_loss_on_the_teacher_vanishes_at_the_teacher(loss):
    batch = batch_of([1, 2, 3, 2, 4, 5], [0, 1, 2, 3, 4, 5], [1] * 6)
    teacher = vectors_of(6, 0)
    student = teacher.clone().requires_grad_(True)
    if loss == "soft":
        value = LOSSES.soft_loss(DistillationRows(student, teacher, batch), 2.0)
    else:
        value = margin_loss(student, teacher, batch)
        assert float(value.detach()) == 0
    (gradient,) = torch.autograd.grad(value, student)
    assert float(gradient.abs().max()) < 1e-12
    other_student = vectors_of(6, seed=9)
    assert float(margin_loss(other_student, teacher, batch)) > 0.1


def test_margin_loss_allows_vectors_of_another_width():
    batch = batch_of([1, 2, 3], [0, 1, 2], [1, 1, 1])
    teacher = torch.cat([vectors_of(3, 0), torch.zeros(3, 2, 4, dtype=torch.float64)], dim=2)
    assert float(margin_loss(vectors_of(3, 0), teacher, batch)) == 0


def test_hard_loss_without_a_positive_row_is_zero_and_has_a_gradient():
    vectors = vectors_of(3, 0).requires_grad_(True)
    loss = LOSSES.hard_loss(vectors, batch_of([1, 2, 3], [0, 1, 2], [0, 0, 0]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert vectors.grad is not None
