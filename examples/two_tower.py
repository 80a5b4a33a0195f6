"""Two towers over ids, for retrieval: a vector a user, a vector an item, their dot product a score.

Papers: Yi et al. 2019, https://doi.org/10.1145/3298689.3346996 (negatives are the other items of
a batch, corrected for how often each is drawn); Wu et al. 2022, https://arxiv.org/abs/2201.02327
(why a softmax over cosines suits recommendation).
Differs: ids alone, no features, and a residual layer where the first paper has a deep tower.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Ints = NDArray[np.int64]


class IdTower(nn.Module):
    """A unit vector an id, times ``scale``.

    Args:
        name: of the argument of ``forward``.
        rows: of the table.
        dim: of the table and the vector.
        hidden: width of a residual layer on top of the table; 0 means there is none.
        scale: length of the vectors.
    """

    def __init__(self, name: str, rows: int, dim: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.name = name
        self.scale = scale
        self.table = nn.Embedding(rows, dim)
        # Short before they are normalised, so that the first steps turn them far.
        nn.init.normal_(self.table.weight, std=0.02)
        self.layers: nn.Sequential | None = None
        if hidden:
            last = nn.Linear(hidden, dim)
            nn.init.zeros_(last.weight)  # begins as the table alone
            nn.init.zeros_(last.bias)
            self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), last)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Vectors float ``(rows, dim)`` of ids int ``(rows,)``."""
        vector: Tensor = self.table(inputs[self.name])  # (rows, dim)
        if self.layers is not None:
            vector = vector + self.layers(vector)
        return F.normalize(vector, dim=1) * self.scale


class TwoTower(nn.Module):
    """A user tower and an item tower.

    Args:
        users: how many.
        items: how many.
        dim: width of both tables and of the vectors.
        hidden: width of each tower's residual layer; 0 means there is none.
        temperature: a score is the cosine over this; the user tower holds it.
    """

    def __init__(
        self, *, users: int, items: int, dim: int = 64, hidden: int = 0, temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.query = IdTower("user", users, dim, hidden, 1 / temperature)
        self.item = IdTower("item", items, dim, hidden, 1.0)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Scores float ``(rows,)`` of ids int ``(rows,)``: higher ranks first."""
        score: Tensor = (self.query(user=user) * self.item(item=item)).sum(dim=1)
        return score


@dataclass(frozen=True)
class Training:
    """How the network is trained: a few tries on validation rows, no search."""

    dim: int = 64
    # No better than none on validation rows; it is here so that there are dense layers to compress.
    hidden: int = 64
    temperature: float = 0.1
    batch: int = 1024
    learning_rate: float = 3e-3
    # The learning rate falls to 0 over these; a second run may stop where the first was best.
    epochs: int = 8
    stop_after: int | None = None
    patience: int = 2
    seed: int = 1
    # One is fastest: the products are too small to share.
    threads: int = 1


def train(
    network: TwoTower,
    pairs: Ints,
    recipe: Training,
    measure: Callable[[TwoTower], float] | None,
    say: Callable[[str], None],
) -> tuple[int, float]:
    """Train in place on interactions; every other item of a batch is a negative.

    Args:
        network: to train; left in evaluation mode.
        pairs: user and item, int64 ``(rows, 2)``.
        recipe: how.
        measure: what is to grow, asked after every epoch; the best epoch's weights are kept.
            None trains until ``recipe.stop_after``.
        say: told one line of progress at a time.

    Returns:
        The epoch whose weights are kept, from 1, and what was measured then (NaN without).
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    held = torch.from_numpy(pairs)
    # How likely an item is drawn into a batch; what the softmax is corrected by.
    drawn = torch.bincount(held[:, 1], minlength=network.item.table.num_embeddings)
    frequency = (drawn.clamp(min=1) / len(held)).log().float()
    tables = [network.query.table, network.item.table]
    dense = [p for name, p in network.named_parameters() if ".layers." in name]
    # A batch reads a few rows of each table, so only those are stepped: ten times faster.
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SparseAdam([table.weight for table in tables], recipe.learning_rate)
    ]
    if dense:
        optimizers.append(torch.optim.Adam(dense, recipe.learning_rate))
    steps, step = recipe.epochs * -(-len(held) // recipe.batch), 0
    last = recipe.stop_after or recipe.epochs
    best, kept, state = -1.0, last, dict[str, Tensor]()
    for epoch in range(1, last + 1):
        network.train()
        for table in tables:
            table.sparse = True
        total = 0.0
        for rows in torch.split(torch.randperm(len(held), generator=generator), recipe.batch):
            user, item = held[rows, 0], held[rows, 1]
            logits = network.query(user=user) @ network.item(item=item).T  # (batch, batch)
            logits = logits - frequency[item]
            # The same item in another row is no negative of this one.
            again = (item == item.unsqueeze(1)).fill_diagonal_(False)
            logits = logits.masked_fill(again, -torch.inf)
            loss = F.cross_entropy(logits, torch.arange(len(rows)))
            torch.autograd.backward(loss)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * (1 - step / steps)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            total += loss.item() * len(rows)
        network.eval()
        for table in tables:
            table.sparse = False
        if measure is None:
            say(f"epoch {epoch:2d}  loss {total / len(held):.4f}")
            continue
        found = measure(network)
        say(f"epoch {epoch:2d}  loss {total / len(held):.4f}  validation Recall@20 {found:.4f}")
        if found > best:
            best, kept, state = found, epoch, copy.deepcopy(network.state_dict())
        elif epoch - kept == recipe.patience:
            break
    if measure is None:
        return last, float("nan")
    network.load_state_dict(state)
    return kept, best


@torch.no_grad()
def vectors(network: TwoTower, users: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Vectors of some users, and of every item."""
    items = torch.arange(network.item.table.num_embeddings)
    return network.query(**users), network.item(item=items)
