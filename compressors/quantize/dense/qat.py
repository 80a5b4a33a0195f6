"""Quantization-aware training: train dense layers in int8 together with their scales.

During training, a selected layer has float weights, and the forward pass rounds its weights and
inputs to int8 levels. Gradients pass straight through the rounding. The scales, one for each output
channel and one for the layer's inputs, are learned, starting from calibrated values. After
training, the layer is stored as ``static_int8``. Its outputs equal those of the best epoch in
validation bit for bit.

Papers: Esser et al. 2020, https://arxiv.org/abs/1902.08153 (learned step size quantization: the
gradient of a scale, equation 3). Differs: scales start from calibration, not from the mean absolute
value. The learned parameter is the logarithm of a scale's relative change, as in Jain et al. 2020,
https://arxiv.org/abs/1903.08066, because Adam's steps have the same size for small and large
parameters, and a scale is small. The paper's scaling of gradients is omitted, because Adam cancels
it.
"""

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import LayerPatterns
from compressors.core.units import Unit, swap
from compressors.distill.soft_labels import build_mixed_loss
from compressors.distill.training.settings import SoftShare, Temperature, Training
from compressors.distill.training.training_steps import (
    require_loss,
    require_training_rows,
    train_units,
)
from compressors.errors.steps import StepRefused
from compressors.quantize.calibration.calibrators import LEVELS
from compressors.quantize.dense.calibrated import (
    ALL_LAYERS,
    ZERO_INPUTS,
    Calibrator,
    calibrate_layers,
)
from compressors.quantize.dense.int8_codes import clip_to_scale, encode
from compressors.quantize.dense.static_int8 import FORMAT, packed_int8


def fake_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Round numbers to integer multiples of a scale, with gradients for numbers and scale.

    Args:
        x: float, any shape.
        scale: float > 0, of a shape that broadcasts to ``x``.
        low: the lowest multiple; lower numbers are clipped to it.
        high: the highest multiple; higher numbers are clipped to it.

    Returns:
        float, shape of ``x``. The gradient of ``x`` passes where nothing was clipped; the gradient
        of ``scale`` is ``round(x / scale) - x / scale`` there, and ``low`` or ``high`` elsewhere.
    """
    ratio = (x / scale).clamp(low, high)
    rounded: Tensor = ratio + (ratio.round() - ratio).detach()
    return rounded * scale


class LearnedInt8(nn.Module):
    """A dense layer in quantization-aware training: float32 ``(*, in)`` -> ``(*, out)``.

    In evaluation mode its output equals that of ``packed()``.

    Attributes:
        weight: the layer's float weight ``(out, in)``.
        bias: the layer's float bias ``(out,)``, or None.
        weight_scale: initial scales of the output channels, ``(out,)``.
        input_scale: initial scale of the inputs, ``()``.
        weight_growth: learned logarithms of the relative changes of ``weight_scale``.
        input_growth: learned logarithm of the relative change of ``input_scale``.
    """

    weight_scale: Tensor
    input_scale: Tensor
    weight_growth: nn.Parameter
    input_growth: nn.Parameter

    def __init__(self, layer: nn.Linear, initial: PackedLinear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        for name in ("weight", "input"):
            scale = initial.get_buffer(f"{name}_scale")
            self.register_buffer(f"{name}_scale", scale)
            setattr(self, f"{name}_growth", nn.Parameter(torch.zeros_like(scale)))

    def scales(self) -> tuple[Tensor, Tensor]:
        """Return the current scales of weights ``(out,)`` and inputs ``()``."""
        weight_scale = self.weight_scale * self.weight_growth.exp()
        return weight_scale, self.input_scale * self.input_growth.exp()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        if not self.training:
            return FORMAT.apply(self.stored(), input, {})
        weight_scale, input_scale = self.scales()
        # Inputs also use the code -128; weights do not.
        x = fake_quantize(input, input_scale, -LEVELS - 1, LEVELS)
        bias = None if self.bias is None else self.bias.detach()
        clipped, stored_scale = clip_to_scale(self.weight, weight_scale, bias, input_scale.detach())
        weight = fake_quantize(clipped, stored_scale[:, None], -LEVELS, LEVELS)
        return F.linear(x, weight, self.bias)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Return the layer's stored tensors in the format ``static_int8``."""
        weight_scale, input_scale = self.scales()
        bias = None if self.bias is None else self.bias.detach()
        codes, weight_scale = encode(self.weight.detach(), bias, input_scale, weight_scale)
        return {
            "codes": codes,
            "weight_scale": weight_scale,
            "input_scale": input_scale,
            "bias": torch.zeros_like(weight_scale) if bias is None else bias.clone(),
        }

    def packed(self) -> PackedLinear:
        """Return the ``static_int8`` layer that replaces this one after training."""
        outputs, inputs = self.weight.shape
        stored = self.stored()
        return PackedLinear(FORMAT, inputs, outputs, bias=self.bias is not None, stored=stored)


