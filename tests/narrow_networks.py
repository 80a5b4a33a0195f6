"""Networks for tests of channel pruning: layers that can be narrower, and layers that cannot.

A width can be pruned if it is a constructor argument and no code depends on single channels.
``SIGNATURE`` (a logit), ``HISTORY`` (a padded bag instead of the user), ``RATE`` (a probability)
and ``RETRIEVAL`` (two towers) are the signatures of these networks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import DenseInput, IdInput, Output, PaddedBag, Signature
from tests.signatures import replace_output

SIGNATURE = Signature(
    inputs=(IdInput(name="user", table="user"), DenseInput(name="price", shape=(5,))),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


HISTORY = SIGNATURE.model_copy(
    update={
        "inputs": (
            PaddedBag(name="history", table="item", shape=(6,)),
            DenseInput(name="price", shape=(5,)),
        )
    }
)


RATE = replace_output(SIGNATURE, form="probability")


RETRIEVAL = Signature.model_validate(
    {
        "group": "user",
        "item": "item",
        "inputs": [
            {"kind": "id", "name": "user", "table": "query.0"},
            {"kind": "id", "name": "item", "table": "item"},
        ],
        "outputs": [{"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"}],
        "towers": {
            "query": {"module": "query", "inputs": ["user"]},
            "item": {"module": "item", "inputs": ["item"]},
        },
    }
)


class ResidualConcatNet(nn.Module):
    """A residual sum of ``left`` and ``again``, concatenated with ``right``, which has a norm.

    ``left`` and ``again`` have one width, the argument ``left``: their channels are added.
    """

    def __init__(self, left: int = 16, right: int = 24, deep: int = 32) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.left = nn.Linear(9, left)
        self.again = nn.Linear(left, left)
        self.right = nn.Linear(9, right)
        self.norm = nn.BatchNorm1d(right)
        self.slope = nn.PReLU(right)
        self.deep = nn.Linear(left + right, deep)
        self.out = nn.Linear(deep, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        left = F.relu(self.left(x))
        left = left + F.relu(self.again(left))  # adds the channels of both layers
        right = self.slope(self.norm(self.right(x)))
        score: Tensor = self.out(F.relu(self.deep(torch.cat([right, left], dim=1))))
        return score


class HiddenLayerNet(nn.Module):
    """One hidden layer, ``between``, and an output layer that reads it once or twice.

    Subclasses replace ``between``, which is a relu here.
    """

    def __init__(self, width: int = 16, twice: bool = False, dim: int = 4) -> None:
        super().__init__()
        self.user = nn.Embedding(30, dim)
        self.hidden = nn.Linear(dim + 5, width)
        self.out = nn.Linear(width * 2 if twice else width, 1)
        self.twice = twice

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = self.between(self.hidden(torch.cat([self.user(user), price], dim=1)))
        score: Tensor = self.out(torch.cat([x, -x], dim=1) if self.twice else x)
        return score


class SoftmaxNet(HiddenLayerNet):
    def between(self, x: Tensor) -> Tensor:
        return x.softmax(dim=1)


class FlippedChannelsNet(HiddenLayerNet):
    """The output layer reads the channels of ``hidden`` in reverse order."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x).flip(1)


class ResidualSumNet(HiddenLayerNet):
    """Adds the first hidden channel to the score, without a layer."""

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = self.between(self.hidden(torch.cat([self.user(user), price], dim=1)))
        return self.out(x) + x[:, :1]


class FixedWidthNet(HiddenLayerNet):
    """Has no argument for the width."""

    def __init__(self) -> None:
        super().__init__(16)


class WeightReadingNet(HiddenLayerNet):
    """Multiplies by the sum of the layer's weights."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x) * self.hidden.weight.abs().sum()


class StatefulNet(HiddenLayerNet):
    """Stores its width and scales by it, so the attribute must change with the layer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.width = width

    def between(self, x: Tensor) -> Tensor:
        return F.relu(x).view(-1, self.width) * self.width**-0.5


