"""Evaluate a network on validation data, for steps that compare candidates by the metric."""

import numpy as np
import torch
from torch import nn

from compressors.contracts import Signature, Split, metric
from compressors.core.batches import batches
from compressors.core.placement import device_of, to_device
from compressors.metrics.estimators import builtin as builtin
from compressors.metrics.estimators.protocols import RowEstimator, ScoredRows

SCORING_ROWS = 8192
"""Rows per batch."""


@torch.no_grad()
def quality(module: nn.Module, signature: Signature, split: Split) -> float:
    """Evaluate the signature's metric on a split; higher is better.

    Args:
        module: the network, in evaluation mode.
        signature: signature of a ``ctr`` or ``ranking`` model.
        split: prepared rows (as tensors of the model's inputs) with labels, and groups if the
            metric needs them.

    Raises:
        MetricRefused: the metric is undefined for these rows.
    """
    parts, device = list(batches(split, signature, SCORING_ROWS)), device_of(module)
    outputs = [module(**to_device(part, device).inputs).reshape(-1) for part in parts]
    scores = torch.cat(outputs).cpu().numpy()
    label = np.concatenate([part.label.numpy() for part in parts])
    groups = [part.group.numpy() for part in parts if part.group is not None]
    estimator: RowEstimator = metric(signature.single_output.metric).estimator("rows")
    return estimator.point(ScoredRows(label, scores, np.concatenate(groups) if groups else None))
