"""DeepFM: a factorization machine and a perceptron that share the embeddings of id fields.

Paper: Guo et al. 2017, https://arxiv.org/abs/1703.04247.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from examples.field_tables import build_tables
from examples.perceptron import build_perceptron


class DeepFM(nn.Module):
    """The sum of a linear model, all pairwise dot products of embeddings, and a perceptron.

    Args:
        fields: one ``{"name": str, "rows": int}`` per field; its tables are ``tables.<name>`` and,
            with rows of width 1, ``linear.<name>``.
        dim: width of every embedding.
        hidden: widths of the perceptron.
        dropout: dropout probability of hidden activations in training.
        batch_norm: whether every hidden layer has batch norm.
    """

    def __init__(
        self,
        *,
        fields: Sequence[Mapping[str, str | int]],
        dim: int = 10,
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tables, self.linear = build_tables(fields, dim), build_tables(fields, 1)
        self.perceptron = build_perceptron(
            len(self.tables) * dim, hidden, dropout=dropout, batch_norm=batch_norm
        )
        self.head = nn.Linear(hidden[-1] if hidden else len(self.tables) * dim, 1)

    def forward(self, **ids: Tensor) -> Tensor:
        """Return logits float ``(rows,)`` of ids int ``(rows,)``, given by field."""
        vectors = torch.stack([table(ids[name]) for name, table in self.tables.items()], dim=1)
        linear = torch.stack([table(ids[name]) for name, table in self.linear.items()], dim=1)
        # The sum over all pairs of fields (equation 4 of Rendle 2010, "Factorization Machines").
        total = vectors.sum(dim=1)  # (rows, dim)
        pairs = (total.square() - vectors.square().sum(dim=1)).sum(dim=1) / 2  # (rows,)
        deep = self.head(self.perceptron(vectors.flatten(1))).squeeze(1)
        logits: Tensor = linear.sum(dim=(1, 2)) + pairs + deep
        return logits
