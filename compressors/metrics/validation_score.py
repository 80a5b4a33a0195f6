"""Evaluate a network on validation data, for steps that compare candidates by the metric."""

import torch
from torch import Tensor, nn

from compressors.contracts import Output, Signature, Split, metric
from compressors.core.batches import JoinedRows, Rows, batches
from compressors.core.placement import find_device, to_device
from compressors.core.scores import network_scores, score_columns
from compressors.metrics.estimators import builtin as builtin  # cache keys depend on it
from compressors.metrics.estimators.protocols import RowEstimator, ScoredRows
from compressors.metrics.validation_ranking import ranking_quality

SCORING_ROWS = 8192
"""Rows per batch."""


@torch.no_grad()
def quality(
    module: nn.Module,
    signature: Signature,
    split: Split,
    train: Split | Rows | JoinedRows | None = None,
) -> float:
    """Evaluate the signature's metric on a split; higher is better.

    With several outputs, it is the mean of their metrics, weighted by ``loss_weight``. Rows without
    the label of an output are left out of its metric.

    Args:
        module: the network, in evaluation mode.
        signature: the model's signature.
        split: prepared rows (as tensors of the model's inputs) with labels, and groups if the
            metric needs them.
        train: the training rows. Only for ``retrieval``: their items are ranked too, except for a
            query that has them in these rows (``validation_ranking.py``).

    Raises:
        MetricRefused: the metric is undefined for these rows.
    """
    if not signature.scores_rows:
        train_rows = Rows(train, signature) if isinstance(train, Split) else train
        return ranking_quality(module, signature, Rows(split, signature), train_rows)
    parts, device = list(batches(split, signature, SCORING_ROWS)), find_device(module)
    outputs = [network_scores(module, to_device(part, device).inputs, signature) for part in parts]
    scores = score_columns(torch.cat(outputs).cpu())
    labels = score_columns(torch.cat([part.label for part in parts]))
    groups = [part.group for part in parts if part.group is not None]
    group = torch.cat(groups) if groups else None
    total = 0.0
    for output, score, label in zip(signature.outputs, scores, labels, strict=True):
        value = _compute_quality_of_output(output, score, label, group)
        if not signature.has_several_outputs:
            return value
        total += output.loss_weight * value
    return total / sum(output.loss_weight for output in signature.outputs)


def _compute_quality_of_output(
    output: Output, score: Tensor, label: Tensor, group: Tensor | None
) -> float:
    estimator: RowEstimator = metric(output.metric).estimator("rows")
    has_label = ~label.isnan()
    if not bool(has_label.all()):
        score, label = score[has_label], label[has_label]
        group = None if group is None else group[has_label]
    groups = None if group is None else group.numpy()
    return estimator.compute(ScoredRows(label.numpy(), score.numpy(), groups))
