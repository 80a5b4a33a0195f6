"""What lowering says about a graph. Plain values: reading a report needs no ONNX library."""

from compressors.contracts import Frozen


class TableInitializers(Frozen):
    """The stored tensors of one table in a graph, by name.

    ``every`` says for each how many rows share an entry of its first dimension, 0 where it belongs
    to the whole table; empty where it is 1 for all of them.
    """

    module: str
    rows: int
    format: str
    names: tuple[str, ...]
    every: tuple[int, ...] = ()

    def entries(self) -> dict[str, int]:
        """How long the first dimension of every tensor must be, of those written by rows."""
        every = self.every or (1,) * len(self.names)
        pairs = zip(self.names, every, strict=True)
        return {name: -(-self.rows // rows) for name, rows in pairs if rows}


class GraphAudit(Frozen):
    """What an optimized graph was found to hold."""

    nodes: dict[str, int]
    int8_products: int
    packed_tables: int
    weight_bytes: int
