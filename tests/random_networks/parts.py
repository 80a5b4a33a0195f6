"""Parts of random networks that work on vectors, and the base class of all parts.

A part is a small module. ``takes`` and ``gives`` are the kinds of its inputs and of its output: a
``vector`` is ``(rows, width)``, ``fields`` are ``(rows, fields, dim)``, and a ``sequence`` is
``(rows, length, dim)`` with a mask ``(rows, length)``. ``size`` is the shape of the output without
the rows. ``draw`` draws settings; input sizes and settings are enough to build the part again. The
setting ``form`` selects one of several formulas of a part, or one of several ways to write it in
PyTorch.
"""

import random
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, ...]
Sizes = Sequence[Size]
PARTS: dict[str, type["Part"]] = {}
WIDTHS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 32, 48)
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky": nn.LeakyReLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "hardswish": nn.Hardswish,
    "none": nn.Identity,
}
DRAWN_ACTIVATIONS = (*ACTIVATIONS, "relu", "relu", "prelu", "prelu_each", "dice")


class Part(nn.Module):
    """Base class of all parts."""

    takes: ClassVar[tuple[str, ...]] = ("vector",)
    gives: ClassVar[str] = "vector"
    size: Size

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        """Draw the settings of one part."""
        return {}


def part(kind: type[Part]) -> type[Part]:
    """Register a part under its class name."""
    PARTS[kind.__name__] = kind
    return kind


class Dice(nn.Module):
    """The activation of DIN: a gate between ``x`` and ``alpha * x``, after a norm without scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.transpose(1, 2)).transpose(1, 2) if x.dim() == 3 else self.norm(x)
        gate = torch.sigmoid(normed)
        return gate * x + (1 - gate) * self.alpha * x


class EachPReLU(nn.Module):
    """A PReLU whose channels are the last dimension; those of ``nn.PReLU`` are the second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2) if x.dim() == 3 else self.inner(x)


class RMSNorm(nn.Module):
    """A root-mean-square norm written out, as model code often does."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def activation(name: str, width: int) -> nn.Module:
    """Return an activation for inputs with ``width`` channels in the last dimension."""
    if name == "prelu":
        return nn.PReLU()
    if name == "prelu_each":
        return EachPReLU(width)
    return Dice(width) if name == "dice" else ACTIVATIONS[name]()


def norm(name: str, width: int) -> nn.Module:
    """Return a norm for vectors of this width."""
    kinds = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "rms": RMSNorm}
    if name == "rms_torch":
        return nn.RMSNorm(width)
    return kinds[name](width) if name in kinds else nn.Identity()


NORMS = ("none", "none", "batch", "batch", "layer", "rms", "rms_torch")


def draw_activation(rng: random.Random) -> str:
    """Draw the name of an activation."""
    return rng.choice(DRAWN_ACTIVATIONS)


@part
class MLP(Part):
    """One to three blocks of linear layer, norm, activation and dropout."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            "widths": [rng.choice(WIDTHS) for _ in range(rng.randint(1, 3))],
            "activation": draw_activation(rng),
            "norm": rng.choice(NORMS),
            "norm_first": rng.random() < 0.3,
            "bias": rng.random() < 0.8,
            "dropout": rng.choice((0.0, 0.3)),
        }

    def __init__(self, sizes: Sizes, *, widths: list[int], **more: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        (width,) = sizes[0]
        for next_width in widths:
            layers.append(nn.Linear(width, next_width, bias=more["bias"]))
            pair = [norm(more["norm"], next_width), activation(more["activation"], next_width)]
            layers += pair if more["norm_first"] else pair[::-1]
            if more["dropout"]:
                layers.append(nn.Dropout(more["dropout"]))
            width = next_width
        self.layers = nn.Sequential(*layers)
        self.size = (width,)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@part
class Residual(Part):
    """A residual block ``x + f(x)``, with a norm of the sum (``last``) or of the input of ``f``."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            "width": rng.choice(WIDTHS),
            "activation": draw_activation(rng),
            "norm": rng.choice(NORMS),
            "last": rng.random() < 0.5,
        }

    def __init__(self, sizes: Sizes, *, width: int, **more: Any) -> None:
        super().__init__()
        (outer,) = sizes[0]
        self.first, self.second = nn.Linear(outer, width), nn.Linear(width, outer)
        self.activation = activation(more["activation"], width)
        self.norm = norm(more["norm"], outer)
        self.last, self.size = more["last"], (outer,)

    def forward(self, x: Tensor) -> Tensor:
        if self.last:
            return self.norm(x + self.second(self.activation(self.first(x))))
        return x + self.second(self.activation(self.first(self.norm(x))))


@part
class CrossV1(Part):
    """Cross layers of DCN: ``x0 * (x @ w) + b + x``, with ``w`` and ``b`` as plain parameters."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"layers": rng.randint(1, 3)}

    def __init__(self, sizes: Sizes, *, layers: int) -> None:
        super().__init__()
        (width,) = sizes[0]
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(width, 1)) for _ in range(layers))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(width)) for _ in range(layers))
        self.size = (width,)

    def forward(self, x: Tensor) -> Tensor:
        x0 = x
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = x0 * torch.matmul(x, weight) + bias + x
        return x


