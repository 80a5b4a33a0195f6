"""Losses of retrieval with items that are drawn from a catalogue as further negatives.

The hard loss compares scores with labels, the soft loss with the scores of a teacher.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compressors.contracts import Output
from compressors.core.batches import Batch, SampledItems
from compressors.core.placement import to_device
from compressors.task_kinds.protocol import DistillationRows
from compressors.task_kinds.retrieval import Retrieval, margin_loss
from compressors.task_kinds.sampled_softmax import log_inclusion_of

LOSSES = Retrieval(Output(name="score", kind="retrieval", form="score", metric="recall@20"))
ITEMS, DIM = 7, 3

rows_of_batches = st.lists(
    st.tuples(st.integers(0, ITEMS - 1), st.integers(0, 3), st.integers(0, 1)),
    min_size=1,
    max_size=8,
)
"""Item, query and label of each row."""


def vectors(count: int, seed: int) -> Tensor:
    """Draw vectors, float64 ``(count, DIM)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64)


def batch_of(rows: list[tuple[int, int, int]], drawn: list[int]) -> Batch:
    """Return a batch with drawn items; an item's share of the training rows is (1 + id) / 100."""
    item, query, label = (torch.tensor(column) for column in zip(*rows, strict=True))

    def log_share(ids: Tensor) -> Tensor:
        return ((1.0 + ids.double()) / 100).log()

    sampled = SampledItems(
        inputs={},
        item=torch.tensor(drawn),
        item_log_share=log_share(torch.tensor(drawn)),
        drawn_share=len(drawn) / ITEMS,
    )
    return Batch(
        inputs={},
        label=label,
        group=query,
        item=item,
        item_log_share=log_share(item),
        sampled=sampled,
    )


def output_of(query: Tensor, item: Tensor, batch: Batch) -> Tensor:
    """Return what the towers return for a batch, from the vectors of queries and all items.

    Args:
        query: float ``(rows, DIM)``.
        item: float ``(ITEMS, DIM)``.
        batch: the rows and the drawn items.
    """
    assert batch.item is not None
    assert batch.sampled is not None
    items = item[torch.cat([batch.item, batch.sampled.item])]
    padding = torch.zeros(len(items) - len(query), DIM, dtype=query.dtype)
    return torch.stack([torch.cat([query, padding]), items], dim=1)


@given(rows_of_batches, st.integers(0, 1000))
def test_hard_loss_with_all_items_drawn_is_the_softmax_over_the_catalogue(rows, seed):
    batch = batch_of(rows, drawn=list(range(ITEMS))[::-1])
    query, item = vectors(len(rows), seed), vectors(ITEMS, seed + 1)
    scores = (query @ item.T).numpy()
    losses = []
    for row, (own, of_query, label) in enumerate(rows):
        positives = {other for other, q, liked in rows if q == of_query and liked}
        candidates = [j for j in range(ITEMS) if j == own or j not in positives]
        if label:
            losses.append(np.log(np.exp(scores[row, candidates]).sum()) - scores[row, own])
    actual = LOSSES.hard_loss(output_of(query, item, batch), batch)
    # A float64 sum of a few terms.
    assert float(actual) == pytest.approx(np.mean(losses) if losses else 0.0, abs=1e-12)


@given(rows_of_batches, st.lists(st.integers(0, ITEMS - 1), min_size=1, unique=True))
def test_hard_loss_divides_each_exponential_by_the_probability_of_inclusion(rows, drawn):
    batch = batch_of(rows, drawn)
    query, item = vectors(len(rows), 0), vectors(ITEMS, 1)
    share = (1 + np.arange(ITEMS)) / 100
    included = 1 - (1 - share) ** (len(rows) - 1) * (1 - len(drawn) / ITEMS)
    terms = np.exp((query @ item.T).numpy()) / included  # (rows, ITEMS)
    losses = []
    for row, (own, of_query, label) in enumerate(rows):
        positives = {other for other, q, liked in rows if q == of_query and liked}
        candidates = {*drawn, *(other for other, _, _ in rows)} - positives | {own}
        if label:
            losses.append(np.log(terms[row, list(candidates)].sum() / terms[row, own]))
    actual = LOSSES.hard_loss(output_of(query, item, batch), batch)
    # A float64 sum of a few terms.
    assert float(actual) == pytest.approx(np.mean(losses) if losses else 0.0, abs=1e-12)


@given(rows_of_batches, st.integers(0, 1000), st.floats(0.5, 4))
def test_soft_loss_with_all_items_drawn_is_the_cross_entropy_over_the_catalogue(
    rows, seed, temperature
):
    batch = batch_of(rows, drawn=list(range(ITEMS)))
    shares, outputs = [], []
    for model in (0, 1):  # student and teacher
        query, item = vectors(len(rows), seed + model), vectors(ITEMS, seed + 10 + model)
        outputs.append(output_of(query, item, batch))
        exponentials = np.exp((query @ item.T).numpy() / temperature)
        shares.append(exponentials / exponentials.sum(axis=1, keepdims=True))
    expected = -(shares[1] * np.log(shares[0])).sum(axis=1).mean() * temperature**2
    actual = LOSSES.soft_loss(DistillationRows(*outputs, batch), temperature)
    assert float(actual) == pytest.approx(expected, rel=1e-12)


