"""The layers of a transformer encoder: self-attention and a feed-forward network.

Papers: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; Devlin et al. 2019,
https://arxiv.org/abs/1810.04805 (post-norm: the norm follows the residual sum).
Differs: no dropout.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
)
"""The activations of the feed-forward networks; ``gelu_tanh`` approximates ``gelu``."""


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate projections for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return float ``(rows, length, dim)``.

        Args:
            x: float ``(rows, length, dim)``.
            mask: bool ``(rows, 1, 1, length)``, False at padding, to which no token attends; or
                float ``(rows, heads, length, length)``, which is added to the logits.
        """
        rows, length, dim = x.shape
        query, key, value = (
            projection(x).view(rows, length, self.heads, dim // self.heads).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(rows, length, dim))
        return result


class Layer(nn.Module):
    """Self-attention and a feed-forward network, each followed by a residual sum and a norm."""

    def __init__(self, dim: int, heads: int, hidden: int, activation: str, epsilon: float) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.attention = SelfAttention(dim, heads)
        self.attention_norm = nn.LayerNorm(dim, eps=epsilon)
        self.intermediate = nn.Linear(dim, hidden)
        self.output = nn.Linear(hidden, dim)
        self.output_norm = nn.LayerNorm(dim, eps=epsilon)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return float ``(rows, length, dim)``; arguments as ``SelfAttention.forward``."""
        x = self.attention_norm(x + self.attention(x, mask))
        hidden = self.activation(self.intermediate(x))
        result: Tensor = self.output_norm(x + self.output(hidden))
        return result
