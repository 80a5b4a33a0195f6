"""Cross-layer equalization: give the channels between consecutive dense layers equal ranges.

Scores do not change, but quantization errors become smaller. If a channel's weights are large in
one layer and small in the next, both layers are quantized badly. A factor per channel moves from
one layer to the other until both ranges are equal.

Paper: Nagel et al. 2019, https://arxiv.org/abs/1906.04721, section 4.1, eq. 11 (cross-layer
equalization).
Differs: a layer with several consumers is equalized with the largest of their ranges; leaky Relu,
PReLU and dropout are treated like Relu; high biases are not absorbed.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Change, Frozen, Part
from compressors.core.model import Model
from compressors.core.units import Choice
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


class Equalize(Frozen):
    """Bring the channels between neighbouring dense layers to equal ranges."""

    kind: Literal["equalize"] = "equalize"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers that may change: module names, with * for any characters."
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """No data: only the weights are read."""
        return ()

    @property
    def changes(self) -> Change:
        """Layers hold other values in the same format."""
        return "values"

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:
        """Which dense layers are equalized, with which others, and why the rest is not."""
        return self._links(model, bench)[1]

    def apply(self, model: Model, bench: Bench) -> Model:
        """Equalize pair by pair until the factors converge."""
        links, _ = self._links(model, bench)
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
        return model

    def dry_run(self, model: Model, bench: Bench) -> Model:  # noqa: ARG002
        """No shape changes."""
        return model

    def _links(self, model: Model, bench: Bench) -> tuple[list[Link], dict[str, Choice]]:
        return choose_links(model, bench.signature, self.layers, self.kind, norms=False)