@part
class CrossV2(Part):
    """Cross layers of DCN-v2, full-rank (``rank`` 0) or low-rank."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"layers": rng.randint(1, 2), "rank": rng.choice((0, 0, 2, 4))}

    def __init__(self, sizes: Sizes, *, layers: int, rank: int) -> None:
        super().__init__()
        (width,) = sizes[0]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
            if rank
            else nn.Linear(width, width)
            for _ in range(layers)
        )
        self.size = (width,)

    def forward(self, x: Tensor) -> Tensor:
        x0 = x
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


@part
class Gate(Part):
    """A vector times a gate computed from the second input."""

    takes = ("vector", "vector")

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"form": rng.choice(("sigmoid", "double_sigmoid", "hard", "softmax"))}

    def __init__(self, sizes: Sizes, *, form: str) -> None:
        super().__init__()
        self.layer = nn.Linear(sizes[1][0], sizes[0][0])
        self.form, self.size = form, sizes[0]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        gate = self.layer(context)
        if self.form == "hard":
            return x * F.hardsigmoid(gate)
        if self.form == "softmax":
            return x * torch.softmax(gate, dim=-1)
        return x * torch.sigmoid(gate) * (2.0 if self.form == "double_sigmoid" else 1.0)


@part
class GLU(Part):
    """A gated linear unit: one half of a layer's output gates the other half."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"width": rng.choice((2, 3, 8, 16)), "form": rng.choice(("glu", "chunk", "split"))}

    def __init__(self, sizes: Sizes, *, width: int, form: str) -> None:
        super().__init__()
        self.layer = nn.Linear(sizes[0][0], 2 * width)
        self.width, self.form, self.size = width, form, (width,)

    def forward(self, x: Tensor) -> Tensor:
        both = self.layer(x)
        if self.form == "glu":
            return F.glu(both, dim=-1)
        if self.form == "chunk":
            value, gate = both.chunk(2, dim=-1)
        else:
            value, gate = torch.split(both, self.width, dim=-1)
        return value * F.silu(gate)


@part
class Experts(Part):
    """Experts mixed by a softmax gate, as in MMoE."""

    takes = ("vector", "vector")

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            "experts": rng.randint(2, 4),
            "width": rng.choice((3, 4, 8, 16)),
            "form": rng.choice(("einsum", "bmm", "sum")),
            "activation": draw_activation(rng),
        }

    def __init__(self, sizes: Sizes, *, experts: int, width: int, form: str, **more: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(sizes[0][0], width), activation(more["activation"], width))
            for _ in range(experts)
        )
        self.gate = nn.Linear(sizes[1][0], experts, bias=False)
        self.form, self.size = form, (width,)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        stacked = torch.stack([expert(x) for expert in self.experts], dim=1)
        gates = self.gate(context).softmax(dim=1)  # (rows, experts)
        if self.form == "einsum":
            return torch.einsum("be,bed->bd", gates, stacked)
        if self.form == "bmm":
            return torch.bmm(gates.unsqueeze(1), stacked).squeeze(1)
        return (stacked * gates.unsqueeze(-1)).sum(dim=1)


@part
class Norm(Part):
    """A norm that follows no layer, for example on dense inputs."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"form": rng.choice(NORMS[2:])}  # without "none"

    def __init__(self, sizes: Sizes, *, form: str) -> None:
        super().__init__()
        self.norm, self.size = norm(form, sizes[0][0]), sizes[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@part
class SharedLayer(Part):
    """One layer that is called twice, and one that is never called."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"activation": draw_activation(rng)}

    def __init__(self, sizes: Sizes, **more: Any) -> None:
        super().__init__()
        (width,) = sizes[0]
        self.layer, self.unused = nn.Linear(width, width), nn.Linear(width, width + 1)
        self.activation, self.size = activation(more["activation"], width), (width,)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.activation(self.layer(x)))


@part
class FunctionalLinear(Part):
    """Products without a layer call: ``F.linear``, ``@``, ``addmm``, or a layer's raw weight.

    Form ``weight_norm`` does call a layer, whose weight is computed from two parameters.
    """

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        forms = ("linear", "matmul", "addmm", "sliced", "transposed", "weight_norm")
        return {"width": rng.choice(WIDTHS[2:]), "form": rng.choice(forms)}

    def __init__(self, sizes: Sizes, *, width: int, form: str) -> None:
        super().__init__()
        (inputs,) = sizes[0]
        self.form, self.width, self.size = form, width, (width,)
        if form in ("sliced", "transposed", "weight_norm"):
            extra = 2 if form == "sliced" else 0
            self.layer = nn.Linear(inputs + extra, width)
            if form == "weight_norm":
                nn.utils.parametrizations.weight_norm(self.layer)
        else:
            shape = (width, inputs) if form == "linear" else (inputs, width)
            self.weight = nn.Parameter(torch.zeros(shape))
            self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "weight_norm":
            return self.layer(x)
        if self.form == "sliced":
            return F.linear(x, self.layer.weight[:, : x.shape[1]], self.layer.bias)
        if self.form == "transposed":
            return x @ self.layer.weight.t() + self.layer.bias
        if self.form == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.form == "addmm":
            return torch.addmm(self.bias, x, self.weight)
        return torch.matmul(x, self.weight) + self.bias


@part
class Join(Part):
    """Two vectors: concatenated, or multiplied, added or subtracted after a projection.

    Form ``outer`` is the outer product of the second vector and a projection of the first.
    """

    takes = ("vector", "vector")

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"form": rng.choice(("cat", "product", "sum", "difference", "outer"))}

    def __init__(self, sizes: Sizes, *, form: str) -> None:
        super().__init__()
        (left,), (right,) = sizes
        self.form = form
        self.project = nn.Linear(right, left, bias=False) if form not in ("cat", "outer") else None
        self.outer = nn.Linear(left, 3) if form == "outer" else None
        self.size = ({"cat": left + right, "outer": 3 * right}.get(form, left),)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.form == "cat":
            return torch.cat([x, y], dim=-1)
        if self.outer is not None:
            return (self.outer(x).unsqueeze(2) * y.unsqueeze(1)).flatten(1)
        assert self.project is not None
        y = self.project(y)
        return {"product": x * y, "sum": x + y, "difference": x - y}[self.form]
