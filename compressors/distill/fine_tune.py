"""Fine-tuning: train a pruned or quantized network on the labels.

Weights that pruning set to zero stay zero, so this step may follow ``magnitude``. In quantized
layers the scales and biases are trained through the quantizer (Esser et al. 2020,
https://arxiv.org/abs/1902.08153; differs: the codes do not change).
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Change, Frozen, Part
from compressors.core.batches import Batch
from compressors.core.model import Model
from compressors.core.units import Choice
from compressors.distill.training.settings import Training
from compressors.distill.training.training_steps import choose_trainable, pruned_layers, train_model
from compressors.task_kinds.loss import hard_loss


class FineTune(Frozen):
    """Train dense layers on the labels, with early stopping on validation rows."""

    kind: Literal["fine_tune"] = "fine_tune"
    training: Training = Field(default_factory=Training, description="How it is trained.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, and validation rows for early stopping."""
        return ("train", "validation")

    @property
    def changes(self) -> Change:
        """Values change; formats and shapes stay."""
        return "values"

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:
        """What is trained, and why the rest is not."""
        return choose_trainable(model, bench, self.kind, tables=self.training.tables)

    def apply(self, model: Model, bench: Bench) -> Model:
        """Train, and leave the network as it was in its best epoch.

        Raises:
            CompressionError: the bench lacks rows, or training diverged.
        """

        def loss(output: Tensor, batch: Batch, numbers: Tensor) -> Tensor:  # noqa: ARG001
            return hard_loss(bench.signature, output, batch)

        return train_model(model, bench, loss, self.training, pruned_layers(model))

    def dry_run(self, model: Model, bench: Bench) -> Model:  # noqa: ARG002
        """Training changes no shape."""
        return model
