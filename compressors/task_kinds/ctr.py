"""Task kind ``ctr``: the probability of a click for each row, with labels 0 and 1."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Output
from compressors.contracts.reasons import Reason
from compressors.core.batches import Batch
from compressors.metrics import point_estimates
from compressors.metrics.baseline_problem import (
    CLEAR_STANDARD_ERRORS,
    BaselineProblem,
    clearly_above,
)
from compressors.task_kinds.outputs import logits
from compressors.task_kinds.protocol import DistillationRows, ScoredSample


@dataclass(frozen=True)
class Ctr:
    """Losses and score checks of click prediction."""

    output: Output

    def hard_loss(self, score: Tensor, batch: Batch) -> Tensor:
        """Compute the mean binary cross entropy."""
        label = batch.label.to(torch.float32)
        return F.binary_cross_entropy_with_logits(logits(self.output, score), label)

    def soft_loss(self, rows: DistillationRows, temperature: float) -> Tensor:
        """Compute the mean cross entropy against the teacher's probabilities at a temperature."""
        student, teacher = logits(self.output, rows.student), logits(self.output, rows.teacher)
        target = torch.sigmoid(teacher / temperature)
        loss = F.binary_cross_entropy_with_logits(student / temperature, target)
        return loss * temperature**2

    def find_score_problems(self, sample: ScoredSample) -> Iterator[BaselineProblem]:
        """Check that scores fit the declared output form and beat a constant prediction.

        Yields a problem if scores declared as probabilities are outside [0, 1], the other form
        (logit or probability) has a clearly lower loss, the loss is clearly above that of
        predicting the base rate, or the AUC is clearly below 0.5.
        """
        label, score = sample.label, sample.score
        is_outside = (score < 0) | (score > 1)
        is_probability = self.output.form == "probability"
        if is_probability and is_outside.any():
            yield BaselineProblem(
                Reason(
                    "probability_outside",
                    count=int(is_outside.sum()),
                    rows=score.size,
                    score=float(score[is_outside][0]),
                ),
                prevents_packing=True,
                prevents_measurement=True,
            )
            return
        as_logit = point_estimates.row_logloss(label, 1 / (1 + np.exp(-score)))
        loss = as_logit
        if not is_outside.any():
            as_probability = point_estimates.row_logloss(label, score)
            loss = as_probability if is_probability else as_logit
            other_loss = as_logit if is_probability else as_probability
            if clearly_above(loss - other_loss):
                declared_form, fitting_form = (
                    ("probability", "logit") if is_probability else ("logit", "probability")
                )
                yield BaselineProblem(
                    Reason(
                        "output_misdeclared",
                        declared=declared_form,
                        fitting=fitting_form,
                        rows=score.size,
                        declared_loss=float(loss.mean()),
                        fitting_loss=float(other_loss.mean()),
                    ),
                    prevents_packing=not is_probability,  # scores in [0, 1] are valid probabilities
                )
                return
        rate = float(label.mean())
        if not 0 < rate < 1:  # all labels of the sample are equal
            return
        if clearly_above(loss - np.where(label == 1, -np.log(rate), -np.log1p(-rate))):
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
        # Standard error of the AUC of random scores (the Mann-Whitney statistic). The AUC is nearly
        # normally distributed only if there are several rows of each class.
        auc_error = np.sqrt((label.size + 1) / (12 * positives * negatives))
        auc = point_estimates.auc(label, score)
        if min(positives, negatives) >= 10 and auc + CLEAR_STANDARD_ERRORS * auc_error < 0.5:
            yield BaselineProblem(Reason("worse_than_chance", auc=float(auc), rows=score.size))
