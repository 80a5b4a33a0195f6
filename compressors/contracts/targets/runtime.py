"""The runtime of a target, which scores and times what is served, and the machine it runs on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from compressors.contracts.inputs import Frozen

if TYPE_CHECKING:  # the contracts are read without these libraries
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]


class Session(Protocol):
    """One served graph or engine, loaded."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of its inputs."""

    def scores(self, inputs: "Mapping[str, NDArray[Any]]") -> "FloatArray":
        """Return scores, float32 ``(rows,)``, or vectors, float32 ``(rows, dim)``.

        NaN where the graph's out-of-range policy refuses a row.

        Raises:
            InfraError: the runtime failed on these inputs.
        """

    def bound(self, inputs: "Mapping[str, NDArray[Any]]") -> "Callable[[], FloatArray]":
        """Return a function that evaluates ``scores`` on inputs stored where the runtime reads.

        A call returns after the result is computed, so that its time is the latency.

        Raises:
            InfraError: the runtime does not accept these inputs.
        """


class Runtime(Protocol):
    """Loads what a target serves."""

    def version(self) -> str:
        """Return the version of the runtime's library."""

    def open(self, path: Path, threads: int) -> Session:
        """Load a graph or an engine.

        Args:
            path: the file that is served; large weights of a graph are next to it.
            threads: number of threads of one call.

        Raises:
            Refused: the runtime does not accept the file.
        """

    def optimized_graph(self, path: Path) -> "onnx.GraphProto | None":
        """Return a graph as the runtime optimized it; None if the runtime does not show it.

        Large weights are not loaded.

        Raises:
            Refused: the runtime does not accept the graph.
        """


UNNAMED_RUNTIME = "ONNX Runtime"
"""The runtime of documents that do not name it: they have its version as ``onnxruntime``."""


class Machine(Frozen):
    """The machine on which a latency was measured, and the runtime.

    The first runtime is stored as earlier versions did, because records of results are compared
    with their stored bytes.
    """

    processor: str
    cores: int
    system: str
    runtime: str = Field(description="The target's name in sentences, such as ONNX Runtime.")
    version: str = Field(description="Of the runtime's library.")
    threads: int
    int8_dot: bool = Field(description="VNNI or its like: int8 products are exact and fast.")

    @model_validator(mode="before")
    @classmethod
    def _read_version_of_one_runtime(cls, data: Any) -> Any:
        """Read a document that does not name the runtime."""
        if not isinstance(data, Mapping) or "onnxruntime" not in data:
            return data
        others = {name: value for name, value in data.items() if name != "onnxruntime"}
        return {**others, "runtime": UNNAMED_RUNTIME, "version": data["onnxruntime"]}

    @model_serializer(mode="wrap")
    def _write_version_of_one_runtime(
        self, serialize: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        if self.runtime != UNNAMED_RUNTIME:
            return fields
        return {
            ("onnxruntime" if name == "version" else name): value
            for name, value in fields.items()
            if name != "runtime"
        }
