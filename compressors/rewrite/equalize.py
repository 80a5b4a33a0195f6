"""Cross-layer equalization: give the channels between consecutive dense layers equal ranges.

Scores do not change, but quantization errors become smaller. If a channel's weights are large in
one layer and small in the next, both layers have large quantization errors. The step moves a factor
per channel from one layer to the next until its largest absolute weight (its *range*) is the same
in both. A *link* is a layer and all layers that consume its output.

Paper: Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.1, eq. 11 (cross-layer
equalization).
Differs: a layer with several consumers is equalized with the largest of their ranges; leaky Relu,
PReLU and dropout are treated like Relu; the paper's absorption of high biases is left out.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.steps.decisions import AppliedStep, StepPlan
from compressors.core.steps.step import Effect, StepSettings
from compressors.rewrite.scaling import Link, choose_links, linear_weight, rescale

MAX_ROUNDS = 100  # largest number of rounds over all links
DEAD = 1e-3  # channels below this share of the layer's largest channel are not scaled
CONVERGED = 1e-3  # stop when a round changes every factor by less


def equalization_factors(output_ranges: Tensor, input_ranges: Tensor) -> Tensor:
    """Compute the factors that make each channel's ranges in two consecutive layers equal.

    Args:
        output_ranges: the largest absolute weight that computes each channel, ``(channels,)``.
        input_ranges: the largest absolute weight that consumes it, ``(channels,)``.

    Returns:
        ``sqrt(output_ranges / input_ranges)``, float64 ``(channels,)``; 1 where either is zero, or
        so small compared to the layer's other channels that the channel is nearly dead. The output
        of such a channel is mostly its bias, which grows with the factor and widens the next
        layer's input range.
    """
    outputs, inputs = output_ranges.double(), input_ranges.double()
    is_scaled = (outputs > DEAD * outputs.max()) & (inputs > DEAD * inputs.max())
    ratio = torch.where(is_scaled, outputs, 1.0) / torch.where(is_scaled, inputs, 1.0)
    return ratio.sqrt()


class Equalize(StepSettings):
    """Give the channels between consecutive dense layers equal ranges."""

    effect: ClassVar[Effect] = "values"  # layers keep their format; their weights change

    kind: Literal["equalize"] = "equalize"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers that may change: module names, with * for any characters."
    )

    def plan(self, model: Model, bench: Bench) -> StepPlan[tuple[Link, ...]]:
        """Select the dense layers to equalize with each other; give a reason for each other layer.

        Raises:
            NothingToCompress: a pattern matches no layer.
            StepRefused: the network cannot be exported.
        """
        return choose_links(model, bench.signature, self.layers, self.kind, norms=False)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[tuple[Link, ...]]) -> AppliedStep:
        """Equalize link by link (a layer and its consumers), in rounds, until factors converge."""
        links = plan.payload
        module = model.module
        for _ in range(MAX_ROUNDS):
            largest_change = 0.0
            for link in links:
                output_ranges = linear_weight(module.get_submodule(link.producer)).abs().amax(dim=1)
                consumers = [linear_weight(module.get_submodule(name)) for name in link.consumers]
                input_ranges = torch.stack([weight.abs().amax(dim=0) for weight in consumers]).amax(
                    dim=0
                )
                factors = equalization_factors(output_ranges, input_ranges)
                rescale(module, link, factors)
                largest_change = max(largest_change, float((factors - 1).abs().max()))
            if largest_change < CONVERGED:
                break
        return AppliedStep(model)
