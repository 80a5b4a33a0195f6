"""What lowering reports about a graph, as plain values: reading them needs no ONNX library."""

from pydantic import Field

from compressors.contracts import Frozen


class TableInitializers(Frozen):
    """The stored tensors of one table in a graph, by name.

    The first dimension of each tensor is the number of the table's rows, except for those in
    ``every``, which gives how many rows share one entry, or 0 if it belongs to the whole table.
    """

    module: str
    rows: int
    format: str
    names: tuple[str, ...]
    every: dict[str, int] = Field(default_factory=dict)

    def entries(self, name: str) -> int | None:
        """The first dimension of a stored tensor; None if it does not depend on the rows."""
        every = self.every.get(name, 1)
        return -(-self.rows // every) if every else None


class LayerInitializer(Frozen):
    """The weights of one packed dense layer in a graph, by name.

    If ``packed``, the runtime computes with the weights as they are stored. Otherwise it widens
    them once when a session starts, or converts them itself, as it does for int8.
    """

    module: str
    format: str
    name: str
    packed: bool


class GraphAudit(Frozen):
    """Counts and sizes measured in an optimized graph.

    ``packed_layers`` counts dense layers whose product reads the codes as they are stored,
    ``widened_layers`` those that are float32 in memory after the start of a session.
    """

    nodes: dict[str, int]
    int8_products: int
    packed_tables: int
    weight_bytes: int
    packed_layers: int = 0
    widened_layers: int = 0


class Parity(Frozen):
    """Differences between two sets of scores, and their limits."""

    rows: int
    largest: float
    root_mean_square: float
    quantile_90: float
    spread: float
    rms_limit: float
    largest_limit: float
    quantile_90_limit: float
