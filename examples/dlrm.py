"""DLRM: dot products of all pairs of embeddings, and a perceptron over them.

Paper: Naumov et al. 2019, https://arxiv.org/abs/1906.00091.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from examples.perceptron import build_perceptron


class DLRM(nn.Module):
    """Embeddings of ids and bags, a perceptron over numbers, and their pairwise dot products.

    Args:
        fields: one ``{"name": str, "rows": int}`` per single-valued field; its table is
            ``tables.<name>``.
        bags: one such mapping per multi-valued field; its table is ``bags.<name>``, whose rows are
            summed.
        dense: width of the dense input named ``dense``; 0 means no dense input and no bottom
            perceptron.
        dim: width of every embedding, and of the last layer of the bottom perceptron.
        bottom: widths of the hidden layers of the bottom perceptron, which reads the numbers.
        top: widths of the hidden layers of the top perceptron, which reads the dot products.
        dropout: dropout probability of hidden activations in training.
        batch_norm: whether every hidden layer has batch norm.
    """

    def __init__(
        self,
        *,
        fields: Sequence[Mapping[str, str | int]] = (),
        bags: Sequence[Mapping[str, str | int]] = (),
        dense: int = 0,
        dim: int = 10,
        bottom: Sequence[int] = (),
        top: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {str(item["name"]): nn.Embedding(int(item["rows"]), dim) for item in fields}
        )
        self.bags = nn.ModuleDict(
            {
                str(item["name"]): nn.EmbeddingBag(int(item["rows"]), dim, mode="sum")
                for item in bags
            }
        )
        # Larger than in other models: with nearly equal vectors, all dot products are nearly zero
        # and their gradients too.
        for weight in (*self.tables.parameters(), *self.bags.parameters()):
            nn.init.normal_(weight, std=0.1)
        self.bottom: nn.Sequential | None = None
        if dense:
            self.bottom = build_perceptron(
                dense, [*bottom, dim], dropout=dropout, batch_norm=batch_norm
            )
        vectors = len(self.tables) + len(self.bags) + (self.bottom is not None)
        # Positions of the dot products below the diagonal in the flattened matrix of all of them.
        self.pairs = [i * vectors + j for i in range(vectors) for j in range(i)]
        width = len(self.pairs) + (dim if self.bottom is not None else 0)
        self.top = build_perceptron(width, top, dropout=dropout, batch_norm=batch_norm)
        self.head = nn.Linear(top[-1] if top else width, 1)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the logits of rows, float ``(rows,)``.

        Args:
            **inputs: tensors by name. A field is int ``(rows,)``. A bag is the concatenated ids of
                all rows, int ``(all ids,)``, and ``<name>_offsets`` is the index of each row's
                first id, int ``(rows,)``. ``dense`` is float ``(rows, dense)``, if ``dense > 0``.
        """
        vectors = [table(inputs[name]) for name, table in self.tables.items()]  # (rows, dim) each
        vectors += [
            bag(inputs[name], inputs[f"{name}_offsets"])  # (rows, dim) each
            for name, bag in self.bags.items()
        ]
        numbers = [] if self.bottom is None else [self.bottom(inputs["dense"])]  # (rows, dim)
        stacked = torch.stack([*vectors, *numbers], dim=1)  # (rows, vectors, dim)
        products = stacked @ stacked.transpose(1, 2)  # (rows, vectors, vectors)
        dots = products.flatten(1)[:, self.pairs]  # (rows, pairs)
        logits: Tensor = self.head(self.top(torch.cat([*numbers, dots], dim=1))).squeeze(1)
        return logits
