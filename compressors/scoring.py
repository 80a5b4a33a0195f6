"""How good a network is on some rows: what a method decides by, on validation rows."""

import numpy as np
import torch
from torch import nn

from compressors import metrics
from compressors.batches import batches
from compressors.contracts import Schema, Split
from compressors.placement import device_of, on

SCORING_ROWS = 8192


@torch.no_grad()
def quality(module: nn.Module, schema: Schema, split: Split) -> float:
    """The schema's metric over a split; higher is better.

    Args:
        module: in evaluation mode.
        schema: of a click or ranking model.
        split: with labels, and groups where the metric needs them.
    """
    parts, device = list(batches(split, schema, SCORING_ROWS)), device_of(module)
    found = [module(**on(part, device).inputs).reshape(-1) for part in parts]
    scores = torch.cat(found).cpu().numpy()
    label = np.concatenate([part.label.numpy() for part in parts])
    if schema.metric == "auc":
        return metrics.auc(label, scores)
    group = np.concatenate([part.group.numpy() for part in parts if part.group is not None])
    if schema.metric == "gauc":
        return metrics.gauc(label, scores, group)
    return metrics.ndcg(label, scores, group, k=int(schema.metric.rpartition("@")[2]))
