"""A click network with inputs as in public CTR libraries, in a module outside of recpress."""

import torch
from torch import Tensor, nn


class FieldsNet(nn.Module):
    """Wide and deep parts over fields of joined tables, and over one float matrix.

    The tables ``joined`` and ``wide`` have the rows of all users, then those of all items.

    Args:
        users: rows of the first field of the joined tables.
        items: rows of the second field, which follow those of the first.
        brands: rows of the table ``brand``.
        tags: rows of the table ``tags``, of which row 0 is padding.
        longest: number of columns of the matrix with ids of tags.
        dim: width of every table but ``wide``.
        hidden: width of the hidden layer.
    """

    def __init__(
        self, users: int, items: int, brands: int, tags: int, longest: int, dim: int, hidden: int
    ) -> None:
        super().__init__()
        self.longest = longest
        self.joined = nn.Embedding(users + items, dim)
        self.wide = nn.Embedding(users + items, 1)
        self.brand = nn.Embedding(brands, dim)
        self.tags = nn.Embedding(tags, dim)
        self.register_buffer("offsets", torch.tensor([0, users]))
        self.first = nn.Linear(4 * dim + 3, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, ids: Tensor, matrix: Tensor, position: Tensor) -> Tensor:
        """Return logits ``(rows,)``.

        Args:
            ids: the ids of user and item, int ``(rows, 2)``; each starts at 0.
            matrix: float32 ``(rows, 1 + longest + 2)``: the brand, ``longest`` tags, two numbers.
            position: int ``(rows,)``, from 1.
        """
        rows = ids + self.offsets
        tag_ids = matrix[:, 1 : 1 + self.longest].long()
        is_tag = (tag_ids != 0).unsqueeze(2).to(torch.float32)  # (rows, longest, 1)
        bag = (self.tags(tag_ids) * is_tag).sum(dim=1) / is_tag.sum(dim=1).clamp(min=1)
        brand = self.brand(matrix[:, 0].long())
        numbers = matrix[:, 1 + self.longest :]
        discount = 1 / position.to(torch.float32).unsqueeze(1)
        deep = torch.cat([self.joined(rows).flatten(1), bag, brand, numbers, discount], dim=1)
        wide = self.wide(rows).sum(dim=(1, 2))
        logits: Tensor = wide + self.out(torch.relu(self.first(deep))).squeeze(1)
        return logits
