"""Parts of random networks that work on fields ``(rows, fields, dim)``, such as interactions.

``takes``, ``gives``, ``size``, ``draw`` and the setting ``form`` are explained in ``parts.py``.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_networks.parts import Part, Sizes, activation, draw_activation, part

MAX_PAIRS = 40  # ``Pairs`` ignores further pairs of fields


@part
class Stack(Part):
    """Projects vectors of different widths to one width and stacks them as fields."""

    takes = ("vector", "vector", "vector")
    gives = "fields"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"dim": rng.choice((1, 3, 4, 8)), "form": rng.choice(("stack", "cat"))}

    def __init__(self, sizes: Sizes, *, dim: int, form: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, dim) for (width,) in sizes)
        self.form, self.size = form, (len(sizes), dim)

    def forward(self, *vectors: Tensor) -> Tensor:
        projected = [layer(x) for layer, x in zip(self.layers, vectors, strict=True)]
        if self.form == "stack":
            return torch.stack(projected, dim=1)
        return torch.cat([x.unsqueeze(1) for x in projected], dim=1)


@part
class FM(Part):
    """Second-order factorization machine."""

    takes = ("fields",)

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"reduce": rng.random() < 0.5}

    def __init__(self, sizes: Sizes, *, reduce: bool) -> None:
        super().__init__()
        self.reduce, self.size = reduce, (1 if reduce else sizes[0][1],)

    def forward(self, x: Tensor) -> Tensor:
        pairs = 0.5 * (x.sum(dim=1) ** 2 - (x**2).sum(dim=1))
        return pairs.sum(dim=1, keepdim=True) if self.reduce else pairs


@part
class Pairs(Part):
    """A scalar or a vector for each pair of fields: DLRM, PNN and bilinear interactions.

    In form ``bilinear`` a Linear multiplies the first field of each pair, in ``own_bilinear`` a
    plain parameter. ``dot`` and ``triu`` are equal. A single field has no pair: it is returned
    unchanged (``flat``).
    """

    takes = ("fields",)

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"form": rng.choice(("dot", "bilinear", "hadamard", "own_bilinear", "triu"))}

    def __init__(self, sizes: Sizes, *, form: str) -> None:
        super().__init__()
        count, dim = sizes[0]
        left, right = torch.triu_indices(count, count, offset=1)[:, :MAX_PAIRS]
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)
        self.form = form
        if form == "bilinear":
            self.layer = nn.Linear(dim, dim, bias=False)
        elif form == "own_bilinear":
            self.weight = nn.Parameter(torch.zeros(dim, dim))
        pairs = max(len(left), 1)
        self.size = (pairs if form in ("dot", "triu") else pairs * dim,)
        if not len(left):
            self.form, self.size = "flat", (count * dim,)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "flat":
            return x.flatten(1)
        if self.form in ("dot", "triu"):
            products = torch.bmm(x, x.transpose(1, 2))  # (rows, fields, fields)
            return products[:, self.left, self.right]
        first, second = x[:, self.left], x[:, self.right]  # (rows, pairs, dim)
        if self.form == "bilinear":
            first = self.layer(first)
        elif self.form == "own_bilinear":
            first = torch.matmul(first, self.weight)
        return (first * second).reshape(x.shape[0], -1)


@part
class SENet(Part):
    """Fields times a gate computed from the mean or maximum of each field (SENet)."""

    takes = ("fields",)
    gives = "fields"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"width": rng.randint(1, 3), "form": rng.choice(("mean", "max"))}

    def __init__(self, sizes: Sizes, *, width: int, form: str) -> None:
        super().__init__()
        count, _ = sizes[0]
        self.squeeze, self.excite = nn.Linear(count, width), nn.Linear(width, count)
        self.form, self.size = form, sizes[0]

    def forward(self, x: Tensor) -> Tensor:
        summary = x.mean(dim=-1) if self.form == "mean" else x.max(dim=-1).values
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(summary))))
        return x * gate.unsqueeze(-1)


@part
class CIN(Part):
    """The compressed interaction network of xDeepFM: a kernel-1 Conv1d over field products."""

    takes = ("fields",)

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"maps": rng.choice((2, 3, 8)), "activation": rng.choice(("relu", "none"))}

    def __init__(self, sizes: Sizes, *, maps: int, **more: Any) -> None:
        super().__init__()
        count, _ = sizes[0]
        self.conv = nn.Conv1d(count * count, maps, 1)
        self.activation = activation(more["activation"], maps)
        self.size = (maps,)

    def forward(self, x: Tensor) -> Tensor:
        rows, count, dim = x.shape
        products = torch.einsum("bhd,bmd->bhmd", x, x).reshape(rows, count * count, dim)
        return self.activation(self.conv(products)).sum(dim=2)


@part
class FieldConv(Part):
    """A kernel-1 Conv1d whose channels are the fields (``across``), or the elements of a field."""

    takes = ("fields",)
    gives = "fields"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            "width": rng.choice((2, 3, 8)),
            "across": rng.random() < 0.5,
            "norm": rng.random() < 0.3,
            "bias": rng.random() < 0.7,
        }

    def __init__(self, sizes: Sizes, *, width: int, across: bool, norm: bool, bias: bool) -> None:
        super().__init__()
        count, dim = sizes[0]
        self.across = across
        self.conv = nn.Conv1d(count if across else dim, width, 1, bias=bias)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.size = (width, dim) if across else (count, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.across:
            return F.relu(self.norm(self.conv(x)))
        return self.norm(self.conv(x.transpose(1, 2))).permute(0, 2, 1)


@part
class FieldLinear(Part):
    """A layer on each field, with or without an activation and a norm."""

    takes = ("fields",)
    gives = "fields"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            "width": rng.choice((1, 3, 8)),
            "activation": draw_activation(rng),
            "norm": rng.choice(("none", "layer", "batch")),
        }

    def __init__(self, sizes: Sizes, *, width: int, norm: str, **more: Any) -> None:
        super().__init__()
        count, dim = sizes[0]
        self.layer = nn.Linear(dim, width)
        kinds = {"layer": nn.LayerNorm(width), "batch": nn.BatchNorm1d(count)}
        self.norm = kinds.get(norm, nn.Identity())
        self.activation = activation(more["activation"], width)
        self.size = (count, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.layer(x)))


@part
class FieldAttention(Part):
    """Self-attention over fields, as in AutoInt: written out (``hand``), or torch's module."""

    takes = ("fields",)
    gives = "fields"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            "heads": rng.choice((1, 2)),
            "head_dim": rng.choice((2, 3, 4)),
            "form": rng.choice(("hand", "module")),
        }

    def __init__(self, sizes: Sizes, *, heads: int, head_dim: int, form: str) -> None:
        super().__init__()
        count, dim = sizes[0]
        width = heads * head_dim
        self.heads, self.form, self.size = heads, form, (count, width)
        self.enter = nn.Linear(dim, width)
        if form == "module":
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        else:
            self.query, self.key, self.value = (nn.Linear(dim, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        projected = self.enter(x)
        if self.form == "module":
            return F.relu(self.attention(projected, projected, projected)[0] + projected)
        rows, count, _ = x.shape
        query, key, value = (
            layer(x).view(rows, count, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = torch.softmax(query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5, dim=-1)
        return F.relu((weights @ value).transpose(1, 2).reshape(rows, count, -1) + projected)


@part
class FieldPool(Part):
    """Pools all fields to one vector."""

    takes = ("fields",)

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"form": rng.choice(("flatten", "mean", "max", "logsumexp", "attention", "first"))}

    def __init__(self, sizes: Sizes, *, form: str) -> None:
        super().__init__()
        count, dim = sizes[0]
        self.form = form
        self.score = nn.Linear(dim, 1, bias=False) if form == "attention" else None
        self.size = (count * dim if form == "flatten" else dim,)

    def forward(self, x: Tensor) -> Tensor:
        if self.score is not None:
            return (torch.softmax(self.score(torch.tanh(x)), dim=1) * x).sum(dim=1)
        match self.form:
            case "flatten":
                return x.reshape(x.size(0), -1)
            case "max":
                return x.amax(dim=1)
            case "logsumexp":
                return torch.logsumexp(x, dim=1)
            case "first":
                return x[:, 0]
        return x.mean(1)
