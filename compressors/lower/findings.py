"""What lowering says about a graph. Plain values: reading a report needs no ONNX library."""

from pydantic import Field

from compressors.contracts import Frozen


class TableInitializers(Frozen):
    """The stored tensors of one table in a graph, by name.

    The first dimension of each is the table's rows, but for those that ``every`` names: there so
    many rows share one entry, or, with 0, the tensor belongs to the whole table.
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

    ``packed`` says that the runtime computes with them as they are stored; else it widens them,
    once when a session starts, or its own way as with int8.
    """

    module: str
    format: str
    name: str
    packed: bool


class GraphAudit(Frozen):
    """What an optimized graph was found to hold.

    ``packed_layers`` are dense layers that are multiplied by their codes as they are stored,
    ``widened_layers`` those that are float32 in memory from the start of a session on.
    """

    nodes: dict[str, int]
    int8_products: int
    packed_tables: int
    weight_bytes: int
    packed_layers: int = 0
    widened_layers: int = 0
