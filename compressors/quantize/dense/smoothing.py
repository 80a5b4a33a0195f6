"""Factors that move range from the input channels of a dense layer into its weights.

If a few input channels are far larger than the others, one scale for all leaves the others few
levels. Each channel is divided by a factor, and the weights that multiply it are multiplied by the
factor, so the product does not change. ``smooth_quant`` applies the factors to the layer before;
``static_int8`` with ``input_scales: "channel"`` applies them when it rounds the inputs.

Paper: Xiao et al. 2022, https://arxiv.org/abs/2211.10438, eq. 4. Differs: the migration strength
(how much of the input range moves into the weights) can be searched by the error of int8 products,
as AWQ does for weights (Lin et al. 2023, https://arxiv.org/abs/2306.00978); no migration is one of
the candidates.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.units import Unit
from compressors.errors.steps import StepRefused
from compressors.quantize.calibration.calibrators import LEVELS
from compressors.quantize.calibration.layer_inputs import input_vectors, read_layer_inputs
from compressors.quantize.dense.int8_codes import encode, quantize

SAMPLE = 1024
"""Number of input vectors per layer on which int8 products are compared."""

STRENGTHS = tuple(tenths / 10 for tenths in range(11))
"""Migration strengths that ``best_smoothing`` compares."""

LayerSample = tuple[Tensor, Tensor]
"""Inputs of a layer, float ``(vectors, channels)``, and its weight ``(out, channels)``."""


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


def record_inputs(
    module: nn.Module,
    layers: Collection[Unit],
    calibration: Split,
    signature: Signature,
    *,
    batch: int,
    limit: int,
) -> dict[str, "InputRecorder"]:
    """Run a network on calibration rows and record the inputs of its layers, by layer name.

    Args:
        module: the network in evaluation mode; it is not changed.
        layers: dense layers of the module.
        calibration: data of which the first ``limit`` rows are read.
        signature: inputs of the network.
        batch: rows per batch.
        limit: largest number of rows that are read.
    """
    calls = -(-min(limit, calibration.rows) // batch)  # number of batches, rounded up
    # Each batch contributes an equal part of the sample, rounded up.
    recorders = {unit.name: InputRecorder(-(-SAMPLE // calls)) for unit in layers}
    read_layer_inputs(
        module,
        layers,
        calibration,
        signature,
        batch=batch,
        limit=limit,
        receive=lambda unit, x: recorders[unit.name](input_vectors(x)),
    )
    return recorders


class InputRecorder:
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
