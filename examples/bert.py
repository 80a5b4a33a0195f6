"""A BERT encoder in plain torch, and a retrieval model that encodes queries and documents with it.

Papers: Devlin et al. 2019, https://arxiv.org/abs/1810.04805 (post-norm encoder); Reimers and
Gurevych 2019, https://arxiv.org/abs/1908.10084 (mean pooling over tokens, one encoder for both
sides).
Differs: no dropout, and one sentence per text, so the embedding of token types is a constant vector
that is added to every position.

The names of the modules are those of Hugging Face's ``BertModel`` with shorter prefixes
(``from_huggingface``), so trained weights are loaded without the package transformers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate projections for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        """Return float ``(rows, length, dim)``.

        Args:
            x: float ``(rows, length, dim)``.
            is_token: bool ``(rows, 1, 1, length)``, False at padding, to which no token attends.
        """
        rows, length, dim = x.shape
        query, key, value = (
            projection(x).view(rows, length, self.heads, dim // self.heads).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_token)
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(rows, length, dim))
        return result


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each followed by a residual sum and a norm."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-12)
        self.intermediate = nn.Linear(dim, hidden)
        self.output = nn.Linear(hidden, dim)
        self.output_norm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        """Return float ``(rows, length, dim)``; arguments as ``SelfAttention.forward``."""
        x = self.attention_norm(x + self.attention(x, is_token))
        result: Tensor = self.output_norm(x + self.output(F.gelu(self.intermediate(x))))
        return result


class BertEncoder(nn.Module):
    """Maps token ids to one vector of norm 1 per text: the normalized mean over its tokens.

    Args:
        vocabulary: rows of the table ``word``.
        longest: rows of the table ``position``: the largest number of tokens of a text.
        dim: width of the tables and of the vectors.
        heads: attention heads of each layer; ``dim`` is a multiple.
        hidden: width of the feed-forward networks.
        layers: number of layers.
    """

    def __init__(
        self, *, vocabulary: int, longest: int, dim: int, heads: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(longest, dim)
        self.token_type = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.layer = nn.ModuleList(Layer(dim, heads, hidden) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return vectors float ``(rows, dim)``.

        Args:
            input_ids: token ids, int ``(rows, length)``.
            attention_mask: int ``(rows, length)``, 1 at tokens and 0 at padding.
        """
        length = input_ids.shape[1]
        positions = self.position(torch.arange(length, device=input_ids.device))
        x = self.norm(self.word(input_ids) + positions + self.token_type)
        is_token = attention_mask[:, None, None, :] > 0
        for layer in self.layer:
            x = layer(x, is_token)
        weight = attention_mask.unsqueeze(2).to(x.dtype)  # (rows, length, 1)
        mean = (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1e-9)
        return F.normalize(mean, dim=1)


class TextRetriever(nn.Module):
    """Scores a query and a document by the cosine of their vectors, with one encoder for both.

    The arguments are those of ``BertEncoder``.
    """

    def __init__(
        self, *, vocabulary: int, longest: int, dim: int, heads: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        self.encoder = BertEncoder(
            vocabulary=vocabulary,
            longest=longest,
            dim=dim,
            heads=heads,
            hidden=hidden,
            layers=layers,
        )

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


NAMES = (
    ("embeddings.word_embeddings.", "word."),
    ("embeddings.position_embeddings.", "position."),
    ("embeddings.LayerNorm.", "norm."),
    ("encoder.layer.", "layer."),
    (".attention.self.", ".attention."),
    (".attention.output.dense.", ".attention.output."),
    (".attention.output.LayerNorm.", ".attention_norm."),
    (".intermediate.dense.", ".intermediate."),
    (".output.dense.", ".output."),
    (".output.LayerNorm.", ".output_norm."),
)
"""Parts of the names of Hugging Face's ``BertModel``, and of ``BertEncoder``, in this order."""

UNUSED = ("embeddings.position_ids", "pooler.")
"""First parts of names that ``BertEncoder`` does not use: row numbers, and a pooling layer."""


def from_huggingface(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of Hugging Face's ``BertModel`` for ``BertEncoder``.

    Args:
        weights: tensors by name, without a prefix for the whole model.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith(UNUSED):
            continue
        if name == "embeddings.token_type_embeddings.weight":
            renamed["token_type"] = tensor[0].clone()
            continue
        for part, shorter in NAMES:
            name = name.replace(part, shorter)
        renamed[name] = tensor
    return renamed
