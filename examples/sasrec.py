"""SASRec: a transformer over a user's history predicts the next item.

Paper: Kang and McAuley 2018, https://arxiv.org/abs/1808.09781.
Differs: positions are counted from the latest item, as with the paper's lists of fixed length, so
that lists need no padding to that length; training uses a softmax over all items instead of one
sampled negative.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Causal self-attention and two linear layers, each after a layer norm and with a residual.

    Args:
        dim: width of the vectors.
        heads: number of attention heads.
        dropout: dropout probability in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_layers = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Return vectors float ``(rows, length, dim)``.

        Args:
            x: float ``(rows, length, dim)``.
            visible: bool ``(rows, length, length)``; whether a position (second dimension) attends
                to another one (third dimension).
        """
        rows, length, dim = x.shape

        def split(vectors: Tensor) -> Tensor:  # (rows, heads, length, dim / heads)
            return vectors.view(rows, length, self.heads, dim // self.heads).transpose(1, 2)

        normed = self.before_attention(x)
        attended = F.scaled_dot_product_attention(
            split(self.query(normed)),
            split(self.key(normed)),
            split(self.value(normed)),
            attn_mask=visible.unsqueeze(1),
        )
        x = x + self.dropout(self.output(attended.transpose(1, 2).reshape(rows, length, dim)))
        hidden = torch.relu(self.inner(self.before_layers(x)))
        result: Tensor = x + self.dropout(self.outer(hidden))
        return result


class HistoryTower(nn.Module):
    """Maps a history of items to the vector of the next item.

    Args:
        table: embeddings of items.
        longest: number of ids of the longest history.
        blocks: number of blocks.
        heads: number of attention heads.
        dropout: dropout probability in training.
    """

    def __init__(
        self, table: nn.Embedding, longest: int, blocks: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        dim = table.embedding_dim
        self.table = table
        self.position = nn.Embedding(longest + 1, dim)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def compute_all_vectors(self, history: Tensor, history_mask: Tensor) -> Tensor:
        """Return the vector of the next item at each position, float ``(rows, length, dim)``."""
        length = history.shape[1]
        # The latest item has position 1, the one before 2, ...; padding, on the left, has 0.
        positions = torch.arange(length, 0, -1, device=history.device) * history_mask
        x = self.dropout(self.table(history) + self.position(positions))
        is_earlier = torch.ones(length, length, dtype=torch.bool, device=history.device).tril()
        is_item = history_mask == 1
        # A padded position attends to itself, because a softmax over nothing is NaN.
        itself = torch.eye(length, dtype=torch.bool, device=history.device)
        visible = (is_earlier & is_item.unsqueeze(1)) | itself  # (rows, length, length)
        for block in self.blocks:
            x = block(x, visible)
        vectors: Tensor = self.norm(x)
        return vectors

    def forward(self, history: Tensor, history_mask: Tensor) -> Tensor:
        """Return the vector of the item after the last one, float ``(rows, dim)``.

        Args:
            history: ids of items, int ``(rows, length)``, padded on the left.
            history_mask: int ``(rows, length)``, 1 at ids and 0 at padding.
        """
        return self.compute_all_vectors(history, history_mask)[:, -1]


class ItemTower(nn.Module):
    """Maps an item to its row of the table that the histories use too."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, item: Tensor) -> Tensor:
        """Return vectors float ``(rows, dim)`` of ids int ``(rows,)``."""
        vectors: Tensor = self.table(item)
        return vectors


class SASRec(nn.Module):
    """Two towers over one table: ``query`` reads a history, ``item`` an item.

    Args:
        items: rows of the table; row 0 is padding.
        longest: number of ids of the longest history.
        dim: width of all vectors.
        blocks: number of transformer blocks.
        heads: number of attention heads.
        dropout: dropout probability in training.
    """

    def __init__(
        self,
        *,
        items: int,
        longest: int = 50,
        dim: int = 64,
        blocks: int = 2,
        heads: int = 2,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        table = nn.Embedding(items, dim)
        nn.init.normal_(table.weight, std=0.02)
        self.query = HistoryTower(table, longest, blocks, heads, dropout)
        self.item = ItemTower(table)

    def forward(self, history: Tensor, history_mask: Tensor, item: Tensor) -> Tensor:
        """Return scores float ``(rows,)``: the dot product of both towers' vectors."""
        products: Tensor = self.query(history, history_mask) * self.item(item)  # (rows, dim)
        return products.sum(dim=1)
