"""Magnitude pruning: set the smallest weights of dense layers to zero.

Source: Han et al. 2015, https://arxiv.org/abs/1506.02626 (magnitude pruning).
Differs: weights are pruned once, without training. A later step ``fine_tune`` or ``distill`` keeps
the zeros and recovers quality.

Zeros are stored like any other weight, so this step alone saves neither bytes nor time on the
supported targets. Use it before a training step, or to compare it with ``channels``, which
removes whole output channels.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.steps.decisions import AppliedStep, StepPlan, choose_dense
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit, replace_parameter


def zero_smallest(weights: list[Tensor], share: float) -> list[Tensor]:
    """Set the weights of smallest absolute value to zero, over all tensors together.

    Args:
        weights: tensors of any shapes.
        share: the share of all weights that becomes zero, between 0 and 1. Of weights with
            equal absolute values, those at earlier positions become zero first.

    Returns:
        New tensors in the same order and shapes.
    """
    flat = torch.cat([weight.abs().flatten() for weight in weights])  # (all weights,)
    smallest = flat.sort(stable=True).indices[: round(share * len(flat))]
    pruned = torch.zeros(len(flat), dtype=torch.bool)
    pruned[smallest] = True
    masks = torch.split(pruned, [weight.numel() for weight in weights])
    return [
        weight.masked_fill(mask.view_as(weight), 0.0)
        for weight, mask in zip(weights, masks, strict=True)
    ]


class Magnitude(StepSettings):
    """Set the smallest weights of dense layers to zero."""

    effect: ClassVar[Effect] = "values"  # units keep their format; their weights change
    keeps_zeros: ClassVar[bool] = True  # later training leaves these weights at zero

    kind: Literal["magnitude"] = "magnitude"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to prune: module names, with * for any characters."
    )
    share: float = Field(0.5, gt=0, lt=1, description="Share of the weights that become zero.")
    scope: Literal["layer", "global"] = Field(
        "layer",
        description="layer: each layer gets the same share of zeros. global: weights are ranked "
        "over all layers together.",
    )

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the dense layers to compress; give a reason for each other layer."""
        decisions = choose_dense(Unit.of(model.module), self.layers, self.kind)
        reason = (
            Reason("zeros_of_layer", step=self.kind, share=self.share)
            if self.scope == "layer"
            else Reason("zeros_of_all_layers", step=self.kind, share=self.share)
        )
        decisions = {name: decision.replace_reasons(reason) for name, decision in decisions.items()}
        return StepPlan(decisions, None)  # ``apply`` needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Set the smallest weights of every selected layer to zero."""
        units = plan.units(model.module)
        ranked_together = [units] if self.scope == "global" else [[unit] for unit in units]
        for compared in ranked_together:
            weights = zero_smallest([unit.weight for unit in compared], self.share)
            for unit, weight in zip(compared, weights, strict=True):
                layer = unit.module
                if isinstance(layer, nn.Linear):
                    replace_parameter(layer, "weight", weight)
        return AppliedStep(model)
