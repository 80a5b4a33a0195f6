"""Ranking: scores that order the rows of each list, with labels that are grades of relevance."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressors.contracts import Output
from compressors.contracts.reasons import Reason
from compressors.core.batches import Batch
from compressors.metrics import point_estimates
from compressors.metrics.baseline_problem import BaselineProblem, clearly_above
from compressors.task_kinds.outputs import EDGE, listwise, log_shares, segments, sums
from compressors.task_kinds.protocol import ScoredSample, TaughtRows


@dataclass(frozen=True)
class Ranking:
    """Listwise softmax cross entropy, and lists that are ordered better than at random.

    Source: ListNet, Cao et al. 2007, top-one probabilities, with gains ``2^label - 1``. Groups
    without a positive label do not count.
    """

    output: Output

    def hard_loss(self, score: Tensor, batch: Batch) -> Tensor:
        """Compute the mean cross entropy of the lists with a relevant row."""
        segment, groups = segments(batch, len(score))
        gains = torch.exp2(batch.label.to(torch.float32)) - 1
        total = sums(gains, segment, groups)
        target = gains / total.clamp(min=EDGE)[segment]
        return listwise(score, target, segment, total > 0)

    def soft_loss(self, rows: TaughtRows, temperature: float) -> Tensor:
        """Compute the mean cross entropy against the teacher's shares of each list."""
        segment, groups = segments(rows.batch, len(rows.student))
        wanted = log_shares(rows.teacher / temperature, segment, groups).exp()
        every = torch.ones(groups, dtype=torch.bool, device=rows.student.device)
        return listwise(rows.student / temperature, wanted, segment, every) * temperature**2

    def score_problems(self, sample: ScoredSample) -> Iterator[BaselineProblem]:
        """Check that lists are ordered better than at random."""
        label, score, group = sample
        if group is None:
            return
        reached = point_estimates.group_ndcg(label, score, group, k=10)
        random = point_estimates.group_ndcg(label, np.zeros_like(score), group, k=10)
        if clearly_above(random - reached):
            yield BaselineProblem(
                Reason(
                    "worse_than_random_order",
                    ndcg=float(reached.mean()),
                    groups=reached.size,
                    random=float(random.mean()),
                )
            )
