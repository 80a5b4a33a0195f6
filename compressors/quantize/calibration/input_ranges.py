"""Warn about dense layers in which one input scale leaves some channels too few levels.

If a layer rounds its inputs with one scale, the largest inputs determine the scale. Raw counts next
to embeddings leave only a few levels for the embeddings: single scores change much although the
average metric hardly changes. The plan has a warning for such layers.

Criterion, on calibration rows: an input channel is coarse if the rounding error (root mean square,
times sqrt(12), which is the step of a uniform quantizer) leaves its range fewer than
``LEAST_LEVELS`` levels, and its range is less than half of the layer's. A layer is reported if the
rounding of its coarse channels alone changes its output by more than ``LARGEST_ERROR`` of the
output's standard deviation; channels are weighted by their weights, as if they were uncorrelated.
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
LARGEST_ERROR = 0.02
"""A layer whose channels share one range loses about 1 %, with int8 steps a 25th of its spread."""

ROWS, BATCH = 4096, 256
SHOWN = 3
WEIGHT_ROWS = 256


@runtime_checkable
class RoundsInputs(Protocol):
    """A linear format that rounds its inputs, with scales that several channels share."""

    def rounded_inputs(
        self, stored: Mapping[str, Tensor], x: Tensor, settings: Mapping[str, Any]
    ) -> Tensor:
        """The rounded inputs that are multiplied, float32 in the shape of ``x`` ``(*, in)``."""


@dataclass
class _Seen:
    """Sums over the inputs of a layer, float64 ``(in,)``, and the largest absolute values."""

    rows: int
    first: Tensor
    second: Tensor
    error: Tensor
    largest: Tensor


def input_range_warnings(source: nn.Module, result: nn.Module, bench: Bench) -> dict[str, Reason]:
    """Warnings for the layers whose inputs a step rounds too coarsely, by layer name.

    Args:
        source: the network before the step; the weights of its float layers weight the channels.
        result: the network after the step, in evaluation mode.
        bench: with calibration rows; without them the result is empty.
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
    seen = _inputs_of(result, units, bench)
    warnings = {}
    for unit in units:
        layer = before[unit.name]
        if unit.name in seen and isinstance(layer, nn.Linear):
            warning = _warning(seen[unit.name], layer.weight.detach())
            if warning is not None:
                warnings[unit.name] = warning
    return warnings


def _inputs_of(result: nn.Module, units: Collection[Unit], bench: Bench) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    if bench.calibration is None or not units:
        return seen

    def add(unit: Unit, inputs: Tensor) -> None:
        layer, name, x = unit.module, unit.name, input_vectors(inputs).float()
        if not x.numel() or not isinstance(layer, PackedLinear):
            return
        storage = layer.storage
        if not isinstance(storage, RoundsInputs):
            return
        near = storage.rounded_inputs(dict(layer.named_buffers()), x, layer.settings)
        wide, error = x.double(), (near - x).double()
        if name not in seen:
            zero = torch.zeros(x.shape[1], dtype=torch.float64)
            seen[name] = _Seen(0, zero, zero, zero, zero)
        sums = seen[name]
        sums.rows += len(x)
        sums.first = sums.first + wide.sum(dim=0)
        sums.second = sums.second + wide.square().sum(dim=0)
        sums.error = sums.error + error.square().sum(dim=0)
        sums.largest = torch.maximum(sums.largest, wide.abs().amax(dim=0))

    read_layer_inputs(
        result, units, bench.calibration, bench.signature, batch=BATCH, limit=ROWS, receive=add
    )
    return seen


def _warning(seen: _Seen, weight: Tensor) -> Reason | None:
    """The warning for one layer, from its inputs and its float weight ``(out, in)``, or None."""
    variance = (seen.second - seen.first.square() / seen.rows).clamp(min=0) / seen.rows
    noise = seen.error / seen.rows
    # In parts, because a float64 copy of a wide layer would be the largest tensor of the step.
    parts = torch.split(weight, WEIGHT_ROWS)
    power = torch.stack([part.double().square().sum(dim=0) for part in parts]).sum(dim=0)
    overall = float(seen.largest.max())
    step = (12 * noise).sqrt()
    levels = seen.largest / step.clamp(min=torch.finfo(torch.float64).tiny)
    coarse = (levels < LEAST_LEVELS) & (seen.largest < overall / 2) & (noise > 0) & (variance > 0)
    total = float(power @ variance)
    if not bool(coarse.any()) or total == 0:
        return None
    error = (float(power[coarse] @ noise[coarse]) / total) ** 0.5
    if error <= LARGEST_ERROR:
        return None
    ranges, left = seen.largest[coarse], levels[coarse]
    widest = seen.largest.argsort(descending=True)[:SHOWN].tolist()
    channels = tuple(
        Reason("channel_range", channel=place, largest=float(seen.largest[place]))
        for place in widest
    )
    return Reason(
        "mixed_input_ranges",
        range=overall,
        least_range=float(ranges.min()),
        largest_range=float(ranges.max()),
        coarse=int(coarse.sum()),
        channels=coarse.numel(),
        least_levels=float(left.min()),
        most_levels=float(left.max()),
        error=error,
        widest=channels,
    )
