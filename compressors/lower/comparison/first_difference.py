"""Find the first tensor of a graph that differs from the module's, when their scores differ.

Two programs compute one row: the program that torch.export traced, node by node, and the ONNX
graph, with every intermediate value as an output. A value of the graph has the name of the traced
node from which it was translated. Values are therefore compared by name, in the graph's order.

Each node of the traced program can also read the graph's values in place of its own. A value then
differs only if its own operator is translated wrongly, not because of earlier differences.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from compressors.errors.parity_failure import TensorDifference

ROUNDING = 1e-4
"""Differences up to this, relative to a tensor's largest absolute value, are not clear.

Float32 sums depend on the order of their terms. A difference that is not clear is reported only if
no tensor has a clear one.
"""
CANCELLATION = 1e-6
"""Rounding error that a sum may have, relative to the largest absolute value of its operands."""
SUMMING_OPERATORS = {
    "add", "sub", "rsub", "sum", "mean", "mm", "bmm", "addmm", "matmul", "linear", "cumsum", "var",
    "var_mean", "std", "native_layer_norm", "layer_norm",
}  # fmt: skip
"""Names of torch operators that sum, so that large operands can cancel to a small result."""


class GraphValue(NamedTuple):
    """One value that the graph computed, and the ONNX operator that computed it."""

    name: str
    operator: str
    value: NDArray[Any]


Run = Callable[[Mapping[str, Tensor]], Sequence[GraphValue]]
"""Runs a graph and returns all of its values in topological order."""


class TracedValues(NamedTuple):
    """The values that a traced program computed, by node, and its outputs."""

    values: dict[fx.Node, Tensor]
    outputs: tuple[Tensor, ...]


def run_traced(
    program: torch.export.ExportedProgram,
    inputs: Sequence[Tensor],
    instead: Mapping[str, NDArray[Any]] = MappingProxyType({}),
) -> TracedValues:
    """Run a traced program node by node and record the value of each node.

    Args:
        program: the program from which the graph was translated.
        inputs: the graph's inputs, in the graph's order.
        instead: by the name of a node, the value that later nodes read in place of its own.
    """
    remaining = iter(inputs)
    arguments: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            arguments.append(next(remaining))
        elif spec.target in program.state_dict:
            arguments.append(program.state_dict[str(spec.target)])
        else:
            arguments.append(program.constants[str(spec.target)])
    values: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and n.op == "call_function":
                values[n] = value
                other = instead.get(n.name)
                if other is not None and other.shape == tuple(value.shape):
                    return torch.from_numpy(other).to(value.dtype)
            return value

    with torch.no_grad():
        outputs = Recorder(program.graph_module).run(*arguments)
    return TracedValues(values, tuple(outputs))


def first_difference(
    traced: TracedValues,
    graph_values: Sequence[GraphValue],
    outputs: Sequence[str],
    allowed: float,
) -> TensorDifference | None:
    """Return the first value of a graph that differs from the traced program's.

    Args:
        traced: the values that the program computed.
        graph_values: the graph's values in topological order.
        outputs: the names of the graph's outputs.
        allowed: largest allowed difference, relative to a tensor's largest absolute value.

    Returns:
        The first value that differs clearly: by more than ``allowed`` and ``ROUNDING``. If there
        is none, the value that differs most; None if all are equal.
    """
    nodes = {node.name: node for node in traced.values}
    all_nodes = next(iter(nodes.values())).graph.nodes
    (result,) = [node for node in all_nodes if node.op == "output"]
    nodes |= {
        name: scores
        for name, scores in zip(outputs, result.args[0], strict=True)
        if isinstance(scores, fx.Node) and scores in traced.values
    }
    worst: tuple[float, TensorDifference] | None = None
    for value in graph_values:
        node = nodes.get(value.name)
        if node is None:
            continue
        expected = traced.values[node].detach()
        if tuple(expected.shape) != value.value.shape or not expected.numel():
            continue
        relative, position = _find_largest_difference(node, expected, value.value, traced.values)
        if not relative or (worst is not None and relative <= worst[0]):
            continue
        is_clear = relative > max(allowed, ROUNDING)
        difference = TensorDifference(
            name=value.name,
            operator=value.operator,
            submodule=_find_module_path(node),
            source=_find_source_line(node),
            place=position,
            expected=float(expected[position]),
            found=float(value.value[position]),
            is_clear=is_clear,
        )
        if is_clear:
            return difference
        worst = relative, difference
    return None if worst is None else worst[1]


def _find_largest_difference(
    node: fx.Node, expected: Tensor, actual: NDArray[Any], values: Mapping[fx.Node, Tensor]
) -> tuple[float, tuple[int, ...]]:
    """Return the largest difference, relative to the largest absolute value, and its position."""
    first, second = expected.double().numpy(), actual.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.abs(first - second)
    differences[(first == second) | (np.isnan(first) & np.isnan(second))] = 0.0
    differences[np.isnan(differences)] = np.inf  # one value is NaN, or infinities differ in sign
    # The target of a node is, for example, ``aten.add.Tensor``.
    if str(node.target).split(".")[1:2] and str(node.target).split(".")[1] in SUMMING_OPERATORS:
        operands = [values[item] for item in node.all_input_nodes if item in values]
        rounding = max(
            (_find_largest_finite(item.double().numpy()) for item in operands), default=0.0
        )
        differences = np.maximum(differences - CANCELLATION * rounding, 0.0)
    position = tuple(
        int(number) for number in np.unravel_index(int(np.argmax(differences)), differences.shape)
    )
    largest = float(differences[position])
    magnitude = max(_find_largest_finite(first), _find_largest_finite(second))
    is_relative = magnitude and np.isfinite(largest)
    return (largest / magnitude if is_relative else largest), position


def _find_largest_finite(values: NDArray[np.float64]) -> float:
    """Return the largest finite absolute value; 0 if there is none."""
    finite = values[np.isfinite(values)]
    return float(np.abs(finite).max(initial=0.0))


def _find_module_path(node: fx.Node) -> str:
    """Return the path of the innermost submodule that a node belongs to; empty for the network."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0]
    return str(path).removeprefix("model").removeprefix(".")


def _find_source_line(node: fx.Node) -> str:
    """Return file, line and code that call a node, without frames of torch and of this package.

    Empty if the node is not called from the network's code.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', node.stack_trace or "")
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    for path, line, code in reversed(frames):
        if not path.startswith(libraries):
            return f"{Path(path).name} line {line}: {code.strip()}"
    return ""
