"""SmoothQuant: move outliers from the inputs of dense layers into their weights, before int8.

Scores do not change, but quantization errors become smaller. An input is quantized with one scale
for all channels, a weight with one scale per output. If a few input channels are far larger than
the others, the other channels use only a few levels. A factor per channel makes inputs smaller and
weights larger. The inputs become smaller because the previous layer is changed: the affine part of
a norm, or the rows of a dense layer's weight, is divided by the factors. A *link* is a norm or
dense layer (the *producer*) with all dense layers that consume its output: they share the factors.

Paper: Xiao et al. 2022, https://arxiv.org/abs/2211.10438.
Differs: factors also move between two dense layers with a Relu or a similar operator between them;
and the migration strength can be searched for each link (``quantize/dense/smoothing.py``).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from compressors.contracts import Bench, Part
from compressors.core.model import Model
from compressors.core.steps.decisions import AppliedStep, StepPlan
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit
from compressors.errors.steps import RowsMissing
from compressors.quantize.calibration.layer_inputs import BATCH
from compressors.quantize.dense.smoothing import (
    best_smoothing,
    record_inputs,
    smoothing_factors,
)
from compressors.rewrite.scaling import Link, choose_links, linear_weight, rescale


class SmoothQuant(StepSettings):
    """Move outliers from the inputs of dense layers into their weights, before int8."""

    effect: ClassVar[Effect] = "values"  # layers keep their format; their weights change

    kind: Literal["smooth_quant"] = "smooth_quant"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers that may change: module names, with * for any characters."
    )
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Migration strength. 0: the scaled weights have equal ranges. 1: the scaled "
        "inputs have equal ranges.",
    )
    search: bool = Field(
        False,
        description="Search the strength with the smallest int8 error, including no migration, for "
        "each norm or layer and all layers that read its output. alpha is then not used.",
    )
    rows: int = Field(4096, ge=1, description="Largest number of calibration rows to read.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Calibration rows, to measure the largest value of each input channel."""
        return ("calibration",)

    def plan(self, model: Model, bench: Bench) -> StepPlan[tuple[Link, ...]]:
        """Select the dense layers to smooth; give a reason for each other layer.

        Raises:
            NothingToCompress: a pattern matches no layer.
            StepRefused: the network cannot be exported.
        """
        return choose_links(model, bench.signature, self.layers, self.kind, norms=True)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[tuple[Link, ...]]) -> AppliedStep:
        """Measure the inputs on calibration rows, and move a factor for each of their channels.

        Raises:
            RowsMissing: there are no calibration rows.
            StepRefused: a layer never ran on them.
        """
        if bench.calibration is None:
            raise RowsMissing("calibration_rows_missing", step=self.kind)
        links = plan.payload
        module = model.module
        consumers = {name for link in links for name in link.consumers}
        recorders = record_inputs(
            module,
            [unit for unit in Unit.of(module) if unit.name in consumers],
            bench.calibration,
            bench.signature,
            batch=BATCH,
            limit=self.rows,
        )
        # Last link first: rescaling a link changes the weight of its producer, which may be a
        # consumer of an earlier link, whose factors depend on this weight. The measured inputs of
        # other layers do not change.
        for link in reversed(links):
            weights = {name: linear_weight(module.get_submodule(name)) for name in link.consumers}
            weight_ranges = torch.stack([weight.abs().amax(dim=0) for weight in weights.values()])
            inputs = torch.stack([recorders[name].largest(name) for name in link.consumers])
            largest_inputs = inputs.amax(dim=0)  # (channels,)
            largest_weights = weight_ranges.amax(dim=0)
            if self.search:
                layers = [
                    (torch.cat(recorders[name].sample), weight) for name, weight in weights.items()
                ]
                factors = best_smoothing(largest_inputs, largest_weights, layers)
            else:
                factors = smoothing_factors(largest_inputs, largest_weights, self.alpha)
            rescale(module, link, factors)
        return AppliedStep(model)
