"""Networks that read the weight of a table: sliced positions, and heads that score all items.

``SELF_ATTENTIVE``, ``MASKED_ITEM_HEAD`` and ``RECURRENT`` are references: class and signature of a
network (see ``models.py``).
"""

import torch
from models import Reference, signature_of
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import IdInput, SequenceInput

ITEMS, LONGEST, DIM = 40, 6, 16


class SelfAttentive(nn.Module):
    """A small SASRec: positions are a slice of a table's weight; the item table is the output head.

    Returns the logit of the item ``next``.
    """

    def __init__(self, items: int = ITEMS, longest: int = LONGEST, dim: int = DIM) -> None:
        super().__init__()
        self.item = nn.Embedding(items, dim)
        self.position = nn.Embedding(longest, dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.forward_layer = nn.Linear(dim, dim)

    def scores(self, hidden: Tensor) -> Tensor:
        return hidden @ self.item.weight.T

    def forward(self, history: Tensor, history_mask: Tensor, next: Tensor) -> Tensor:  # noqa: A002
        seen = self.item(history) + self.position.weight[: history.shape[1]]
        similarity = self.query(seen) @ self.key(seen).transpose(1, 2)
        hidden = similarity.masked_fill(~history_mask.unsqueeze(1), -1e9).softmax(2) @ seen
        hidden = hidden[:, -1] + F.relu(self.forward_layer(hidden[:, -1]))
        logits: Tensor = self.scores(hidden).gather(1, next.unsqueeze(1)).squeeze(1)
        return logits


class MaskedItemHead(SelfAttentive):
    """As ``SelfAttentive``, with the output head of BERT4Rec: a layer, and a bias for each item."""

    def __init__(self, items: int = ITEMS, longest: int = LONGEST, dim: int = DIM) -> None:
        super().__init__(items, longest, dim)
        self.transform, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.item_bias = nn.Parameter(torch.linspace(-1, 1, items))

    def scores(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(F.gelu(self.transform(hidden)))
        return F.linear(hidden, self.item.weight, self.item_bias)


class Recurrent(nn.Module):
    """A small GRU4Rec whose output head is an ``nn.Linear`` with the weight of the item table."""

    def __init__(self, items: int = ITEMS, dim: int = DIM) -> None:
        super().__init__()
        self.item = nn.Embedding(items, dim)
        self.reset, self.state = nn.Linear(2 * dim, dim), nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, items)
        self.head.weight = self.item.weight

    def forward(self, history: Tensor, history_mask: Tensor, next: Tensor) -> Tensor:  # noqa: A002
        seen = self.item(history)
        state = seen.new_zeros(seen.shape[0], seen.shape[2])
        for step in range(seen.shape[1]):
            both = torch.cat([seen[:, step], state], dim=1)
            gate = torch.sigmoid(self.reset(both)) * history_mask[:, step : step + 1].float()
            state = (1 - gate) * state + gate * torch.tanh(self.state(both))
        logits: Tensor = self.head(state).gather(1, next.unsqueeze(1)).squeeze(1)
        return logits


def _reference(network: type[nn.Module], *, dynamic: bool) -> Reference:
    """Return a reference; only with ``dynamic`` may histories be shorter than ``LONGEST``."""
    shortest = {"min_length": 1} if dynamic else {"min_length": LONGEST}
    history = SequenceInput(
        name="history",
        table="item",
        shape=(LONGEST,),
        mask="history_mask",
        mask_dtype="bool",
        **shortest,
    )
    return Reference(
        network, signature_of(history, IdInput(name="next", table="item"), form="logit")
    )


SELF_ATTENTIVE = _reference(SelfAttentive, dynamic=True)
MASKED_ITEM_HEAD = _reference(MaskedItemHead, dynamic=True)
RECURRENT = _reference(Recurrent, dynamic=False)
READERS = {"self-attentive": SELF_ATTENTIVE, "masked": MASKED_ITEM_HEAD, "recurrent": RECURRENT}
