"""What a serving target declares."""

from dataclasses import dataclass
from typing import Any, Literal

from compressors.contracts.named_object import named_object
from compressors.contracts.targets.builder import Builder
from compressors.contracts.targets.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Engines:
    """The engines that a target's builder writes, one for each graph.

    Attributes:
        builder: ``module:class`` of the builder, imported when first used, or the class. Its
            protocol is in ``builder.py``; it is created with the target's name.
        suffix: suffix of an engine's file.
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
        platform: platform in a model's configuration.
        instance_kind: on what an instance runs.
        suffix: end of the Triton model's name; empty for none. Two targets have different ones.
        has_threads: whether the configuration has the number of threads of one call.
    """

    platform: str
    instance_kind: Literal["KIND_CPU", "KIND_GPU"]
    suffix: str = ""
    has_threads: bool = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """Properties of a runtime by which results are served.

    Attributes:
        name: name in orders and reports.
        label: name in sentences.
        lowering: ``module:class`` of translations, stored types, passes, tolerances and audit,
            imported when first used, or the class. Its protocol is ``LoweringTarget`` in
            ``compressors/lower/targets/target.py``; it is created without arguments.
        engines: the engines that are built from the graphs; None if the graphs are served.
        runtime: ``module:class`` of the runtime that scores and times what is served, or the class.
            Its protocol is in ``runtime.py``; it is created without arguments. With a runtime the
            target is measured and its limits are judged; without, it is built and audited.
        triton: how Triton serves it; None if Triton cannot.
        libraries: distributions whose version can change results.
        title: title in the form of an order; empty for the label.
        description: description in the form of an order.
        is_default: whether it is required by an order that does not name it. One target is.
        is_always_stored: whether orders store it if it is off, as the digests of earlier orders
            contain it. Not for new targets, which would change those digests.
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
        """Its field in an order."""
        return self.name.replace("-", "_")

    @property
    def is_built(self) -> bool:
        """Whether its graphs are built to engines."""
        return self.engines is not None

    @property
    def is_measured(self) -> bool:
        """Whether its runtime scores and times the result, so that limits are judged."""
        return self.runtime is not None

    def served_file(self, graph: str) -> str:
        """Return the name of the file that is served for a graph; large weights are next to it."""
        return f"{graph}{'.onnx' if self.engines is None else self.engines.suffix}"

    def load_lowering(self) -> Any:
        """Return the object of ``lowering``."""
        return named_object(self.lowering)()

    def load_builder(self) -> Builder | None:
        """Return the builder of its engines; None if the graphs are served."""
        if self.engines is None:
            return None
        builder: Builder = named_object(self.engines.builder)(self.name)
        return builder

    def load_runtime(self) -> Runtime | None:
        """Return its runtime; None if it has none."""
        if self.runtime is None:
            return None
        runtime: Runtime = named_object(self.runtime)()
        return runtime
