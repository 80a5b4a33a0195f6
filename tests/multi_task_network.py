"""A network with three outputs, in the manner of a multi-gate mixture of experts (Ma et al. 2018).

It is not a test file: a child process imports it as ``multi_task_network:MultiTaskNet``.
"""

from typing import Literal

import torch
from torch import Tensor, nn


class MultiTaskNet(nn.Module):
    """Score a row three times: logits of ``click`` and ``like``, and the probability of ``buy``.

    ``returns`` is the form in which ``forward`` returns them: a tuple, a mapping with a further
    entry, in another order, or one tensor ``(rows, 3)``.
    """

    def __init__(
        self,
        *,
        users: int,
        items: int,
        dense: int,
        dim: int,
        hidden: int,
        returns: Literal["tuple", "mapping", "tensor"] = "tuple",
    ) -> None:
        super().__init__()
        self.user = nn.Embedding(users, dim)
        self.item = nn.Embedding(items, dim)
        width = 2 * dim + dense
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, hidden),
                nn.BatchNorm1d(hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
            )
            for _ in range(2)
        )
        self.gates = nn.ModuleList(nn.Linear(width, 2) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(3))
        self.returns = returns

    def forward(
        self, *, user: Tensor, item: Tensor, price: Tensor
    ) -> tuple[Tensor, ...] | dict[str, Tensor] | Tensor:
        x = torch.cat([self.user(user), self.item(item), price], dim=1)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        click, like, buy = (
            head((gate(x).softmax(dim=1).unsqueeze(2) * experts).sum(dim=1))
            for gate, head in zip(self.gates, self.heads, strict=True)
        )
        if self.returns == "mapping":
            probability = buy.sigmoid()
            return {"buy": probability, "like": like, "hidden": experts, "click": click.squeeze(1)}
        if self.returns == "tensor":
            return torch.cat([click, like, buy.sigmoid()], dim=1)
        return click, like.squeeze(1), buy.sigmoid()
