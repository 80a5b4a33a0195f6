"""Dense layers as int8 weights and int8 inputs, both scaled before serving.

Weights get one scale per output channel, inputs one scale per layer, calibrated as the largest
absolute input seen on the calibration rows. Both symmetric, since TensorRT takes no zero point.

Paper: Jacob et al. 2018, https://arxiv.org/abs/1712.05877 (integer-arithmetic-only inference).
Differs: symmetric activations, and the output stays float32 unless the runtime fuses it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.batches import batches
from compressors.contracts import Bench, Change, Frozen, Part
from compressors.errors import CompressionError
from compressors.formats import LinearFormat, PackedLinear, TensorSpec
from compressors.model import Model
from compressors.stand_ins import packed_outline
from compressors.units import Choice, Unit, choose_dense, swap

LEVELS = 127
# Products of two int8 numbers summed over this many inputs are exact in float32 (2^24).
EXACT_INPUTS = 2**24 // (128 * 128)


def encode(weight: Tensor, bias: Tensor | None, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Round each output channel to 255 even levels.

    Args:
        weight: float, ``(out, in)``.
        bias: float ``(out,)`` or None; runtimes hold it as an int32 multiple of
            ``weight_scale * input_scale``, so a channel's scale is kept large enough for it.
        input_scale: float, scalar.

    Returns:
        ``codes`` int8 ``(out, in)`` and ``weight_scale`` float32 ``(out,)``, always positive.
    """
    scale = weight.float().abs().amax(dim=1) / LEVELS
    if bias is not None:
        scale = torch.maximum(scale, bias.float().abs() / (input_scale * 2**23))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    # A dead channel's weights may have decayed to next to nothing: the step of its products,
    # which the bias is divided by, must not underflow to zero.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny / min(float(input_scale), 1.0))
    codes = (weight.float() / scale[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return codes, scale


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Inputs as whole numbers in [-128, 127], still float, as QuantizeLinear rounds them."""
    return (x / scale).round().clamp(-128, 127)


@torch.library.custom_op("recpress::static_int8_linear", mutates_args=())
def static_int8_linear(
    x: Tensor, codes: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor
) -> Tensor:
    """What an int8 Gemm computes, in float arithmetic that is exact for it.

    ``x`` float32 ``(*, in)``, ``codes`` int8 ``(out, in)``, ``weight_scale`` ``(out,)``,
    ``input_scale`` scalar, ``bias`` float32 ``(out,)`` -> float32 ``(*, out)``.
    """
    exact = torch.float32 if codes.shape[1] <= EXACT_INPUTS else torch.float64
    total = quantize(x, input_scale).to(exact) @ codes.to(exact).T
    step = weight_scale * input_scale
    return ((total + (bias / step).round()) * step).to(torch.float32)


@static_int8_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    weight_scale: Tensor,  # noqa: ARG001
    input_scale: Tensor,  # noqa: ARG001
    bias: Tensor,  # noqa: ARG001
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor, Tensor]:
    """Rounding passes gradients straight through; clipped inputs get none (Esser et al. 2020)."""
    x, codes, weight_scale, input_scale, _ = ctx.saved_tensors
    ratio = x / input_scale
    inside = (ratio >= -128) & (ratio <= 127)
    whole = quantize(x, input_scale)
    weight = codes.float() * weight_scale[:, None]
    to_input = grad @ weight  # (*, in)
    flat = grad.reshape(-1, grad.shape[-1])
    dot = whole.reshape(-1, whole.shape[-1]) @ codes.float().T  # (rows, out)
    to_weight_scale = (flat * dot * input_scale).sum(dim=0)
    to_input_scale = (to_input * torch.where(inside, whole - ratio, whole)).sum()
    to_x = torch.where(inside, to_input, torch.zeros_like(to_input))
    return to_x, None, to_weight_scale, to_input_scale.reshape(input_scale.shape), flat.sum(dim=0)


static_int8_linear.register_autograd(_backward, setup_context=_keep)


@dataclass(frozen=True)
class StaticInt8Format:
    """``codes`` int8 ``(out, in)``, two scales and a float32 bias (zeros where there is none)."""

    name: str = "static_int8"
    learned: tuple[str, ...] = ("weight_scale", "input_scale", "bias")

    def layout(
        self,
        inputs: int,
        outputs: int,
        settings: Mapping[str, Any],  # noqa: ARG002
        *,
        bias: bool,  # noqa: ARG002
    ) -> dict[str, TensorSpec]:
        return {
            "codes": TensorSpec((outputs, inputs), torch.int8),
            "weight_scale": TensorSpec((outputs,), torch.float32),
            "input_scale": TensorSpec((), torch.float32),
            "bias": TensorSpec((outputs,), torch.float32),
        }

    def apply(
        self,
        stored: Mapping[str, Tensor],
        x: Tensor,
        settings: Mapping[str, Any],  # noqa: ARG002
    ) -> Tensor:
        y: Tensor = torch.ops.recpress.static_int8_linear(
            x, stored["codes"], stored["weight_scale"], stored["input_scale"], stored["bias"]
        )
        return y


FORMAT: LinearFormat = StaticInt8Format()


class StaticInt8(Frozen):
    """Compute dense layers in int8, with scales calibrated before serving."""

    kind: Literal["static_int8"] = "static_int8"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to compress: module names, with * for any characters."
    )
    rows: int = Field(4096, ge=1, description="Calibration rows read, at most.")
    batch: int = Field(1024, ge=1, description="Rows of one calibration batch.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Rows to see how large the inputs of each layer become."""
        return ("calibration",)

    @property
    def changes(self) -> Change:
        """Each layer it takes is stored in another format."""
        return "format"

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:  # noqa: ARG002
        """Which dense layers this step takes, and why not the others."""
        return choose_dense(Unit.of(model.module), self.layers, self.kind)

    def apply(self, model: Model, bench: Bench) -> Model:
        """Calibrate on ``bench.calibration`` and replace every chosen layer.

        Raises:
            CompressionError: there are no calibration rows, or a layer never ran on them.
        """
        if bench.calibration is None:
            raise CompressionError(
                "'static_int8' needs calibration rows; this bundle has neither calibration nor "
                "train data. Add one to model.json, or use 'float16' for the dense layers."
            )
        module, choices = model.module, self.choose(model, bench)
        units = Unit.of(module)
        chosen = [unit for unit in units if unit.name in choices and choices[unit.name].take]
        largest = {unit.name: torch.zeros(()) for unit in chosen}

        def watch(name: str) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                x = args[0] if args else named["input"]
                largest[name] = torch.maximum(largest[name], x.detach().abs().amax())

            return hook

        handles = [
            unit.module.register_forward_pre_hook(watch(unit.name), with_kwargs=True)
            for unit in chosen
        ]
        try:
            with torch.no_grad():
                for batch in batches(bench.calibration, bench.signature, self.batch, self.rows):
                    module(**batch.inputs)
        finally:
            for handle in handles:
                handle.remove()
        for unit in chosen:
            layer = unit.module
            if not isinstance(layer, nn.Linear) or not largest[unit.name] > 0:
                raise CompressionError(
                    f"Dense layer {unit.name!r} saw no input but zeros on the calibration rows, "
                    f"so its scale is unknown. Leave it out of 'layers'."
                )
            input_scale = largest[unit.name] / LEVELS
            bias = None if layer.bias is None else layer.bias.detach().float()
            codes, weight_scale = encode(layer.weight.detach(), bias, input_scale)
            stored = {
                "codes": codes,
                "weight_scale": weight_scale,
                "input_scale": input_scale,
                "bias": torch.zeros_like(weight_scale) if bias is None else bias.clone(),
            }
            packed = PackedLinear(
                FORMAT,
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                stored=stored,
            )
            swap(module, unit.name, packed)
        return model

    def outline(self, model: Model, bench: Bench) -> Model:
        """Every chosen layer in the format, without calibration."""
        return packed_outline(model, self.choose(model, bench), linear=FORMAT)
