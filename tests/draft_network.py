"""Networks of the test drafts, in a module outside of recpress, like the module of a user.

A draft is the folder that a user writes and ``recpress bundle pack`` reads.
"""

import torch
from torch import Tensor, nn


class ClickNet(nn.Module):
    """A cross layer parallel to two dense layers, over two ids, a bag of ids and dense numbers.

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
        """Return logits ``(rows,)``; ids are ``(rows,)``, ``dense`` is ``(rows, dense)``."""
        bag = self.tags(tags, tags_offsets)  # (rows, dim)
        wide = torch.cat([self.user(user), self.item(item), bag, dense], dim=1)  # (rows, width)
        crossed = wide * self.cross(wide) + wide  # (rows, width)
        deep = torch.relu(self.second(torch.relu(self.first(wide))))  # (rows, hidden / 2)
        logits: Tensor = self.out(torch.cat([crossed, deep], dim=1))  # (rows, 1)
        return logits.squeeze(1)


class UserTower(nn.Module):
    """The vector of a user, from the user's id and the tags of recent purchases (``lately``)."""

    def __init__(self, users: int, tags: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.user = nn.Embedding(users, dim)
        self.lately = nn.EmbeddingBag(tags, dim, mode="mean")
        self.first = nn.Linear(2 * dim, hidden)
        self.second = nn.Linear(hidden, dim)

    def forward(self, user: Tensor, lately: Tensor, lately_offsets: Tensor) -> Tensor:
        """Return vectors ``(rows, dim)`` of ids ``(rows,)`` and a jagged bag."""
        features = torch.cat([self.user(user), self.lately(lately, lately_offsets)], dim=1)
        vectors: Tensor = self.second(torch.relu(self.first(features)))
        return vectors


class ItemTower(nn.Module):
    """The vector of an item, from its id, tags and dense features."""

    def __init__(self, items: int, tags: int, dense: int, dim: int) -> None:
        super().__init__()
        self.item = nn.Embedding(items, dim)
        self.tags = nn.EmbeddingBag(tags, dim, mode="mean")
        self.out = nn.Linear(2 * dim + dense, dim)

    def forward(self, item: Tensor, tags: Tensor, tags_offsets: Tensor, dense: Tensor) -> Tensor:
        """Return vectors ``(rows, dim)``; ids are ``(rows,)``, ``dense`` is ``(rows, dense)``."""
        features = torch.cat([self.item(item), self.tags(tags, tags_offsets), dense], dim=1)
        vectors: Tensor = self.out(features)
        return vectors


class TowerNet(nn.Module):
    """Two towers of different classes; a score is the dot product of their vectors.

    Args:
        users: rows of the table ``of_user.user``.
        items: rows of the table ``of_item.item``.
        tags: rows of the bags ``of_user.lately`` and ``of_item.tags``.
        dense: width of the item's dense input.
        dim: width of every table and vector.
        hidden: width of the user tower's first layer.
        bias: added to every score outside the towers; packing such a model must fail if not 0.
        share: ``module`` or ``weight`` if both towers use one table of tags: the same bag, or two
            bags over one weight. An empty string: each tower has a table of tags.
    """

    def __init__(
        self,
        users: int,
        items: int,
        tags: int,
        dense: int,
        dim: int,
        hidden: int,
        bias: float = 0,
        share: str = "",
    ) -> None:
        super().__init__()
        self.of_user = UserTower(users, tags, dim, hidden)
        self.of_item = ItemTower(items, tags, dense, dim)
        self.bias = bias
        if share == "module":
            self.of_item.tags = self.of_user.lately
        elif share == "weight":
            self.of_item.tags.weight = self.of_user.lately.weight

    def forward(
        self,
        user: Tensor,
        lately: Tensor,
        lately_offsets: Tensor,
        item: Tensor,
        tags: Tensor,
        tags_offsets: Tensor,
        dense: Tensor,
    ) -> Tensor:
        """Return scores ``(rows,)`` of one user and one item per row."""
        query = self.of_user(user, lately, lately_offsets)
        item_vectors = self.of_item(item, tags, tags_offsets, dense)
        score: Tensor = (query * item_vectors).sum(dim=1) + self.bias
        return score