class QAT(StepSettings):
    """Train dense layers with rounded weights and inputs, and store them in int8."""

    trains_towers: ClassVar[bool] = True  # it can train models with two towers

    kind: Literal["qat"] = "qat"
    layers: LayerPatterns = ("*",)
    calibrator: Calibrator = Field(
        "best",
        description="Calibrator of the initial input ranges, as in static_int8: min_max, "
        "percentile, entropy, mse, or for each layer the best of them.",
    )
    share: float = Field(
        0.9999, gt=0.5, le=1, description="Share of the inputs that percentile does not clip."
    )
    rows: int = Field(4096, ge=1, description="Largest number of calibration rows that are read.")
    batch: int = Field(1024, ge=1, description="Rows of one calibration batch.")
    soft_share: SoftShare = 0.5  # weight of the original model's predictions in the training loss
    temperature: Temperature = 1.0
    training: Training = Field(
        default_factory=lambda: Training(epochs=5, learning_rate=3e-4),
        description="How the layers are trained. Tables cannot be trained.",
    )

    @model_validator(mode="after")
    def _require_no_tables(self) -> Self:
        if self.training.tables:
            raise value_error("qat_trains_tables")
        return self

    @property
    def trains(self) -> bool:
        """True: the step trains the network."""
        return True

    @property
    def needs(self) -> tuple[Part, ...]:
        """Calibration, training and validation rows, and soft labels if they are used."""
        parts: tuple[Part, ...] = ("calibration", "train", "validation", *self.training.needs)
        return (*parts, "soft_labels") if self.soft_share else parts

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the dense layers to train; give a reason for each other layer.

        Raises:
            NothingToCompress: the signature's task has no loss to train with.
        """
        require_loss(bench, self.kind, self.training)
        decisions = choose_dense(Unit.of(model.module), self.layers, self.kind, FORMAT)
        return StepPlan(decisions, None)  # None: apply() needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Train the selected layers, and modules that are not units, such as norms.

        The result has the weights of the best epoch in validation.

        Raises:
            RowsMissing: the bench lacks calibration, training or validation rows, or soft labels.
            StepRefused: the inputs of a layer are not finite; or they are all zero, and ``layers``
                does not contain the pattern ``*``.
            TrainingFailed: training diverged.
        """
        require_training_rows(bench)  # before the calibration, which takes time
        module, units = model.module, Unit.of(model.module)
        selected = plan.units(module)
        initial = calibrate_layers(
            module,
            selected,
            bench,
            packed_int8,
            calibrator=self.calibrator,
            share=self.share,
            rows=self.rows,
            batch=self.batch,
            measure_error=False,
            skip_zero_inputs=ALL_LAYERS in self.layers,
        )
        learned = {
            unit.name: _build_learned(unit.module, initial[unit.name].packed)
            for unit in selected
            if unit.name in initial
        }
        for name, layer in learned.items():
            swap(module, name, layer)
        loss = build_mixed_loss(
            bench, self.soft_share, self.temperature, self.kind, original=model.original
        )
        outcome = train_units(model, bench, loss, self.training, units, learned)
        for name, layer in learned.items():
            swap(module, name, layer.packed())
        outcomes = {unit.name: ZERO_INPUTS for unit in selected if unit.name not in initial}
        for name in learned:
            start = initial[name].reasons()
            first = (Reason("training_start", start=start),) if start else ()
            outcomes[name] = Decision("taken", (*first, *outcome))
        return AppliedStep(model, outcomes)

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace every selected layer by one in the format, with zeros that take no memory."""
        return dry_run_packed(model, plan.units(model.module), linear=FORMAT)


def _build_learned(layer: nn.Module, initial: PackedLinear) -> LearnedInt8:
    if not isinstance(layer, nn.Linear):  # choose_dense selects only these
        raise StepRefused("layer_not_linear", got=type(layer).__name__)
    return LearnedInt8(layer, initial)
