"""Documents that describe exported graphs and engines: their types, and how to read them."""

import operator
from pathlib import Path

from pydantic import Field

from compressors.contracts import Frozen
from compressors.contracts.targets import engine_suffixes
from compressors.lower.findings import GraphAudit, Parity, TableInitializers
from infra.bundle.json_reader import read_document

TOKENIZER_SUFFIX = ".tokenizer.json"
"""Last part of the name of a tokenizer's file next to graphs or engines."""


class BatchSizes(Frozen):
    """Batch sizes that an engine accepts: smallest, the one it is optimized for, largest."""

    low: int
    best: int
    high: int


class GraphInput(Frozen):
    """One input of a graph.

    Attributes:
        name: name of the input.
        dtype: dtype of the tensor, such as ``int64``.
        shape: shape without the first dimension: the rows, or the ids of all rows of a jagged bag.
        longest: maximum number of ids per row of a jagged bag; None for other inputs.
        shortest: smallest length of a sequence, whose longest is ``shape[0]``; None for others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    longest: int | None = None
    shortest: int | None = None


class LoweredGraph(Frozen):
    """One exported graph and the results of its checks.

    Attributes:
        name: ``model``; ``query`` or ``item`` for the towers of a retrieval model; ``encoder`` for
            both towers if they are one module.
        inputs: the inputs, in order.
        output: ``score`` or ``vector``: what the graph computes, and the name of its only output.
        several_outputs: the names of the outputs, if there are several.
        width: length of the output vectors; None if the output is one number per row.
        rows_parity: largest differences from the torch module on rows of data.
        edge_parity: the same on synthetic edge cases, such as ids out of range.
        audit: quantized operators in the graph as the runtime optimizes it; None if no step
            changed the model, or if no runtime serves the graph itself.
        tables: the graph's constants with the weights of each table.
        packed_bytes: bytes of the weights in this graph, as compressed, each counted once.
        sparse_layers: layers with 2:4 zeros (two zeros among every four weights of an output).
    """

    name: str
    inputs: tuple[GraphInput, ...]
    output: str
    several_outputs: tuple[str, ...] = Field((), exclude_if=operator.not_)
    width: int | None = None
    rows_parity: Parity
    edge_parity: Parity
    audit: GraphAudit | None
    tables: tuple[TableInitializers, ...]
    packed_bytes: int
    sparse_layers: tuple[str, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs, in order."""
        return self.several_outputs or (self.output,)

    @property
    def file(self) -> str:
        """Name of the graph's file; large weights are in separate files next to it."""
        return f"{self.name}.onnx"


class TextInput(Frozen):
    """How a client computes inputs of a graph from texts.

    Attributes:
        column: the column of the data with these texts.
        graph: name of the graph.
        tokenizer: file of the tokenizer, next to the graph. It truncates texts and pads them to the
            longest of a batch.
        ids: name of the graph's input with the token ids.
        mask: name of the input with 1 at tokens and 0 at padding; None if there is none.
        token_types: name of the input with the token types; None if there is none.
        lengths: name of the input with the number of tokens of each text; None if there is none.
        positions: name of the input with the positions of the tokens; None if there is none.
        first_position: position of the first token.
    """

    column: str
    graph: str
    tokenizer: str
    ids: str
    mask: str | None = None
    token_types: str | None = None
    lengths: str | None = None
    positions: str | None = None
    first_position: int = 0


class Lowering(Frozen):
    """Contents of ``lowering.json``, which is stored next to the graphs of a model.

    Attributes:
        target: name of the target.
        name: ``name@version`` of the bundle.
        graphs: one graph ``model``; for a retrieval model ``query``, then ``item``, or only
            ``encoder``. A request runs only the first graph; item vectors are computed before.
        packed_bytes: bytes of the model's weights, as compressed. A tensor that two graphs read
            counts once, as in plans; in ``served_packed_bytes`` it counts twice.
        repeated_bytes: the difference of these two numbers.
        texts: how clients compute the inputs that are token ids; empty without such inputs.
    """

    target: str
    name: str
    graphs: tuple[LoweredGraph, ...] = Field(min_length=1)
    packed_bytes: int
    repeated_bytes: int = 0
    texts: tuple[TextInput, ...] = Field((), exclude_if=operator.not_)

    @property
    def served_packed_bytes(self) -> int:
        """Bytes of the weights in all graphs, as compressed, counted in each graph."""
        return sum(graph.packed_bytes for graph in self.graphs)


def build_record(graph: str) -> str:
    """Return the name of the file next to an engine that describes its build and its audit."""
    return "build.json" if graph == "model" else f"{graph}.build.json"


def read_lowering(folder: Path) -> Lowering:
    """Read ``lowering.json`` in a folder of graphs or engines."""
    return read_document(Lowering, folder / "lowering.json")


def served_bytes(folder: Path) -> int:
    """Return the bytes of the files that a target loads: all engines, or all graphs with weights.

    A tensor that two graphs read is in both files and counts twice.
    """
    suffixes = engine_suffixes()
    engines = [path for path in folder.iterdir() if path.suffix in suffixes]
    return sum(path.stat().st_size for path in engines or folder.glob("*.onnx*"))
