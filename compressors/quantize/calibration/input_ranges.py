"""Warn about dense layers that round some of their input channels to too few levels.

If a layer rounds its inputs with one scale, the largest inputs determine the scale. If the inputs
are, for example, embeddings and raw counts, the embeddings are rounded to only a few levels. Single
scores then change much, although the metric hardly changes. The plan has a warning for such layers.

The criterion is evaluated on calibration rows. The range of an input channel is its largest
absolute input. A channel is *coarse* if its range has fewer than ``LEAST_LEVELS`` levels and is
less than half of the largest range in the layer. The distance of levels is estimated as sqrt(12)
times the root mean square of the rounding errors, as for a uniform quantizer. A layer is reported
if the rounding of its coarse channels alone changes its output by more than ``LARGEST_ERROR``
standard deviations. This change is computed from the weights as if channels were uncorrelated.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.modules.formats import PackedLinear
from compressors.core.units import Unit
from compressors.quantize.calibration.layer_inputs import input_vectors, read_layer_inputs

LEAST_LEVELS = 8
"""A coarse channel has fewer levels."""

LARGEST_ERROR = 0.02
"""Largest change of a layer's output, as a share of its standard deviation, without a warning.

For comparison: if all channels of a layer have one range, int8 changes the output by about 1 %.
"""

ROWS, BATCH = 4096, 256
"""Largest number of calibration rows, and rows per batch."""

NAMED_CHANNELS = 3
"""A warning names this number of channels: those with the largest ranges."""

WEIGHT_ROWS = 256
"""Output channels whose weights are converted to float64 at once."""


@runtime_checkable
class RoundsInputs(Protocol):
    """A format of dense layers that rounds inputs, with scales that several channels share."""

    def rounded_inputs(
        self, stored: Mapping[str, Tensor], x: Tensor, settings: Mapping[str, Any]
    ) -> Tensor:
        """Return the rounded inputs that the weights multiply, float32 ``(*, in)`` like ``x``."""


@dataclass
class _InputSums:
    """Sums over the inputs of a layer, each float64 ``(in,)`` with one entry per channel.

    Attributes:
        rows: number of inputs.
        total: sum of the inputs.
        squares: sum of their squares.
        squared_errors: sum of the squared rounding errors.
        largest: largest absolute input.
    """

    rows: int
    total: Tensor
    squares: Tensor
    squared_errors: Tensor
    largest: Tensor


def input_range_warnings(source: nn.Module, result: nn.Module, bench: Bench) -> dict[str, Reason]:
    """Return warnings about layers whose inputs a step rounds too coarsely, by layer name.

    Args:
        source: the network before the step; channels are weighted by its float weights.
        result: the network after the step, in evaluation mode.
        bench: its calibration rows are read; without such rows there are no warnings.
    """
    if bench.calibration is None:
        return {}
    before = {unit.name: unit.module for unit in Unit.of(source)}
    units = [
        unit
        for unit in Unit.of(result)
        if isinstance(before.get(unit.name), nn.Linear)
        and isinstance(unit.module, PackedLinear)
        and isinstance(unit.module.storage, RoundsInputs)
    ]
    sums = _sum_inputs(result, units, bench)
    warnings = {}
    for unit in units:
        layer = before[unit.name]
        if unit.name in sums and isinstance(layer, nn.Linear):
            warning = _warning(sums[unit.name], layer.weight.detach())
            if warning is not None:
                warnings[unit.name] = warning
    return warnings


def _sum_inputs(result: nn.Module, units: Collection[Unit], bench: Bench) -> dict[str, _InputSums]:
    """Run the network on calibration rows and sum over the inputs of each layer, by layer name."""
    by_layer: dict[str, _InputSums] = {}
    if bench.calibration is None or not units:
        return by_layer

    def add(unit: Unit, inputs: Tensor) -> None:
        layer, name, x = unit.module, unit.name, input_vectors(inputs).float()
        if not x.numel() or not isinstance(layer, PackedLinear):
            return
        storage = layer.storage
        if not isinstance(storage, RoundsInputs):
            return
        rounded = storage.rounded_inputs(dict(layer.named_buffers()), x, layer.settings)
        exact, error = x.double(), (rounded - x).double()
        if name not in by_layer:
            zero = torch.zeros(x.shape[1], dtype=torch.float64)
            by_layer[name] = _InputSums(0, zero, zero, zero, zero)
        sums = by_layer[name]
        sums.rows += len(x)
        sums.total = sums.total + exact.sum(dim=0)
        sums.squares = sums.squares + exact.square().sum(dim=0)
        sums.squared_errors = sums.squared_errors + error.square().sum(dim=0)
        sums.largest = torch.maximum(sums.largest, exact.abs().amax(dim=0))

    read_layer_inputs(
        result, units, bench.calibration, bench.signature, batch=BATCH, limit=ROWS, receive=add
    )
    return by_layer


def _warning(sums: _InputSums, weight: Tensor) -> Reason | None:
    """Return the warning about a layer with this float weight ``(out, in)``, or None."""
    variance = (sums.squares - sums.total.square() / sums.rows).clamp(min=0) / sums.rows
    noise = sums.squared_errors / sums.rows
    # In parts, because a float64 copy of the weight of a wide layer takes much memory.
    weight_parts = torch.split(weight, WEIGHT_ROWS)
    weight_energy = torch.stack([part.double().square().sum(dim=0) for part in weight_parts]).sum(
        dim=0
    )
    layer_range = float(sums.largest.max())
    level_distance = (12 * noise).sqrt()
    levels = sums.largest / level_distance.clamp(min=torch.finfo(torch.float64).tiny)
    coarse = (
        (levels < LEAST_LEVELS) & (sums.largest < layer_range / 2) & (noise > 0) & (variance > 0)
    )
    total = float(weight_energy @ variance)
    if not bool(coarse.any()) or total == 0:
        return None
    error = (float(weight_energy[coarse] @ noise[coarse]) / total) ** 0.5
    if error <= LARGEST_ERROR:
        return None
    ranges, coarse_levels = sums.largest[coarse], levels[coarse]
    widest = sums.largest.argsort(descending=True)[:NAMED_CHANNELS].tolist()
    channels = tuple(
        Reason("channel_range", channel=channel, largest=float(sums.largest[channel]))
        for channel in widest
    )
    return Reason(
        "mixed_input_ranges",
        range=layer_range,
        least_range=float(ranges.min()),
        largest_range=float(ranges.max()),
        coarse=int(coarse.sum()),
        channels=coarse.numel(),
        least_levels=float(coarse_levels.min()),
        most_levels=float(coarse_levels.max()),
        error=error,
        widest=channels,
    )
