"""Dense layers with weights and inputs in 8-bit floats (E4M3), for GPUs that multiply them.

Weights have one scale per output channel or per layer, inputs one per layer. The scales map the
largest weight, and the largest input on the calibration rows, to 448, the largest E4M3 number.
Numbers have 4 significant bits down to 1/28,672 of the largest, so if a few inputs are much larger
than all others, less precision is lost than in int8.

Use it for GPU targets: TensorRT multiplies 8-bit floats from compute capability 8.9 on. CPUs
cannot multiply them: there ONNX Runtime converts the weights to float32 when a session starts, and
computes the same outputs in float32. On CPU only the file becomes smaller, to a quarter of float32.

Format: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433 (E4M3 without infinities).
Differs: static scales from the largest value; larger inputs in serving are clipped, because
QuantizeLinear saturates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compressors.contracts import Bench, Part
from compressors.core.model import Model
from compressors.core.modules.formats import LinearFormat, PackedLinear, TensorSpec
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import LayerPatterns
from compressors.core.units import Unit, swap
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.quantize.calibration.layer_inputs import input_vectors, read_layer_inputs
from compressors.quantize.dense.calibrated import ALL_LAYERS, ZERO_INPUTS
from compressors.quantize.tables.float8_e4m3 import LARGEST, convert_from_float8

SMALLEST = torch.finfo(torch.float32).tiny
"""Smallest scale: the smallest normal float32 number."""


def encode(weight: Tensor, *, by_channel: bool) -> tuple[Tensor, Tensor]:
    """Round a layer's weights to the nearest 8-bit floats.

    Args:
        weight: float, ``(out, in)``.
        by_channel: compute one scale per output channel, instead of one for the layer.

    Returns:
        ``codes`` uint8 ``(out, in)``, the bits of E4M3, and ``scale`` float32, ``(out,)`` or
        ``()``, always positive.
    """
    magnitude = weight.float().abs()
    largest = magnitude.amax(dim=1) if by_channel else magnitude.amax()
    scale = largest / LARGEST
    scale = torch.where(scale >= SMALLEST, scale, torch.ones_like(scale))
    rounded = round_to_float8(weight.float() / scale.reshape(-1, 1))
    return rounded.to(torch.float8_e4m3fn).view(torch.uint8), scale


def round_to_float8(x: Tensor) -> Tensor:
    """Round to the nearest E4M3 numbers, as float32; numbers beyond 448 are clipped."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()


