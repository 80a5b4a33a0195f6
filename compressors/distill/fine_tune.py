"""Training a pruned or quantized network on its labels.

Weights that are zero stay zero, so it may follow ``magnitude``; of quantized layers the scales
and biases are trained, through the quantizer (Esser et al. 2020, https://arxiv.org/abs/1902.08153;
differs: the codes stay as they are).
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from compressors.batches import Batch
from compressors.contracts import Bench, Change, Frozen, Part
from compressors.loss import hard_loss
from compressors.model import Model
from compressors.trained import choose_trained, pruned_layers, trained_on
from compressors.training import Training
from compressors.units import Choice


class FineTune(Frozen):
    """Train dense layers on the labels, with early stopping on validation rows."""

    kind: Literal["fine_tune"] = "fine_tune"
    training: Training = Field(default_factory=Training, description="How it is trained.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Rows to learn from, and rows that say when to stop."""
        return ("train", "validation")

    @property
    def changes(self) -> Change:
        """Values change; formats and shapes stay."""
        return "values"

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:
        """What is trained, and why the rest is not."""
        return choose_trained(model, bench, self.kind, tables=self.training.tables)

    def apply(self, model: Model, bench: Bench) -> Model:
        """Train, and leave the network as it was in its best epoch.

        Raises:
            CompressionError: the bench lacks rows, or training diverged.
        """

        def loss(output: Tensor, batch: Batch, numbers: Tensor) -> Tensor:  # noqa: ARG001
            return hard_loss(bench.signature, output, batch)

        return trained_on(model, bench, loss, self.training, pruned_layers(model))

    def outline(self, model: Model, bench: Bench) -> Model:  # noqa: ARG002
        """Training changes no shape."""
        return model
