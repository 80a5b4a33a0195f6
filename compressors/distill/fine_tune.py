"""Fine-tuning: train a pruned or quantized network on the labels.

Weights that pruning set to zero stay zero, so this step may follow the pruning step ``magnitude``.
In quantized layers, the scales and biases are trained with gradients of the quantized output (Esser
et al. 2020, https://arxiv.org/abs/1902.08153). Differs: the codes do not change.
"""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Part
from compressors.core.batches import Batch
from compressors.core.model import Model
from compressors.core.steps.decisions import AppliedStep, StepPlan
from compressors.core.steps.step import Effect, StepSettings
from compressors.distill.training.settings import Training
from compressors.distill.training.training_steps import (
    choose_trainable,
    list_pruned_layers,
    train_model,
)
from compressors.task_kinds.loss import hard_loss


class FineTune(StepSettings):
    """Train dense layers (and tables, if set) on the labels; validation rows select the epoch."""

    effect: ClassVar[Effect] = "values"  # units keep their format; their weights change
    recovers_quality: ClassVar[bool] = True
    trains_towers: ClassVar[bool] = True  # the step can train a model with two towers

    kind: Literal["fine_tune"] = "fine_tune"
    training: Training = Field(default_factory=Training, description="Settings of the training.")

    @property
    def trains(self) -> bool:
        """True: the step trains the network."""
        return True

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, validation rows for early stopping, and what the training needs."""
        return ("train", "validation", *self.training.needs)

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the units to train; give a reason for each other unit.

        Raises:
            NothingToCompress: the task has no training loss.
        """
        decisions = choose_trainable(model, bench, self.kind, self.training)
        return StepPlan(decisions, None)  # None: ``apply`` needs no data from the plan

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Train, and return the network of the best epoch.

        Raises:
            RowsMissing: the bench lacks rows.
            TrainingFailed: training diverged, or nothing can be trained.
        """

        def loss(output: Tensor, batch: Batch, row_numbers: Tensor) -> Tensor:
            return hard_loss(bench.signature, output, batch)

        return train_model(
            model, bench, loss, self.training, keep_zeros_in=list_pruned_layers(model)
        )
