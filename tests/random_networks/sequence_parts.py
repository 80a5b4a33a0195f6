"""Parts of random networks that work on sequences: masked pooling and attention.

A sequence is ``(rows, length, dim)`` with a mask ``(rows, length)``, True at valid positions. A row
may have no valid position, like the history of a new user.

``takes``, ``gives``, ``size``, ``draw`` and the setting ``form`` are explained in ``parts.py``.
"""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.random_networks.parts import Part, Sizes, activation, draw_activation, part

EPSILONS = (1e-7, 1e-8, 1e-9, 1e-10, 1e-12, 1e-16)
Masked = tuple[Tensor, Tensor]


@part
class MaskedMean(Part):
    """A mean over valid positions, with the usual ways to keep it finite for an empty row.

    Form ``root`` divides the sum by the square root of the count; form ``sum`` does not divide it.
    """

    takes = ("sequence",)

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        forms = ("eps", "eps", "eps", "clamp", "where", "maximum", "root", "sum", "plain")
        return {"form": rng.choice(forms), "eps": rng.choice(EPSILONS)}

    def __init__(self, sizes: Sizes, *, form: str, eps: float) -> None:
        super().__init__()
        self.form, self.eps, self.size = form, eps, (sizes[0][1],)

    def forward(self, sequence: Masked) -> Tensor:
        x, mask = sequence
        valid = mask.to(x.dtype).unsqueeze(-1)  # (rows, length, 1)
        total, count = (x * valid).sum(dim=1), valid.sum(dim=1)
        match self.form:
            case "eps":
                return total / (count + self.eps)
            case "clamp":
                return total / count.clamp(min=1)
            case "where":
                return torch.where(count > 0, total / count, torch.zeros_like(total))
            case "maximum":
                return total / torch.maximum(count, torch.ones_like(count))
            case "root":
                return total / torch.sqrt(count + self.eps)
            case "plain":  # NaN for an empty row, replaced by zero
                return torch.nan_to_num(total / count)
        return total


@part
class MaskedMax(Part):
    """A maximum over valid positions."""

    takes = ("sequence",)

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {"form": rng.choice(("large", "lowest", "infinite", "subtract"))}

    def __init__(self, sizes: Sizes, *, form: str) -> None:
        super().__init__()
        self.form, self.size = form, (sizes[0][1],)

    def forward(self, sequence: Masked) -> Tensor:
        x, mask = sequence
        padding = ~mask.unsqueeze(-1)
        if self.form == "infinite":
            top = x.masked_fill(padding, float("-inf")).amax(dim=1)
            return torch.where(torch.isinf(top), torch.zeros_like(top), top)
        if self.form == "subtract":
            top = (x - padding.to(x.dtype) * 1e4).max(dim=1)[0]
        else:
            low = torch.finfo(x.dtype).min if self.form == "lowest" else -1e9
            top = x.masked_fill(padding, low).max(dim=1).values
        return top * mask.any(dim=1, keepdim=True).to(x.dtype)


@part
class TargetAttention(Part):
    """Attention of DIN: a small network scores each position against a second input.

    In DIN this input, the target, is the item whose click is predicted.
    """

    takes = ("sequence", "vector")

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            "width": rng.choice((3, 8, 16)),
            "activation": draw_activation(rng),
            "weights": rng.choice(("softmax", "softmax_infinite", "mask", "sigmoid")),
        }

    def __init__(self, sizes: Sizes, *, width: int, weights: str, **more: Any) -> None:
        super().__init__()
        (_, dim), (target_width,) = sizes
        self.project = nn.Linear(target_width, dim)
        self.hidden, self.score = nn.Linear(4 * dim, width), nn.Linear(width, 1)
        self.activation = activation(more["activation"], width)
        self.weights, self.size = weights, (dim,)

    def forward(self, sequence: Masked, target: Tensor) -> Tensor:
        keys, mask = sequence
        query = self.project(target).unsqueeze(1).expand(-1, keys.shape[1], -1)
        both = torch.cat([query, keys, query - keys, query * keys], dim=-1)
        scores = self.score(self.activation(self.hidden(both))).squeeze(-1)  # (rows, length)
        match self.weights:
            case "softmax":
                scores = scores.masked_fill(~mask, -(2.0**32) + 1)  # the constant of DIN's code
                weights = torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1)
            case "softmax_infinite":  # 0 / 0 for an empty row
                weights = torch.nan_to_num(
                    torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1)
                )
            case "mask":
                weights = scores * mask.to(scores.dtype)
            case _:
                weights = torch.sigmoid(scores) * mask.to(scores.dtype)
        return torch.matmul(weights.unsqueeze(1), keys).squeeze(1)


