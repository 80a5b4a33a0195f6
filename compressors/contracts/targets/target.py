"""The class ``Target``: the properties of a serving target.

A serving target is a runtime that serves compressed models. An order is a request to compress a
model for some targets. An audit checks that what is served stores weights in the planned formats.
"""

from dataclasses import dataclass
from typing import Any, Literal

from compressors.contracts.named_object import named_object
from compressors.contracts.targets.builder import Builder
from compressors.contracts.targets.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The engines that a target's builder writes, one for each graph.

    Attributes:
        builder: the class of the builder, or its ``module:class``, which is imported at first use.
            Its protocol is in ``builder.py``; it is created with the target's name.
        suffix: file suffix of an engine.
        is_bound_to_gpu: whether an engine runs only on GPUs of the compute capability on which it
            was built.
    """

    builder: str | type
    suffix: str
    is_bound_to_gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class TritonBackend:
    """How Triton serves the files of a target.

    Attributes:
        platform: Triton's name of the backend, in a model's configuration.
        instance_kind: Triton's name of the device on which an instance runs.
        suffix: end of the Triton model's name; empty for none. No two targets may have the same.
        has_threads: whether the configuration sets the number of threads of one call.
    """

    platform: str
    instance_kind: Literal["KIND_CPU", "KIND_GPU"]
    suffix: str = ""
    has_threads: bool = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """Properties of a serving target.

    Attributes:
        name: name in orders and reports.
        label: name in sentences.
        lowering: the class that defines how a model is exported as a graph for this target and how
            the graph is audited, or its ``module:class``, which is imported at first use. Its
            protocol is ``LoweringTarget`` in ``compressors/lower/targets/target.py``; it is created
            without arguments.
        engines: the engines that are built from the graphs; None if the graphs themselves are
            served.
        runtime: the class of the runtime that scores and times what is served, or its
            ``module:class``. Its protocol is in ``runtime.py``; it is created without arguments. A
            target with a runtime is measured and its limits are judged; one without is only built
            and audited.
        triton: how Triton serves the target's files; None if Triton cannot.
        libraries: Python distributions whose version can change results.
        title: title in Prefect's form for orders; empty if it is the label.
        description: description in Prefect's form for orders.
        is_default: whether orders require the target by default. True for exactly one target.
        is_always_stored: whether a stored order contains the target even if it is off. True only
            for the targets of the first version of recpress: digests of its orders include all of
            these targets, and must not change.
    """

    name: str
    label: str
    lowering: str | type
    engines: Engines | None = None
    runtime: str | type | None = None
    triton: TritonBackend | None = None
    libraries: tuple[str, ...] = ()
    title: str = ""
    description: str = ""
    is_default: bool = False
    is_always_stored: bool = False

    @property
    def field(self) -> str:
        """Name of the target's field in an order."""
        return self.name.replace("-", "_")

    @property
    def is_built(self) -> bool:
        """Whether engines are built from the target's graphs."""
        return self.engines is not None

    @property
    def is_measured(self) -> bool:
        """Whether the target has a runtime that scores and times graphs or engines."""
        return self.runtime is not None

    def name_served_file(self, graph: str) -> str:
        """Return the name of the file that is served for a graph; large weights are next to it."""
        return f"{graph}{'.onnx' if self.engines is None else self.engines.suffix}"

    def load_lowering(self) -> Any:
        """Create the object that the attribute ``lowering`` describes."""
        return named_object(self.lowering)()

    def load_builder(self) -> Builder | None:
        """Create the builder of engines; None if the graphs are served."""
        if self.engines is None:
            return None
        builder: Builder = named_object(self.engines.builder)(self.name)
        return builder

    def load_runtime(self) -> Runtime | None:
        """Create the runtime; None if the target has none."""
        if self.runtime is None:
            return None
        runtime: Runtime = named_object(self.runtime)()
        return runtime
