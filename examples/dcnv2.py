"""DCN-v2, a click model for rows of categorical, multi-valued and dense fields.

Paper: Wang et al. 2021, https://arxiv.org/abs/2008.13535.
Differs: full-rank cross layers only (no mixture of low-rank experts), and all embeddings have the
same width, so that a table can be replaced without changing the layers that consume it.

All arguments are JSON values, because a bundle stores an architecture as JSON arguments.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from examples.perceptron import build_perceptron


class DCNv2(nn.Module):
    """Cross layers, and a multilayer perceptron parallel to them or on top of them.

    ``fields`` and ``bags`` are lists, because vectors are concatenated in their order. A mapping
    would not keep it: JSON writers may sort keys.

    Args:
        fields: one ``{"name": str, "rows": int}`` per single-valued field; its table is
            ``tables.<name>``.
        bags: one such mapping per multi-valued field; its table is ``bags.<name>`` with mean
            pooling.
        dense: width of the dense input named ``dense``; 0 means no dense input.
        dim: width of every embedding.
        cross_layers: number of cross layers.
        hidden: widths of the perceptron; empty means the perceptron is the identity.
        dropout: dropout probability of hidden activations in training.
        batch_norm: whether every hidden layer has batch norm.
        structure: what the input of the perceptron is: "parallel" the concatenated vectors, as for
            the cross layers; "stacked" the output of the last cross layer.
    """

    def __init__(
        self,
        *,
        fields: Sequence[Mapping[str, str | int]],
        bags: Sequence[Mapping[str, str | int]] = (),
        dense: int = 0,
        dim: int = 16,
        cross_layers: int = 3,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.0,
        batch_norm: bool = False,
        structure: Literal["parallel", "stacked"] = "parallel",
    ) -> None:
        super().__init__()
        if structure not in ("parallel", "stacked"):
            raise ValueError(f"Expected structure 'parallel' or 'stacked', got {structure!r}.")
        self.dense = dense
        self.structure = structure
        self.tables = nn.ModuleDict(
            {str(item["name"]): nn.Embedding(int(item["rows"]), dim) for item in fields}
        )
        self.bags = nn.ModuleDict(
            {
                str(item["name"]): nn.EmbeddingBag(int(item["rows"]), dim, mode="mean")
                for item in bags
            }
        )
        for weight in (*self.tables.parameters(), *self.bags.parameters()):
            # Small enough that the ids hardly affect the first logits.
            nn.init.normal_(weight, std=0.01)

        width = (len(self.tables) + len(self.bags)) * dim + dense
        if not width:
            raise ValueError("DCNv2 needs at least one field, bag or dense input.")
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(cross_layers))
        self.perceptron = build_perceptron(width, hidden, dropout=dropout, batch_norm=batch_norm)
        last = hidden[-1] if hidden else width
        self.head = nn.Linear(last if structure == "stacked" else width + last, 1)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the logits of rows.

        Args:
            **inputs: tensors by name. A field is int ``(rows,)``. A bag is the concatenated ids of
                all rows, int ``(all ids,)``, and ``<name>_offsets`` is the index of each row's
                first id, int ``(rows,)``. ``dense`` is float ``(rows, dense)``, if ``dense > 0``.

        Returns:
            float ``(rows,)``: the logit of a click. An empty bag contributes a zero vector.
        """
        parts = [table(inputs[name]) for name, table in self.tables.items()]  # (rows, dim) each
        parts += [
            bag(inputs[name], inputs[f"{name}_offsets"])  # (rows, dim) each
            for name, bag in self.bags.items()
        ]
        if self.dense:
            parts.append(inputs["dense"])  # (rows, dense)
        concatenated = torch.cat(parts, dim=1)  # (rows, width)

        crossed = concatenated  # (rows, width)
        for layer in self.cross:
            crossed = concatenated * layer(crossed) + crossed  # (rows, width)

        if self.structure == "stacked":
            top = self.perceptron(crossed)  # (rows, hidden[-1])
        else:
            # (rows, width + hidden[-1])
            top = torch.cat([crossed, self.perceptron(concatenated)], dim=1)
        logit: Tensor = self.head(top).squeeze(1)  # (rows,)
        return logit
