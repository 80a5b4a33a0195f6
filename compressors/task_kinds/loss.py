"""Training losses by the task of the signature, and batches of rows in random order.

A loss takes the network's raw output in the form that the signature names (a logit, a probability,
or any score) and returns a scalar, averaged over rows or, for ranking, over groups.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Signature, Split
from compressors.core.batches import Batch, JoinedRows, Rows

EDGE = 1e-6  # probabilities are clamped to [EDGE, 1 - EDGE], so that their logits are finite


def hard_loss(signature: Signature, output: Tensor, batch: Batch) -> Tensor:
    """Compute the loss against the labels.

    Args:
        signature: task and form of the output.
        output: the network's output, float ``(rows,)`` or ``(rows, 1)``.
        batch: labels, and for ranking the groups.

    Returns:
        A scalar: binary cross entropy for ``ctr``; for ``ranking`` the listwise softmax cross
        entropy (ListNet, Cao et al. 2007, top-one probabilities) with gains ``2^label - 1``.
        Groups without a positive label do not count.
    """
    score, label = output.reshape(-1), batch.label.to(torch.float32)
    if signature.task == "ctr":
        return F.binary_cross_entropy_with_logits(logits(signature, score), label)
    segment, groups = segments(batch, len(score))
    gains = torch.exp2(label) - 1
    total = sums(gains, segment, groups)
    target = gains / total.clamp(min=EDGE)[segment]
    return _listwise(score, target, segment, total > 0)


def soft_loss(
    signature: Signature, output: Tensor, teacher: Tensor, batch: Batch, temperature: float
) -> Tensor:
    """Compute the distillation loss against the teacher (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        signature: task and form of both outputs.
        output: the student's output, float ``(rows,)`` or ``(rows, 1)``.
        teacher: the teacher's output for the same rows, float ``(rows,)``.
        batch: the groups, for ranking.
        temperature: divides both outputs before they are converted to probabilities; the loss is
            multiplied by its square, so that the size of gradients does not change.

    Returns:
        A scalar.
    """
    score = output.reshape(-1)
    if signature.task == "ctr":
        wanted = torch.sigmoid(logits(signature, teacher) / temperature)
        loss = F.binary_cross_entropy_with_logits(logits(signature, score) / temperature, wanted)
        return loss * temperature**2
    segment, groups = segments(batch, len(score))
    wanted = log_shares(teacher / temperature, segment, groups).exp()
    every = torch.ones(groups, dtype=torch.bool, device=score.device)
    return _listwise(score / temperature, wanted, segment, every) * temperature**2


def logits(signature: Signature, output: Tensor) -> Tensor:
    """Convert the output to a logit."""
    return output if signature.output == "logit" else torch.logit(output, eps=EDGE)


def shuffled(
    split: Split, signature: Signature, size: int, seed: int, limit: int | None = None
) -> Iterator[Batch]:
    """Yield batches of about ``size`` rows in random order, until ``limit`` rows are read."""
    rows = Rows(split, signature)
    read = 0
    for numbers in shuffled_rows(rows, signature, size, seed):
        if limit is not None and read >= limit:
            return
        read += len(numbers)
        yield rows.take(numbers)


def shuffled_rows(
    rows: Rows | JoinedRows,
    signature: Signature,
    size: int,
    seed: int,
    *,
    whole_lists: bool = False,
) -> Iterator[Tensor]:
    """Yield the row numbers of each batch, int64 ``(about size,)``, each row once.

    For ranking a batch contains whole groups, because the loss is computed by list; with
    ``whole_lists`` also for other tasks whose rows have a group.
    """
    generator = torch.Generator().manual_seed(seed)
    if rows.group is None or not (whole_lists or signature.task == "ranking"):
        whole = torch.randperm(len(rows), generator=generator)
        yield from _without_single_rows(torch.split(whole, size))
        return
    order = rows.group.argsort(stable=True)  # rows of a group are adjacent
    counts = torch.unique(rows.group, return_counts=True)[1]
    begins = counts.cumsum(0) - counts
    yield from _without_single_rows(_lists(order, begins, counts, size, generator))


def _lists(
    order: Tensor, begins: Tensor, counts: Tensor, size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield whole groups in random order, collected until a batch has ``size`` rows."""
    pending: list[Tensor] = []
    rows = 0
    for number in torch.randperm(len(counts), generator=generator).tolist():
        pending.append(order[begins[number] : begins[number] + counts[number]])
        rows += len(pending[-1])
        if rows >= size:
            yield torch.cat(pending)
            pending, rows = [], 0
    if pending:
        yield torch.cat(pending)


def _without_single_rows(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """Merge a batch of one row with the one before it: batch norm needs two rows for a variance."""
    before: Tensor | None = None
    for part in parts:
        if before is not None and len(part) == 1:
            before = torch.cat([before, part])
            continue
        if before is not None:
            yield before
        before = part
    if before is not None:
        yield before


def segments(batch: Batch, rows: int) -> tuple[Tensor, int]:
    """Return the number of each row's list, int64 ``(rows,)``, and the number of lists.

    Without groups the whole batch is one list.
    """
    if batch.group is None:
        return torch.zeros(rows, dtype=torch.int64, device=batch.label.device), 1
    lists, segment = torch.unique(batch.group, return_inverse=True)
    return segment, len(lists)


def sums(values: Tensor, segment: Tensor, groups: int) -> Tensor:
    """Sum values, ``(rows,)``, by list: ``(groups,)``."""
    return values.new_zeros(groups).index_add(0, segment, values)


def log_shares(score: Tensor, segment: Tensor, groups: int) -> Tensor:
    """Return each row's log-softmax within its list, ``(rows,)``."""
    top = score.detach().new_full((groups,), -torch.inf)
    top = top.scatter_reduce(0, segment, score.detach(), "amax")
    shifted = score - top[segment]
    return shifted - sums(shifted.exp(), segment, groups).log()[segment]


def _listwise(score: Tensor, target: Tensor, segment: Tensor, counts: Tensor) -> Tensor:
    """Compute the mean softmax cross entropy of the groups that count."""
    each = sums(-target * log_shares(score, segment, len(counts)), segment, len(counts))
    return (each * counts).sum() / counts.sum().clamp(min=1)
