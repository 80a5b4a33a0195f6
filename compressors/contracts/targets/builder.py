"""The builder of a target, which builds engines from graphs, and its requests."""

from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import ConfigDict, Field, model_validator

from compressors.contracts.inputs import Frozen
from compressors.contracts.value_errors import value_error


class Profile(Frozen):
    """The shapes of one graph input: smallest, the one to optimize for, largest."""

    input: str
    low: tuple[int, ...]
    best: tuple[int, ...]
    high: tuple[int, ...]

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not len(self.low) == len(self.best) == len(self.high):
            raise value_error("profile_ranks_differ", input=self.input)
        steps = zip(self.low, self.best, self.high, strict=True)
        if not all(0 <= low <= best <= high for low, best, high in steps):
            raise value_error("profile_order", input=self.input)
        return self


class TableWeights(Frozen):
    """The ONNX initializers of one table.

    The first dimension of each is the table's rows, except for those in ``every``: there the given
    number of rows shares one entry, or, with 0, the tensor belongs to the whole table.
    """

    module: str
    rows: int = Field(ge=1)
    initializers: tuple[str, ...] = Field(min_length=1)
    every: dict[str, int] = Field(default_factory=dict)

    def entries(self, name: str, rows: int) -> int | None:
        """Return the first dimension of an initializer; None if it does not depend on rows."""
        every = self.every.get(name, 1)
        return -(-rows // every) if every else None


class BuildRequest(Frozen):
    """A request to build an engine. ``packed_bytes`` is the plan's bytes of all weights.

    ``sparse_layers`` are dense layers with two zeros among every four inputs: if there are any, the
    builder may use sparse kernels where it measures them as faster.
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
    """What every builder stores about an engine; a record may have more.

    Attributes:
        audit: the results of its audit, by name, as reports show them.
        capability: the compute capability on which it was built, if it runs only there.
    """

    model_config = ConfigDict(extra="ignore")

    audit: dict[str, Any]
    capability: str | None = None


class BuiltEngine(Protocol):
    """An engine that passed its audit."""

    @property
    def path(self) -> str:
        """Its file."""

    @property
    def bytes(self) -> int:
        """Size of the file."""

    @property
    def version(self) -> str:
        """Version of the library that built it."""

    def record(self, name: str) -> str:
        """Return its record as JSON with at least the fields of ``EngineRecord``.

        Args:
            name: the name of its file where it is stored.
        """


class Builder(Protocol):
    """Builds and audits engines. It is created with the target's name."""

    def version(self) -> str:
        """Return the version of the library that builds.

        Raises:
            Refused: it cannot build on this machine.
        """

    def build(self, request: BuildRequest, folder: Path) -> BuiltEngine:
        """Build an engine from an ONNX graph, audit it, and write it into ``folder``.

        Raises:
            Refused: the builder does not accept the graph, or the engine failed its audit.
            InfraError: the time limit passed, or the builder crashed.
        """