@torch.library.custom_op("recpress::float8_linear", mutates_args=())
def float8_linear(
    x: Tensor, codes: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Compute a Gemm of 8-bit floats, with sums in float32.

    ``x`` float32 ``(*, in)``, ``codes`` uint8 ``(out, in)``, ``weight_scale`` ``(out,)`` or ``()``,
    ``input_scale`` ``()``, ``bias`` float32 ``(out,)`` -> float32 ``(*, out)``.
    """
    weight = convert_from_float8(codes) * weight_scale.reshape(-1, 1)
    return F.linear(round_to_float8(x / input_scale) * input_scale, weight, bias)


@float8_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*tensors)


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight-through gradients for rounding; zero for clipped inputs (Esser et al. 2020)."""
    x, codes, weight_scale, input_scale = ctx.saved_tensors
    ratio = x / input_scale
    inside = ratio.abs() <= LARGEST
    rounded, weights = round_to_float8(ratio), convert_from_float8(codes)
    grad_input = grad @ (weights * weight_scale.reshape(-1, 1))  # (*, in)
    flat_grad = grad.reshape(-1, grad.shape[-1])
    inputs = (rounded * input_scale).reshape(-1, rounded.shape[-1])  # (rows, in)
    grad_scale_by_weight = flat_grad.T @ inputs * weights  # (out, in)
    grad_weight_scale = (
        grad_scale_by_weight.sum(dim=1) if weight_scale.dim() else grad_scale_by_weight.sum()
    )
    grad_input_scale = (grad_input * torch.where(inside, rounded - ratio, rounded)).sum()
    grad_x = torch.where(inside, grad_input, torch.zeros_like(grad_input))
    grad_bias = flat_grad.sum(dim=0) if ctx.has_bias else None
    return grad_x, None, grad_weight_scale, grad_input_scale.reshape(input_scale.shape), grad_bias


float8_linear.register_autograd(_compute_gradients, setup_context=_setup_context)


@dataclass(frozen=True)
class Float8DenseFormat:
    """Stores ``codes`` uint8 ``(out, in)``, two scales, and a float32 bias if the layer has one.

    ``learned``: names of the tensors that training may change. The protocol ``LinearFormat``
    (``core/modules/formats.py``) explains the methods.
    """

    name: str = "float8_dense"
    learned: tuple[str, ...] = ("weight_scale", "input_scale", "bias")

    def layout(
        self, inputs: int, outputs: int, settings: Mapping[str, Any], *, bias: bool
    ) -> dict[str, TensorSpec]:
        by_channel = settings["scales"] == "channel"
        specs = {
            "codes": TensorSpec((outputs, inputs), torch.uint8),
            "weight_scale": TensorSpec((outputs,) if by_channel else (), torch.float32),
            "input_scale": TensorSpec((), torch.float32),
        }
        return {**specs, "bias": TensorSpec((outputs,), torch.float32)} if bias else specs

    def apply(
        self,
        stored: Mapping[str, Tensor],
        x: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        y: Tensor = torch.ops.recpress.float8_linear(
            x, stored["codes"], stored["weight_scale"], stored["input_scale"], stored.get("bias")
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
        return round_to_float8(x / scale) * scale


FORMAT: LinearFormat = Float8DenseFormat()


class Float8Dense(StepSettings):
    """Compute dense layers in 8-bit floats (E4M3) on GPUs, with calibrated scales."""

    kind: Literal["float8_dense"] = "float8_dense"
    layers: LayerPatterns = ("*",)
    scales: Literal["channel", "layer"] = Field(
        "channel", description="One scale for the weights of each output channel, or one per layer."
    )
    rows: int = Field(4096, ge=1, description="Largest number of calibration rows that are read.")
    batch: int = Field(1024, ge=1, description="Rows of one calibration batch.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Calibration rows, for the range of the inputs of each layer."""
        return ("calibration",)

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the stored layout of a layer."""
        return {"scales": self.scales}

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the dense layers to compress; give a reason for each other layer."""
        units = Unit.of(model.module)
        decisions = choose_dense(units, self.layers, self.kind, FORMAT, self.settings())
        return StepPlan(decisions, payload=None)  # ``apply`` needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Calibrate on ``bench.calibration`` and replace every selected layer.

        Raises:
            RowsMissing: there are no calibration rows.
            StepRefused: all inputs of a layer are zero, and ``layers`` does not contain the pattern
                ``*``.
        """
        if bench.calibration is None:
            raise RowsMissing("input_scales_need_rows")
        selected = plan.units(model.module)
        largest = {unit.name: torch.zeros(()) for unit in selected}

        def update(unit: Unit, x: Tensor) -> None:
            batch_largest = input_vectors(x).float().abs().amax()
            largest[unit.name] = torch.maximum(largest[unit.name], batch_largest)

        outcomes: dict[str, Decision] = {}
        read_layer_inputs(
            model.module,
            selected,
            bench.calibration,
            bench.signature,
            batch=self.batch,
            limit=self.rows,
            receive=update,
        )
        for unit in selected:
            input_scale = largest[unit.name] / LARGEST
            if ALL_LAYERS in self.layers and not largest[unit.name]:
                outcomes[unit.name] = ZERO_INPUTS
                continue
            if not bool(torch.isfinite(input_scale)):
                raise StepRefused(
                    "layer_inputs_not_finite", layer=unit.name, value=float(largest[unit.name])
                )
            if not input_scale >= SMALLEST:
                raise StepRefused("layer_inputs_zero", layer=unit.name)
            weight, bias = unit.weight, unit.bias
            codes, weight_scale = encode(weight, by_channel=self.scales == "channel")
            tensors = {"codes": codes, "weight_scale": weight_scale, "input_scale": input_scale}
            if bias is not None:
                tensors["bias"] = bias.float().clone()
            outputs, inputs = weight.shape
            packed = PackedLinear(
                FORMAT,
                inputs,
                outputs,
                bias=bias is not None,
                settings=self.settings(),
                stored=tensors,
            )
            swap(model.module, unit.name, packed)
        return AppliedStep(model, outcomes)

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace every selected layer by one in the format, with zeros that take no memory."""
        units = plan.units(model.module)
        return dry_run_packed(model, units, linear=FORMAT, settings=self.settings())
