"""Names of modules, weights and values of a network that is read from an ONNX graph.

Plans and reports show the names of tables and layers. An exporter of TensorFlow names nodes by
layer (``model/hidden/MatMul``), one of torch names initializers by attribute
(``hidden.0.weight``), or nodes by scope (``/hidden/hidden.0/Gemm``).
"""

import re
from collections.abc import Iterable

import onnx_ir as ir

_KINDS = ("weight", "kernel", "embeddings", "bias")
"""The last part of an initializer's name that names a weight of a layer and not the layer."""


def layer_path(node: ir.Node, weight: ir.Value) -> tuple[str, ...]:
    """Return the parts of the name of the layer or table that a node computes.

    Args:
        node: the node, such as a MatMul.
        weight: its initializer.
    """
    for name in (node.name, node.outputs[0].name):
        *scope, _ = (name or "").strip("/").split("/")
        if scope:
            return tuple(part for item in _without_repetition(scope) for part in item.split("."))
    parts = re.split(r"[./:]+", weight.name or "weight")
    return tuple(parts[:-1] if len(parts) > 1 and parts[-1] in _KINDS else parts)


def _without_repetition(scope: list[str]) -> list[str]:
    """Leave out scopes that the next one repeats: torch writes ``/mlp/mlp.0/MatMul``."""
    return [
        part
        for index, part in enumerate(scope)
        if not (index + 1 < len(scope) and scope[index + 1].startswith(f"{part}."))
    ]


def common_scopes(paths: Iterable[tuple[str, ...]]) -> int:
    """Return how many first parts all paths share, such as the name of the model."""
    first, *others = list(paths) or [()]
    count = 0
    while all(len(path) > count + 1 and path[count] == first[count] for path in (first, *others)):
        count += 1
    return count if others else 0


def unique_name(text: str, *taken: set[str]) -> str:
    """Return an attribute name for a text that is in none of the sets, and add it to all of them.

    It is the text itself, if that is a name that is not in use.
    """
    base = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "value"
    base = f"_{base}" if base[0].isdigit() else base
    name, number = base, 1
    while any(name in names for names in taken):
        name, number = f"{base}_{number}", number + 1
    for names in taken:
        names.add(name)
    return name
