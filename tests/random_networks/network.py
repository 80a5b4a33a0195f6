"""Model classes that build a network from a list of parts.

``model.json`` of a random network names one of these classes. A value between parts has one of
three kinds: ``vector``, ``(rows, width)`` of size ``(width,)``; ``fields``, ``(rows, fields, dim)``
of size ``(fields, dim)``; and ``sequence``, ``(rows, length, dim)`` with a mask ``(rows, length)``,
of size ``(length, dim)``. ``takes`` and ``gives`` of a part's class are the kinds of its inputs and
of its output. ``generator.py`` lists the keys of a part's spec and of ``head``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_networks import field_parts as _field_parts  # registers its parts
from tests.random_networks import input_parts as _input_parts
from tests.random_networks import sequence_parts as _sequence_parts
from tests.random_networks import shape_parts as _shape_parts
from tests.random_networks.parts import PARTS, Part, Size, activation

__all__ = ["RandomNetwork", "Tower", "TwoTowers"]
assert all((_field_parts, _input_parts, _sequence_parts, _shape_parts))  # imports that are used

Value = Tensor | tuple[Tensor, Tensor]


def convert_size(size: Size, have: str, need: str) -> Size:
    """Return the size of a value after ``convert``; ``have`` and ``need`` are kinds of values."""
    if have == need:
        return size
    match have, need:
        case "vector", _:
            return (1, size[0])
        case "fields", "vector":
            return (size[0] * size[1],)
        case "sequence", "vector":
            return (size[1],)
    return size


def convert(value: Value, have: str, need: str) -> Value:
    """Convert a value of kind ``have`` to kind ``need``, so that any part can follow any other."""
    if have == need:
        return value
    if have == "sequence":
        x, mask = value
        masked = x * mask.unsqueeze(-1)
        return masked.sum(dim=1) if need == "vector" else masked
    if need == "vector":
        return value.flatten(1)
    x = value.unsqueeze(1) if have == "vector" else value
    if need == "fields":
        return x
    return x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


class Graph(nn.Module):
    """Parts in order; each spec describes one part and names the parts or inputs that it reads.

    A spec has ``name``, ``kind`` (class of the part), ``settings``, and ``takes`` (names of the
    parts whose outputs it reads) or ``inputs`` (arguments of the network that it reads). ``shares``
    names a part whose table module the part uses, and ``ties`` a part whose table weight it uses.
    """

    def __init__(self, parts: list[dict[str, Any]]) -> None:
        super().__init__()
        self.specs = parts
        self.parts = nn.ModuleDict()
        self.kinds: dict[str, str] = {}
        sizes: dict[str, Size] = {}
        for spec in parts:
            kind = PARTS[spec["kind"]]
            input_sizes = [
                convert_size(sizes[name], self.kinds[name], need)
                for name, need in zip(spec.get("takes", ()), kind.takes, strict=True)
            ]
            built = kind(input_sizes, **spec["settings"])
            self._share(spec, built)
            self.parts[spec["name"]] = built
            sizes[spec["name"]], self.kinds[spec["name"]] = built.size, kind.gives
        self.sizes = {
            name: convert_size(size, self.kinds[name], "vector") for name, size in sizes.items()
        }

    def _share(self, spec: dict[str, Any], built: Part) -> None:
        if "shares" in spec:
            built.table = self.parts[spec["shares"]].table
        elif "ties" in spec:
            table = self.parts[spec["ties"]].table
            if hasattr(built, "tie"):
                built.tie(table)
            else:
                built.table.weight = table.weight

    def values(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the output of every part, converted to a vector."""
        outputs: dict[str, Value] = {}
        for spec in self.specs:
            part = self.parts[spec["name"]]
            if part.takes:
                values = [
                    convert(outputs[name], self.kinds[name], need)
                    for name, need in zip(spec["takes"], part.takes, strict=True)
                ]
            else:
                values = [inputs[name] for name in spec["inputs"]]
            outputs[spec["name"]] = part(*values)
        return {name: convert(value, self.kinds[name], "vector") for name, value in outputs.items()}


