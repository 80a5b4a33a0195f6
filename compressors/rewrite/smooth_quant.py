"""SmoothQuant: move outliers from the inputs of dense layers into their weights, before int8.

Scores do not change, but quantization errors become smaller. An input is quantized with one scale
for all channels, a weight with one scale per output. If a few input channels are far larger than
the others, the other channels use only a few levels. A factor per channel makes inputs smaller and
weights larger. The inputs become smaller because the previous layer is changed: the affine part of
a norm, or the rows of a dense layer's weight, is divided by the factors. A *link* is a norm or
dense layer (the *producer*) with all dense layers that consume its output: they share the factors.

Paper: Xiao et al. 2022, https://arxiv.org/abs/2211.10438, eq. 4.
Differs: factors also move between two dense layers with a Relu or a similar operator between them.
The migration strength (how much of the input range moves into the weights) can be searched for
each link by the error of int8 products, as AWQ does for weights (Lin et al. 2023,
https://arxiv.org/abs/2306.00978); no migration is one of the candidates.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Part
from compressors.core.model import Model
from compressors.core.steps.decisions import AppliedStep, StepPlan
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.quantize.calibration.calibrators import LEVELS
from compressors.quantize.calibration.layer_inputs import BATCH, input_vectors, read_layer_inputs
from compressors.quantize.dense.static_int8 import encode, quantize
from compressors.rewrite.scaling import Link, choose_links, linear_weight, rescale

SAMPLE = 1024  # number of input vectors per layer on which a search compares int8 products
LayerSample = tuple[Tensor, Tensor]
"""Inputs of a layer, float ``(vectors, channels)``, and its weight ``(out, channels)``."""
STRENGTHS = tuple(tenths / 10 for tenths in range(11))  # migration strengths that a search tries


def smoothing_factors(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Compute the factor by which each input channel is divided: eq. 4.

    Args:
        inputs: the largest absolute input of each channel, ``(channels,)``.
        weights: the largest absolute weight that is applied to it, ``(channels,)``.
        alpha: migration strength; 0 moves all quantization difficulty into the inputs, 1 all of
            it into the weights.

    Returns:
        ``inputs ** alpha / weights ** (1 - alpha)``, float64 ``(channels,)``; 1 where either is
        zero.
    """
    largest_input, largest_weight = inputs.double(), weights.double()
    is_scaled = (largest_input > 0) & (largest_weight > 0)
    numerator = torch.where(is_scaled, largest_input, 1.0) ** alpha
    factors = numerator / torch.where(is_scaled, largest_weight, 1.0) ** (1 - alpha)
    return torch.where(is_scaled, factors, 1.0)


def int8_error(layers: Sequence[LayerSample], factors: Tensor) -> float:
    """Compute the mean relative squared error of int8 products over all outputs of some layers.

    All outputs have equal weight: the next layer may apply small weights to a large output, or the
    output may be rescaled later. The input range comes from half of the vectors and the error from
    the other half, so that the error includes clipping of unseen inputs.

    Args:
        layers: inputs and weight of each layer.
        factors: float64 ``(channels,)``: inputs are divided and weights multiplied by it.
    """
    smallest = torch.finfo(torch.float32).tiny
    errors = []
    for vectors, weight in layers:
        inputs = (vectors.double() / factors).float()
        input_scale = inputs[::2].abs().amax().clamp(min=smallest) / LEVELS
        inputs, original = inputs[1::2], vectors[1::2]
        codes, weight_scale = encode(
            (weight.double() * factors).float(), bias=None, input_scale=input_scale
        )
        exact = original @ weight.T  # (vectors, out)
        rounded = (quantize(inputs, input_scale) * input_scale) @ (
            codes.float() * weight_scale[:, None]
        ).T
        energy = exact.double().square().sum(dim=0).clamp(min=smallest)
        errors.append((rounded.double() - exact.double()).square().sum(dim=0) / energy)
    return float(torch.cat(errors).mean())


def best_smoothing(inputs: Tensor, weights: Tensor, layers: Sequence[LayerSample]) -> Tensor:
    """Return the factors of the strength with the smallest int8 error; ones if none has less.

    ``inputs`` and ``weights`` are as in ``smoothing_factors``, ``layers`` as in ``int8_error``.

    Returns:
        Float64 ``(channels,)``.
    """
    candidates = [torch.ones_like(inputs, dtype=torch.float64)]
    candidates += [smoothing_factors(inputs, weights, alpha) for alpha in STRENGTHS]
    return min(candidates, key=lambda factors: int8_error(layers, factors))


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
        description="Search the strength of each layer with the smallest int8 error, including no "
        "migration. alpha is then not used.",
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
        calls = -(-min(self.rows, bench.calibration.rows) // BATCH)
        consumers = [name for link in links for name in link.consumers]
        vectors_per_call = -(-SAMPLE // calls)  # rounded up
        recorders = {name: _InputRecorder(vectors_per_call) for name in consumers}
        read_layer_inputs(
            module,
            [unit for unit in Unit.of(module) if unit.name in recorders],
            bench.calibration,
            bench.signature,
            batch=BATCH,
            limit=self.rows,
            receive=lambda unit, x: recorders[unit.name](input_vectors(x)),
        )
        # Last link first: a factor changes the weight rows of the previous layer, and the factor of
        # the link before that depends on these rows. The measured inputs of any other layer do not
        # change.
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


class _InputRecorder:
    """Records the largest input of each channel of a layer, and a sample of input vectors."""

    def __init__(self, vectors_per_call: int) -> None:
        self.vectors_per_call = vectors_per_call
        self.maxima: list[Tensor] = []  # of each call, (channels,)
        self.sample: list[Tensor] = []

    def __call__(self, x: Tensor) -> None:
        """Record the inputs of one call, ``(vectors, channels)``."""
        if len(x):
            count = self.vectors_per_call
            self.maxima.append(x.abs().amax(dim=0))
            self.sample.append(x[:: max(1, len(x) // count)][:count].clone())

    def largest(self, name: str) -> Tensor:
        """Return the largest absolute input of each channel of layer ``name``, ``(channels,)``.

        Raises:
            StepRefused: the layer never ran.
        """
        if not self.maxima:
            raise StepRefused("layer_not_called", layer=name)
        return torch.stack(self.maxima).amax(dim=0)
