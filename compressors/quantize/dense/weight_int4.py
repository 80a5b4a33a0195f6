"""Dense layers with 4-bit weights, rounded to the nearest level or by GPTQ.

A layer of ``out x in`` float32 shrinks from ``4 * out * in`` to ``out * in * (1/2 + 2/block)``
bytes with float16 scales, with ``in`` padded to a multiple of ``block``: to 14 % with blocks of 32.

``rounding="gptq"`` uses statistics of the layer's inputs on calibration rows; see ``gptq.py``.
ONNX Runtime keeps the weights packed in memory. A layer with float inputs takes about as long as
a float32 Gemm. With inputs rounded to int8, it is faster for single rows and wide layers
(``benchmarks/weight_only.py``).

Paper: Frantar et al. 2022, https://arxiv.org/abs/2210.17323 (4 bits in groups, GPTQ).
Differs: 15 levels, symmetric around zero, because TensorRT supports no zero point; the range of the
weights of a block may be clipped.
"""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import LayerPatterns
from compressors.core.units import Unit, swap
from compressors.errors.steps import RowsMissing
from compressors.quantize.calibration.input_moments import gram_matrices, squared_error
from compressors.quantize.dense import weight_only
from compressors.quantize.dense.gptq import gptq
from compressors.quantize.dense.weight_only import Activations, Block, WeightOnlyFormat
from compressors.quantize.kernels.levels import Clipping, ScaleType

BITS = 4
FORMAT = WeightOnlyFormat("weight_int4", BITS)


class WeightInt4(StepSettings):
    """Store the weights of dense layers as half a byte each, with one scale per block."""

    kind: Literal["weight_int4"] = "weight_int4"
    layers: LayerPatterns = ("*",)
    block: Block = Field(
        32, description="Number of inputs that share a scale; 0: all inputs of an output."
    )
    clipping: Clipping = Field(
        "mse",
        description="Range of the weights of a block: min_max clips none; the others clip large "
        "weights to lower the squared error.",
    )
    scale: ScaleType = Field("float16", description="How scales are stored.")
    activations: Activations = Field(
        "float32",
        description="float32: inputs are not rounded. int8: each block of a row's inputs is "
        "rounded at run time: faster in ONNX Runtime for single rows and wide layers.",
    )
    rounding: Literal["nearest", "gptq"] = Field(
        "nearest",
        description="nearest: round each weight to the nearest level. gptq: round so that the "
        "layer's outputs on calibration rows change least.",
    )
    rows: int = Field(4096, ge=1, description="Largest number of calibration rows read for gptq.")
    batch: int = Field(1024, ge=1, description="Rows of one calibration batch.")

    @property
    def needs(self) -> tuple[Part, ...]:
        """Calibration rows, if rounding depends on the inputs."""
        return ("calibration",) if self.rounding == "gptq" else ()

    @property
    def wants(self) -> tuple[Part, ...]:
        """Calibration rows, to check the ranges of inputs if inputs are rounded."""
        rounds_inputs = self.activations == "int8" and self.rounding != "gptq"
        return ("calibration",) if rounds_inputs else ()

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
            RowsMissing: there are no calibration rows for gptq.
            StepRefused: with gptq, a layer's inputs are all zero on the calibration rows.
        """
        selected = plan.units(model.module)
        by_layer = (
            self._compute_gram_matrices(model, selected, bench) if self.rounding == "gptq" else {}
        )
        # The evenly spaced levels of the weights (``kernels/levels.py``).
        grid = weight_only.create_grid(BITS, self.clipping, self.scale)
        outcomes: dict[str, Decision] = {}
        for unit in selected:
            weight, bias = unit.weight, unit.bias
            scale = weight_only.fit_scales(weight, self.block, grid)
            multiples = weight_only.round_to_multiples(weight, scale, self.block, grid)
            if unit.name in by_layer:
                gram, nearest = by_layer[unit.name], multiples
                scales = weight_only.expand_scales(scale, weight.shape[1], self.block)
                multiples = gptq(weight, nearest, gram, scales, max_multiple=grid.max_multiple)
                error = _compute_output_error(multiples, scales, weight, gram)
                share = error / _compute_output_error(nearest, scales, weight, gram)
                outcomes[unit.name] = Decision("taken", (Reason("gptq_error", share=share),))
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
        return AppliedStep(model, outcomes)

    def _compute_gram_matrices(
        self, model: Model, layers: list[Unit], bench: Bench
    ) -> dict[str, Tensor]:
        """Compute the Gram matrix of each layer's inputs on calibration rows, ``(in, in)``."""
        if bench.calibration is None:
            raise RowsMissing("gptq_needs_rows", step=self.kind)
        rows, signature = bench.calibration, bench.signature
        return gram_matrices(model.module, layers, rows, signature, self.batch, self.rows)

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace every selected layer by one in the format, with zeros that take no memory."""
        units = plan.units(model.module)
        return dry_run_packed(model, units, linear=FORMAT, settings=self.settings())


def _compute_output_error(multiples: Tensor, scale: Tensor, weight: Tensor, gram: Tensor) -> float:
    """Return the squared error of a layer's outputs, as a positive number to divide by."""
    return float(squared_error(multiples * scale - weight, gram).sum()) + 1e-300
