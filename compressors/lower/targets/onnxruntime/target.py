"""The target ONNX Runtime: its translations, passes, tolerance and audit for lowering."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from compressors.contracts import Plan
from compressors.core.modules.formats import PackedLinear
from compressors.lower.audit import audit
from compressors.lower.findings import GraphAudit, LayerInitializer, TableInitializers
from compressors.lower.targets.onnxruntime import operators, types
from compressors.lower.targets.onnxruntime.join_split_rows import JoinSplitRows
from compressors.lower.targets.onnxruntime.spell_out_clipping import SpellOutClipping
from compressors.lower.targets.target import EXACT, Tolerance, formats_of


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on CPU and edge devices. See ``LoweringTarget`` for the methods."""

    merges_lookups: bool = True

    def translations(self) -> Mapping[Any, Callable[..., Any]]:
        """Return the function that builds the subgraph of each custom op."""
        return operators.translations()

    def retyped_table(self, *_: object) -> None:
        """Return None, because tables keep their stored types."""

    def retyped_layer(
        self, layer: PackedLinear, name: str, values: np.ndarray
    ) -> ir.TensorProtocol | None:
        """Reshape codes to blocks, as MatMulNBits reads them."""
        return types.convert_type(layer, name, values)

    def stays_packed(self, layer: PackedLinear) -> bool:
        """Return whether MatMulNBits multiplies by the stored codes of a layer."""
        return types.stays_packed(layer)

    def passes(self) -> tuple[ir.passes.InPlacePass, ...]:
        """Return the passes that keep products in int8 and remove the Split of merged lookups."""
        return JoinSplitRows(), SpellOutClipping()

    def tolerance(self, plan: Plan | None) -> Tolerance:
        """Return the limits of the parity check; see ``parity.py`` for the reasons."""
        formats = formats_of(plan)
        if "float8_dense" in formats:  # rounding changes a value by up to 6 %
            return Tolerance(root_mean_square=0.005, largest=0.2, quantile_90=2e-3)
        if "static_int8" in formats:
            return Tolerance(root_mean_square=0.005, largest=0.2, quantile_90=1e-3)
        if formats & {"weight_int8", "weight_int4"}:
            # Inputs are rounded to int8; one may be on the boundary of two levels.
            return Tolerance(root_mean_square=0.002, largest=0.05, quantile_90=1e-3)
        return EXACT

    def audit(
        self,
        graph: onnx.GraphProto,
        plan: Plan | None,
        tables: tuple[TableInitializers, ...],
        layers: tuple[LayerInitializer, ...],
    ) -> GraphAudit:
        """Check the optimized graph; see ``audit.py`` for the rules."""
        return audit(graph, plan, tables, layers)

    def has_unsupported_products(self, plan: Plan | None) -> bool:
        """Return False, because ONNX Runtime runs all graphs of this target."""
        return False