class RandomNetwork(nn.Module):
    """A CTR model of random parts with one logit or probability per row.

    In ``head``, ``reads`` names the parts whose outputs are concatenated for the output layer.
    ``wide`` names parts of width 1 that are added to the logit directly. ``squeeze`` is the way in
    which the last dimension of the logits is removed, or ``keep``.

    ``widths`` and ``activation`` belong to the hidden layers, ``norm`` is whether a batch norm
    precedes them, and ``probability`` is whether the output is a probability.
    """

    def __init__(self, parts: list[dict[str, Any]], head: dict[str, Any]) -> None:
        super().__init__()
        self.graph = Graph(parts)
        self.reads, self.wide = head["reads"], head["wide"]
        self.squeeze, self.probability = head["squeeze"], head["probability"]
        width = sum(self.graph.sizes[name][0] for name in self.reads)
        # The concatenated outputs of the parts are scaled by a batch norm, or by learned factors.
        self.norm = nn.BatchNorm1d(width) if head["norm"] else None
        self.scale = None if head["norm"] else nn.Parameter(torch.ones(width))
        self.wide_scale = nn.Parameter(torch.ones(max(len(self.wide), 1)))
        layers: list[nn.Module] = []
        for next_width in head["widths"]:
            layers += [nn.Linear(width, next_width), activation(head["activation"], next_width)]
            width = next_width
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(width, 1)
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, **inputs: Tensor) -> Tensor:
        values = self.graph.values(inputs)
        x = torch.cat([values[name] for name in self.reads], dim=1)
        x = self.norm(x) if self.norm is not None else x * self.scale
        logit = self.output(self.hidden(x))
        for index, name in enumerate(self.wide):
            wide = values[name].sum(dim=1, keepdim=True)
            logit = logit + wide * self.wide_scale[index]
        logit = self._remove_dimension(logit + self.offset)
        return torch.sigmoid(logit) if self.probability else logit

    def _remove_dimension(self, logit: Tensor) -> Tensor:
        match self.squeeze:
            case "one":
                return logit.squeeze(1)
            case "last":
                return logit.squeeze(-1)
            case "view":
                return logit.view(-1)
            case "flatten":
                return logit.flatten()
            case "index":
                return logit[:, 0]
            case "reshape":
                return logit.reshape(logit.size(0))
            case "sum":
                return logit.sum(dim=1)
            case "every":  # for a single row the result has no dimensions
                return logit.squeeze()
        return logit


class Tower(nn.Module):
    """One tower of a retrieval model, with one vector per row.

    In ``head``, ``reads`` names the parts whose outputs are concatenated, ``width`` is the width of
    the vector, and ``normalize`` is the way in which it is scaled to length 1, or ``none``.
    """

    def __init__(self, parts: list[dict[str, Any]], head: dict[str, Any]) -> None:
        super().__init__()
        self.graph = Graph(parts)
        self.reads, self.normalize = head["reads"], head["normalize"]
        width = sum(self.graph.sizes[name][0] for name in self.reads)
        self.output = nn.Linear(width, head["width"])

    def forward(self, **inputs: Tensor) -> Tensor:
        values = self.graph.values(inputs)
        vector = self.output(torch.cat([values[name] for name in self.reads], dim=1))
        if self.normalize == "function":
            return F.normalize(vector, dim=-1)
        if self.normalize == "division":
            return vector / (vector.norm(dim=1, keepdim=True) + 1e-12)
        return vector


class TwoTowers(nn.Module):
    """A retrieval model with two towers of random parts."""

    def __init__(self, query: dict[str, Any], item: dict[str, Any]) -> None:
        super().__init__()
        self.query, self.item = Tower(**query), Tower(**item)
        self.inputs_of = {
            side: {name for spec in parts["parts"] for name in spec.get("inputs", ())}
            for side, parts in (("query", query), ("item", item))
        }

    def forward(self, **inputs: Tensor) -> Tensor:
        vectors = [
            tower(**{name: x for name, x in inputs.items() if name in self.inputs_of[side]})
            for side, tower in (("query", self.query), ("item", self.item))
        ]
        return (vectors[0] * vectors[1]).sum(dim=1)
