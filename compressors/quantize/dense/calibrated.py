"""Calibrate the input ranges of dense layers and build layers with scaled inputs from them."""

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.modules.formats import PackedLinear
from compressors.core.steps.decisions import Decision
from compressors.core.units import Unit
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.quantize.calibration import calibrators as calibration
from compressors.quantize.calibration.calibrators import Histogram
from compressors.quantize.calibration.layer_inputs import Receive, read_layer_inputs

EVERY = "*"
"""Layers of a step that names no layer: one that cannot be scaled may stay."""
ZERO_INPUTS = Decision("skipped", (Reason("zero_inputs"),))
"""The outcome of a layer whose inputs were all zero on the calibration rows."""
"""Why such a layer stays."""

Calibrator = Literal["min_max", "percentile", "entropy", "mse", "best"]

Pack = Callable[[nn.Linear, Tensor], PackedLinear]
"""From a layer and the end of its inputs' range, float32 scalar, to what takes its place."""


class Calibrated(NamedTuple):
    """A calibrated layer, the calibrator of its input range, and its output error.

    ``error`` is the root mean square of the output's error on the calibration rows, as a share of
    the root mean square of the output; None if it was not measured.
    """

    packed: PackedLinear
    calibrator: str
    error: float | None

    def reasons(self) -> tuple[Reason, ...]:
        """The selected calibrator and the measured error as reasons for the plan; may be empty."""
        reasons: list[Reason] = []
        if self.calibrator != "min_max":
            reasons.append(Reason("calibrated_range", calibrator=self.calibrator))
        if self.error is not None:
            reasons.append(Reason("output_error", share=self.error))
        return tuple(reasons)


def range_end(seen: Histogram, calibrator: str, share: float) -> Tensor:
    """The largest input that is represented, float32 scalar, by the given calibrator."""
    match calibrator:
        case "percentile":
            return torch.tensor(calibration.percentile(seen, share))
        case "entropy":
            return torch.tensor(calibration.least_divergence(seen))
        case "mse":
            return torch.tensor(calibration.least_squares(seen))
    return seen.largest


def calibrated(
    module: nn.Module,
    chosen: Collection[Unit],
    bench: Bench,
    pack: Pack,
    *,
    calibrator: Calibrator,
    share: float,
    rows: int,
    batch: int,
    measured: bool,
    lenient: bool,
) -> dict[str, Calibrated]:
    """Calibrate the selected layers and return their replacements by layer name.

    Args:
        module: the network in evaluation mode; it is not changed.
        chosen: the layers to replace, each an ``nn.Linear``.
        bench: with calibration rows.
        pack: builds a layer in the format.
        calibrator: selects the range of the inputs; ``best`` compares all on a second pass.
        share: share of the inputs inside the range of ``percentile``.
        rows: largest number of rows that are read.
        batch: rows per batch.
        measured: measure the output error, on a second pass.
        lenient: skip layers whose inputs are all zero, such as heads used only in training.

    Raises:
        CompressionError: there are no calibration rows, or the inputs of a layer give no scale.
    """
    split = bench.calibration
    if split is None:
        raise RowsMissing("input_scales_need_rows")

    def read(units: Collection[Unit], receive: Receive) -> None:
        read_layer_inputs(
            module, units, split, bench.signature, batch=batch, limit=rows, receive=receive
        )

    seen = {unit.name: Histogram() for unit in chosen}
    read(chosen, lambda unit, x: seen[unit.name].add(x))
    taken = [unit for unit in chosen if not lenient or seen[unit.name].largest != 0]
    layers = {unit.name: _scalable(unit, seen[unit.name]) for unit in taken}
    tried = get_args(Calibrator)[:-1] if calibrator == "best" else (calibrator,)
    candidates = {
        name: [pack(layer, range_end(seen[name], how, share)) for how in tried]
        for name, layer in layers.items()
    }
    if not measured and len(tried) == 1:
        return {name: Calibrated(packed, tried[0], None) for name, (packed,) in candidates.items()}
    wrong = {name: [0.0] * len(tried) for name in layers}
    right = dict.fromkeys(layers, 0.0)

    def compare(unit: Unit, x: Tensor) -> None:
        for place, candidate in enumerate(candidates[unit.name]):
            error, own = squared_error(layers[unit.name], candidate, x)
            wrong[unit.name][place] += error
        right[unit.name] += own

    read(taken, compare)
    return {name: _least(candidates[name], tried, wrong[name], right[name]) for name in layers}


def squared_error(layer: nn.Linear, packed: nn.Module, x: Tensor) -> tuple[float, float]:
    """Sums of squares of the output's error and of the output, for inputs ``(*, in)``."""
    expected = F.linear(x, layer.weight, layer.bias).double()
    error = packed(x).double() - expected
    return float(error.square().sum()), float(expected.square().sum())


def _least(
    made: list[PackedLinear], calibrators: tuple[str, ...], wrong: list[float], right: float
) -> Calibrated:
    place = min(range(len(made)), key=wrong.__getitem__)
    return Calibrated(
        made[place], calibrators[place], (wrong[place] / right) ** 0.5 if right else 0.0
    )


def _scalable(unit: Unit, seen: Histogram) -> nn.Linear:
    """Return the layer if its inputs determine a scale.

    Raises:
        CompressionError: all inputs were zero, or some were not finite.
    """
    largest = seen.largest
    if not isinstance(unit.module, nn.Linear) or largest == 0:
        raise StepRefused("layer_inputs_zero", layer=unit.name)
    if not bool(torch.isfinite(largest)):
        raise StepRefused("layer_inputs_not_finite", layer=unit.name, value=float(largest))
    return unit.module
