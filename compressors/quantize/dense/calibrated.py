"""Calibrate the input ranges of dense layers, and build layers with int8 inputs from them."""

from collections.abc import Callable, Collection, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Bench, Split
from compressors.contracts.reasons import Reason
from compressors.core.modules.formats import PackedLinear
from compressors.core.steps.decisions import Decision
from compressors.core.units import Unit
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.quantize.calibration import calibrators as calibration
from compressors.quantize.calibration.calibrators import Histogram
from compressors.quantize.calibration.layer_inputs import Receive, read_layer_inputs
from compressors.quantize.dense.smoothing import best_smoothing, record_inputs

ALL_LAYERS = "*"
"""Pattern that matches every layer. With it, a layer whose inputs are all zero is skipped.

If a layer is named by another pattern, this is an error.
"""

ZERO_INPUTS = Decision("skipped", (Reason("zero_inputs"),))
"""The outcome of a layer whose inputs are all zero on the calibration rows."""

Calibrator = Literal["min_max", "percentile", "entropy", "mse", "best"]

Pack = Callable[[nn.Linear, Tensor], PackedLinear]
"""Builds the replacement of a layer; the arguments are the layer and the end of its input range.

The end is a float32 scalar, or ``(in,)`` with one range for each input channel.
"""


class CalibratedLayer(NamedTuple):
    """A quantized layer with a calibrated input range.

    Attributes:
        packed: the quantized layer.
        calibrator: the calibrator that selected the range.
        error: root mean square of the output's error on the calibration rows, as a share of the
            root mean square of the output; None if it was not measured.
    """

    packed: PackedLinear
    calibrator: str
    error: float | None

    def reasons(self) -> tuple[Reason, ...]:
        """Return reasons for the plan: the calibrator unless it is ``min_max``, and the error."""
        reasons: list[Reason] = []
        if self.calibrator != "min_max":
            reasons.append(Reason("calibrated_range", calibrator=self.calibrator))
        if self.error is not None:
            reasons.append(Reason("output_error", share=self.error))
        return tuple(reasons)


def range_end(histogram: Histogram, calibrator: str, share: float) -> Tensor:
    """Compute the largest input that a calibrator does not clip, float32 scalar.

    Args:
        histogram: the absolute inputs of a layer.
        calibrator: a name in ``Calibrator``, other than ``best``. ``entropy`` is
            ``least_divergence`` of ``calibrators.py``, ``mse`` is ``least_squares``.
        share: for ``percentile``, the share of the inputs inside the range.
    """
    match calibrator:
        case "percentile":
            return torch.tensor(calibration.percentile(histogram, share))
        case "entropy":
            return torch.tensor(calibration.least_divergence(histogram))
        case "mse":
            return torch.tensor(calibration.least_squares(histogram))
    return histogram.largest


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
    measure_error: bool,
    skip_zero_inputs: bool,
    factors: Mapping[str, Tensor] | None = None,
) -> dict[str, CalibratedLayer]:
    """Calibrate the selected layers and return their replacements by layer name.

    Args:
        module: the network in evaluation mode; it is not changed.
        layers: the layers to replace, each an ``nn.Linear``.
        bench: provides the calibration rows.
        pack: builds a layer in the format.
        calibrator: selects the range of the inputs; ``best`` measures the output error of all
            other calibrators on a second pass and takes the smallest.
        share: for ``percentile``, the share of the inputs inside the range.
        rows: largest number of rows that are read.
        batch: rows per batch.
        measure_error: measure the output error, on a second pass.
        skip_zero_inputs: return no replacement for layers whose inputs are all zero, such as heads
            that are used only in training; otherwise such a layer is an error.
        factors: for ranges by input channel, the factor of each channel, float32 ``(in,)``, by
            layer name (``channel_factors``). The calibrator selects the range of inputs divided
            by their factors.

    Raises:
        RowsMissing: there are no calibration rows.
        StepRefused: some inputs of a layer are not finite; or all of them are zero, and
            ``skip_zero_inputs`` is False.
    """
    split = _require_calibration(bench)
    factors = factors or {}

    def read(units: Collection[Unit], receive: Receive) -> None:
        read_layer_inputs(
            module, units, split, bench.signature, batch=batch, limit=rows, receive=receive
        )

    histograms = {unit.name: Histogram() for unit in layers}

    def count(unit: Unit, x: Tensor) -> None:
        factor = factors.get(unit.name)
        histograms[unit.name].add(x if factor is None else x / factor)

    read(layers, count)
    units = [unit for unit in layers if not skip_zero_inputs or histograms[unit.name].largest != 0]
    linears = {unit.name: _require_scale(unit, histograms[unit.name]) for unit in units}
    # The last calibrator is ``best``, which compares all others.
    calibrators = get_args(Calibrator)[:-1] if calibrator == "best" else (calibrator,)
    candidates = {
        name: [
            pack(linear, range_end(histograms[name], option, share) * factors.get(name, 1))
            for option in calibrators
        ]
        for name, linear in linears.items()
    }
    if not measure_error and len(calibrators) == 1:
        return {
            name: CalibratedLayer(packed, calibrators[0], None)
            for name, (packed,) in candidates.items()
        }
    errors = {name: [0.0] * len(calibrators) for name in linears}
    outputs = dict.fromkeys(linears, 0.0)

    def compare(unit: Unit, x: Tensor) -> None:
        for index, candidate in enumerate(candidates[unit.name]):
            error, output = squared_error(linears[unit.name], candidate, x)
            errors[unit.name][index] += error
        outputs[unit.name] += output

    read(units, compare)
    return {
        name: _select_best(candidates[name], calibrators, errors[name], outputs[name])
        for name in linears
    }


