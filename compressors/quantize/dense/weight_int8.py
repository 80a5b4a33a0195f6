"""Dense layers with int8 weights, and float inputs or dynamically quantized int8 inputs.

A layer of ``out x in`` float32 shrinks from ``4 * out * in`` to ``out * (in + 2)`` bytes with one
float16 scale per output channel, with ``in`` padded to a multiple of 16.

With ``activations="int8"``, ONNX Runtime rounds the inputs at run time, with a scale from the
largest input of each data row and block. This needs no calibration and loses almost no precision,
and the weights stay packed in memory. With ``activations="float32"``, only the file is smaller: the
weights are converted to float32 when a session starts, because for one data row, ONNX Runtime's
MatMul of float inputs and 8-bit weights is four to twelve times slower than a float32 Gemm
(``benchmarks/weight_only.py``).

Source: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339 (LLM.int8(), vector-wise scales).
Differs: no columns are kept in float for outliers.
"""

from typing import Any, Literal

from pydantic import Field

from compressors.contracts import Bench, Part
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import AppliedStep, StepPlan, choose_dense
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import LayerPatterns
from compressors.core.units import Unit, swap
from compressors.quantize.dense import weight_only
from compressors.quantize.dense.weight_only import Activations, Block, WeightOnlyFormat
from compressors.quantize.kernels.levels import Clipping, ScaleType

BITS = 8
FORMAT = WeightOnlyFormat("weight_int8", BITS)


class WeightInt8(StepSettings):
    """Store the weights of dense layers as one byte each, without calibration."""

    kind: Literal["weight_int8"] = "weight_int8"
    layers: LayerPatterns = ("*",)
    block: Block = Field(
        0, description="Number of inputs that share a scale; 0: all inputs of an output."
    )
    clipping: Clipping = Field(
        "min_max",
        description="Range of the weights of a block: min_max clips none; the others clip large "
        "weights to lower the squared error.",
    )
    scale: ScaleType = Field("float16", description="How scales are stored.")
    activations: Activations = Field(
        "int8",
        description="int8: each block of a row's inputs is rounded at run time. float32: inputs "
        "are not rounded; in ONNX Runtime the weights are then packed in the file only.",
    )

    @property
    def wants(self) -> tuple[Part, ...]:
        """Calibration rows, to check the ranges of inputs if inputs are rounded."""
        return ("calibration",) if self.activations == "int8" else ()

    def settings(self) -> dict[str, Any]:
        """Return the settings that determine the stored layout of a layer and how it computes."""
        return {"block": self.block, "scale": self.scale, "activations": self.activations}

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the dense layers to compress; give a reason for each other layer."""
        units = Unit.of(model.module)
        decisions = choose_dense(units, self.layers, self.kind, FORMAT, self.settings())
        return StepPlan(decisions, None)  # None: apply() needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Round the weights of every selected layer.

        Raises:
            ValueNotStorable: a scale is too large for the dtype in which it is stored.
        """
        # The evenly spaced levels of the weights (``kernels/levels.py``).
        grid = weight_only.create_grid(BITS, self.clipping, self.scale)
        for unit in plan.units(model.module):
            weight, bias = unit.weight, unit.bias
            scale = weight_only.fit_scales(weight, self.block, grid)
            multiples = weight_only.round_to_multiples(weight, scale, self.block, grid)
            outputs, inputs = weight.shape
            packed = PackedLinear(
                FORMAT,
                inputs,
                outputs,
                bias=bias is not None,
                settings=self.settings(),
                stored=weight_only.pack_tensors(multiples, scale, bias, self.block, BITS),
            )
            swap(model.module, unit.name, packed)
        return AppliedStep(model)

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace every selected layer by one in the format, with zeros that take no memory."""
        units = plan.units(model.module)
        return dry_run_packed(model, units, linear=FORMAT, settings=self.settings())
