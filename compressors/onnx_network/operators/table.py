"""The list of the ONNX operators that a network from an ONNX file may have."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from compressors.onnx_network.operators.elementwise import ELEMENTWISE
from compressors.onnx_network.operators.layout import LAYOUT, Indices
from compressors.onnx_network.operators.recurrent import RECURRENT
from compressors.onnx_network.operators.reductions import REDUCTIONS
from compressors.onnx_network.operators.sizes import SIZE_OPERATORS, Sizes, shape, size

DEVICE = "device"


@dataclass(frozen=True)
class Operator:
    """One ONNX operator.

    Attributes:
        function: computes its outputs: a tensor, or a tuple of them.
        sizes: positions of the inputs that are integers of a shape, not tensors.
        indices: positions of the inputs that may be either.
        attributes: names of the attributes that the function accepts.
        needs_device: whether it creates a tensor, on the device that it receives.
        results: the number of its outputs; None for any number.
    """

    function: Callable[..., Any]
    sizes: frozenset[int] = frozenset()
    indices: frozenset[int] = frozenset()
    attributes: frozenset[str] = frozenset()
    needs_device: bool = False
    results: int | None = 1


def _operator(function: Callable[..., Any]) -> Operator:
    """Describe a function by its parameters; those of torch take tensors only."""
    if not inspect.isfunction(function) or function.__module__.startswith("torch"):
        return Operator(function)
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    returned = get_args(signature.return_annotation)  # of a tuple: the types of its items
    keywords = {item.name for item in parameters if item.kind is item.KEYWORD_ONLY}
    return Operator(
        function,
        sizes=frozenset(
            i for i, p in enumerate(parameters) if p.annotation in (Sizes, Sizes | None)
        ),
        indices=frozenset(i for i, p in enumerate(parameters) if p.annotation == Indices),
        attributes=frozenset(keywords - {DEVICE}),
        needs_device=DEVICE in keywords,
        results=None if Ellipsis in returned else max(1, len(returned)),
    )


OPERATORS: dict[str, Operator] = {
    name: _operator(function)
    for name, function in {
        **ELEMENTWISE,
        **LAYOUT,
        **REDUCTIONS,
        **RECURRENT,
        "Shape": shape,
        "Size": size,
    }.items()
}
"""The operators by their ONNX name. A graph with another one is refused."""


def computes_sizes(kind: str, attributes: Mapping[str, Any]) -> bool:
    """Return whether a node whose inputs are all integers of a shape results in such integers."""
    is_float = kind == "Cast" and attributes["to"] not in (6, 7)
    is_filled_with_floats = kind == "ConstantOfShape" and type(attributes.get("value")) is not int
    return kind in SIZE_OPERATORS and not is_float and not is_filled_with_floats
