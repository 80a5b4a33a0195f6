"""The lowering of the targets TensorRT and TensorRT-RTX, which read the same graphs.

A dense layer is *packed* if a compressed module stores it as codes and scales.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from compressors.contracts import DROPPED, Plan
from compressors.core.modules.formats import PackedLinear, PackedTable
from compressors.lower.passes.bfloat16_matmuls import has_bfloat16_matmuls
from compressors.lower.targets.target import (
    BFLOAT16_ERROR,
    FLOAT16_ERROR,
    FLOAT32_ERROR,
    FLOAT_ROUNDING,
    Tolerance,
    list_formats,
)
from compressors.lower.targets.tensorrt import dense_types, operators, types


@dataclass(frozen=True)
class TensorRT:
    """TensorRT and TensorRT-RTX.

    The protocol ``LoweringTarget`` (``compressors/lower/targets/target.py``) explains the methods.

    Attributes:
        can_merge_lookups: False: TensorRT's builder fuses operators, so one Gather for several
            tables would not make the engine faster.
    """

    can_merge_lookups: bool = False

    def translations(self) -> Mapping[Any, Callable[..., Any]]:
        """Return the function that builds the subgraph of each custom op."""
        return operators.translations()

    def convert_table_tensor(
        self, table: PackedTable, name: str, values: np.ndarray
    ) -> ir.TensorProtocol | None:
        """Convert codes to signed integers, and scales ``(rows, 1)`` to vectors."""
        return types.convert_type(table, name, values)

    def convert_layer_tensor(
        self, layer: PackedLinear, name: str, values: np.ndarray
    ) -> ir.TensorProtocol | None:
        """Convert codes to signed integers, and scales ``(channels, 1)`` to vectors."""
        return dense_types.convert_type(layer, name, values)

    def stays_packed(self, layer: PackedLinear) -> bool:
        """Return True: an engine stores codes, and its audit compares its size with the plan."""
        return True

    def passes(self) -> tuple[ir.passes.InPlacePass, ...]:
        """Return no pass, because the builder optimizes the graph."""
        return ()

    def tolerance(self, plan: Plan | None) -> Tolerance:
        """Return how far scores may differ from the module's, relative to their standard deviation.

        ``compressors/lower/comparison/parity.py`` compares them and explains the limits.
        """
        formats = list_formats(plan)
        if "float8_dense" in formats:  # one float8 level more changes a value by up to 6 %
            return Tolerance(root_mean_square=0.02, largest=0.3, quantile_90=0.03)
        if has_bfloat16_matmuls(plan):
            return Tolerance(root_mean_square=0.015, largest=0.2, quantile_90=0.025)
        if "static_int8" in formats:
            # Float16 rounding moves a few inputs to the next level: 0.012 in two small networks.
            return Tolerance(root_mean_square=0.015, largest=0.2, quantile_90=0.015)
        if formats - {"float32", DROPPED}:  # DROPPED: the unit was removed
            # Looked-up weights are rounded to float16 once, or a Gemm computes in float16.
            return Tolerance(root_mean_square=0.005, largest=0.05, quantile_90=0.01)
        return FLOAT_ROUNDING

    def rounding_error(self, plan: Plan | None) -> float:
        """Return the error of the smallest precision in which a layer or table is computed."""
        if has_bfloat16_matmuls(plan):
            return BFLOAT16_ERROR
        return FLOAT16_ERROR if list_formats(plan) - {"float32", DROPPED} else FLOAT32_ERROR

    def audit(self, *_: object) -> None:
        """Return None: the engine is audited instead of the graph, which the builder rewrites."""

    def has_unsupported_matmuls(self, plan: Plan | None) -> bool:
        """Return whether a dense layer multiplies in bfloat16, which ONNX Runtime refuses."""
        return has_bfloat16_matmuls(plan)
