"""Dense layers as bfloat16: half the bytes, float32's range, three decimal digits.

A weight has 8 significant bits, in float16 11: use bfloat16 if float16 overflows, which the plan of
``float16`` reports. TensorRT multiplies in bfloat16; ONNX Runtime on CPU has no such Gemm, so there
only the stored bytes halve and the arithmetic is in float32. Tables have the separate step
``bfloat16``, because tables of any size are encoded row block by row block, which is not possible
in a step that needs the whole network.
"""

from dataclasses import replace
from typing import Literal

import torch

from compressors.contracts import Bench, Change, Frozen, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.placeholders import dry_run_packed
from compressors.core.step_settings import LayerPatterns
from compressors.core.units import Choice, Unit, choose_dense, swap
from compressors.quantize.kernels.short_floats import short_float_linear_format

LARGEST = float(torch.finfo(torch.bfloat16).max)


FORMAT = short_float_linear_format("bfloat16", torch.bfloat16)


class BFloat16Dense(Frozen):
    """Store dense layers as bfloat16."""

    kind: Literal["bfloat16_dense"] = "bfloat16_dense"
    layers: LayerPatterns = ("*",)

    @property
    def needs(self) -> tuple[Part, ...]:
        """No data: the range is that of float32 for any rows."""
        return ()

    @property
    def changes(self) -> Change:
        """The selected layers are stored in another format."""
        return "format"

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:  # noqa: ARG002
        """Select the dense layers to compress; give a reason for each other layer."""
        return choose_dense(Unit.of(model.module), self.layers, self.kind, FORMAT)

    def apply(self, model: Model, bench: Bench) -> Model:
        """Replace every selected layer whose weights do not round to infinity."""
        choices = self.choose(model, bench)
        kept: dict[str, tuple[Reason, ...]] = {}
        for unit in Unit.of(model.module):
            if unit.name not in choices or not choices[unit.name].take:
                continue
            weight, bias = unit.weight, unit.bias
            largest = max(float(each.abs().max()) for each in (weight, bias) if each is not None)
            stored = {
                "weight": weight.to(torch.bfloat16),
                "bias": (weight.new_zeros(len(weight)) if bias is None else bias).bfloat16(),
            }
            if not all(bool(torch.isfinite(tensor).all()) for tensor in stored.values()):
                beyond = Reason(
                    "beyond_largest", largest=largest, format=FORMAT.name, limit=LARGEST
                )
                kept[unit.name] = (beyond,)
                continue
            outputs, inputs = weight.shape
            packed = PackedLinear(FORMAT, inputs, outputs, bias=bias is not None, stored=stored)
            swap(model.module, unit.name, packed)
        return replace(model, notes={**model.notes, **kept})

    def dry_run(self, model: Model, bench: Bench) -> Model:
        """Replace every selected layer by one in the format."""
        return dry_run_packed(model, self.choose(model, bench), linear=FORMAT)
