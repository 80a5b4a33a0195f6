"""Check the uncompressed model on its own test rows, before anything is compared with it.

Problems that make every later number meaningless are refused at pack; the rest are warnings. Scores
are computed for a sample of ``SAMPLE_ROWS`` rows, spread evenly over the split (whole groups for
``ranking``). A warning needs a difference of ``CLEAR`` standard errors, so that chance in the
sample does not cause it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from compressors.contracts import MEASURES, Signature, Split, quality_metrics
from compressors.core.batches import Rows
from compressors.metrics import point_estimates

SAMPLE_ROWS = 4096
CLEAR = 4.0  # standard errors: by chance about 1 in 30,000
FEWEST = 100
"""Rows or groups below which nothing is concluded from a mean."""

Array = NDArray[Any]


@dataclass(frozen=True)
class BaselineProblem:
    """What is wrong with a model or its labels.

    Attributes:
        text: what was expected, what was found, and what to do.
        refused: whether a bundle with it is refused at pack; else it is a warning.
        fatal: whether measuring fails because of it, so that a run cannot succeed.
    """

    text: str
    refused: bool = False
    fatal: bool = False


def label_problems(
    signature: Signature, split: str, label: Array, group: Array | None
) -> Iterator[BaselineProblem]:
    """What is wrong with the labels of one split, all of its rows.

    Args:
        signature: of the model.
        split: its name.
        label: float ``(rows,)``.
        group: int ``(rows,)``, or None.
    """
    measured = split == "test"
    judged = measured or split == "validation"
    if signature.label is None:
        return
    if signature.task == "retrieval":
        if not (label > 0).any():
            yield BaselineProblem(
                f"Expected interactions with a label above 0 in split {split!r}, got none in "
                f"{label.size:,} rows, so there is nothing to find. Check column "
                f"{signature.label!r}.",
                refused=judged,
                fatal=measured,
            )
        return
    if label.min() == label.max():
        yield BaselineProblem(
            f"Expected rows with different labels in split {split!r}, got {label.size:,} rows "
            f"that all have label {label[0]:g}: no metric can tell models apart. Check column "
            f"{signature.label!r}, or how the split was drawn.",
            refused=judged,
            fatal=measured,
        )
        return
    quality = quality_metrics(signature.task, grouped=signature.group is not None)
    grouped = [name for name in quality if MEASURES[name].needs_group]
    needed = grouped if measured else [name for name in grouped if name == signature.metric]
    if group is not None and judged and needed and not _has_mixed_group(label, group):
        yield BaselineProblem(
            f"Expected a group with different labels in split {split!r} for "
            f"{', '.join(needed)}, got none: within each value of {signature.group!r} all labels "
            f"are equal. Name another group column"
            f"{', or remove it' if signature.metric not in grouped else ''}.",
            refused=True,
            fatal=measured,
        )


def score_problems(
    module: nn.Module, signature: Signature, test: Split
) -> Iterator[BaselineProblem]:
    """What is wrong with the scores of a sample of test rows.

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
            f"Expected a finite score for every test row, got none for {broken:,} of "
            f"{score.size:,} rows. Check ids and dense inputs of these rows, and the weights.",
            refused=True,
            fatal=True,
        )
        return
    if score.size > 1 and score.min() == score.max():
        yield BaselineProblem(
            f"The model gives all {score.size:,} sampled test rows the same score "
            f"{score[0]:g}. Check that the trained weights were saved, and the inputs."
        )
        return
    if signature.task == "ctr":
        yield from _probability_problems(signature, label, score)
    elif signature.task == "ranking" and sample.group is not None:
        yield from _order_problems(label, score, sample.group.numpy())


def _probability_problems(
    signature: Signature, label: Array, score: Array
) -> Iterator[BaselineProblem]:
    """Whether scores are what the output declares, and better than the base rate."""
    count = f"{score.size:,} sampled test rows"
    outside = (score < 0) | (score > 1)
    declared = signature.output == "probability"
    if declared and outside.any():
        yield BaselineProblem(
            f"Expected output 'probability' in [0, 1], got {int(outside.sum()):,} of {count} "
            f"outside, such as {score[outside][0]:g}. Set output to 'logit', or apply the sigmoid "
            f"in forward.",
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
                f"Expected output {wrong!r}, got scores that fit output {right!r}: all of {count} "
                f"lie in [0, 1], and their log loss is {other.mean():.4f} as {right} and "
                f"{loss.mean():.4f} as {wrong}. Set output to {right!r}.",
                refused=not declared,
            )
            return
    rate = float(label.mean())
    if not 0 < rate < 1:  # too rare for the sample
        return
    if _clearly_above(loss - np.where(label == 1, -np.log(rate), -np.log1p(-rate))):
        yield BaselineProblem(
            f"The model's log loss {loss.mean():.4f} on {count} is worse than "
            f"{point_estimates.base_entropy(rate):.4f}, which predicting the mean label {rate:.4f} "
            "for every row reaches. Check the labels, and whether the model is calibrated (a model "
            "trained on sampled negatives is not)."
        )
    positives = float(label.sum())
    negatives = label.size - positives
    error = np.sqrt((label.size + 1) / (12 * positives * negatives))
    found = point_estimates.auc(label, score)
    if min(positives, negatives) >= 10 and found + CLEAR * error < 0.5:
        yield BaselineProblem(
            f"The model's AUC {found:.4f} on {count} is worse than chance (0.5). Check that "
            f"label 1 is the positive class and that a higher score means more likely."
        )


def _order_problems(label: Array, score: Array, group: Array) -> Iterator[BaselineProblem]:
    """Whether lists are ordered better than at random."""
    reached = point_estimates.group_ndcg(label, score, group, k=10)
    random = point_estimates.group_ndcg(label, np.zeros_like(score), group, k=10)
    if _clearly_above(random - reached):
        yield BaselineProblem(
            f"The model's NDCG@10 {reached.mean():.4f} on {reached.size:,} sampled test groups is "
            f"worse than the {random.mean():.4f} of a random order. Check that a higher label is "
            f"more relevant and that a higher score ranks first."
        )


def _clearly_above(values: Array) -> bool:
    """Whether a mean is above 0 by more than chance explains."""
    if values.size < FEWEST:
        return False
    error = values.std(ddof=1) / np.sqrt(values.size)
    return bool(values.mean() > CLEAR * error and values.mean() > 0)


def _has_mixed_group(label: Array, group: Array) -> bool:
    order = np.lexsort((label, group))
    labels, groups = label[order], group[order]
    return bool(((groups[1:] == groups[:-1]) & (labels[1:] != labels[:-1])).any())


def _sample(rows: Rows, signature: Signature) -> torch.Tensor:
    """Numbers of rows spread evenly over a split; of whole groups for ranking."""
    if len(rows) <= SAMPLE_ROWS:
        return torch.arange(len(rows))
    if signature.task != "ranking" or rows.group is None:
        return torch.arange(SAMPLE_ROWS) * len(rows) // SAMPLE_ROWS
    number = torch.unique(rows.group, return_inverse=True)[1]
    every = -(-len(rows) // SAMPLE_ROWS)
    return torch.nonzero(number % every == 0).reshape(-1)
