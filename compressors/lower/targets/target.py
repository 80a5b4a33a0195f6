"""The protocol of a serving target's lowering, and the tolerances of its parity check.

The parity check compares the scores of the exported graph with those of the torch module.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx
import onnx_ir as ir

from compressors.contracts import Plan
from compressors.core.modules.formats import PackedLinear, PackedTable
from compressors.lower.findings import GraphAudit, LayerInitializer, TableInitializers


class Tolerance(NamedTuple):
    """Largest allowed differences from the module's scores, relative to their standard deviation.

    Attributes:
        root_mean_square: limit of the root mean square of the differences.
        largest: limit of the largest absolute difference.
        quantile_90: limit of the 0.9 quantile of the absolute differences.
    """

    root_mean_square: float
    largest: float
    quantile_90: float


FLOAT_ROUNDING = Tolerance(root_mean_square=1e-4, largest=1e-3, quantile_90=2e-4)
"""Tolerance of graphs without int8 or float8 arithmetic, which differ only by float32 rounding."""

FLOAT32_ERROR = 2.0**-21
"""Error of a sum in float32, relative to its absolute value: four times the epsilon of float32."""
FLOAT16_ERROR = 2.0**-11
"""Error of rounding to float16, relative to the value."""
BFLOAT16_ERROR = 2.0**-8
"""Error of rounding to bfloat16, relative to the value."""


class LoweringTarget(Protocol):
    """Translations, stored types, passes, tolerances and audit of one serving target."""

    @property
    def can_merge_lookups(self) -> bool:
        """Whether tables of the same format are concatenated and looked up by one Gather."""

    def translations(self) -> Mapping[Any, Callable[..., Any]]:
        """Return, for each custom op, the function that builds its ONNX subgraph."""

    def convert_table_tensor(
        self, table: PackedTable, name: str, values: np.ndarray
    ) -> ir.TensorProtocol | None:
        """Convert a stored tensor of a table to the dtype and shape that the target reads.

        Args:
            table: the table to which the tensor belongs.
            name: the tensor's name in the table's format.
            values: the tensor as the module stores it.

        Returns:
            The converted tensor; None if the target reads ``values`` unchanged.
        """

    def convert_layer_tensor(
        self, layer: PackedLinear, name: str, values: np.ndarray
    ) -> ir.TensorProtocol | None:
        """Convert a stored tensor of a dense layer, as ``convert_table_tensor`` does for tables."""

    def stays_packed(self, layer: PackedLinear) -> bool:
        """Return whether the runtime's MatMul reads a dense layer's codes as they are stored."""

    def passes(self) -> tuple[ir.passes.InPlacePass, ...]:
        """Return the target's graph passes, which run after the passes of ``passes/``, in order."""

    def tolerance(self, plan: Plan | None) -> Tolerance:
        """Return the limits of the parity check for a model with this plan."""

    def rounding_error(self, plan: Plan | None) -> float:
        """Return the rounding error of a layer's output, as a share of the output's absolute value.

        Args:
            plan: the compression plan, since layers of some formats run in another precision.
        """

    def audit(
        self,
        graph: onnx.GraphProto,
        plan: Plan | None,
        tables: tuple[TableInitializers, ...],
        layers: tuple[LayerInitializer, ...],
    ) -> GraphAudit | None:
        """Check that the graph that the runtime optimized has the plan's formats.

        Args:
            graph: the optimized graph. Only the data of initializers may be in an external file.
            plan: the compression plan; None for an uncompressed model.
            tables: names in the graph of the stored tensors of every table.
            layers: names in the graph of the stored weights of every compressed dense layer.

        Returns:
            Counts and sizes; None if the target does not audit graphs.

        Raises:
            AuditFailed: a weight or a MatMul does not have the plan's format.
        """

    def has_unsupported_matmuls(self, plan: Plan | None) -> bool:
        """Return whether the graph has bfloat16 MatMuls, which ONNX Runtime on CPU refuses."""


def list_formats(plan: Plan | None) -> set[str]:
    """Return the formats of all tables and dense layers of a plan; empty if there is no plan."""
    return {line.format for line in plan.lines if line.role != "other"} if plan else set()
