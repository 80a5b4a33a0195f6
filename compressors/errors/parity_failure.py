"""Details of a failed parity check, for the error ``ParityLost``.

A parity check compares the scores of an exported graph with those of the torch module from which it
was exported (*the module*).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TensorDifference:
    """The first tensor of a graph whose values differ from the module's.

    Attributes:
        name: the tensor's name in the graph, which the node of the torch.export program has, too.
        operator: the ONNX operator that computes the tensor.
        submodule: attribute path of the submodule that computes the tensor; empty for the module.
        source: file, line and code of the module's class; empty if only libraries call the
            operator.
        place: index at which the difference is largest.
        expected: the module's value at that index.
        found: the graph's value at that index.
        is_clear: True if the difference is larger than the rounding of the target's number formats.
            False if no tensor has such a difference, and this is the one that differs most.
    """

    name: str
    operator: str
    submodule: str
    source: str
    place: tuple[int, ...]
    expected: float
    found: float
    is_clear: bool = True

    def __str__(self) -> str:
        label = "First tensor that differs" if self.is_clear else "Tensor that differs most"
        module = f" of {self.submodule!r}" if self.submodule else ""
        source = f", {self.source}" if self.source else ""
        place = f"[{', '.join(map(str, self.place))}]"
        return (
            f"{label}: {self.name!r} ({self.operator}{module}{source}), at {place} "
            f"{self.expected:.6g} in the module and {self.found:.6g} in the graph."
        )


ParityCode = Literal[
    "parity_shape", "parity_nan", "parity_limit", "parity_operator", "parity_batch", "parity_run"
]


@dataclass(frozen=True)
class ParityFailure:
    """The result of a failed parity check between a graph and its module.

    Attributes:
        code: ``parity_shape``: the outputs have different shapes; ``parity_nan``: NaN is in
            different rows; ``parity_limit``: a difference exceeds its limit; ``parity_operator``:
            an operator gives another result than torch for the same inputs; ``parity_batch``: the
            score of a row depends on the batch; ``parity_run``: the graph does not run.
        target: name of the serving target for which the graph was exported.
        graph: name of the graph.
        rows_from: the source of the compared rows: the data, or generated edge cases.
        row: index of the row with the largest difference.
        component: index in that row's vector, for graphs that output vectors.
        output: name of the output that differs, for graphs with several.
        inputs: the inputs of that row, shortened, by name.
        expected: the module's score of that row, or the component of its vector; for
            ``parity_batch`` the score in a large batch.
        found: the graph's score of that row; for ``parity_batch`` the score in a small batch.
        measured: the differences by the names of ``limits``.
        limits: the largest allowed differences: ``largest`` for ``parity_operator`` and
            ``parity_batch``, and names such as ``root mean square`` for ``parity_limit``.
        spread: standard deviation of the module's scores.
        by_rounding: root mean square of how much rounding errors change the module's scores; 0 if
            it was not measured. For ``parity_limit``.
        shapes: shapes of the module's and the graph's output.
        side: ``network`` (the module) or ``graph``: which of them has scores that depend on the
            batch, for ``parity_batch``.
        reason: the runtime's error message, for ``parity_run``.
        rows: number of compared rows.
        tensor: the first tensor that differs.
        is_exported_wrong: whether the program of torch.export already differs from the module; then
            tracing is the cause, not an operator of the graph.
    """

    code: ParityCode
    target: str
    graph: str = "model"
    rows_from: str = "the compared rows"
    row: int | None = None
    component: int | None = None
    output: str = ""
    inputs: Mapping[str, str] = field(default_factory=dict)
    expected: float | None = None
    found: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0
    by_rounding: float = 0.0
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    side: str = ""
    reason: str = ""
    rows: int = 0
    tensor: TensorDifference | None = None
    is_exported_wrong: bool = False

    def __str__(self) -> str:
        parts = [self._describe_failure(), self._describe_row()]
        if self.is_exported_wrong:
            parts.append(
                "The program that torch.export traced already computes the wrong score. Tracing "
                "fixes Python control flow on tensor values and random numbers: remove both from "
                "forward."
            )
        if self.tensor is not None:
            parts.append(str(self.tensor))
        return " ".join(part for part in parts if part)

    def _describe_failure(self) -> str:
        graph = (
            f"{self.target} graph"
            if self.graph == "model"
            else (f"{self.target} graph {self.graph!r}")
        )
        if self.output:
            graph += f", output {self.output!r},"
        match self.code:
            case "parity_shape":
                first, second = self.shapes or ((), ())
                return f"Expected scores of shape {first} from the {graph}, got {second}."
            case "parity_nan":
                return f"The module and the {graph} give NaN in different rows."
            case "parity_batch":
                scorer = "network" if self.side == "network" else graph
                return (
                    f"The {scorer} scores {self.rows} row(s) differently alone than among others, "
                    f"by up to {self.measured['largest']:.2g} "
                    f"(limit {self.limits['largest']:.2g}). "
                    f"A served score must not depend on the batch: leave batch statistics, padded "
                    f"positions and branches on the batch size out of forward."
                )
            case "parity_operator":
                return (
                    f"An operator of the {graph} gives another result than torch for the same "
                    f"inputs. The scores differ by {self.measured['largest']:.2g}."
                )
            case "parity_run":
                return f"The {graph} does not run on {self.rows} rows: {self.reason}"
        sizes = ", ".join(
            f"{value:.2g} {name} (limit {self.limits[name]:.2g})"
            for name, value in self.measured.items()
        )
        rounding = (
            f" Rounding errors change the module's scores by {self.by_rounding:.2g} (root mean "
            f"square), which explains only a part of the difference."
            if self.by_rounding
            else ""
        )
        return (
            f"The scores of the {graph} differ by {sizes}; the standard deviation of scores is "
            f"{self.spread:.2g}.{rounding}"
        )

    def _describe_row(self) -> str:
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
