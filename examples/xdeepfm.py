"""xDeepFM: a linear model, a compressed interaction network (CIN), and a perceptron.

Paper: Lian et al. 2018, https://arxiv.org/abs/1803.05170. As in the paper, all maps of a CIN layer
are summed and passed to the next layer; some implementations pass only half of them. Differs: a
layer has a bias and a ReLU.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from examples.field_tables import build_tables
from examples.perceptron import build_perceptron


class XDeepFM(nn.Module):
    """The sum of a linear model, the head of a CIN, and a perceptron, over the same embeddings.

    Args:
        fields: one ``{"name": str, "rows": int}`` per field; its tables are ``tables.<name>`` and,
            with rows of width 1, ``linear.<name>``.
        dim: width of every embedding.
        maps: number of feature maps of each CIN layer (equation 6 of the paper). A layer is a
            convolution of kernel size 1 over the products of all pairs of maps and fields.
        hidden: widths of the perceptron.
        dropout: dropout probability of hidden activations in training.
        batch_norm: whether every hidden layer of the perceptron has batch norm.
    """

    def __init__(
        self,
        *,
        fields: Sequence[Mapping[str, str | int]],
        dim: int = 10,
        maps: Sequence[int] = (64, 64),
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tables, self.linear = build_tables(fields, dim), build_tables(fields, 1)
        previous = [len(fields), *maps]
        self.interactions = nn.ModuleList(
            nn.Conv1d(before * len(fields), after, 1)
            for before, after in zip(previous, maps, strict=False)
        )
        self.interaction_head = nn.Linear(sum(maps), 1)
        self.perceptron = build_perceptron(
            len(fields) * dim, hidden, dropout=dropout, batch_norm=batch_norm
        )
        self.head = nn.Linear(hidden[-1] if hidden else len(fields) * dim, 1)

    def forward(self, **ids: Tensor) -> Tensor:
        """Return logits float ``(rows,)`` of ids int ``(rows,)``, given by field."""
        vectors = torch.stack([table(ids[name]) for name, table in self.tables.items()], dim=1)
        linear = torch.stack([table(ids[name]) for name, table in self.linear.items()], dim=1)
        maps, sums = vectors, []  # (rows, maps, dim); sums over dim, (rows, maps) each
        for layer in self.interactions:
            products = maps.unsqueeze(2) * vectors.unsqueeze(1)  # (rows, maps, fields, dim)
            maps = torch.relu(layer(products.flatten(1, 2)))
            sums.append(maps.sum(dim=2))
        crossed = self.interaction_head(torch.cat(sums, dim=1)).squeeze(1)
        deep = self.head(self.perceptron(vectors.flatten(1))).squeeze(1)
        logits: Tensor = linear.sum(dim=(1, 2)) + crossed + deep
        return logits
