"""A network that no part of recpress has seen: what tests pack stands for a user's own model."""

import torch
from torch import Tensor, nn


class ClickNet(nn.Module):
    """One cross layer beside two dense layers, over two ids, a bag of ids and dense numbers.

    Args:
        users: rows of the table ``user``.
        items: rows of the table ``item``.
        tags: rows of the bag ``tags``.
        dense: width of the dense input.
        dim: width of every table.
        hidden: width of the first dense layer; the second has half of it.
    """

    def __init__(
        self, users: int, items: int, tags: int, dense: int, dim: int, hidden: int
    ) -> None:
        super().__init__()
        self.user = nn.Embedding(users, dim)
        self.item = nn.Embedding(items, dim)
        self.tags = nn.EmbeddingBag(tags, dim, mode="mean")
        width = 3 * dim + dense
        self.cross = nn.Linear(width, width)
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, hidden // 2)
        self.out = nn.Linear(width + hidden // 2, 1)

    def forward(
        self, user: Tensor, item: Tensor, tags: Tensor, tags_offsets: Tensor, dense: Tensor
    ) -> Tensor:
        """Logits ``(rows,)`` of ids ``(rows,)``, a jagged bag and dense ``(rows, width)``."""
        bag = self.tags(tags, tags_offsets)  # (rows, dim)
        wide = torch.cat([self.user(user), self.item(item), bag, dense], dim=1)  # (rows, width)
        crossed = wide * self.cross(wide) + wide  # (rows, width)
        deep = torch.relu(self.second(torch.relu(self.first(wide))))  # (rows, hidden / 2)
        logits: Tensor = self.out(torch.cat([crossed, deep], dim=1))  # (rows, 1)
        return logits.squeeze(1)
