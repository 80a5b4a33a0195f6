"""Cross-layer equalization: give the channels between consecutive dense layers equal ranges.

Scores do not change, but quantization errors become smaller. If a channel's weights are large in
one layer and small in the next, both layers are quantized badly. A factor per channel moves from
one layer to the other until both ranges are equal.

Paper: Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.1, eq. 11 (cross-layer
equalization).
Differs: a layer with several consumers is equalized with the largest of their ranges; leaky Relu,
PReLU and dropout are treated like Relu; high biases are not absorbed.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.steps.decisions import Applied, StepPlan
from compressors.core.steps.step import Effect, StepSettings
from compressors.rewrite.scaling import Link, choose_links, linear_weight, rescale

ROUNDS = 100
DEAD = 1e-3  # relative to the layer's largest channel
SETTLED = 1e-3  # stop when a round changes every factor by less


def equalizing(made: Tensor, read: Tensor) -> Tensor:
    """The factor per channel that makes its ranges in two consecutive layers equal.

    Args:
        made: the largest absolute weight of each output channel, ``(channels,)``.
        read: the largest absolute weight that is applied to it, ``(channels,)``.

    Returns:
        ``sqrt(made / read)``, float64 ``(channels,)``; 1 where either is zero, or so small compared
        to the layer's other channels that the channel is nearly dead. The output of such a channel
        is mostly its bias, which grows with the factor and widens the next layer's input range.
    """
    first, second = made.double(), read.double()
    both = (first > DEAD * first.max()) & (second > DEAD * second.max())
    ratio = torch.where(both, first, 1.0) / torch.where(both, second, 1.0)
    return ratio.sqrt()


class Equalize(StepSettings):
    """Bring the channels between neighbouring dense layers to equal ranges."""

    effect: ClassVar[Effect] = "values"

    kind: Literal["equalize"] = "equalize"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers that may change: module names, with * for any characters."
    )

    def plan(self, model: Model, bench: Bench) -> StepPlan[tuple[Link, ...]]:
        """Which dense layers are equalized, with which others, and why the rest is not."""
        return choose_links(model, bench.signature, self.layers, self.kind, norms=False)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[tuple[Link, ...]]) -> Applied:
        """Equalize pair by pair until the factors converge."""
        links = plan.payload
        module = model.module
        for _round in range(ROUNDS):
            largest_change = 0.0
            for link in links:
                output_ranges = linear_weight(module.get_submodule(link.maker)).abs().amax(dim=1)
                readers = [linear_weight(module.get_submodule(name)) for name in link.readers]
                input_ranges = torch.stack([weight.abs().amax(dim=0) for weight in readers]).amax(
                    dim=0
                )
                scale = equalizing(output_ranges, input_ranges)
                rescale(module, link, scale)
                largest_change = max(largest_change, float((scale - 1).abs().max()))
            if largest_change < SETTLED:
                break
        return Applied(model)
