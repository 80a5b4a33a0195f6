"""Tables and dense layers as float16: half the bytes, no calibration.

Rows of tables are looked up in float16 and then converted to float32. Dense layers compute in
float16 on targets that support it (TensorRT); ONNX Runtime on CPU has no float16 Gemm, so there
only the stored bytes halve and the arithmetic is in float32.

Units that float16 cannot represent stay in float32, and the plan gives the reason. These are units
with weights above 65,504, and dense layers whose inputs or partial sums are near or above that
number on the calibration rows.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import (
    PackedLinear,
    PackedTable,
)
from compressors.core.placeholders import dry_run_packed
from compressors.core.steps.decisions import (
    AppliedStep,
    Decision,
    StepPlan,
    choose_dense,
    choose_tables,
)
from compressors.core.steps.step import StepSettings
from compressors.core.steps.unit_settings import MinRows
from compressors.core.units import Unit, pack_table, swap
from compressors.quantize.calibration.layer_inputs import read_layer_inputs
from compressors.quantize.kernels.short_floats import (
    short_float_linear_format,
    short_float_table_format,
)

LARGEST = 65_504.0
"""The largest float16 number."""


def to_float16(weight: Tensor) -> Tensor:
    """Convert a tensor to float16; numbers that round to more than 65,504 become infinite."""
    return weight.detach().to(torch.float16)


def find_overflow(*weights: Tensor | None) -> Reason | None:
    """Return the reason why float16 cannot represent some tensors, or None if it can."""
    for weight in weights:
        if weight is not None and not bool(torch.isfinite(to_float16(weight)).all()):
            largest = float(weight.abs().max())
            return Reason("beyond_largest", largest=largest, format="float16", limit=LARGEST)
    return None


def compute_largest_sum(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Return the largest absolute partial sum of a layer's outputs, over all orders of summation.

    It occurs if all terms of one sign are added first. A GPU may accumulate partial sums in
    float16.

    Args:
        x: inputs, float ``(*, in)``, at least one row.
        weight: float ``(out, in)``.
        bias: float ``(out,)`` or None.
    """
    output = F.linear(x, weight, bias)
    terms = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    return float(((terms + output.abs()) / 2).max())


TABLE_FORMAT = short_float_table_format("float16", torch.float16)
LINEAR_FORMAT = short_float_linear_format("float16", torch.float16)


class Float16(StepSettings):
    """Store tables and dense layers as float16."""

    kind: Literal["float16"] = "float16"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to compress: module names, with * for any characters."
    )
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to compress: module names, with * for any characters."
    )
    min_rows: MinRows = 1
    headroom: float = Field(
        2.0,
        ge=1,
        description="Dense layers stay float32 if their inputs or sums on the calibration rows, "
        "multiplied by this, exceed 65,504: later rows may be larger.",
    )
    rows: int = Field(4096, ge=1, description="Largest number of calibration rows that are read.")
    batch: int = Field(1024, ge=1, description="Rows of one calibration batch.")

    @property
    def wants(self) -> tuple[Part, ...]:
        """Calibration rows, to detect overflow in layers; without them only weights are checked."""
        return ("calibration",)

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the tables and dense layers to convert; give a reason for each other unit."""
        units = Unit.of(model.module)
        # ``with_heads``: also tables whose weight an output layer shares.
        decisions = {
            **choose_tables(units, self.tables, self.min_rows, self.kind, with_heads=True),
            **choose_dense(units, self.layers, self.kind, LINEAR_FORMAT),
        }
        return StepPlan(decisions, payload=None)  # ``apply`` needs only the decisions

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Replace every selected table and layer that float16 can represent."""
        module, selected = model.module, plan.units(model.module)
        dense = [unit for unit in selected if unit.role == "dense"]
        overflowing = self._find_overflowing_layers(module, dense, bench)
        outcomes: dict[str, Decision] = {}
        if bench.calibration is None:
            unchecked = Decision("taken", (Reason("sums_not_checked"),))
            outcomes |= {unit.name: unchecked for unit in dense}
        for unit in selected:
            reason = find_overflow(unit.weight, unit.bias) or overflowing.get(unit.name)
            if reason is not None:
                outcomes[unit.name] = Decision("skipped", (reason,))
            else:
                swap(module, unit.name, _build_packed(unit))
        return AppliedStep(model, outcomes)

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Replace every selected unit by one in the format, with zeros that take no memory."""
        units = plan.units(model.module)
        return dry_run_packed(model, units, table=TABLE_FORMAT, linear=LINEAR_FORMAT)

    def _find_overflowing_layers(
        self, module: nn.Module, layers: Sequence[Unit], bench: Bench
    ) -> dict[str, Reason]:
        """Return the layers whose inputs or sums are near or above 65,504, with the reasons."""
        if bench.calibration is None:
            return {}
        largest = {unit.name: {"an input": 0.0, "a sum": 0.0} for unit in layers}

        def update(unit: Unit, x: Tensor) -> None:
            if x.numel():
                sizes = largest[unit.name]
                sums = compute_largest_sum(x, unit.weight, unit.bias)
                for what, size in (("an input", float(x.abs().max())), ("a sum", sums)):
                    sizes[what] = size if math.isnan(size) else max(sizes[what], size)

        read_layer_inputs(
            module,
            layers,
            bench.calibration,
            bench.signature,
            batch=self.batch,
            limit=self.rows,
            receive=update,
        )
        return {
            name: Reason(
                "near_largest",
                what=what,
                size=size,
                headroom=self.headroom,
                format="float16",
                limit=LARGEST,
            )
            for name, sizes in largest.items()
            for what, size in sizes.items()
            if not size * self.headroom <= LARGEST  # also true for NaN
        }


def _build_packed(unit: Unit) -> nn.Module:
    """Build the float16 replacement of a table or layer."""
    weight, bias = to_float16(unit.weight), unit.bias
    if unit.role == "table":
        rows, dim = weight.shape
        # ``pack_table`` puts the new table into a ``Bag`` if it replaces an EmbeddingBag.
        table = PackedTable(TABLE_FORMAT, rows, dim, settings={}, stored={"weight": weight})
        return pack_table(unit.module, table)
    outputs, inputs = weight.shape
    stored = {
        "weight": weight,
        "bias": weight.new_zeros(outputs) if bias is None else to_float16(bias),
    }
    return PackedLinear(LINEAR_FORMAT, inputs, outputs, bias=bias is not None, stored=stored)
