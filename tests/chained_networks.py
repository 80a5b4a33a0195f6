"""Networks with norms and activations between layers.

They are for tests of the steps ``fold``, ``equalize`` and ``smooth_quant``, which rewrite weights
without changing the network's function.

``NORM_FIRST``, ``BLOCK``, ``LOUD`` and ``CHAIN`` are references (class, arguments and signature of
a network, see ``models.py``). ``LOUD`` is the ``Block`` with outlier channels. ``SIGNATURE`` of
``narrow_networks.py`` has the inputs ``user`` (an id) and ``price`` (five numbers).
"""

import torch
from models import ATTENTION, Reference
from narrow_networks import SIGNATURE
from torch import Tensor, nn
from torch.nn import functional as F


class NormFirst(nn.Module):
    """Batch norms: ``first`` before a Linear, ``second`` after one, ``third`` before a sum.

    ``bias`` is whether the layer ``deep`` has a bias.
    """

    def __init__(self, width: int = 16, bias: bool = True) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.first = nn.BatchNorm1d(9)
        self.hidden = nn.Linear(9, width)
        self.plain = nn.Linear(width, width, bias=False)
        self.second = nn.BatchNorm1d(width)
        self.deep = nn.Linear(width, width, bias=bias)
        self.third = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = self.first(torch.cat([self.user(user), price], dim=1))
        x = F.relu(self.hidden(x))
        x = self.deep(self.second(self.plain(x)))
        score: Tensor = self.out(torch.tanh(self.third(x) + x))
        return score


class Block(nn.Module):
    """One transformer block over a history.

    ``loud`` creates outlier channels, so that int8 inputs of the next layers have a coarse scale.
    It multiplies the factors of two channels in the first two norms and the weights of one channel
    of ``up``, and divides the weights that consume them. Scores change little: only by the biases
    of these channels, which are not multiplied.
    """

    def __init__(self, dim: int = 16, inner: int = 32, loud: float = 1.0) -> None:
        super().__init__()
        self.user = nn.Embedding(25, dim)
        self.item = nn.Embedding(60, dim, padding_idx=0)
        self.first = nn.LayerNorm(dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.mix = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.second = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.last = nn.RMSNorm(dim)
        self.out = nn.Linear(dim, 1)
        with torch.no_grad():
            for norm in (self.first, self.second):
                norm.bias.normal_(std=0.1)
                norm.weight[3:5] *= loud
            self.last.weight.uniform_(0.5, 1.5)
            self.up.weight[7] *= loud  # loud inside the feed-forward part as well
            self.down.weight[:, 7] /= loud
            for layer in (self.query, self.key, self.value, self.up):
                layer.weight[:, 3:5] /= loud

    def forward(self, user: Tensor, history: Tensor) -> Tensor:
        x = self.item(history) + self.user(user).unsqueeze(1)  # (rows, length, dim)
        y = self.first(x)
        attention = self.query(y) @ self.key(y).transpose(1, 2)  # (rows, length, length)
        x = x + self.mix((attention / attention.shape[-1]).softmax(dim=2) @ self.value(y))
        x = x + self.down(F.relu(self.up(self.second(x))))
        score: Tensor = self.out(self.last(x[:, 0])).squeeze(1)
        return score


class Chain(nn.Module):
    """A chain of dense layers with activations between them.

    A positive factor per channel can be moved through some (relu, leaky relu, PReLU, a clamp at 0,
    reshapes that keep channels) and not through others (gelu, tanh). The weight of ``weight_read``
    is also read outside the layer.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.a = nn.Linear(9, width)
        self.b = nn.Linear(width, width)
        self.c, self.d = nn.Linear(width, width), nn.Linear(width, width)
        self.e = nn.Linear(width, width)
        self.called_twice = nn.Linear(width, width)
        self.weight_read = nn.Linear(width, width)
        self.slope = nn.PReLU(width)
        self.out = nn.Linear(width, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = F.leaky_relu(self.a(torch.cat([self.user(user), price], dim=1)))
        x = self.slope(self.b(x.view(-1, 1, x.shape[-1]).squeeze(1))).clamp(min=0)
        x = F.gelu(self.c(x)) + torch.tanh(self.d(x))
        x = F.relu(self.e(x))
        x = self.called_twice(F.relu(self.called_twice(x)))
        x = self.weight_read(F.relu(x)) * self.weight_read.weight.abs().sum()
        score: Tensor = self.out(F.relu(x))
        return score


NORM_FIRST = Reference(NormFirst, SIGNATURE)
BLOCK = Reference(Block, ATTENTION.signature)
LOUD = Reference(Block, ATTENTION.signature, {"loud": 40.0})
CHAIN = Reference(Chain, SIGNATURE)
