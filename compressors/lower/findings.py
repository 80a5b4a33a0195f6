"""Result types of lowering: the names of a graph's stored tensors, its audit and parity check.

This file imports no ONNX library, so that reports can use its types without one.
"""

import math
import operator

from pydantic import ConfigDict, Field

from compressors.contracts import Frozen


class TableInitializers(Frozen):
    """The names and first dimensions of the stored tensors of one table in a graph.

    Attributes:
        module: the table's attribute path in the model.
        rows: number of rows of the table.
        format: name of the table's storage format.
        names: names of the table's stored tensors in the graph.
        rows_per_entry: how many rows share one entry of a tensor's first dimension, by tensor name;
            0 if the tensor belongs to the whole table, such as a codebook. Tensors that are not
            listed have one entry per row.
        multiplied: whether the graph multiplies inputs by the whole table (a MatMul), in addition
            to lookups or instead.
    """

    # Stored JSON has the field ``rows_per_entry`` under its earlier name, ``every``.
    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    module: str
    rows: int
    format: str
    names: tuple[str, ...]
    rows_per_entry: dict[str, int] = Field(default_factory=dict, alias="every")
    multiplied: bool = False

    def entries(self, name: str) -> int | None:
        """Return the size of a tensor's first dimension; None if it does not depend on the rows."""
        shared = self.rows_per_entry.get(name, 1)
        return math.ceil(self.rows / shared) if shared else None


class LayerInitializer(Frozen):
    """The name that the weights of one compressed dense layer have in a graph.

    Attributes:
        module: the layer's attribute path in the model.
        format: name of the layer's storage format.
        name: name of the stored weights in the graph.
        packed: whether the layer stays packed: the runtime multiplies by the stored codes. If not,
            it converts them once, when a session starts: to float32, or to an int8 layout that the
            runtime chooses.
    """

    module: str
    format: str
    name: str
    packed: bool


class GraphAudit(Frozen):
    """Counts and sizes measured in an optimized graph.

    Attributes:
        nodes: number of nodes by operator.
        int8_products: number of matrix products of int8 numbers.
        packed_tables: number of tables in a format smaller than float32; their rows are dequantized
            after the lookup.
        weight_bytes: bytes of all initializers.
        packed_layers: number of dense layers whose stored codes the runtime multiplies by.
        widened_layers: number of dense layers that are float32 in memory once a session has
            started.
    """

    nodes: dict[str, int]
    int8_products: int
    packed_tables: int
    weight_bytes: int
    packed_layers: int = 0
    widened_layers: int = 0


class Parity(Frozen):
    """Differences between the scores of a lowered graph and of its module, and their limits.

    Attributes:
        rows: number of compared scores.
        output: name of the compared output, for a graph with several.
        largest: largest absolute difference.
        root_mean_square: root mean square of the differences.
        quantile_90: 0.9 quantile of the absolute differences.
        spread: standard deviation of the module's scores.
        rms_limit: largest allowed ``root_mean_square``.
        largest_limit: largest allowed ``largest``.
        quantile_90_limit: largest allowed ``quantile_90``.
        by_rounding: root mean square of how much rounding errors change the module's scores, if the
            limits were raised for that; 0 if they depend only on the target and the plan.
    """

    rows: int
    largest: float
    root_mean_square: float
    quantile_90: float
    spread: float
    rms_limit: float
    largest_limit: float
    quantile_90_limit: float
    output: str = Field("", exclude_if=operator.not_)
    by_rounding: float = Field(0.0, exclude_if=operator.not_)

    @property
    def exceeds_limit(self) -> bool:
        """Whether a difference is larger than its limit."""
        return (
            self.root_mean_square > self.rms_limit
            or self.largest > self.largest_limit
            or self.quantile_90 > self.quantile_90_limit
        )
