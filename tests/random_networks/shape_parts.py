"""Parts of random networks that rearrange a vector, or transform its values, without a layer.

``takes``, ``gives``, ``size``, ``draw`` and the setting ``form``, which selects one of the formulas
in ``forward``, are explained in ``tests/random_networks/parts.py``.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_networks.parts import Part, Sizes, part


@part
class Rearrange(Part):
    """Reorders a vector, pads it with zeros, or appends a scaled copy of it (``stack``)."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"form": rng.choice(("halves", "flip", "roll", "view", "index", "pad", "stack"))}

    def __init__(self, sizes: Sizes, *, form: str) -> None:
        super().__init__()
        (width,) = sizes[0]
        self.form = form
        widths = {"pad": width + 2, "stack": 2 * width}
        self.size = (widths.get(form, width),)
        self.register_buffer("order", torch.arange(width - 1, -1, -1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        match self.form:
            case "halves":
                return torch.cat([x[:, width // 2 :], x[:, : width // 2]], dim=1)
            case "flip":
                return x.flip(1)
            case "roll":
                return torch.roll(x, 1, dims=1)
            case "view":  # does not change the order; exports as Reshape and Transpose
                return x.view(-1, 1, width).transpose(1, 2).reshape(x.size(0), -1)
            case "index":
                return x[:, self.order]
            case "pad":
                return F.pad(x, (1, 1))
        return torch.stack([x, x * 0.5], dim=1).reshape(x.shape[0], 2 * width)


@part
class Transform(Part):
    """Applies a function that models use on dense inputs, with a learned scale in some forms."""

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        forms = ("log1p", "clip", "tanh", "scale", "normalize", "softmax", "where")
        return {"form": rng.choice(forms)}

    def __init__(self, sizes: Sizes, *, form: str) -> None:
        super().__init__()
        self.form, self.size = form, sizes[0]
        self.scale = nn.Parameter(torch.ones(sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        match self.form:
            case "log1p":
                return torch.sign(x) * torch.log1p(x.abs()) * self.scale
            case "clip":
                return x.clamp(-3, 3)
            case "tanh":
                return torch.tanh(x * self.scale)
            case "normalize":
                return F.normalize(x, dim=-1)
            case "softmax":
                return torch.softmax(x, dim=-1) * self.scale
            case "where":
                return torch.where(x > 0, x, self.scale * x)
        return x * self.scale
