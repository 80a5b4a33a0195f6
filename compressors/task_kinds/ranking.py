"""Task kind ``ranking``: scores that order the rows of each list; labels are relevance grades."""

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
from compressors.task_kinds.outputs import EDGE, list_indices, listwise, log_shares, sum_by_list
from compressors.task_kinds.protocol import DistillationRows, ScoredSample


@dataclass(frozen=True)
class Ranking:
    """Losses and score checks of ranking.

    Both losses are the listwise softmax cross entropy. The target of a row is the probability that
    the softmax over its list should give it. For ``hard_loss``, it is the row's share of the gains
    ``2^label - 1`` of its list, and lists without a positive label are ignored. For ``soft_loss``,
    it is the softmax of the teacher's scores, and all lists are used.

    Source: ListNet, Cao et al. 2007 (top-one probabilities).
    """

    output: Output

    def hard_loss(self, score: Tensor, batch: Batch) -> Tensor:
        """Compute the mean cross entropy of the lists with a relevant row."""
        segment, groups = list_indices(batch, len(score))
        gains = torch.exp2(batch.label.to(torch.float32)) - 1
        total = sum_by_list(gains, segment, groups)
        # A list without gains, which is not used, must not give 0 / 0: EDGE is any small divisor.
        target = gains / total.clamp(min=EDGE)[segment]
        return listwise(score, target, segment, total > 0)

    def soft_loss(self, rows: DistillationRows, temperature: float) -> Tensor:
        """Compute the mean cross entropy against each list's softmax of the teacher's scores."""
        segment, groups = list_indices(rows.batch, len(rows.student))
        target = log_shares(rows.teacher / temperature, segment, groups).exp()
        all_lists = torch.ones(groups, dtype=torch.bool, device=rows.student.device)
        return listwise(rows.student / temperature, target, segment, all_lists) * temperature**2

    def find_score_problems(self, sample: ScoredSample) -> Iterator[BaselineProblem]:
        """Yield a problem if the mean NDCG@10 is clearly below that of a random order."""
        label, score, group = sample
        if group is None:
            return
        ndcg = point_estimates.group_ndcg(label, score, group, k=10)
        random = point_estimates.group_ndcg(label, np.zeros_like(score), group, k=10)
        if clearly_above(random - ndcg):
            yield BaselineProblem(
                Reason(
                    "worse_than_random_order",
                    ndcg=float(ndcg.mean()),
                    groups=ndcg.size,
                    random=float(random.mean()),
                )
            )
