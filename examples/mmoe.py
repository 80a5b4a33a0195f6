"""MMoE, a model with several predictions per row: experts that all tasks share, a gate for each.

Paper: Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", KDD. Differs: inputs are embeddings of fields and bags.

All arguments are JSON values, because a bundle stores an architecture as JSON arguments.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class MMoE(nn.Module):
    """Experts over the concatenated embeddings, and for each task a gate and a tower.

    Args:
        fields: one ``{"name": str, "rows": int}`` per single-valued field; its table is
            ``tables.<name>``.
        bags: one such mapping per multi-valued field; its table is ``bags.<name>`` with mean
            pooling.
        tasks: names of the tasks, in the order of the outputs.
        dim: width of every embedding.
        experts: number of experts.
        expert: width of the layer of an expert.
        tower: width of the hidden layer of a task's tower.
        dropout: dropout probability of hidden activations in training.
    """

    def __init__(
        self,
        *,
        fields: Sequence[Mapping[str, str | int]],
        bags: Sequence[Mapping[str, str | int]],
        tasks: Sequence[str],
        dim: int = 16,
        experts: int = 4,
        expert: int = 128,
        tower: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
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
        width = (len(self.tables) + len(self.bags)) * dim
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, expert), nn.ReLU(), nn.Dropout(dropout))
            for _ in range(experts)
        )
        self.gates = nn.ModuleDict({task: nn.Linear(width, experts) for task in tasks})
        self.towers = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.Linear(expert, tower), nn.ReLU(), nn.Dropout(dropout), nn.Linear(tower, 1)
                )
                for task in tasks
            }
        )

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the logits of each task, float ``(rows,)``, by its name.

        Args:
            **inputs: tensors by name. A field is int ``(rows,)``. A bag is the concatenated ids of
                all rows, int ``(all ids,)``, and ``<name>_offsets`` is the index of each row's
                first id, int ``(rows,)``.
        """
        parts = [table(inputs[name]) for name, table in self.tables.items()]  # (rows, dim) each
        parts += [
            bag(inputs[name], inputs[f"{name}_offsets"])  # (rows, dim) each
            for name, bag in self.bags.items()
        ]
        x = torch.cat(parts, dim=1)  # (rows, width)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)  # (rows, n, expert)
        logits = {}
        for task, gate in self.gates.items():
            shares = gate(x).softmax(dim=1).unsqueeze(2)  # (rows, n, 1)
            logits[task] = self.towers[task]((shares * experts).sum(dim=1)).squeeze(1)
        return logits
