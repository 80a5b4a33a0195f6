"""Find the first tensor of a graph that differs from the module's; used when parity fails.

The program that torch.export traced runs node by node on the failing row, and the graph runs with
every intermediate value as an output. A graph value has the name of the traced node that it was
translated from, also if that node is the custom op of a packed table or layer. Values are compared
by name, in the graph's order.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from compressors.errors.parity_failure import TensorDifference

ROUNDING = 1e-4
"""Smallest difference that counts, relative to a tensor's size: float32 sums vary in order."""
CANCELLED = 1e-6
"""Rounding error that a sum may have, relative to the size of its operands."""
SUMS = {
    "add", "sub", "rsub", "sum", "mean", "mm", "bmm", "addmm", "matmul", "linear", "cumsum", "var",
    "var_mean", "std", "native_layer_norm", "layer_norm",
}  # fmt: skip


class GraphValue(NamedTuple):
    """One value that the graph computed, and the ONNX operator that computed it."""

    name: str
    operator: str
    value: NDArray[Any]


Run = Callable[[Mapping[str, Tensor]], Sequence[GraphValue]]
"""Runs a graph and returns all of its values in topological order."""


class Traced(NamedTuple):
    """What the traced program computed: values by node, and its output."""

    values: dict[fx.Node, Tensor]
    output: Tensor


def run_traced(program: torch.export.ExportedProgram, inputs: Sequence[Tensor]) -> Traced:
    """Run a traced program node by node.

    Args:
        program: the program from which the graph was translated.
        inputs: the graph's inputs, in its order.
    """
    given = iter(inputs)
    arguments: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind == InputKind.USER_INPUT:
            arguments.append(next(given))
        elif spec.target in program.state_dict:
            arguments.append(program.state_dict[str(spec.target)])
        else:
            arguments.append(program.constants[str(spec.target)])
    values: dict[fx.Node, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and n.op == "call_function":
                values[n] = result
            return result

    with torch.no_grad():
        output = Recorder(program.graph_module).run(*arguments)
    return Traced(values, output[0])


def first_difference(
    traced: Traced, found: Sequence[GraphValue], output: str, allowed: float
) -> TensorDifference | None:
    """The first value of a graph that differs from the traced program's by more than allowed.

    Args:
        traced: the values that the program computed.
        found: the graph's values in topological order.
        output: the name of the graph's output.
        allowed: how far a tensor may differ, as a share of its largest number.

    Returns:
        The first such value. If there is none, the value that differs most; None if all are equal.
    """
    nodes = {node.name: node for node in traced.values}
    (result,) = [node for node in next(iter(nodes.values())).graph.nodes if node.op == "output"]
    last = result.args[0][0]
    if isinstance(last, fx.Node) and last in traced.values:
        nodes[output] = last
    worst: tuple[float, TensorDifference] | None = None
    for value in found:
        node = nodes.get(value.name)
        if node is None:
            continue
        expected = traced.values[node].detach()
        if tuple(expected.shape) != value.value.shape or not expected.numel():
            continue
        share, place = _share(node, expected, value.value, traced.values)
        if not share or (worst is not None and share <= worst[0]):
            continue
        is_clear = share > max(allowed, ROUNDING)
        difference = TensorDifference(
            name=value.name,
            operator=value.operator,
            module=_module(node),
            source=_source(node),
            place=place,
            expected=float(expected[place]),
            found=float(value.value[place]),
            is_clear=is_clear,
        )
        if is_clear:
            return difference
        worst = share, difference
    return None if worst is None else worst[1]


def _share(
    node: fx.Node, expected: Tensor, found: NDArray[Any], values: Mapping[fx.Node, Tensor]
) -> tuple[float, tuple[int, ...]]:
    """The largest difference, relative to the tensor's largest value, and its position."""
    first, second = expected.double().numpy(), found.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(first - second)
    gap[(first == second) | (np.isnan(first) & np.isnan(second))] = 0.0
    gap[np.isnan(gap)] = np.inf  # NaN or another infinity on one side
    if str(node.target).split(".")[1:2] and str(node.target).split(".")[1] in SUMS:
        operands = [values[item] for item in node.all_input_nodes if item in values]
        noise = max((_size(item.double().numpy()) for item in operands), default=0.0)
        gap = np.maximum(gap - CANCELLED * noise, 0.0)
    place = tuple(int(number) for number in np.unravel_index(int(np.argmax(gap)), gap.shape))
    largest = float(gap[place])
    size = max(_size(first), _size(second))
    return (largest / size if size and np.isfinite(largest) else largest), place


def _size(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.abs(finite).max(initial=0.0))


def _module(node: fx.Node) -> str:
    """The innermost submodule of the network that a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()), ("",))[0]
    return str(path).removeprefix("model").removeprefix(".")


def _source(node: fx.Node) -> str:
    """File, line and code in the network's forward, without frames of torch and packed modules."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', node.stack_trace or "")
    libraries = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    for path, line, code in reversed(frames):
        if not path.startswith(libraries):
            return f"{Path(path).name} line {line}: {code.strip()}"
    return ""
