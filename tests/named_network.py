"""A network whose config has the names of its modules, as models with feature names have."""

import torch
from torch import Tensor, nn


class Named(nn.Module):
    """Tables with the two given names, and a layer with the first one."""

    def __init__(self, *, names: list[str]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(50, 8) for name in names})
        self.layers = nn.ModuleDict({name: nn.Linear(8 * len(names) + 2, 1) for name in names[:1]})
        self.names = names

    def forward(self, *, a: Tensor, b: Tensor, dense: Tensor) -> Tensor:
        """Return logits ``(rows,)``."""
        first, second = (self.tables[name] for name in self.names)
        x = torch.cat([first(a), second(b), dense], dim=1)
        logit: Tensor = self.layers[self.names[0]](x).squeeze(1)
        return logit
