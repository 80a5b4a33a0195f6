"""Training losses of a signature's kind of task, and batches of rows in random order.

A loss takes the network's raw output in the form that the signature names (a logit, a probability,
or any score) and returns a scalar, averaged over rows or, for ranking, over groups.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from compressors.contracts import Output, Signature, Split
from compressors.core.batches import Batch, JoinedRows, Rows
from compressors.task_kinds import builtin as builtin
from compressors.task_kinds.protocol import TaskFunctions, TaughtRows


def functions_of(output: Output) -> TaskFunctions:
    """Return the functions of an output's kind of task.

    Raises:
        ValueError: it has none; steps that need a loss refuse such a kind before.
    """
    kind = output.task_kind.load()
    if kind is None:
        raise ValueError(f"task {output.kind!r} has no loss")
    functions: TaskFunctions = kind(output)
    return functions


def hard_loss(signature: Signature, output: Tensor, batch: Batch) -> Tensor:
    """Compute the loss against the labels.

    Args:
        signature: kind and form of the output.
        output: the network's output, float ``(rows,)`` or ``(rows, 1)``.
        batch: labels, and for ranking the groups.

    Returns:
        A scalar.
    """
    return functions_of(signature.single_output).hard_loss(output.reshape(-1), batch)


def soft_loss(
    signature: Signature, output: Tensor, teacher: Tensor, batch: Batch, temperature: float
) -> Tensor:
    """Compute the distillation loss against the teacher (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        signature: kind and form of both outputs.
        output: the student's output, float ``(rows,)`` or ``(rows, 1)``.
        teacher: the teacher's output for the same rows, float ``(rows,)``.
        batch: the groups, for ranking.
        temperature: divides both outputs before they are converted to probabilities; the loss is
            multiplied by its square, so that the size of gradients does not change.

    Returns:
        A scalar.
    """
    rows = TaughtRows(output.reshape(-1), teacher, batch)
    return functions_of(signature.single_output).soft_loss(rows, temperature)


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

    A batch contains whole groups if the loss is computed by list; with ``whole_lists`` also for
    other tasks whose rows have a group.
    """
    generator = torch.Generator().manual_seed(seed)
    if rows.group is None or not (whole_lists or signature.has_lists):
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
