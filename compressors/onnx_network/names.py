"""Derive names of modules, weights and values of a network from those in an ONNX graph.

Plans and reports show the names of tables and layers. TensorFlow exporters name nodes by layer
(``model/hidden/MatMul``). PyTorch exporters name initializers by attribute (``hidden.0.weight``)
or nodes by scope (``/hidden/hidden.0/Gemm``).
"""

import re
from collections.abc import Iterable

import onnx_ir as ir

_WEIGHT_NAMES = ("weight", "kernel", "embeddings", "bias")
"""Last parts of initializer names that name a weight of a layer, not the layer."""


def layer_path(node: ir.Node, weight: ir.Value) -> tuple[str, ...]:
    """Return the name of the layer or table that a node computes, split into its scopes.

    Args:
        node: the node, such as a MatMul.
        weight: its initializer.
    """
    for name in (node.name, node.outputs[0].name):
        *scopes, _ = (name or "").strip("/").split("/")
        if scopes:
            return tuple(p for scope in _remove_repeated_scopes(scopes) for p in scope.split("."))
    parts = re.split(r"[./:]+", weight.name or "weight")
    return tuple(parts[:-1] if len(parts) > 1 and parts[-1] in _WEIGHT_NAMES else parts)


def _remove_repeated_scopes(scopes: list[str]) -> list[str]:
    """Remove scopes that the next scope repeats: torch writes ``/mlp/mlp.0/MatMul``."""
    return [
        scope
        for index, scope in enumerate(scopes)
        if not (index + 1 < len(scopes) and scopes[index + 1].startswith(f"{scope}."))
    ]


def count_common_scopes(paths: Iterable[tuple[str, ...]]) -> int:
    """Return how many leading scopes all paths share, such as the name of the model."""
    first, *others = list(paths) or [()]
    count = 0
    while all(len(path) > count + 1 and path[count] == first[count] for path in (first, *others)):
        count += 1
    return count if others else 0


def unique_name(text: str, *used_names: set[str]) -> str:
    """Return a Python identifier for a text that none of the sets has, and add it to all sets.

    It is the text itself if that is an unused identifier.
    """
    base = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "value"
    base = f"_{base}" if base[0].isdigit() else base
    name, number = base, 1
    while any(name in names for names in used_names):
        name, number = f"{base}_{number}", number + 1
    for names in used_names:
        names.add(name)
    return name
