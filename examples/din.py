"""DIN: a click model that pools a user's history with attention to the candidate item.

Paper: Zhou et al. 2018, https://arxiv.org/abs/1706.06978.
Differs: ReLU in place of the paper's activation function Dice.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from examples.perceptron import build_perceptron


class DIN(nn.Module):
    """Embeddings of ids, and a history of items weighted by their relation to the candidate.

    Args:
        fields: one ``{"name": str, "rows": int}`` per field; its table is ``tables.<name>``. The
            table of the field ``item`` is also that of the history; its row 0 is padding.
        dim: width of every embedding.
        attention: widths of the hidden layers that compute the weight of an item of the history.
        hidden: widths of the hidden layers of the perceptron.
        dropout: dropout probability of hidden activations in training.
    """

    def __init__(
        self,
        *,
        fields: Sequence[Mapping[str, str | int]],
        dim: int = 16,
        attention: Sequence[int] = (64, 32),
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {str(field["name"]): nn.Embedding(int(field["rows"]), dim) for field in fields}
        )
        for weight in self.tables.parameters():
            # Small enough that the ids hardly affect the first logits.
            nn.init.normal_(weight, std=0.01)
        self.attention = build_perceptron(4 * dim, attention)
        self.weight = nn.Linear(attention[-1], 1)
        width = (len(self.tables) + 1) * dim
        self.perceptron = build_perceptron(width, hidden, dropout=dropout)
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, history: Tensor, history_mask: Tensor, **ids: Tensor) -> Tensor:
        """Return the logits of rows, float ``(rows,)``.

        Args:
            history: ids of earlier items, int ``(rows, length)``.
            history_mask: float ``(rows, length)``, 1 at ids and 0 at padding.
            **ids: int ``(rows,)``, by field.
        """
        vectors = {name: table(ids[name]) for name, table in self.tables.items()}  # (rows, dim)
        seen = self.tables["item"](history)  # (rows, length, dim)
        item = vectors["item"].unsqueeze(1).expand_as(seen)
        related = torch.cat([seen, item, seen - item, seen * item], dim=2)
        # As in the paper, weights have no softmax, so that their sum can measure the interest.
        weights = self.weight(self.attention(related)) * history_mask.unsqueeze(2)
        interest = (weights * seen).sum(dim=1)  # (rows, dim)
        x = torch.cat([*vectors.values(), interest], dim=1)
        logits: Tensor = self.head(self.perceptron(x)).squeeze(1)
        return logits
