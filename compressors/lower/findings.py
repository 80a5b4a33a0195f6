"""What lowering reports about a graph: stored tensors, audit, parity. Needs no ONNX library."""

import math

from pydantic import Field

from compressors.contracts import Frozen


class TableInitializers(Frozen):
    """The stored tensors of one table in a graph, by name.

    Attributes:
        module: the table.
        rows: its rows.
        format: how it is stored.
        names: of its stored tensors in the graph.
        every: by tensor, how many rows share one entry of its first dimension; 0 if the tensor
            belongs to the whole table. Tensors that are not listed have one entry per row.
    """

    module: str
    rows: int
    format: str
    names: tuple[str, ...]
    every: dict[str, int] = Field(default_factory=dict)

    def entries(self, name: str) -> int | None:
        """Return the size of a tensor's first dimension; None if it does not depend on the rows."""
        every = self.every.get(name, 1)
        return math.ceil(self.rows / every) if every else None


class LayerInitializer(Frozen):
    """The weights of one compressed dense layer in a graph, by name.

    If ``packed``, the runtime multiplies by the stored codes. Otherwise it converts them once when
    a session starts: to float32, or to its own layout of int8.
    """

    module: str
    format: str
    name: str
    packed: bool


class GraphAudit(Frozen):
    """Counts and sizes measured in an optimized graph.

    Attributes:
        nodes: nodes by operator.
        int8_products: matrix products of int8 numbers.
        packed_tables: tables whose rows are looked up as they are stored.
        weight_bytes: bytes of all initializers.
        packed_layers: dense layers that are multiplied by their codes as they are stored.
        widened_layers: dense layers that are float32 in memory after the start of a session.
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
        rows: compared rows.
        largest: largest absolute difference.
        root_mean_square: of the differences.
        quantile_90: 90 % of the absolute differences are at most this.
        spread: standard deviation of the module's scores.
        rms_limit, largest_limit, quantile_90_limit: the largest values that are allowed.
    """

    rows: int
    largest: float
    root_mean_square: float
    quantile_90: float
    spread: float
    rms_limit: float
    largest_limit: float
    quantile_90_limit: float
