"""The protocol of a runtime, which scores and times graphs or engines, and the type ``Machine``.

"Refused" and "InfraError" are exceptions of ``infra/errors``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from compressors.contracts.frozen import Frozen

if TYPE_CHECKING:  # importing the contracts must not import these libraries
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    FloatArray = NDArray[np.float32]


class Session(Protocol):
    """A loaded graph or engine, which computes scores."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs."""

    def scores(self, inputs: "Mapping[str, NDArray[Any]]") -> "FloatArray":
        """Return scores, float32 ``(rows,)``, or vectors of a tower, float32 ``(rows, dim)``.

        Several outputs are the columns of one array, float32 ``(rows, outputs)``, in the graph's
        order.

        The graph returns NaN for a row that it refuses, such as one with an id out of range.

        Raises:
            InfraError: the runtime failed on these inputs.
        """

    def bind(
        self, inputs: "Mapping[str, NDArray[Any]]"
    ) -> "Callable[[], FloatArray | tuple[FloatArray, ...]]":
        """Return a function that computes the scores of fixed inputs, to measure latency.

        The inputs are copied to the runtime's memory beforehand. A call of the function returns
        when the result is computed: one array, or a tuple of the outputs if there are several.

        Raises:
            InfraError: the runtime does not accept these inputs.
        """


class Runtime(Protocol):
    """Loads the graphs or engines that a target serves."""

    def version(self) -> str:
        """Return the version of the runtime's library."""

    def open(self, path: Path, threads: int) -> Session:
        """Load a graph or an engine.

        Args:
            path: the served file; large weights of a graph are in files next to it.
            threads: number of threads of one call.

        Raises:
            Refused: the runtime does not accept the file.
        """

    def optimized_graph(self, path: Path) -> "onnx.GraphProto | None":
        """Return a graph as the runtime optimized it, without the data of large weights.

        Returns None if the runtime cannot show its optimized graph.

        Raises:
            Refused: the runtime does not accept the graph.
        """


UNNAMED_RUNTIME = "ONNX Runtime"
"""The runtime of documents that do not name one.

Documents of earlier versions have only the key ``onnxruntime``, with the version.
"""


class Machine(Frozen):
    """The machine on which a latency was measured, and the runtime.

    A measurement with ONNX Runtime is stored in the form of earlier versions, without ``runtime``
    and with the version as ``onnxruntime``, because the bytes of stored results must not change.
    """

    processor: str
    cores: int
    system: str
    runtime: str = Field(description="The target's name in sentences, such as ONNX Runtime.")
    version: str = Field(description="Version of the runtime's library.")
    threads: int
    int8_dot: bool = Field(
        description="Has VNNI or a similar instruction: int8 products are exact and fast."
    )

    @model_validator(mode="before")
    @classmethod
    def _read_unnamed_runtime(cls, data: Any) -> Any:
        """Convert a document in the form of earlier versions."""
        if not isinstance(data, Mapping) or "onnxruntime" not in data:
            return data
        others = {name: value for name, value in data.items() if name != "onnxruntime"}
        return {**others, "runtime": UNNAMED_RUNTIME, "version": data["onnxruntime"]}

    @model_serializer(mode="wrap")
    def _write_unnamed_runtime(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write a measurement with ONNX Runtime in the form of earlier versions."""
        fields: dict[str, Any] = serialize(self)
        if self.runtime != UNNAMED_RUNTIME:
            return fields
        return {
            ("onnxruntime" if name == "version" else name): value
            for name, value in fields.items()
            if name != "runtime"
        }
