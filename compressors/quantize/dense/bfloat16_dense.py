"""Dense layers as bfloat16: half the bytes, float32's range, three decimal digits.

A weight has 8 significant bits; in float16 it has 11. Use bfloat16 if float16 overflows, which the
plan of ``float16`` reports. TensorRT multiplies in bfloat16; ONNX Runtime on CPU has no bfloat16
Gemm, so there only the stored bytes halve and the arithmetic is in float32. This step converts no
tables: tables may be larger than memory, so the separate step ``bfloat16`` encodes them in blocks
of rows.
"""

from typing import Literal

import torch

from compressors.contracts import Bench
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import LayerPatterns
from compressors.core.units import Unit, swap
from compressors.quantize.kernels.short_floats import short_float_linear_format

LARGEST = float(torch.finfo(torch.bfloat16).max)
"""The largest bfloat16 number."""

FORMAT = short_float_linear_format("bfloat16", torch.bfloat16)


class BFloat16Dense(StepSettings):
    """Store the weights and biases of dense layers as bfloat16."""

    kind: Literal["bfloat16_dense"] = "bfloat16_dense"
    layers: LayerPatterns = ("*",)

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the dense layers to compress; give a reason for each other layer."""
        decisions = choose_dense(Unit.of(model.module), self.layers, self.kind, FORMAT)
        return StepPlan(decisions, payload=None)  # ``apply`` needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Replace every selected layer, except those with a number that rounds to infinity."""
        outcomes: dict[str, Decision] = {}
        for unit in plan.units(model.module):
            weight, bias = unit.weight, unit.bias
            largest = max(
                float(tensor.abs().max()) for tensor in (weight, bias) if tensor is not None
            )
            stored = {
                "weight": weight.to(torch.bfloat16),
                "bias": (weight.new_zeros(len(weight)) if bias is None else bias).bfloat16(),
            }
            if not all(bool(torch.isfinite(tensor).all()) for tensor in stored.values()):
                beyond = Reason(
                    "beyond_largest", largest=largest, format=FORMAT.name, limit=LARGEST
                )
                outcomes[unit.name] = Decision("skipped", (beyond,))
                continue
            outputs, inputs = weight.shape
            packed = PackedLinear(FORMAT, inputs, outputs, bias=bias is not None, stored=stored)
            swap(model.module, unit.name, packed)
        return AppliedStep(model, outcomes)

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace every selected layer by one in the format, with zeros that take no memory."""
        return dry_run_packed(model, plan.units(model.module), linear=FORMAT)
