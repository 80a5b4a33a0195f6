"""Registry of the ONNX operators that an ``OnnxNetwork`` supports."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from compressors.onnx_network.operators.elementwise import ELEMENTWISE
from compressors.onnx_network.operators.layout import LAYOUT, Indices
from compressors.onnx_network.operators.recurrent import RECURRENT
from compressors.onnx_network.operators.reductions import REDUCTIONS
from compressors.onnx_network.operators.sizes import (
    OPERATORS_ON_SIZES,
    Sizes,
    tensor_shape,
    tensor_size,
)

DEVICE = "device"
"""The keyword parameter of functions that create a tensor."""


@dataclass(frozen=True)
class Operator:
    """One ONNX operator.

    Attributes:
        function: computes its outputs: a tensor, or a tuple of tensors.
        size_inputs: positions of the inputs that must be sizes, not tensors (``sizes.py``).
        index_inputs: positions of the inputs that may be sizes or tensors.
        attributes: names of the attributes that the function accepts.
        needs_device: whether the function creates a tensor and needs the device for it.
        num_outputs: the number of its outputs; None for any number.
    """

    function: Callable[..., Any]
    size_inputs: frozenset[int] = frozenset()
    index_inputs: frozenset[int] = frozenset()
    attributes: frozenset[str] = frozenset()
    needs_device: bool = False
    num_outputs: int | None = 1


def _build_operator(function: Callable[..., Any]) -> Operator:
    """Return the operator of a function, from the types of its parameters and results.

    A function of torch has only tensors as inputs, no attributes and one output.
    """
    if not inspect.isfunction(function) or function.__module__.startswith("torch"):
        return Operator(function)
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    output_types = get_args(signature.return_annotation)  # for a tuple: the types of its items
    keywords = {item.name for item in parameters if item.kind is item.KEYWORD_ONLY}
    return Operator(
        function,
        size_inputs=frozenset(
            i for i, p in enumerate(parameters) if p.annotation in (Sizes, Sizes | None)
        ),
        index_inputs=frozenset(i for i, p in enumerate(parameters) if p.annotation == Indices),
        attributes=frozenset(keywords - {DEVICE}),
        needs_device=DEVICE in keywords,
        num_outputs=None if Ellipsis in output_types else max(1, len(output_types)),
    )


OPERATORS: dict[str, Operator] = {
    name: _build_operator(function)
    for name, function in {
        **ELEMENTWISE,
        **LAYOUT,
        **REDUCTIONS,
        **RECURRENT,
        "Shape": tensor_shape,
        "Size": tensor_size,
    }.items()
}
"""The supported operators by their ONNX name."""


def computes_sizes(op: str, attributes: Mapping[str, Any]) -> bool:
    """Return whether a node computes sizes if all its inputs are sizes."""
    # 6 and 7 are the numbers of int32 and int64 in TensorProto.DataType.
    leaves_integers = op == "Cast" and attributes["to"] not in (6, 7)
    fills_floats = op == "ConstantOfShape" and type(attributes.get("value")) is not int
    return op in OPERATORS_ON_SIZES and not leaves_integers and not fills_floats
