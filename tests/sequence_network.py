"""A click network with attention over sequences of any length, in a module outside of recpress."""

import torch
from torch import Tensor, nn


class SequenceNet(nn.Module):
    """Attention of an item over the items of a history, and a mean of their categories.

    Args:
        items: rows of the table ``item``; row 0 is padding.
        categories: rows of the table ``category``; row 0 is padding.
        longest: length of the longest history; the table ``position`` has one row more, for 0.
        dim: width of every table.
        hidden: width of the hidden layer.
    """

    def __init__(self, items: int, categories: int, longest: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.item = nn.Embedding(items, dim)
        self.category = nn.Embedding(categories, dim)
        self.position = nn.Embedding(longest + 1, dim)
        self.key = nn.Linear(dim, dim)
        self.first = nn.Linear(3 * dim, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(
        self,
        history: Tensor,
        history_mask: Tensor,
        history_positions: Tensor,
        categories: Tensor,
        category_count: Tensor,
        item: Tensor,
    ) -> Tensor:
        """Return logits ``(rows,)``.

        Args:
            history: ids of items, int ``(rows, length)``.
            history_mask: float ``(rows, length)``, 1 at ids and 0 at padding.
            history_positions: int ``(rows, length)``, from 1; 0 at padding.
            categories: ids of the items' categories, int ``(rows, length)``; 0 at padding.
            category_count: number of ids in each list, int ``(rows,)``.
            item: id of the item whose click is predicted, int ``(rows,)``.
        """
        seen = self.item(history) + self.position(history_positions)  # (rows, length, dim)
        query = self.item(item)  # (rows, dim)
        weights = (self.key(seen) * query.unsqueeze(1)).sum(dim=2)  # (rows, length)
        weights = weights.masked_fill(history_mask == 0, -1e9).softmax(dim=1)
        interest = (seen * weights.unsqueeze(2)).sum(dim=1)
        is_category = history_mask.unsqueeze(2)
        total = (self.category(categories) * is_category).sum(dim=1)
        mean = total / category_count.unsqueeze(1).to(torch.float32)
        hidden = torch.relu(self.first(torch.cat([interest, mean, query], dim=1)))
        logits: Tensor = self.out(hidden).squeeze(1)
        return logits
