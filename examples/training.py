"""The training loop with early stopping that the training scripts share."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class LoopSettings(Protocol):
    """Settings of the loop; the dataclass of each script's settings has these fields."""

    @property
    def batch(self) -> int:
        """Rows per batch."""

    @property
    def learning_rate(self) -> float:
        """Learning rate of Adam at the start."""

    @property
    def table_l2(self) -> float:
        """Coefficient of the penalty ``table_l2 / 2 * ||table||^2``.

        The penalty is added to the loss of every batch, for all rows of all tables. Without it,
        models memorize the rows of small data sets.
        """

    @property
    def epochs(self) -> int:
        """Largest number of epochs."""

    @property
    def patience(self) -> int:
        """Number of consecutive epochs without a better metric after which training ends."""


@dataclass(frozen=True)
class Epoch:
    """The mean training loss of an epoch, without the penalty, and the metric after the epoch."""

    number: int
    loss: float
    metric: float


@contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Make torch deterministic within the ``with`` block, and restore its settings afterwards.

    The number of threads changes the order of float sums, and thereby the last digits.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def train_with_early_stopping(
    network: nn.Module,
    rows: int,
    compute_loss: Callable[[Tensor], Tensor],
    metric: Callable[[], float],
    settings: LoopSettings,
    generator: torch.Generator,
    log: Callable[[str], None],
    *,
    decay: float = 0.1,
) -> list[Epoch]:
    """Train a network in place; it ends in evaluation mode with the weights of its best epoch.

    The learning rate is multiplied by ``decay`` after each epoch that does not improve the best
    metric; training stops after ``settings.patience`` such epochs in a row.

    Args:
        network: the network.
        rows: number of training rows.
        compute_loss: returns the mean loss of the training rows with these indices, int64
            ``(batch,)``.
        metric: returns the validation metric of the network; higher is better.
        settings: settings of the loop.
        generator: draws the order of the rows.
        log: called with a line after each epoch.
        decay: factor of the learning rate; 1 keeps it.

    Returns:
        All epochs, in their order.
    """
    tables = [
        table.weight
        for table in network.modules()
        if isinstance(table, nn.Embedding | nn.EmbeddingBag)
    ]
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    best, state, epochs_without_gain = -1.0, network.state_dict(), 0
    epochs: list[Epoch] = []
    for number in range(1, settings.epochs + 1):
        network.train()
        total = 0.0
        permutation = torch.randperm(rows, generator=generator)  # (rows,)
        for part in torch.split(permutation, settings.batch):
            loss = compute_loss(part)
            penalty = torch.zeros(())
            if settings.table_l2 and tables:
                penalty = torch.stack([weight.square().sum() for weight in tables]).sum()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss + settings.table_l2 / 2 * penalty)
            optimizer.step()
            total += loss.item() * len(part)
        network.eval()
        epoch = Epoch(number, total / rows, metric())
        epochs.append(epoch)
        log(f"epoch {number:2d}  loss {epoch.loss:.4f}  validation metric {epoch.metric:.4f}")
        if epoch.metric > best:
            best, epochs_without_gain = epoch.metric, 0
            state = copy.deepcopy(network.state_dict())
            continue
        epochs_without_gain += 1
        if epochs_without_gain == settings.patience:
            break
        for group in optimizer.param_groups:
            group["lr"] *= decay
    network.load_state_dict(state)
    network.eval()
    return epochs
