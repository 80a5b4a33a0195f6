"""The lowering of the target ONNX Runtime: its translations, passes, tolerance and audit.

A dense layer is *packed* if a compressed module stores it as codes and scales.
"""

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
from compressors.lower.targets.onnxruntime.replace_relu_by_max import ReplaceReluByMax
from compressors.lower.targets.target import (
    FLOAT32_ERROR,
    FLOAT_ROUNDING,
    Tolerance,
    list_formats,
)


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on CPU and edge devices.

    The protocol ``LoweringTarget`` (``compressors/lower/targets/target.py``) explains the methods.

    Attributes:
        can_merge_lookups: whether tables of one format are concatenated and looked up together by
            one Gather; fewer operators make the graph faster on this target.
    """

    can_merge_lookups: bool = True

    def translations(self) -> Mapping[Any, Callable[..., Any]]:
        """Return the function that builds the subgraph of each custom op."""
        return operators.translations()

    def convert_table_tensor(self, *_: object) -> None:
        """Return None: this target reads the stored tensors of tables as they are."""

    def convert_layer_tensor(
        self, layer: PackedLinear, name: str, values: np.ndarray
    ) -> ir.TensorProtocol | None:
        """Reshape the codes ``values`` to blocks for MatMulNBits; None for other tensors."""
        return types.convert_type(layer, name, values)

    def stays_packed(self, layer: PackedLinear) -> bool:
        """Return whether MatMulNBits computes with the stored codes of a layer."""
        return types.stays_packed(layer)

    def passes(self) -> tuple[ir.passes.InPlacePass, ...]:
        """Return the pass that keeps layers in int8."""
        return (ReplaceReluByMax(),)

    def tolerance(self, plan: Plan | None) -> Tolerance:
        """Return how far scores may differ from the module's, relative to their standard deviation.

        ``compressors/lower/comparison/parity.py`` compares them and explains the limits.
        """
        formats = list_formats(plan)
        # Differences are largest where an input is midway between two levels: torch and ONNX
        # Runtime sum in another order, so each may round it to another level.
        if "float8_dense" in formats:  # one float8 level more changes a value by up to 6 %
            return Tolerance(root_mean_square=0.005, largest=0.2, quantile_90=2e-3)
        if "static_int8" in formats:
            return Tolerance(root_mean_square=0.005, largest=0.2, quantile_90=1e-3)
        if formats & {"weight_int8", "weight_int4"}:
            return Tolerance(root_mean_square=0.002, largest=0.05, quantile_90=1e-3)
        return FLOAT_ROUNDING

    def rounding_error(self, _: Plan | None) -> float:
        """Return the error of float32: this target computes sums in float32 in every format."""
        return FLOAT32_ERROR

    def audit(
        self,
        graph: onnx.GraphProto,
        plan: Plan | None,
        tables: tuple[TableInitializers, ...],
        layers: tuple[LayerInitializer, ...],
    ) -> GraphAudit:
        """Check the optimized graph by the rules of ``compressors/lower/audit.py``."""
        return audit(graph, plan, tables, layers)

    def has_unsupported_matmuls(self, plan: Plan | None) -> bool:
        """Return False: ONNX Runtime has every MatMul that this target's graphs contain."""
        return False