def channel_factors(
    module: nn.Module, layers: Collection[Unit], bench: Bench, *, rows: int, batch: int
) -> dict[str, Tensor]:
    """Search the factors of the input channels of each layer with the smallest int8 error.

    Layers that read the same vector get the same factors, so that it is rounded once.

    Args:
        module: the network in evaluation mode; it is not changed.
        layers: dense layers of the module.
        bench: provides the calibration rows.
        rows: largest number of rows that are read.
        batch: rows per batch.

    Returns:
        Float32 ``(in,)`` by layer name; ones for a layer without inputs, or with inputs that are
        not finite.

    Raises:
        RowsMissing: there are no calibration rows.
    """
    split = _require_calibration(bench)
    recorders = record_inputs(module, layers, split, bench.signature, batch=batch, limit=rows)
    factors = {unit.name: torch.ones(unit.weight.shape[1]) for unit in layers}
    # Layers with the same largest input of each channel read the same vector.
    consumers: dict[bytes, tuple[Tensor, list[Unit]]] = {}
    for unit in layers:
        if recorders[unit.name].maxima:
            largest = recorders[unit.name].largest(unit.name)
            if bool(torch.isfinite(largest).all()):
                consumers.setdefault(largest.numpy().tobytes(), (largest, []))[1].append(unit)
    for largest, units in consumers.values():
        weights = [unit.weight.detach().float() for unit in units]
        samples = [torch.cat(recorders[unit.name].sample) for unit in units]
        best = best_smoothing(
            largest,
            torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0),
            list(zip(samples, weights, strict=True)),
        ).float()
        factors |= {unit.name: best for unit in units}
    return factors


def _require_calibration(bench: Bench) -> Split:
    """Return the calibration rows.

    Raises:
        RowsMissing: there are none.
    """
    if bench.calibration is None:
        raise RowsMissing("input_scales_need_rows")
    return bench.calibration


def squared_error(layer: nn.Linear, packed: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return two sums of squares over the inputs ``(*, in)``: output error and output."""
    expected = F.linear(x, layer.weight, layer.bias).double()
    error = packed(x).double() - expected
    return float(error.square().sum()), float(expected.square().sum())


def _select_best(
    candidates: list[PackedLinear], calibrators: tuple[str, ...], errors: list[float], output: float
) -> CalibratedLayer:
    """Return the candidate with the smallest error.

    ``errors`` and ``output`` are the sums of squares that ``squared_error`` returns.
    """
    index = min(range(len(candidates)), key=errors.__getitem__)
    error = (errors[index] / output) ** 0.5 if output else 0.0
    return CalibratedLayer(candidates[index], calibrators[index], error)


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
