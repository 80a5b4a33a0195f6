"""Calibrate the input ranges of dense layers, and build layers with int8 inputs from them."""

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
"""Pattern that matches every layer. With it, layers whose inputs give no scale are skipped."""

ZERO_INPUTS = Decision("skipped", (Reason("zero_inputs"),))
"""The outcome of a layer whose inputs are all zero on the calibration rows."""

Calibrator = Literal["min_max", "percentile", "entropy", "mse", "best"]

Pack = Callable[[nn.Linear, Tensor], PackedLinear]
"""Builds the replacement of a layer from the layer and its largest input, float32 scalar."""


class CalibratedLayer(NamedTuple):
    """A calibrated layer, the calibrator of its input range, and its output error.

    ``error`` is the root mean square of the output's error on the calibration rows, as a share of
    the root mean square of the output; None if it was not measured.
    """

    packed: PackedLinear
    calibrator: str
    error: float | None

    def reasons(self) -> tuple[Reason, ...]:
        """Return the calibrator, unless it is ``min_max``, and the measured error as reasons."""
        reasons: list[Reason] = []
        if self.calibrator != "min_max":
            reasons.append(Reason("calibrated_range", calibrator=self.calibrator))
        if self.error is not None:
            reasons.append(Reason("output_error", share=self.error))
        return tuple(reasons)


def range_end(seen: Histogram, calibrator: str, share: float) -> Tensor:
    """Return the largest input that is not clipped, float32 scalar, by the given calibrator."""
    match calibrator:
        case "percentile":
            return torch.tensor(calibration.percentile(seen, share))
        case "entropy":
            return torch.tensor(calibration.least_divergence(seen))
        case "mse":
            return torch.tensor(calibration.least_squares(seen))
    return seen.largest


def calibrate_layers(
    module: nn.Module,
    layers: Collection[Unit],
    bench: Bench,
    pack: Pack,
    *,
    calibrator: Calibrator,
    share: float,
    rows: int,
    batch: int,
    measured: bool,
    lenient: bool,
) -> dict[str, CalibratedLayer]:
    """Calibrate the selected layers and return their replacements by layer name.

    Args:
        module: the network in evaluation mode; it is not changed.
        layers: the layers to replace, each an ``nn.Linear``.
        bench: with calibration rows.
        pack: builds a layer in the format.
        calibrator: selects the range of the inputs; ``best`` compares the output error of all
            others on a second pass.
        share: for ``percentile``, the share of the inputs inside the range.
        rows: largest number of rows that are read.
        batch: rows per batch.
        measured: measure the output error, on a second pass.
        lenient: leave out layers whose inputs are all zero, such as heads used only in training.

    Raises:
        RowsMissing: there are no calibration rows.
        StepRefused: some inputs of a layer are not finite, or, unless ``lenient``, all are zero.
    """
    split = bench.calibration
    if split is None:
        raise RowsMissing("input_scales_need_rows")

    def read(units: Collection[Unit], receive: Receive) -> None:
        read_layer_inputs(
            module, units, split, bench.signature, batch=batch, limit=rows, receive=receive
        )

    histograms = {unit.name: Histogram() for unit in layers}
    read(layers, lambda unit, x: histograms[unit.name].add(x))
    units = [unit for unit in layers if not lenient or histograms[unit.name].largest != 0]
    linears = {unit.name: _require_scale(unit, histograms[unit.name]) for unit in units}
    calibrators = get_args(Calibrator)[:-1] if calibrator == "best" else (calibrator,)
    candidates = {
        name: [pack(linear, range_end(histograms[name], rule, share)) for rule in calibrators]
        for name, linear in linears.items()
    }
    if not measured and len(calibrators) == 1:
        return {
            name: CalibratedLayer(packed, calibrators[0], None)
            for name, (packed,) in candidates.items()
        }
    errors = {name: [0.0] * len(calibrators) for name in linears}
    outputs = dict.fromkeys(linears, 0.0)

    def compare(unit: Unit, x: Tensor) -> None:
        for place, candidate in enumerate(candidates[unit.name]):
            error, output = squared_error(linears[unit.name], candidate, x)
            errors[unit.name][place] += error
        outputs[unit.name] += output

    read(units, compare)
    return {
        name: _best(candidates[name], calibrators, errors[name], outputs[name]) for name in linears
    }


def squared_error(layer: nn.Linear, packed: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the sums of squares of the output's error and of the output, for ``(*, in)``."""
    expected = F.linear(x, layer.weight, layer.bias).double()
    error = packed(x).double() - expected
    return float(error.square().sum()), float(expected.square().sum())


def _best(
    candidates: list[PackedLinear], calibrators: tuple[str, ...], errors: list[float], output: float
) -> CalibratedLayer:
    """Return the candidate with the smallest error, a sum of squares, like ``output``."""
    place = min(range(len(candidates)), key=errors.__getitem__)
    error = (errors[place] / output) ** 0.5 if output else 0.0
    return CalibratedLayer(candidates[place], calibrators[place], error)


def _require_scale(unit: Unit, histogram: Histogram) -> nn.Linear:
    """Return the layer if its inputs determine a scale.

    Raises:
        StepRefused: all inputs are zero, or some are not finite.
    """
    largest = histogram.largest
    if not isinstance(unit.module, nn.Linear) or largest == 0:
        raise StepRefused("layer_inputs_zero", layer=unit.name)
    if not bool(torch.isfinite(largest)):
        raise StepRefused("layer_inputs_not_finite", layer=unit.name, value=float(largest))
    return unit.module
