"""How a lowered graph and its module disagree: the details of ``errors.ParityLost``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TensorDifference:
    """The first tensor of a graph whose values are not the module's.

    Attributes:
        name: the tensor's name in the graph, which is that of the node in the exported program.
        operator: the ONNX operator that computes it.
        module: the submodule that computes it, by its attribute path; empty for the network.
        source: file, line and code in the network; empty if it is not from there.
        place: where in the tensor the difference is largest.
        expected: the module's value there.
        found: the graph's value there.
        is_clear: whether it differs by more than the graph's formats explain; if not, it is the
            tensor that differs most.
    """

    name: str
    operator: str
    module: str
    source: str
    place: tuple[int, ...]
    expected: float
    found: float
    is_clear: bool = True

    def __str__(self) -> str:
        rank = "First tensor that differs" if self.is_clear else "Tensor that differs most"
        module = f" of {self.module!r}" if self.module else ""
        source = f", {self.source}" if self.source else ""
        place = f"[{', '.join(map(str, self.place))}]"
        return (
            f"{rank}: {self.name!r} ({self.operator}{module}{source}), at {place} "
            f"{self.expected:.6g} in the module and {self.found:.6g} in the graph."
        )


ParityCode = Literal["parity_shape", "parity_nan", "parity_limit", "parity_batch", "parity_run"]


@dataclass(frozen=True)
class ParityFailure:
    """How a graph and its module disagree.

    Attributes:
        code: ``parity_shape``: another number of scores; ``parity_nan``: NaN in other rows;
            ``parity_limit``: a difference over a limit; ``parity_batch``: ``side`` scores a row
            alone differently than among others; ``parity_run``: the graph does not run.
        target: the serving target whose form the graph has.
        graph: which graph of the model.
        rows_from: what the compared rows are: of the data, or edge cases.
        row: the number of the row that shows it best among the compared ones.
        component: where in the row's vector, for graphs that output vectors.
        inputs: what that row holds, shortened.
        expected: the module's score of that row, or the worst number of its vector; for
            ``parity_batch`` the score among others.
        found: the graph's score of that row; for ``parity_batch`` the score alone.
        measured: differences by their names, in the order of ``limits``.
        limits: the largest allowed of each.
        spread: the standard deviation of the module's scores.
        shapes: of the module's and the graph's output.
        side: ``network`` or ``graph``, for ``parity_batch``.
        reason: what the runtime reported, for ``parity_run``.
        rows: how many rows were compared.
        tensor: the first tensor that differs.
        is_exported_wrong: whether the program that torch.export traced differs from the module
            already, so that no operator of the graph is at fault.
    """

    code: ParityCode
    target: str
    graph: str = "model"
    rows_from: str = "the compared rows"
    row: int | None = None
    component: int | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    expected: float | None = None
    found: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    side: str = ""
    reason: str = ""
    rows: int = 0
    tensor: TensorDifference | None = None
    is_exported_wrong: bool = False

    def __str__(self) -> str:
        parts = [self._what(), self._where()]
        if self.is_exported_wrong:
            parts.append(
                "The program that torch.export traced computes this already, so forward does "
                "something that tracing fixes: leave Python control flow on tensor values and "
                "random numbers out of it."
            )
        if self.tensor is not None:
            parts.append(str(self.tensor))
        return " ".join(part for part in parts if part)

    def _what(self) -> str:
        graph = (
            f"{self.target} graph"
            if self.graph == "model"
            else (f"{self.target} graph {self.graph!r}")
        )
        match self.code:
            case "parity_shape":
                first, second = self.shapes or ((), ())
                return f"The module gives {first} scores, the {graph} {second}."
            case "parity_nan":
                return f"The module and the {graph} give NaN in different rows."
            case "parity_batch":
                who = "network" if self.side == "network" else graph
                return (
                    f"The {who} scores {self.rows} row(s) alone differently than among others, by "
                    f"up to {self.measured['largest']:.2g} (limit {self.limits['largest']:.2g}). "
                    f"A served score must not depend on the batch: leave batch statistics and "
                    f"branches on the batch size out of forward."
                )
            case "parity_run":
                return f"The {graph} does not run on {self.rows} rows: {self.reason}"
        sizes = ", ".join(
            f"{value:.2g} {name} (limit {self.limits[name]:.2g})"
            for name, value in self.measured.items()
        )
        return f"The {graph} is off by {sizes}, where scores spread by {self.spread:.2g}."

    def _where(self) -> str:
        if self.row is None:
            return ""
        inputs = ", ".join(f"{name}={value}" for name, value in self.inputs.items())
        scores = ""
        if self.expected is not None and self.found is not None:
            first, second = "by the module", "by the graph"
            if self.code == "parity_batch":
                first, second = "among others", "alone"
            scores = f": {self.expected:.6g} {first} and {self.found:.6g} {second}"
        number = "" if self.component is None else f", number {self.component} of its vector"
        return (
            f"Row {self.row} of {self.rows_from}{f' ({inputs})' if inputs else ''}{number}{scores}."
        )
