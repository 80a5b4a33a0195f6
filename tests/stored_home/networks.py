"""The networks of the stored home. Bundles name these classes by path: never rename or move them.

A change of a constructor's arguments, of a module's name or of the computation makes the stored
bundles unreadable or their stored scores wrong. Add a new class instead. A home is the folder with
everything that recpress stores (``RECPRESS_HOME``).
"""

import torch
from torch import Tensor, nn


class ClickNet(nn.Module):
    """A cross layer and a residual stack over two ids, a bag of ids and dense numbers.

    Args:
        users: rows of the table ``user``.
        items: rows of the table ``item``.
        tags: rows of the bag ``tags``.
        dense: width of the dense input.
        dim: width of every table.
        hidden: width of every hidden layer.
        inner: width between the two layers of every residual block.
        blocks: number of residual blocks.
    """

    def __init__(
        self,
        users: int,
        items: int,
        tags: int,
        dense: int,
        dim: int,
        hidden: int,
        inner: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.user = nn.Embedding(users, dim)
        self.item = nn.Embedding(items, dim)
        self.tags = nn.EmbeddingBag(tags, dim, mode="mean")
        width = 3 * dim + dense
        self.cross = nn.Linear(width, width, bias=False)
        self.first = nn.Linear(width, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.up = nn.ModuleList(nn.Linear(hidden, inner) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(inner, hidden) for _ in range(blocks))
        self.out = nn.Linear(width + hidden, 1)

    def forward(
        self, user: Tensor, item: Tensor, tags: Tensor, tags_offsets: Tensor, dense: Tensor
    ) -> Tensor:
        """Logits ``(rows,)`` of ids ``(rows,)``, a jagged bag and dense ``(rows, dense)``."""
        bag = self.tags(tags, tags_offsets)  # (rows, dim)
        wide = torch.cat([self.user(user), self.item(item), bag, dense], dim=1)  # (rows, width)
        crossed = wide * self.cross(wide) + wide  # (rows, width)
        deep = torch.relu(self.norm(self.first(wide)))  # (rows, hidden)
        for up, down in zip(self.up, self.down, strict=True):
            deep = deep + down(torch.relu(up(deep)))
        logits: Tensor = self.out(torch.cat([crossed, deep], dim=1))  # (rows, 1)
        return logits.squeeze(1)


class UserTower(nn.Module):
    """The vector of a user and of the tags of recent items."""

    def __init__(self, users: int, recent: nn.EmbeddingBag, dim: int, hidden: int) -> None:
        super().__init__()
        self.user = nn.Embedding(users, dim)
        self.recent = recent
        self.first = nn.Linear(2 * dim, hidden)
        self.second = nn.Linear(hidden, dim)

    def forward(self, user: Tensor, recent: Tensor, recent_offsets: Tensor) -> Tensor:
        """Vectors ``(rows, dim)`` of ids ``(rows,)`` and a jagged bag."""
        x = torch.cat([self.user(user), self.recent(recent, recent_offsets)], dim=1)
        vectors: Tensor = self.second(torch.relu(self.first(x)))
        return vectors


class ItemTower(nn.Module):
    """The vector of an item, its tags and its dense numbers."""

    def __init__(self, items: int, tags: int, dense: int, dim: int) -> None:
        super().__init__()
        self.item = nn.Embedding(items, dim)
        self.tags = nn.EmbeddingBag(tags, dim, mode="mean")
        self.out = nn.Linear(2 * dim + dense, dim)

    def forward(self, item: Tensor, tags: Tensor, tags_offsets: Tensor, dense: Tensor) -> Tensor:
        """Vectors ``(rows, dim)`` of ids ``(rows,)``, a jagged bag and dense ``(rows, dense)``."""
        x = torch.cat([self.item(item), self.tags(tags, tags_offsets), dense], dim=1)
        vectors: Tensor = self.out(x)
        return vectors


class TwoTowerNet(nn.Module):
    """Two towers that share one bag of tags; a score is the dot product of their vectors.

    Args:
        users: rows of the table ``query.user``.
        items: rows of the table ``catalogue.item``.
        tags: rows of the bags ``query.recent`` and ``catalogue.tags``.
        dense: width of the item's dense input.
        dim: width of every table and vector.
        hidden: width of the query tower's first layer.
    """

    def __init__(
        self, users: int, items: int, tags: int, dense: int, dim: int, hidden: int
    ) -> None:
        super().__init__()
        self.catalogue = ItemTower(items, tags, dense, dim)
        self.query = UserTower(users, self.catalogue.tags, dim, hidden)

    def forward(
        self,
        user: Tensor,
        recent: Tensor,
        recent_offsets: Tensor,
        item: Tensor,
        tags: Tensor,
        tags_offsets: Tensor,
        dense: Tensor,
    ) -> Tensor:
        """Scores ``(rows,)``."""
        query = self.query(user, recent, recent_offsets)
        return (query * self.catalogue(item, tags, tags_offsets, dense)).sum(dim=1)
