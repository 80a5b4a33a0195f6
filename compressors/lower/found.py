"""What lowering says about a graph. Plain values: reading a report needs no ONNX library."""

from compressors.contracts import Frozen


class TableInitializers(Frozen):
    """The stored tensors of one table in a graph, by name; the first dimension is its rows."""

    module: str
    rows: int
    format: str
    names: tuple[str, ...]


class GraphAudit(Frozen):
    """What an optimized graph was found to hold."""

    nodes: dict[str, int]
    int8_products: int
    packed_tables: int
    weight_bytes: int
