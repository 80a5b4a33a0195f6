"""``TextRetriever``: a retrieval model with one transformer encoder for queries and documents.

Papers: Devlin et al. 2019, https://arxiv.org/abs/1810.04805 (encoder); Reimers and Gurevych 2019,
https://arxiv.org/abs/1908.10084 (pooling over tokens, one encoder for both sides); Song et al.
2020, https://arxiv.org/abs/2004.09297 (MPNet, whose attention depends on the distance of tokens).
Differs: no dropout, and one sentence per text, so the embedding of token types is a constant vector
that is added to every position. Positions count from the first token, also in a text that contains
the padding token.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.text_encoder.layers import Layer

POOLINGS = ("mean", "cls", "max")
"""How the vectors of a text's tokens become one: their mean, the first, or the largest values."""

PROJECTION_ACTIVATIONS = MappingProxyType({"identity": nn.Identity, "tanh": nn.Tanh})
"""The activations after a projection of the pooled vector."""


class TextEncoder(nn.Module):
    """Maps token ids to one vector per text.

    Args:
        vocabulary: rows of the table ``word``.
        longest: rows of the table ``position``: the largest number of tokens of a text.
        dim: width of the tables and layers.
        heads: attention heads of each layer; ``dim`` is a multiple.
        hidden: width of the feed-forward networks.
        layers: number of layers.
        activation: activation of the feed-forward networks, a key of ``ACTIVATIONS``.
        epsilon: constant that the norms add to the variance.
        token_type: whether there is a vector of the token type, which is added to every position.
        distance: whether a table has an attention bias per head for each distance of two tokens,
            which is added to the logits of attention.
        pooling: an entry of ``POOLINGS``.
        projections: layers that are applied to the pooled vector: ``dim``, ``bias`` and
            ``activation``, a key of ``PROJECTION_ACTIVATIONS``, of each.
        normalize: whether vectors have the norm 1.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        longest: int,
        dim: int,
        heads: int,
        hidden: int,
        layers: int,
        activation: str = "gelu",
        epsilon: float = 1e-12,
        token_type: bool = True,
        distance: bool = False,
        pooling: str = "mean",
        projections: Sequence[Mapping[str, Any]] = (),
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"expected a pooling of {POOLINGS}, got {pooling!r}")
        self.longest, self.pooling, self.normalize = longest, pooling, normalize
        self.word = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(longest, dim)
        self.token_type = nn.Parameter(torch.zeros(dim)) if token_type else None
        self.distance = nn.Embedding(2 * longest - 1, heads) if distance else None
        self.norm = nn.LayerNorm(dim, eps=epsilon)
        self.layer = nn.ModuleList(
            Layer(dim, heads, hidden, activation, epsilon) for _ in range(layers)
        )
        self.projection = nn.ModuleList()
        self.projection_activation = nn.ModuleList()
        for projection in projections:
            self.projection.append(nn.Linear(dim, projection["dim"], bias=projection["bias"]))
            self.projection_activation.append(PROJECTION_ACTIVATIONS[projection["activation"]]())
            dim = projection["dim"]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return vectors float ``(rows, width)``: ``dim``, or that of the last projection.

        Args:
            input_ids: token ids, int ``(rows, length)``.
            attention_mask: int ``(rows, length)``, 1 at tokens and 0 at padding.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word(input_ids) + self.position(positions)
        if self.token_type is not None:
            x = x + self.token_type
        x = self.norm(x)
        is_token = attention_mask[:, None, None, :] > 0  # (rows, 1, 1, length)
        mask = is_token
        if self.distance is not None:
            distances = positions[None, :] - positions[:, None]  # (length, length)
            # Row ``longest - 1`` of the table is distance 0.
            bias = self.distance(distances + self.longest - 1)  # (length, length, heads)
            mask = bias.permute(2, 0, 1).masked_fill(~is_token, -torch.inf)
        for layer in self.layer:
            x = layer(x, mask)
        vector = self._pool(x, attention_mask)
        for projection, activation in zip(self.projection, self.projection_activation, strict=True):
            vector = activation(projection(vector))
        return F.normalize(vector, dim=1) if self.normalize else vector

    def _pool(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the pooled vectors float ``(rows, dim)`` of token vectors ``(rows, length, dim)``.

        The mean and the maximum of a text without tokens are 0 and -1e9.
        """
        is_token = attention_mask.unsqueeze(2)  # (rows, length, 1)
        if self.pooling == "cls":
            return x[:, 0]
        if self.pooling == "max":
            return x.masked_fill(is_token == 0, -1e9).amax(dim=1)
        weight = is_token.to(x.dtype)
        return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)


class TextRetriever(nn.Module):
    """Scores a query and a document by the dot product of their vectors, with one encoder for both.

    The arguments are those of ``TextEncoder``. With ``normalize``, the score is the cosine.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.encoder = TextEncoder(**arguments)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        document_ids: Tensor,
        document_mask: Tensor,
    ) -> Tensor:
        """Return scores float ``(rows,)`` of queries and documents, as token ids and masks."""
        query = self.encoder(input_ids, attention_mask)
        document = self.encoder(document_ids, document_mask)
        score: Tensor = (query * document).sum(dim=1)
        return score