def test_margin_loss_with_all_items_drawn_is_that_of_all_margins():
    rows = [(1, 0, 1), (3, 1, 1), (1, 2, 1)]
    batch = batch_of(rows, drawn=list(range(ITEMS)))
    own = [item for item, _, _ in rows]
    margins, outputs = [], []
    for model in (0, 1):  # student and teacher
        query, item = vectors(len(rows), model), vectors(ITEMS, 10 + model)
        outputs.append(output_of(query, item, batch))
        scores = query @ item.T
        margins.append(scores[range(len(rows)), own][:, None] - scores)
    expected = (margins[0] - margins[1]).square().mean()
    assert float(margin_loss(*outputs, batch)) == pytest.approx(float(expected), rel=1e-12)


@given(rows_of_batches, st.lists(st.integers(0, ITEMS - 1), min_size=1, unique=True))
def test_drawn_items_that_a_row_has_do_not_change_the_losses(rows, drawn):
    batch = batch_of(rows, drawn)
    query, item = vectors(len(rows), 0), vectors(ITEMS, 1)
    output = output_of(query, item, batch)
    changed = output.clone().detach()
    is_hit = torch.isin(batch.sampled.item, batch.item)
    changed[len(rows) :][is_hit] = 9.0
    teacher = vectors(len(output), 2)[:, None].expand(-1, 2, -1)
    for loss in (
        lambda student: LOSSES.hard_loss(student, batch),
        lambda student: LOSSES.soft_loss(DistillationRows(student, teacher, batch), 1.0),
        lambda student: margin_loss(student, teacher, batch),
    ):
        assert float(loss(output)) == float(loss(changed))
        leaf = output.clone().requires_grad_(True)
        loss(leaf).backward()
        assert not leaf.grad[len(rows) :][is_hit].any()


def test_positive_items_of_a_query_are_not_its_negatives():
    rows = [(0, 0, 1), (1, 0, 1), (2, 1, 1)]
    batch = batch_of(rows, drawn=[1, 4])
    output = output_of(vectors(3, 0), vectors(ITEMS, 1), batch).requires_grad_(True)
    # Query 0 has the items 0 and 1, in two rows; item 1 is drawn too. Without a positive label,
    # item 1 is a negative for row 0, so its vector has a gradient.
    one_positive = replace(batch, label=torch.tensor([1, 0, 0]))
    (gradient,) = torch.autograd.grad(LOSSES.hard_loss(output, one_positive), output)
    assert gradient[1, 1].abs().max() > 0
    # With a positive label, only row 1 gives it a gradient: a multiple of that row's query vector.
    two_positives = replace(batch, label=torch.tensor([1, 1, 0]))
    (gradient,) = torch.autograd.grad(LOSSES.hard_loss(output, two_positives), output)
    direction = gradient[1, 1] / output[1, 0].detach()
    assert torch.allclose(direction, direction[0].expand(DIM), rtol=1e-9)


def test_hard_loss_with_drawn_items_has_the_gradient_of_finite_differences():
    rows = [(0, 0, 1), (1, 1, 1), (1, 0, 1), (2, 2, 0), (5, 3, 1)]
    batch = batch_of(rows, drawn=[1, 3, 6])
    output = output_of(vectors(5, 0), vectors(ITEMS, 1), batch).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda value: LOSSES.hard_loss(value, batch), (output,))


def test_drawn_items_are_moved_to_the_device_of_the_batch():
    moved = to_device(batch_of([(0, 0, 1)], drawn=[1, 2]), torch.device("meta"))
    assert moved.sampled.item.device.type == moved.sampled.item_log_share.device.type == "meta"
    assert moved.sampled.drawn_share == 2 / ITEMS


@pytest.mark.parametrize("drawn", [1, 5, 20])
def test_log_inclusion_is_the_frequency_of_items_in_samples(drawn):
    items, rows, samples = 20, 6, 4_000
    random = np.random.default_rng(drawn)
    share = random.dirichlet(np.full(items, 0.5))
    share[0] = 0.0  # an item without training rows
    share /= share.sum()
    is_in_sample = np.zeros((samples, items), bool)
    for sample in range(samples):
        is_in_sample[sample, random.choice(items, rows, p=share)] = True
        is_in_sample[sample, random.choice(items, drawn, replace=False)] = True
    expected = log_inclusion_of(torch.from_numpy(share).log(), rows, drawn / items).exp().numpy()
    deviation = np.sqrt(expected * (1 - expected) / samples)
    # Five standard deviations: a correct formula fails once in 10**6 seeds.
    assert np.abs(is_in_sample.mean(axis=0) - expected).max() <= 5 * deviation.max()
    if drawn == items:
        assert (expected == 1).all()
