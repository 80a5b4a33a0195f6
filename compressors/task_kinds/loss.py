"""What training minimises: plain functions of scores, by the task of the signature.

A loss takes the network's raw output in the form the signature names (a logit, a probability, or
any score) and gives one number, averaged over rows or, for ranking, over groups.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Signature, Split
from compressors.core.batches import Batch, JoinedRows, Rows

EDGE = 1e-6  # a probability this near 0 or 1 counts as that near: its logit stays finite


def hard_loss(signature: Signature, output: Tensor, batch: Batch) -> Tensor:
    """The loss against the labels.

    Args:
        signature: task and form of the output.
        output: float ``(rows,)`` or ``(rows, 1)``.
        batch: labels, and for ranking the groups.

    Returns:
        A scalar: binary cross entropy for ``ctr``; for ``ranking`` the listwise softmax cross
        entropy (ListNet, Cao et al. 2007, top-one probabilities) with gains ``2^label - 1``.
        Groups without a positive label teach nothing and do not count.
    """
    score, label = output.reshape(-1), batch.label.to(torch.float32)
    if signature.task == "ctr":
        return F.binary_cross_entropy_with_logits(logits(signature, score), label)
    segment, groups = segments(batch, len(score))
    gains = torch.exp2(label) - 1
    total = sums(gains, segment, groups)
    wanted = gains / total.clamp(min=EDGE)[segment]
    return _listwise(score, wanted, segment, total > 0)


def soft_loss(
    signature: Signature, output: Tensor, teacher: Tensor, batch: Batch, temperature: float
) -> Tensor:
    """The loss against what the teacher answers (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        signature: task and form of both outputs.
        output: the student's, float ``(rows,)`` or ``(rows, 1)``.
        teacher: the teacher's on the same rows, float ``(rows,)``.
        batch: for ranking, the groups.
        temperature: both are divided by it before they become probabilities; the loss is
            multiplied by its square, so that gradients keep their size.
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
    """The output as a logit."""
    return output if signature.output == "logit" else torch.logit(output, eps=EDGE)


def shuffled(
    split: Split, signature: Signature, size: int, seed: int, limit: int | None = None
) -> Iterator[Batch]:
    """Batches of about ``size`` rows in random order, of ``limit`` rows at most."""
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
    """The numbers of the rows of each batch, int64 ``(about size,)``, each row once.

    For ranking a batch holds whole groups, since a list is compared with itself; with
    ``whole_lists`` it does for other tasks too, where rows have a group.
    """
    drawn = torch.Generator().manual_seed(seed)
    if rows.group is None or not (whole_lists or signature.task == "ranking"):
        whole = torch.randperm(len(rows), generator=drawn)
        yield from _without_single_rows(torch.split(whole, size))
        return
    order = rows.group.argsort(stable=True)  # rows of a group side by side
    counts = torch.unique(rows.group, return_counts=True)[1]
    begins = counts.cumsum(0) - counts
    yield from _without_single_rows(_lists(order, begins, counts, size, drawn))


def _lists(
    order: Tensor, begins: Tensor, counts: Tensor, size: int, drawn: torch.Generator
) -> Iterator[Tensor]:
    """Whole groups in random order, together until they are ``size`` rows."""
    held: list[Tensor] = []
    rows = 0
    for number in torch.randperm(len(counts), generator=drawn).tolist():
        held.append(order[begins[number] : begins[number] + counts[number]])
        rows += len(held[-1])
        if rows >= size:
            yield torch.cat(held)
            held, rows = [], 0
    if held:
        yield torch.cat(held)


def _without_single_rows(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """A last batch of one row joins the one before: a batch norm has no variance of one row."""
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
    """The number of each row's list, int64 ``(rows,)``, and how many lists there are.

    Rows without a group are one list, the whole batch.
    """
    if batch.group is None:
        return torch.zeros(rows, dtype=torch.int64, device=batch.label.device), 1
    found, segment = torch.unique(batch.group, return_inverse=True)
    return segment, len(found)


def sums(values: Tensor, segment: Tensor, groups: int) -> Tensor:
    """Sums of values, ``(rows,)``, by list, ``(groups,)``."""
    return values.new_zeros(groups).index_add(0, segment, values)


def log_shares(score: Tensor, segment: Tensor, groups: int) -> Tensor:
    """Log of each row's softmax share of its list, ``(rows,)``."""
    top = score.detach().new_full((groups,), -torch.inf)
    top = top.scatter_reduce(0, segment, score.detach(), "amax")
    shifted = score - top[segment]
    return shifted - sums(shifted.exp(), segment, groups).log()[segment]


def _listwise(score: Tensor, wanted: Tensor, segment: Tensor, counts: Tensor) -> Tensor:
    """Cross entropy of each group's shares, averaged over the groups that count."""
    each = sums(-wanted * log_shares(score, segment, len(counts)), segment, len(counts))
    return (each * counts).sum() / counts.sum().clamp(min=1)
