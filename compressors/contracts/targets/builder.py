"""The protocol of a builder, which builds engines from ONNX graphs, and types of its requests.

An engine is a file with a graph compiled by TensorRT. Its audit checks that it does not store
weights in a wider type than the plan of the compression says. "Refused" and "InfraError" are
exceptions of ``infra/errors``.
"""

from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import ConfigDict, Field, model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.value_errors import value_error


class Profile(Frozen):
    """The shapes of a graph input that an engine accepts: ``low`` to ``high``.

    The engine is optimized for the shape ``best``.
    """

    input: str
    low: tuple[int, ...]
    best: tuple[int, ...]
    high: tuple[int, ...]

    @model_validator(mode="after")
    def _require_ascending_shapes(self) -> Self:
        if not len(self.low) == len(self.best) == len(self.high):
            raise value_error("profile_ranks_differ", input=self.input)
        sizes = zip(self.low, self.best, self.high, strict=True)
        if not all(0 <= low <= best <= high for low, best, high in sizes):
            raise value_error("profile_order", input=self.input)
        return self


class TableWeights(Frozen):
    """The ONNX initializers of one table.

    Attributes:
        module: attribute path of the table.
        rows: number of rows of the table.
        initializers: names of the table's initializers in the graph.
        rows_per_entry: how many rows share one entry of an initializer's first dimension, by the
            name of the initializer; 0 if the initializer belongs to the whole table. Initializers
            that are not listed have one entry per row.
        multiplied: whether the graph has a matmul with the table, with or without lookups.
    """

    module: str
    rows: int = Field(ge=1)
    initializers: tuple[str, ...] = Field(min_length=1)
    rows_per_entry: dict[str, int] = Field(default_factory=dict)
    multiplied: bool = False

    def entries(self, name: str, rows: int) -> int | None:
        """Return the first dimension of an initializer if the table has ``rows`` rows.

        Returns None if the initializer belongs to the whole table.
        """
        rows_per_entry = self.rows_per_entry.get(name, 1)
        return -(-rows // rows_per_entry) if rows_per_entry else None


class BuildRequest(Frozen):
    """A request to build an engine.

    Attributes:
        target: name of the target.
        profiles: the shapes of each graph input.
        tables: the initializers of each table, for the audit.
        sparse_layers: dense layers in which two of every four weights are zero. If there are any,
            the builder may use sparse kernels for layers that they make faster.
        workspace_bytes: limit of the builder's scratch memory.
        packed_bytes: bytes of all weights according to the plan.
    """

    target: str
    onnx: str = Field(description="Path; external data is in the same folder.")
    profiles: tuple[Profile, ...] = ()
    tables: tuple[TableWeights, ...] = ()
    sparse_layers: tuple[str, ...] = ()
    workspace_bytes: int | None = Field(None, ge=0)
    packed_bytes: int = Field(ge=0)
    seconds: float = Field(gt=0, description="Limit for building and auditing together.")


class EngineRecord(Frozen):
    """The fields that the record of every engine has; builders may add fields.

    A record describes an engine and is stored next to it as JSON.

    Attributes:
        audit: the results of the engine's audit, by name, as reports show them.
        capability: the compute capability on which it was built, if it runs only there.
    """

    model_config = ConfigDict(extra="ignore")

    audit: dict[str, Any]
    capability: str | None = None


class BuiltEngine(Protocol):
    """An engine that passed its audit."""

    @property
    def path(self) -> str:
        """Path of the engine's file."""

    @property
    def bytes(self) -> int:
        """Size of the engine's file."""

    @property
    def version(self) -> str:
        """Version of the library that built it."""

    def record(self, name: str) -> str:
        """Return the engine's record as JSON with at least the fields of ``EngineRecord``.

        Args:
            name: the name of the engine's file where it is stored.
        """


class Builder(Protocol):
    """Builds and audits engines. A builder is created with the target's name as its argument."""

    def version(self) -> str:
        """Return the version of the library that builds engines.

        Raises:
            Refused: the library cannot build on this machine.
        """

    def build(self, request: BuildRequest, folder: Path) -> BuiltEngine:
        """Build an engine from an ONNX graph, audit it, and write it into ``folder``.

        Raises:
            Refused: the builder does not accept the graph, or the engine failed its audit.
            InfraError: the time limit passed, or the builder crashed.
        """