class BottleneckNet(nn.Module):
    """A bottleneck layer has ``width // 16`` channels, so only multiples of 16 scale both."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.hidden = nn.Linear(9, width)
        self.down = nn.Linear(width, width // 16)
        self.up = nn.Linear(width // 16, width)
        self.out = nn.Linear(width, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = F.relu(self.hidden(torch.cat([self.user(user), price], dim=1)))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x))))
        score: Tensor = self.out(x)
        return score


class GatedHeadsNet(nn.Module):
    """Each gate scales a block of consecutive channels; predictions are about 0.1 %."""

    def __init__(self, inner: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.user = nn.Embedding(30, 4)
        self.value = nn.Linear(9, inner)
        self.gate = nn.Linear(9, heads)
        self.out = nn.Linear(inner, 1)
        nn.init.constant_(self.out.bias, -7.0)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        value = self.value(x).view(len(x), self.heads, -1)
        mixed = (value * torch.sigmoid(4 * self.gate(x)).unsqueeze(2)).flatten(1)
        return torch.sigmoid(self.out(mixed))


class SplitConcatNet(nn.Module):
    """The first half of the channels has a relu6 and the second a relu, then both are joined.

    The two differ only for values above 6, which inputs near zero do not cause.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.hidden = nn.Linear(9, width)
        self.out = nn.Linear(width, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        left, right = self.hidden(torch.cat([self.user(user), price], dim=1)).chunk(2, dim=1)
        score: Tensor = self.out(torch.cat([F.relu6(left), F.relu(right)], dim=1))
        return score


class SharedLayerNet(nn.Module):
    """One layer under two names, a norm without weights, and the activation ``act``.

    ``top`` is the upper bound to which the values that the output layer reads are clamped.
    """

    def __init__(
        self, width: int = 16, act: type[nn.Module] = nn.PReLU, top: float = float("inf")
    ) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.first = nn.Linear(9, width)
        self.second = self.first
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.act = act()
        self.out = nn.Linear(2 * width, 1)
        self.top = top

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        both = [self.act(self.norm(layer(x))) for layer in (self.first, self.second)]
        score: Tensor = self.out(torch.cat(both, dim=1).clamp(max=self.top))
        return score


class ParallelLayersNet(nn.Module):
    """A layer that can be pruned, in parallel with one that cannot, as its weight is read."""

    def __init__(self, prunable: int = 16, fixed: int = 24) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.prunable, self.fixed = nn.Linear(9, prunable), nn.Linear(9, fixed)
        self.out = nn.Linear(prunable + fixed, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        fixed = F.relu(self.fixed(x)) * self.fixed.weight.abs().sum()
        score: Tensor = self.out(torch.cat([F.relu(self.prunable(x)), fixed], dim=1))
        return score


class TableAndTowerNet(nn.Module):
    """A query tower with a hidden layer; the item tower is a table."""

    def __init__(self, hidden: int = 16, dim: int = 6) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Embedding(30, dim), nn.Linear(dim, hidden), nn.ReLU())
        self.query.append(nn.Linear(hidden, dim))
        self.item = nn.Embedding(50, dim)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        score: Tensor = (self.query(user) * self.item(item)).sum(dim=1)
        return score


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: attention over a history, then a feed-forward part.

    With ``fused``, one layer computes queries, keys and values.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, ffn: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        inner = heads * head_dim
        self.norm = nn.LayerNorm(dim)
        if fused:
            self.qkv = nn.Linear(dim, 3 * inner)
        else:
            self.q, self.k = nn.Linear(dim, inner), nn.Linear(dim, inner)
            self.v = nn.Linear(dim, inner)
        self.mix = nn.Linear(inner, dim)
        self.norm_ffn = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, ffn), nn.Linear(ffn, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        three = self.qkv(y).chunk(3, dim=-1) if self.fused else (self.q(y), self.k(y), self.v(y))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in three)
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + self.mix((attention @ v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm_ffn(x))))
        return out


class Transformer(nn.Module):
    """Blocks over a padded history; the score is a layer of its mean and the price."""

    def __init__(
        self,
        dim: int = 12,
        heads: int = 4,
        head_dim: int = 4,
        ffn: int = 32,
        layers: int = 2,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.item = nn.Embedding(30, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads, head_dim, ffn, fused) for _ in range(layers)
        )
        self.out = nn.Linear(dim + 5, 1)

    def forward(self, history: Tensor, price: Tensor) -> Tensor:
        x = self.item(history)
        for block in self.blocks:
            x = block(x)
        score: Tensor = self.out(torch.cat([x.mean(dim=1), price], dim=1))
        return score


class SplitHeadsTransformer(Transformer):
    """Heads split the width of the table, so fewer heads do not mean fewer channels."""

    def __init__(self, dim: int = 16, heads: int = 4, ffn: int = 32, layers: int = 1) -> None:
        super().__init__(dim, heads, dim // heads, ffn, layers)


class LowRankCrossNet(nn.Module):
    """Low-rank cross layers (DCN-v2, eq. 2), then a perceptron; both have a variable depth."""

    def __init__(
        self, dim: int = 11, cross_layers: int = 3, cross_rank: int = 16, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.user = nn.Embedding(30, dim)
        width = dim + 5
        self.down = nn.ModuleList(
            nn.Linear(width, cross_rank, bias=False) for _ in range(cross_layers)
        )
        self.up = nn.ModuleList(nn.Linear(cross_rank, width) for _ in range(cross_layers))
        layers: list[nn.Module] = []
        last = width
        for channels in hidden:
            layers += [nn.Linear(last, channels), nn.BatchNorm1d(channels), nn.ReLU()]
            last = channels
        self.deep = nn.Sequential(*layers)
        self.out = nn.Linear(last, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x0 = torch.cat([self.user(user), price], dim=1)
        x = x0
        for down, up in zip(self.down, self.up, strict=True):
            x = x0 * up(down(x)) + x
        score: Tensor = self.out(self.deep(x))
        return score


class DataDependentBranchNet(nn.Module):
    """Computes another function if a sum of values is positive, so it cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)
        self.out = nn.Linear(8, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        if x.sum() > 0:
            x = -x
        return self.out(x)
