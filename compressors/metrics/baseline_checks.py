"""Check labels and scores of the uncompressed model before it serves as the baseline.

``recpress bundle pack`` refuses a bundle with a problem that ``prevents_packing``; other problems
are warnings. A problem that ``prevents_measurement`` would make every flow run with the bundle
fail. Scores are computed for a sample of about ``SAMPLE_ROWS`` rows, evenly spaced in the split;
the sample of a ranking model consists of whole groups.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressors.contracts import Output, Signature, Split, metric, quality_metrics
from compressors.contracts.reasons import Reason
from compressors.core.batches import Rows, rows_per_batch
from compressors.core.scores import network_scores, score_columns
from compressors.metrics.baseline_problem import BaselineProblem
from compressors.task_kinds import builtin as builtin  # cache keys depend on it
from compressors.task_kinds.protocol import ScoredSample

SAMPLE_ROWS = 4096
"""Approximate number of test rows that are scored."""

Array = NDArray[Any]


def find_label_problems(
    signature: Signature, split: str, label: Array, group: Array | None
) -> Iterator[BaselineProblem]:
    """Yield the problems of the labels of one split, of which all rows are checked.

    Args:
        signature: signature of the model.
        split: name of the split.
        label: labels, float ``(rows,)`` or ``(rows, outputs)``; NaN where a row has none.
        group: group of each row, int ``(rows,)``, or None.
    """
    for output, labels in zip(signature.outputs, _split_outputs(label), strict=True):
        if output.label is None:
            continue
        has_label = ~np.isnan(labels)
        if not has_label.any():
            yield BaselineProblem(
                Reason(
                    "labels_missing",
                    split=split,
                    rows=labels.size,
                    output=output.name,
                    column=str(output.label_where),
                ),
                prevents_packing=split in ("test", "validation"),
                prevents_measurement=split == "test",
            )
            continue
        groups = None if group is None else group[has_label]
        yield from _label_problems(signature, output, split, labels[has_label], groups)


def _label_problems(
    signature: Signature, output: Output, split: str, label: Array, group: Array | None
) -> Iterator[BaselineProblem]:
    """Yield the problems of the labels of one output, of the rows that have a label."""
    is_test = split == "test"
    is_evaluated = is_test or split == "validation"
    if not output.task_kind.needs_label:  # rows are interactions, labels above 0 are positive
        if not (label > 0).any():
            yield BaselineProblem(
                Reason(
                    "interactions_missing",
                    split=split,
                    rows=label.size,
                    column=str(output.label),
                ),
                prevents_packing=is_evaluated,
                prevents_measurement=is_test,
            )
        return
    if label.min() == label.max():
        yield BaselineProblem(
            Reason(
                "labels_equal",
                split=split,
                rows=label.size,
                label=float(label[0]),
                column=str(output.label),
            ),
            prevents_packing=is_evaluated,
            prevents_measurement=is_test,
        )
        return
    quality = quality_metrics(
        output.kind, grouped=signature.group is not None, additional=(output.metric,)
    )
    grouped = [name for name in quality if metric(name).needs_group]
    needed = grouped if is_test else [name for name in grouped if name == output.metric]
    if group is not None and is_evaluated and needed and not _has_mixed_group(label, group):
        column, metrics = str(signature.group), tuple(needed)
        yield BaselineProblem(
            Reason("group_labels_equal", split=split, metrics=metrics, group=column)
            if output.metric in grouped
            else Reason("optional_group_labels_equal", split=split, metrics=metrics, group=column),
            prevents_packing=True,
            prevents_measurement=is_test,
        )


def find_score_problems(
    module: nn.Module, signature: Signature, test: Split
) -> Iterator[BaselineProblem]:
    """Yield the problems of the scores of a sample of test rows.

    Args:
        module: the loaded model, in evaluation mode.
        signature: its inputs and outputs.
        test: the test rows, prepared: as tensors of the model's inputs.
    """
    rows = Rows(test, signature)
    numbers = _sample(rows, signature)
    sample = rows.take(numbers)
    with torch.no_grad():
        scores = torch.cat(
            [
                network_scores(module, rows.take(part).inputs, signature).to(torch.float32)
                for part in torch.split(numbers, rows_per_batch(signature, SAMPLE_ROWS))
            ]
        )
    group = None if sample.group is None else sample.group.numpy()
    for output, score, label in zip(
        signature.outputs,
        score_columns(scores.double()),
        score_columns(sample.label.double()),
        strict=True,
    ):
        for problem in _score_problems(output, score.numpy(), label.numpy(), group):
            if not signature.has_several_outputs:
                yield problem
                continue
            reason = Reason("problem_of_output", output=output.name, problem=problem.reason)
            yield replace(problem, reason=reason)


def _score_problems(
    output: Output, score: Array, label: Array, group: Array | None
) -> Iterator[BaselineProblem]:
    """Yield the problems of the scores of one output; labels may be NaN."""
    if nonfinite := int((~np.isfinite(score)).sum()):
        yield BaselineProblem(
            Reason("scores_not_finite", count=nonfinite, rows=score.size),
            prevents_packing=True,
            prevents_measurement=True,
        )
        return
    if score.size > 1 and score.min() == score.max():
        yield BaselineProblem(Reason("scores_equal", rows=score.size, score=float(score[0])))
        return
    functions = output.task_kind.load()  # class with the task kind's score checks; None if none
    has_label = ~np.isnan(label)
    if functions is not None and has_label.any():
        groups = None if group is None else group[has_label]
        sample = ScoredSample(label[has_label], score[has_label], groups)
        yield from functions(output).find_score_problems(sample)


def _split_outputs(values: Array) -> list[Array]:
    """Return the values of each output, ``(rows,)``."""
    return [values] if values.ndim == 1 else list(values.T)


def _has_mixed_group(label: Array, group: Array) -> bool:
    """Whether at least one group has rows with different labels."""
    permutation = np.lexsort((label, group))
    labels, groups = label[permutation], group[permutation]
    return bool(((groups[1:] == groups[:-1]) & (labels[1:] != labels[:-1])).any())


def _sample(rows: Rows, signature: Signature) -> torch.Tensor:
    """Return evenly spaced row numbers of a split; for ranking, all rows of some groups."""
    if len(rows) <= SAMPLE_ROWS:
        return torch.arange(len(rows))
    if not signature.has_lists or rows.group is None:
        return torch.arange(SAMPLE_ROWS) * len(rows) // SAMPLE_ROWS
    group_index = torch.unique(rows.group, return_inverse=True)[1]
    stride = -(-len(rows) // SAMPLE_ROWS)
    return torch.nonzero(group_index % stride == 0).reshape(-1)
