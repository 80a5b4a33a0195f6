"""Check labels and scores of the uncompressed model before it serves as the baseline.

Problems that make every later number meaningless are refused at pack; the rest are warnings. Scores
are computed for a sample of ``SAMPLE_ROWS`` rows, spread evenly over the split (whole groups for
``ranking``). A warning needs a difference of ``CLEAR`` standard errors, so that sampling noise does
not cause it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressors.contracts import Signature, Split, metric, quality_metrics
from compressors.contracts.reasons import Reason
from compressors.core.batches import Rows
from compressors.metrics import point_estimates

SAMPLE_ROWS = 4096
CLEAR = 4.0  # standard errors: by chance about 1 in 30,000
FEWEST = 100
"""Fewest rows or groups from which a mean is tested."""

Array = NDArray[Any]


@dataclass(frozen=True)
class BaselineProblem:
    """A problem of a model or its labels.

    Attributes:
        reason: the expected and the actual value, and what to do.
        refused: whether pack refuses a bundle with this problem; else it is a warning.
        fatal: whether measuring fails because of it, so that no run can succeed.
    """

    reason: Reason
    refused: bool = False
    fatal: bool = False


def label_problems(
    signature: Signature, split: str, label: Array, group: Array | None
) -> Iterator[BaselineProblem]:
    """Yield problems of the labels of one split; all of its rows are checked.

    Args:
        signature: signature of the model.
        split: name of the split.
        label: label of each row, float ``(rows,)``.
        group: group of each row, int ``(rows,)``, or None.
    """
    measured = split == "test"
    judged = measured or split == "validation"
    if signature.label is None:
        return
    if signature.task == "retrieval":
        if not (label > 0).any():
            yield BaselineProblem(
                Reason(
                    "interactions_missing", split=split, rows=label.size, column=signature.label
                ),
                refused=judged,
                fatal=measured,
            )
        return
    if label.min() == label.max():
        yield BaselineProblem(
            Reason(
                "labels_equal",
                split=split,
                rows=label.size,
                label=float(label[0]),
                column=signature.label,
            ),
            refused=judged,
            fatal=measured,
        )
        return
    quality = quality_metrics(
        signature.task, grouped=signature.group is not None, named=(signature.metric,)
    )
    grouped = [name for name in quality if metric(name).needs_group]
    needed = grouped if measured else [name for name in grouped if name == signature.metric]
    if group is not None and judged and needed and not _has_mixed_group(label, group):
        column, metrics = str(signature.group), tuple(needed)
        yield BaselineProblem(
            Reason("group_labels_equal", split=split, metrics=metrics, group=column)
            if signature.metric in grouped
            else Reason("optional_group_labels_equal", split=split, metrics=metrics, group=column),
            refused=True,
            fatal=measured,
        )


def score_problems(
    module: nn.Module, signature: Signature, test: Split
) -> Iterator[BaselineProblem]:
    """Yield problems of the scores of a sample of test rows.

    Args:
        module: the loaded model, in evaluation mode.
        signature: its inputs and output.
        test: the prepared test rows.
    """
    rows = Rows(test, signature)
    sample = rows.take(_sample(rows, signature))
    with torch.no_grad():
        score = module(**sample.inputs).reshape(-1).to(torch.float32).numpy().astype(np.float64)
    label = sample.label.numpy().astype(np.float64)
    if broken := int((~np.isfinite(score)).sum()):
        yield BaselineProblem(
            Reason("scores_not_finite", count=broken, rows=score.size),
            refused=True,
            fatal=True,
        )
        return
    if score.size > 1 and score.min() == score.max():
        yield BaselineProblem(Reason("scores_equal", rows=score.size, score=float(score[0])))
        return
    if signature.task == "ctr":
        yield from _probability_problems(signature, label, score)
    elif signature.task == "ranking" and sample.group is not None:
        yield from _order_problems(label, score, sample.group.numpy())


def _probability_problems(
    signature: Signature, label: Array, score: Array
) -> Iterator[BaselineProblem]:
    """Check that scores fit the declared output and are better than the base rate."""
    outside = (score < 0) | (score > 1)
    declared = signature.output == "probability"
    if declared and outside.any():
        yield BaselineProblem(
            Reason(
                "probability_outside",
                count=int(outside.sum()),
                rows=score.size,
                score=float(score[outside][0]),
            ),
            refused=True,
            fatal=True,
        )
        return
    as_logit = point_estimates.row_logloss(label, 1 / (1 + np.exp(-score)))
    loss = as_logit
    if not outside.any():
        as_probability = point_estimates.row_logloss(label, score)
        loss = as_probability if declared else as_logit
        other = as_logit if declared else as_probability
        if _clearly_above(loss - other):
            wrong, right = ("probability", "logit") if declared else ("logit", "probability")
            yield BaselineProblem(
                Reason(
                    "output_misdeclared",
                    declared=wrong,
                    fitting=right,
                    rows=score.size,
                    declared_loss=float(loss.mean()),
                    fitting_loss=float(other.mean()),
                ),
                refused=not declared,
            )
            return
    rate = float(label.mean())
    if not 0 < rate < 1:  # the sample has one class only: the rarer one is too rare
        return
    if _clearly_above(loss - np.where(label == 1, -np.log(rate), -np.log1p(-rate))):
        yield BaselineProblem(
            Reason(
                "worse_than_base_rate",
                loss=float(loss.mean()),
                rows=score.size,
                entropy=float(point_estimates.base_entropy(rate)),
                rate=rate,
            )
        )
    positives = float(label.sum())
    negatives = label.size - positives
    error = np.sqrt((label.size + 1) / (12 * positives * negatives))
    auc = point_estimates.auc(label, score)
    if min(positives, negatives) >= 10 and auc + CLEAR * error < 0.5:
        yield BaselineProblem(Reason("worse_than_chance", auc=float(auc), rows=score.size))


def _order_problems(label: Array, score: Array, group: Array) -> Iterator[BaselineProblem]:
    """Check that lists are ordered better than at random."""
    reached = point_estimates.group_ndcg(label, score, group, k=10)
    random = point_estimates.group_ndcg(label, np.zeros_like(score), group, k=10)
    if _clearly_above(random - reached):
        yield BaselineProblem(
            Reason(
                "worse_than_random_order",
                ndcg=float(reached.mean()),
                groups=reached.size,
                random=float(random.mean()),
            )
        )


def _clearly_above(values: Array) -> bool:
    """Whether a mean is above 0 by more than ``CLEAR`` standard errors."""
    if values.size < FEWEST:
        return False
    error = values.std(ddof=1) / np.sqrt(values.size)
    return bool(values.mean() > CLEAR * error and values.mean() > 0)


def _has_mixed_group(label: Array, group: Array) -> bool:
    order = np.lexsort((label, group))
    labels, groups = label[order], group[order]
    return bool(((groups[1:] == groups[:-1]) & (labels[1:] != labels[:-1])).any())


def _sample(rows: Rows, signature: Signature) -> torch.Tensor:
    """Return row numbers spread evenly over a split; whole groups for ranking."""
    if len(rows) <= SAMPLE_ROWS:
        return torch.arange(len(rows))
    if signature.task != "ranking" or rows.group is None:
        return torch.arange(SAMPLE_ROWS) * len(rows) // SAMPLE_ROWS
    number = torch.unique(rows.group, return_inverse=True)[1]
    every = -(-len(rows) // SAMPLE_ROWS)
    return torch.nonzero(number % every == 0).reshape(-1)
