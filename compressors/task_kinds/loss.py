"""Training losses by task kind, and batches of rows in random order.

A loss takes the network's scores in the form that the signature names (logits, probabilities, or
any scores) and returns a scalar, averaged over rows or, for ranking, over lists of rows. The loss
of a network with several outputs is the sum of their losses, each times its ``loss_weight``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from compressors.contracts import Output, Signature, Split
from compressors.core.batches import Batch, JoinedRows, Rows
from compressors.core.scores import score_columns, scores_of

# Not used here. A task's cache key hashes all sources that it imports, and the classes of the task
# kinds, which are loaded by name, must be among them.
from compressors.task_kinds import builtin as builtin
from compressors.task_kinds.protocol import DistillationRows, TaskFunctions

BUCKET_BATCHES = 32
"""Number of batches whose rows are sorted together by the length of their sequences."""


def load_functions(output: Output) -> TaskFunctions:
    """Return the losses and score checks of an output's task kind.

    Raises:
        ValueError: the task kind has no loss. Steps that need one refuse such a model earlier.
    """
    kind = output.task_kind.load()
    if kind is None:
        raise ValueError(f"task kind {output.kind!r} has no loss")
    functions: TaskFunctions = kind(output)
    return functions


def hard_loss(signature: Signature, scores: Tensor, batch: Batch) -> Tensor:
    """Compute the loss against the labels.

    A row without a label of an output does not count in the loss of that output.

    Args:
        signature: signature with the task kind and form of each output.
        scores: the network's scores, float ``(rows,)`` or ``(rows, outputs)``; for ``retrieval``
            the vectors of query and item, ``(rows, 2, dim)``.
        batch: the rows' labels, and for ranking their groups. Its ``output_weights``, if given,
            multiply the losses of the outputs in addition to ``loss_weight``.

    Returns:
        A scalar; 0 if no row has a label.
    """
    if not signature.scores_rows:  # retrieval: the network returns vectors
        return load_functions(signature.single_output).hard_loss(scores, batch)
    scores = scores_of(scores, signature)
    weights = batch.output_weights or (1.0,) * len(signature.outputs)
    losses = [
        output.loss_weight
        * weight
        * _compute_labelled_loss(output, score, replace(batch, label=label))
        for output, weight, score, label in zip(
            signature.outputs,
            weights,
            score_columns(scores),
            score_columns(batch.label),
            strict=True,
        )
    ]
    return torch.stack(losses).sum()


def _compute_labelled_loss(output: Output, score: Tensor, batch: Batch) -> Tensor:
    """Compute the loss of one output, from the rows of the batch whose label is not NaN."""
    is_labelled = ~batch.label.isnan()
    if not bool(is_labelled.all()):
        group = None if batch.group is None else batch.group[is_labelled]
        score, batch = score[is_labelled], Batch({}, batch.label[is_labelled], group)
    if not len(score):
        return score.sum()  # 0, connected to the network, so that it has a gradient
    return load_functions(output).hard_loss(score, batch)


def soft_loss(
    signature: Signature, scores: Tensor, teacher: Tensor, batch: Batch, temperature: float
) -> Tensor:
    """Compute the distillation loss against the teacher (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        signature: signature with the task kind and form of each output.
        scores: the student's scores, float ``(rows,)`` or ``(rows, outputs)``; for ``retrieval``
            the vectors of query and item, ``(rows, 2, dim)``.
        teacher: the teacher's scores for the same rows, in the same shape.
        batch: the rows; for ranking, their groups are used.
        temperature: divides both scores before they are converted to probabilities; the loss is
            multiplied by its square, so that the size of gradients does not change.

    Returns:
        A scalar.
    """
    if not signature.scores_rows:  # retrieval: the network returns vectors
        rows = DistillationRows(scores, teacher, batch)
        return load_functions(signature.single_output).soft_loss(rows, temperature)
    losses = [
        output.loss_weight
        * load_functions(output).soft_loss(
            DistillationRows(score, teacher_score, batch), temperature
        )
        for output, score, teacher_score in zip(
            signature.outputs,
            score_columns(scores_of(scores, signature)),
            score_columns(teacher),
            strict=True,
        )
    ]
    return torch.stack(losses).sum()


def shuffled_batches(
    split: Split, signature: Signature, size: int, seed: int, limit: int | None = None
) -> Iterator[Batch]:
    """Yield batches of about ``size`` rows in random order, until at least ``limit`` rows.

    The arguments are those of ``shuffled_rows``, with the split of the rows; without ``limit``, all
    rows are yielded.
    """
    rows = Rows(split, signature)
    rows_yielded = 0
    for numbers in shuffled_rows(rows, signature, size, seed):
        if limit is not None and rows_yielded >= limit:
            return
        rows_yielded += len(numbers)
        yield rows.take(numbers)


def shuffled_rows(
    rows: Rows | JoinedRows,
    signature: Signature,
    size: int,
    seed: int,
    *,
    whole_lists: bool = False,
) -> Iterator[Tensor]:
    """Yield the row numbers of each batch, int64, in random order; each row is in one batch.

    Rows of a network with sequences are in batches of similar lengths, because each sequence is
    padded to the longest of its batch: ``BUCKET_BATCHES`` batches of random rows are sorted by
    length before they are split. Lists that must not be split are not sorted.

    Args:
        rows: the rows of the data; ``JoinedRows`` are labelled rows and requests without labels.
        signature: the model's signature. If its loss is computed by list, all rows of a group are
            in one batch.
        size: number of rows of a batch; larger if its last group exceeds it.
        seed: seed of the random order.
        whole_lists: whether all rows of a group are in one batch for other task kinds, too.
    """
    generator = torch.Generator().manual_seed(seed)
    if rows.group is None or not (whole_lists or signature.has_lists):
        row_numbers = torch.randperm(len(rows), generator=generator)
        lengths = rows.lengths()
        if lengths is None:
            yield from _merge_single_rows(torch.split(row_numbers, size))
        else:
            batches = _iterate_batches_of_similar_length(row_numbers, lengths, size, generator)
            yield from _merge_single_rows(batches)
        return
    permutation = rows.group.argsort(stable=True)  # makes rows of a group adjacent
    counts = torch.unique(rows.group, return_counts=True)[1]
    begins = counts.cumsum(0) - counts
    yield from _merge_single_rows(
        _iterate_batches_of_groups(permutation, begins, counts, size, generator)
    )


def _iterate_batches_of_similar_length(
    row_numbers: Tensor, lengths: Tensor, size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield batches of ``size`` rows, sorted by length within ``BUCKET_BATCHES`` batches.

    ``row_numbers`` are in random order; ``lengths`` has the length of each row of the data.
    """
    for bucket in torch.split(row_numbers, size * BUCKET_BATCHES):
        by_length = bucket[lengths[bucket].argsort(stable=True)]
        batches = torch.split(by_length, size)
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[number]


def _iterate_batches_of_groups(
    permutation: Tensor, begins: Tensor, counts: Tensor, size: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield batches of whole groups in random order; a batch has at least ``size`` rows.

    ``permutation`` lists row numbers by group; group ``i`` starts at ``begins[i]`` and has
    ``counts[i]`` rows.
    """
    pending: list[Tensor] = []
    rows = 0
    for number in torch.randperm(len(counts), generator=generator).tolist():
        pending.append(permutation[begins[number] : begins[number] + counts[number]])
        rows += len(pending[-1])
        if rows >= size:
            yield torch.cat(pending)
            pending, rows = [], 0
    if pending:
        yield torch.cat(pending)


def _merge_single_rows(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Merge a batch of one row with the batch before it: batch norm needs two rows."""
    previous: Tensor | None = None
    for batch_rows in batches:
        if previous is not None and len(batch_rows) == 1:
            previous = torch.cat([previous, batch_rows])
            continue
        if previous is not None:
            yield previous
        previous = batch_rows
    if previous is not None:
        yield previous