@part
class SelfAttention(Part):
    """Self-attention with masked padding: torch's module, encoder layer, function, or written out.

    ``empty`` is the treatment of a row without a valid position. ``first``: it attends to its first
    position. ``number``: NaN becomes 0. ``raw``: NaN may remain.
    """

    takes = ("sequence",)
    gives = "sequence"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            "heads": rng.choice((1, 2)),
            "head_dim": rng.choice((2, 4)),
            "form": rng.choice(("hand", "module", "function", "layer")),
            "empty": "raw" if rng.random() < 0.08 else rng.choice(("first", "number")),
        }

    def __init__(self, sizes: Sizes, *, heads: int, head_dim: int, form: str, empty: str) -> None:
        super().__init__()
        length, dim = sizes[0]
        width = heads * head_dim
        self.heads, self.form, self.empty = heads, form, empty
        self.size = (length, width)
        self.enter = nn.Linear(dim, width)
        if form == "module":
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        elif form == "layer":
            # Both positions of the norm are covered, selected by ``head_dim`` (2 or 4).
            self.layer = nn.TransformerEncoderLayer(
                width, heads, 2 * width, batch_first=True, norm_first=head_dim == 2
            )
        else:
            self.heads_in, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, sequence: Masked) -> Masked:
        x, mask = sequence
        x = self.enter(x)
        padding = ~mask
        if self.empty == "first":  # an empty row attends to its first position
            first = torch.arange(x.shape[1], device=x.device) == 0
            padding = padding & ~(first & padding.all(dim=1, keepdim=True))
        if self.form == "module":
            output = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        elif self.form == "layer":
            output = self.layer(x, src_key_padding_mask=padding)
        else:
            output = self._attention(x, padding)
        if self.empty == "number":
            output = torch.nan_to_num(output)
        return output, mask

    def _attention(self, x: Tensor, padding: Tensor) -> Tensor:
        rows, length, width = x.shape
        query, key, value = (
            part.reshape(rows, length, self.heads, -1).permute(0, 2, 1, 3)
            for part in self.heads_in(x).chunk(3, dim=-1)
        )
        hidden = padding[:, None, None, :]
        if self.form == "function":
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=~hidden)
        else:
            scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
            low = float("-inf") if self.empty == "raw" else -1e9
            output = scores.masked_fill(hidden, low).softmax(dim=-1) @ value
        return x + self.out(output.permute(0, 2, 1, 3).reshape(rows, length, width))


@part
class PositionEmbedding(Part):
    """Adds position embeddings to a sequence; every batch reads the same rows of their table."""

    takes = ("sequence",)
    gives = "sequence"

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        length, dim = sizes[0]
        self.table = nn.Embedding(length, dim)
        self.norm, self.size = nn.LayerNorm(dim), sizes[0]

    def forward(self, sequence: Masked) -> Masked:
        x, mask = sequence
        positions = torch.arange(x.shape[1], device=x.device)
        return self.norm(x + self.table(positions)), mask


@part
class SequenceConv(Part):
    """A kernel-1 Conv1d over a sequence, or a linear layer at each position."""

    takes = ("sequence",)
    gives = "sequence"

    @staticmethod
    def draw(rng: random.Random) -> dict[str, Any]:
        return {
            "width": rng.choice((2, 3, 8)),
            "conv": rng.random() < 0.7,
            "activation": draw_activation(rng),
        }

    def __init__(self, sizes: Sizes, *, width: int, conv: bool, **more: Any) -> None:
        super().__init__()
        length, dim = sizes[0]
        self.layer = nn.Conv1d(dim, width, 1) if conv else nn.Linear(dim, width)
        self.activation = activation(more["activation"], width)
        self.conv, self.size = conv, (length, width)

    def forward(self, sequence: Masked) -> Masked:
        x, mask = sequence
        x = self.layer(x.transpose(1, 2)).transpose(1, 2) if self.conv else self.layer(x)
        return self.activation(x), mask


@part
class LastStep(Part):
    """The vector at the last valid position, by a gather; zeros for an empty sequence.

    The valid positions are assumed to come first.
    """

    takes = ("sequence",)

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.size = (sizes[0][1],)

    def forward(self, sequence: Masked) -> Tensor:
        x, mask = sequence
        last = (mask.long().sum(dim=1) - 1).clamp(min=0)  # (rows,)
        index = last.view(-1, 1, 1).expand(-1, 1, x.shape[2])
        return x.gather(1, index).squeeze(1) * mask.any(dim=1, keepdim=True)
