"""A two-tower retrieval model over ids: the score is the dot product of user and item vectors.

Papers: Yi et al. 2019, https://doi.org/10.1145/3298689.3346996 (in-batch negatives with the logQ
correction: the logarithm of an item's sampling probability is subtracted from its logit); Wu et al.
2022, https://arxiv.org/abs/2201.02327 (sampled softmax over cosine similarities for
recommendation).
Differs: the only inputs are ids, and a residual layer replaces the deep towers of the first paper.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

Ints = NDArray[np.int64]
"""An array of int64, such as pairs of user and item."""


class IdTower(nn.Module):
    """Maps an id to a vector of norm ``scale``.

    Args:
        name: name of the argument of ``forward`` that contains the ids.
        num_ids: number of ids, which is the number of table rows.
        dim: width of the table and of the vectors.
        hidden: width of a residual layer after the table; 0 means no layer.
        scale: norm of the vectors.
    """

    def __init__(self, name: str, num_ids: int, dim: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.name = name
        self.scale = scale
        self.table = nn.Embedding(num_ids, dim)
        # Vectors are normalized; with small norms, the first updates change directions strongly.
        nn.init.normal_(self.table.weight, std=0.02)
        self.layers: nn.Sequential | None = None
        if hidden:
            last = nn.Linear(hidden, dim)
            nn.init.zeros_(last.weight)  # the residual layer starts at zero
            nn.init.zeros_(last.bias)
            self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), last)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return vectors float ``(batch, dim)`` of ids int ``(batch,)``."""
        vector: Tensor = self.table(inputs[self.name])  # (batch, dim)
        if self.layers is not None:
            vector = vector + self.layers(vector)
        return F.normalize(vector, dim=1) * self.scale


class TwoTower(nn.Module):
    """A user tower (``query``) and an item tower (``item``).

    As usual in retrieval, the tower of the side that searches is the query tower, also in the
    signature of the bundle. Its only input is the id ``user``.

    Args:
        users: number of users.
        items: number of items.
        dim: width of both tables and of the vectors.
        hidden: width of each tower's residual layer; 0 means no layer.
        temperature: divisor of the cosine similarity in a score; the vectors of the user tower have
            the norm ``1 / temperature``, those of the item tower the norm 1.
    """

    def __init__(
        self, *, users: int, items: int, dim: int = 64, hidden: int = 0, temperature: float = 0.1
    ) -> None:
        super().__init__()
        self.query = IdTower("user", users, dim, hidden, scale=1 / temperature)
        self.item = IdTower("item", items, dim, hidden, scale=1.0)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """Return scores float ``(batch,)`` of ids int ``(batch,)``; higher scores rank first."""
        score: Tensor = (self.query(user=user) * self.item(item=item)).sum(dim=1)
        return score


@dataclass(frozen=True)
class Training:
    """Training settings, selected by a few runs on validation rows, without a search."""

    dim: int = 64
    # With 0 validation recall is the same; the layers make the example more useful to compress.
    hidden: int = 64
    temperature: float = 0.1
    batch: int = 1024
    learning_rate: float = 3e-3
    # The learning rate decays linearly and would reach 0 after `epochs` epochs.
    epochs: int = 8
    # Train for only so many epochs, without validation; None trains for `epochs`. A first run
    # selects the best epoch on validation rows. A second run on all rows, validation rows included,
    # has none left to select with, so it repeats the decay of the first run up to that epoch.
    stop_after: int | None = None
    # Stop after so many epochs without a better metric.
    patience: int = 2
    seed: int = 1
    # One thread is fastest: the matrix products are too small to parallelize.
    threads: int = 1


def train(
    network: TwoTower,
    pairs: Ints,
    settings: Training,
    measure: Callable[[TwoTower], float] | None,
    log: Callable[[str], None],
) -> tuple[int, float]:
    """Train in place on interactions with in-batch negatives.

    Args:
        network: network to train; in evaluation mode afterwards.
        pairs: user and item, int64 ``(rows, 2)``.
        settings: training settings.
        measure: metric to maximize, evaluated after every epoch; the network ends with the
            weights of the best epoch. None trains for all epochs, or for
            ``settings.stop_after`` epochs, and keeps the last weights.
        log: called with each line of progress.

    Returns:
        The selected epoch, counted from 1, and its metric (NaN without ``measure``).
    """
    generator = torch.Generator().manual_seed(settings.seed)
    interactions = torch.from_numpy(pairs)
    # The logQ correction: an item is a negative in proportion to its frequency in the interactions,
    # so without the correction the network would rank popular items too low.
    counts = torch.bincount(interactions[:, 1], minlength=network.item.table.num_embeddings)
    log_frequency = (counts.clamp(min=1) / len(interactions)).log().float()
    tables = [network.query.table, network.item.table]
    dense = [p for name, p in network.named_parameters() if ".layers." in name]
    # SparseAdam changes only the table rows of a batch. Adam would change every row in each step,
    # which takes about ten times as long for tables of this size.
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SparseAdam([table.weight for table in tables], settings.learning_rate)
    ]
    if dense:
        optimizers.append(torch.optim.Adam(dense, settings.learning_rate))
    num_batches = settings.epochs * math.ceil(len(interactions) / settings.batch)
    batch_index = 0
    last_epoch = settings.stop_after or settings.epochs
    best, best_epoch, state = -1.0, last_epoch, dict[str, Tensor]()
    for epoch in range(1, last_epoch + 1):
        network.train()
        # SparseAdam needs sparse gradients. They are disabled after each epoch, because other
        # optimizers, which may train the network later, do not accept them.
        for table in tables:
            table.sparse = True
        total = 0.0
        for batch_rows in torch.split(
            torch.randperm(len(interactions), generator=generator), settings.batch
        ):
            user, item = interactions[batch_rows, 0], interactions[batch_rows, 1]
            logits = network.query(user=user) @ network.item(item=item).T  # (batch, batch)
            logits = logits - log_frequency[item]
            # The same item in another row is not a negative.
            duplicate = (item == item.unsqueeze(1)).fill_diagonal_(False)
            logits = logits.masked_fill(duplicate, -torch.inf)
            loss = F.cross_entropy(logits, torch.arange(len(batch_rows)))
            torch.autograd.backward(loss)  # loss.backward() has no type annotations
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * (1 - batch_index / num_batches)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            batch_index += 1
            total += loss.item() * len(batch_rows)
        network.eval()
        for table in tables:
            table.sparse = False
        if measure is None:
            log(f"epoch {epoch:2d}  loss {total / len(interactions):.4f}")
            continue
        metric = measure(network)
        loss_and_metric = f"loss {total / len(interactions):.4f}  validation Recall@20 {metric:.4f}"
        log(f"epoch {epoch:2d}  {loss_and_metric}")
        if metric > best:
            best, best_epoch, state = metric, epoch, copy.deepcopy(network.state_dict())
        elif epoch - best_epoch == settings.patience:
            break
    if measure is None:
        return last_epoch, float("nan")
    network.load_state_dict(state)
    return best_epoch, best


@torch.no_grad()
def compute_vectors(network: TwoTower, users: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return vectors of users, float ``(users, dim)``, and of all items, ``(items, dim)``.

    ``users`` are the arguments of the user tower by name.
    """
    items = torch.arange(network.item.table.num_embeddings)
    return network.query(**users), network.item(item=items)
