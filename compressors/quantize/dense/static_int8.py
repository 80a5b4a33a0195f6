"""Dense layers with int8 weights and int8 inputs, with static scales.

Weights have one scale per output channel, inputs one per layer or one per input channel. A
calibrator selects the range of the inputs on the calibration rows (``calibrators.py``). The levels
of weights and inputs are symmetric around zero, because TensorRT supports no zero point.

With one scale per input channel, the inputs are divided by the scales before they are rounded, and
the weights are multiplied by them before they are encoded (``smoothing.py``). So the product of
codes needs only the scales of the weights, and remains an int8 product.

Paper: Jacob et al. 2018, https://arxiv.org/abs/1712.05877 (integer-arithmetic-only inference).
Differs: inputs are symmetric; the output is float32, unless the runtime fuses it with the
quantization of the next input; and the codes of two neighbouring weights of an output channel never
add up to more than 128 in absolute value. x86 processors without VNNI add two products of an input
(an unsigned byte) and a weight (a signed byte) in 16 bits. Two codes that add up to 129 could
overflow (255 * 129 > 32,767), and the predictions would differ from those of the machine that
evaluated the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import LinearFormat, PackedLinear, TensorSpec
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import LayerPatterns
from compressors.core.units import Unit, swap
from compressors.quantize.calibration.calibrators import LEVELS
from compressors.quantize.dense.calibrated import (
    ALL_LAYERS,
    ZERO_INPUTS,
    Calibrator,
    calibrate_layers,
    channel_factors,
)
from compressors.quantize.dense.int8_codes import clipped_scale, encode, quantize
from compressors.quantize.dense.table_inputs import calibrate_table_layers, find_table_scales

EXACT_INPUTS = 2**24 // (128 * 128)
"""Sums of this many products of int8 numbers are exact in float32, which has 24 bits."""

CONVERTED_AT_ONCE = 2**20
"""Largest number of weights, and of inputs, that ``static_int8_linear`` converts at once."""


@torch.library.custom_op("recpress::static_int8_linear", mutates_args=())
def static_int8_linear(
    x: Tensor, codes: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor
) -> Tensor:
    """Compute an int8 Gemm exactly, in float arithmetic.

    ``x`` float32 ``(*, in)``, ``codes`` int8 ``(out, in)``, ``weight_scale`` ``(out,)``,
    ``input_scale`` scalar, ``bias`` float32 ``(out,)`` -> float32 ``(*, out)``.
    """
    exact = torch.float32 if codes.shape[1] <= EXACT_INPUTS else torch.float64
    product_scale = weight_scale * input_scale
    bias_multiple = (bias / product_scale).round()
    output = x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=torch.float32)
    # In parts, because as floats, codes and inputs take two to eight times their memory, and both
    # are large in wide layers. The sums are exact in any order.
    code_parts = torch.split(codes, max(1, CONVERTED_AT_ONCE // codes.shape[1]))
    rows = max(1, CONVERTED_AT_ONCE // max(codes.shape))
    inputs = torch.split(x.reshape(-1, x.shape[-1]), rows)
    for block, output_block in zip(
        inputs, torch.split(output.view(-1, len(codes)), rows), strict=True
    ):
        rounded = quantize(block, input_scale).to(exact)
        total = torch.cat([rounded @ part.to(exact).T for part in code_parts], dim=-1)
        output_block.copy_((total + bias_multiple) * product_scale)
    return output


@static_int8_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
    """Straight-through gradients for rounding; zero for clipped inputs (Esser et al. 2020)."""
    x, codes, weight_scale, input_scale, _ = ctx.saved_tensors
    ratio = x / input_scale
    inside = (ratio >= -128) & (ratio <= 127)
    rounded = quantize(x, input_scale)
    weight = codes.float() * weight_scale[:, None]
    to_input = grad @ weight  # (*, in)
    flat = grad.reshape(-1, grad.shape[-1])
    dot = rounded.reshape(-1, rounded.shape[-1]) @ codes.float().T  # (rows, out)
    to_weight_scale = (flat * dot * input_scale).sum(dim=0)
    to_input_scale = (to_input * torch.where(inside, rounded - ratio, rounded)).sum()
    to_x = torch.where(inside, to_input, torch.zeros_like(to_input))
    return to_x, None, to_weight_scale, to_input_scale.reshape(input_scale.shape), flat.sum(dim=0)


static_int8_linear.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class StaticInt8Format:
    """Stores ``codes`` int8 ``(out, in)``, two scales and a float32 bias (zeros if none).

    ``input_scale`` has the shape ``()``, or ``(in,)`` with the setting ``{"input_scales":
    "channel"}``. ``learned``: names of the tensors that training may change. For the methods, see
    the protocol ``LinearFormat``.
    """

    name: str = "static_int8"
    learned: tuple[str, ...] = ("weight_scale", "input_scale", "bias")

    def layout(
        self,
        inputs: int,
        outputs: int,
        settings: Mapping[str, Any],
        *,
        bias: bool,
    ) -> dict[str, TensorSpec]:
        input_scales = (inputs,) if settings.get("input_scales") == "channel" else ()
        return {
            "codes": TensorSpec((outputs, inputs), torch.int8),
            "weight_scale": TensorSpec((outputs,), torch.float32),
            "input_scale": TensorSpec(input_scales, torch.float32),
            "bias": TensorSpec((outputs,), torch.float32),
        }

    def apply(
        self,
        stored: Mapping[str, Tensor],
        x: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        input_scale = stored["input_scale"]
        if input_scale.ndim:  # the weights contain the scales of their input channels
            x, input_scale = x / input_scale, input_scale.new_ones(())
        y: Tensor = torch.ops.recpress.static_int8_linear(
            x, stored["codes"], stored["weight_scale"], input_scale, stored["bias"]
        )
        return y

    def rounded_inputs(
        self,
        stored: Mapping[str, Tensor],
        x: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        """Return the rounded inputs that the weights multiply, float32 ``(*, in)``."""
        scale = stored["input_scale"]
        return quantize(x, scale) * scale


FORMAT: LinearFormat = StaticInt8Format()


WeightClipping = Literal["min_max", "mse"]
InputScales = Literal["layer", "channel", "tables"]


def packed_int8(
    layer: nn.Linear, range_end: Tensor, weights: WeightClipping = "min_max"
) -> PackedLinear:
    """Build the int8 layer that replaces a float32 layer.

    Args:
        layer: the float32 layer.
        range_end: largest input that is not clipped, float32 scalar; or ``(in,)``, one for each
            input channel.
        weights: range of the weights, see the setting of ``StaticInt8``.
    """
    return pack_with_scale(layer, range_end / LEVELS, weights)


def pack_with_scale(
    layer: nn.Linear, input_scale: Tensor, weights: WeightClipping = "min_max"
) -> PackedLinear:
    """Build the int8 layer with an input scale, float32: a scalar or ``(in,)``."""
    bias = None if layer.bias is None else layer.bias.detach().float()
    weight = layer.weight.detach().float()
    by_channel = input_scale.ndim == 1
    if by_channel:
        weight = weight * input_scale
    codes, weight_scale = encode(
        weight,
        bias,
        torch.ones(()) if by_channel else input_scale,
        clipped_scale(weight) if weights == "mse" else None,
    )
    stored = {
        "codes": codes,
        "weight_scale": weight_scale,
        "input_scale": input_scale,
        "bias": torch.zeros_like(weight_scale) if bias is None else bias.clone(),
    }
    return PackedLinear(
        FORMAT,
        layer.in_features,
        layer.out_features,
        bias=bias is not None,
        settings=format_settings("channel" if by_channel else "layer"),
        stored=stored,
    )


def format_settings(input_scales: InputScales) -> dict[str, str]:
    """Return the settings of the format: none for one scale per layer."""
    return {"input_scales": input_scales} if input_scales == "channel" else {}


class StaticInt8(StepSettings):
    """Compute dense layers in int8, with scales calibrated before serving."""

    kind: Literal["static_int8"] = "static_int8"
    layers: LayerPatterns = ("*",)
    rows: int = Field(4096, ge=1, description="Largest number of calibration rows that are read.")
    batch: int = Field(1024, ge=1, description="Rows of one calibration batch.")
    calibrator: Calibrator = Field(
        "min_max",
        description="Range of a layer's inputs; larger inputs are clipped. min_max: all inputs. "
        "percentile: a share of them. entropy, mse: the range that changes their distribution "
        "least, or with the least squared error. best: for each layer, the one of these with the "
        "least squared error of the layer's output.",
    )
    share: float = Field(
        0.9999, gt=0.5, le=1, description="Share of the inputs that percentile does not clip."
    )
    input_scales: InputScales = Field(
        "layer",
        description="layer: all inputs of a layer share one scale. channel: one scale for each "
        "input channel, for inputs of different range; the layer divides its inputs by them, "
        "which costs time. tables: as layer, but a layer that reads int8 tables with one scale for "
        "all rows has the scales of these tables, so that ONNX Runtime passes their codes to it.",
    )
    weights: WeightClipping = Field(
        "min_max",
        description="Range of the weights of an output channel. min_max: all weights. mse: the "
        "range with the least squared error.",
    )
    most_error: float | None = Field(
        None,
        gt=0,
        description="Largest output error of a layer on the calibration rows, as a share of its "
        "output (both root mean squares). Layers with a larger error stay float32. Without it all "
        "are converted.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Calibration rows, for the range of the inputs of each layer."""
        return ("calibration",)

    def plan(self, model: Model, bench: Bench) -> StepPlan[Mapping[str, Tensor]]:
        """Select the dense layers to compress; give a reason for each other layer.

        If ``input_scales`` is ``tables``, the payload has the input scales of the layers that read
        tables (``find_table_scales``); otherwise it is empty.

        Raises:
            StepRefused: ``torch.export`` cannot trace the network.
        """
        decisions = choose_dense(Unit.of(model.module), self.layers, self.kind, FORMAT)
        if self.input_scales != "tables":
            return StepPlan(decisions, {})
        scales = find_table_scales(model.module, bench.signature)
        reads = Reason("reads_codes_of_tables")
        decisions = {
            name: decision.replace_reasons(*decision.reasons, reads)
            if name in scales and decision.selected
            else decision
            for name, decision in decisions.items()
        }
        return StepPlan(decisions, scales)

    def apply(
        self, model: Model, bench: Bench, plan: StepPlan[Mapping[str, Tensor]]
    ) -> AppliedStep:
        """Calibrate on ``bench.calibration``; replace selected layers within ``most_error``.

        Raises:
            RowsMissing: there are no calibration rows.
            StepRefused: the inputs of a layer are not finite; or they are all zero, and ``layers``
                does not contain the pattern ``*``.
        """
        units = plan.units(model.module)
        of_tables = plan.payload
        factors = None
        if self.input_scales == "channel":
            factors = channel_factors(model.module, units, bench, rows=self.rows, batch=self.batch)
        replacements = calibrate_table_layers(
            model.module,
            [unit for unit in units if unit.name in of_tables],
            of_tables,
            bench,
            partial(pack_with_scale, weights=self.weights),
            rows=self.rows,
            batch=self.batch,
            measure_error=self.most_error is not None,
        )
        replacements |= calibrate_layers(
            model.module,
            [unit for unit in units if unit.name not in of_tables],
            bench,
            partial(packed_int8, weights=self.weights),
            calibrator=self.calibrator,
            share=self.share,
            rows=self.rows,
            batch=self.batch,
            measure_error=self.most_error is not None,
            skip_zero_inputs=ALL_LAYERS in self.layers,
            factors=factors,
        )
        outcomes = {
            name: Decision("taken", layer.reasons()) for name, layer in replacements.items()
        }
        outcomes |= {unit.name: ZERO_INPUTS for unit in units if unit.name not in replacements}
        for name, layer in replacements.items():
            if self.most_error is not None and (layer.error or 0.0) > self.most_error:
                above = Reason("above_most_error", step=self.kind, most_error=self.most_error)
                outcomes[name] = Decision("skipped", (*layer.reasons(), above))
            else:
                swap(model.module, name, layer.packed)
        return AppliedStep(model, outcomes)

    def dry_run(self, model: Model, plan: StepPlan[Mapping[str, Tensor]]) -> Model:
        """Replace every selected layer by one in the format, with zeros that take no memory."""
        for unit in plan.units(model.module):
            scales: InputScales = "channel" if unit.name in plan.payload else self.input_scales
            dry_run_packed(model, [unit], linear=FORMAT, settings=format_settings(scales))
        return model
