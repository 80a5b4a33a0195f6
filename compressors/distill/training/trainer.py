"""The training loop: train a compressed network for a few epochs, with checkpoints.

By default tables are not trained: they have most of the weights and overfit first. Without the
regularization of the original training, training them loses more quality than it gains.

The state before training is one of the candidates for the best epoch, so training that only
decreases quality returns that state. A checkpoint is stored after every epoch (``checkpoint.py``).
A training that was killed and resumed ends with the same bits as an uninterrupted one: the seed of
an epoch is computed from its number, and the checkpoint contains all other state.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.batches import Batch, JoinedRows, Rows
from compressors.core.modules.formats import PackedLinear
from compressors.core.placement import find_device, move_to, to_device
from compressors.core.scores import training_output
from compressors.distill.training import data_parallel
from compressors.distill.training.checkpoint import TrainingProgress, read_progress, store_progress
from compressors.distill.training.item_sampler import ItemSampler, build_sampler
from compressors.distill.training.settings import Training
from compressors.distill.training.trainable import (
    find_packed_owner,
    is_table,
    replace_buffers,
    replace_trained_tensors,
    trainable_tensors,
)
from compressors.errors.steps import TrainingFailed
from compressors.metrics.validation_score import quality
from compressors.task_kinds.loss import shuffled_rows

log = logging.getLogger(__name__)
MAX_SCALE_FACTOR = 16.0
"""Largest factor by which training may change a scale, because the codes do not change with it."""

Loss = Callable[[Tensor, Batch, Tensor], Tensor]
"""Maps the network's output, the batch, and its row numbers int64 ``(batch,)`` to a scalar."""


@dataclass(frozen=True)
class Epoch:
    """Mean loss and validation metric of one epoch; number 0 is the state before training."""

    number: int
    loss: float
    quality: float


def train(
    module: nn.Module,
    signature: Signature,
    rows: Split | Rows | JoinedRows,
    validation: Split,
    loss: Loss,
    settings: Training,
    *,
    items: Split | None = None,
    seed: int,
    checkpoints: str | None,
    keep_zeros_in: Collection[str] = (),
    tensor_names: Collection[str] | None = None,
    whole_lists: bool = False,
    auxiliary: nn.Module | None = None,
    device: str = "cpu",
    after_step: Callable[[float], None] | None = None,
    keep_last_epoch: bool = False,
) -> tuple[Epoch, ...]:
    """Train a module in place; afterwards it has the tensors of its best epoch.

    Args:
        module: the network. Its tensors may be shared with other networks: those that training
            changes are replaced by copies first.
        signature: inputs and the metric by which epochs are compared (higher is better).
        rows: the training rows.
        validation: rows for early stopping.
        loss: the loss to minimize.
        settings: epochs, learning rate and so on.
        items: the catalogue of a model with two towers, from which ``negatives`` are drawn.
        seed: seed of the order of rows, of dropout and of negatives.
        checkpoints: folder for checkpoints, from which training resumes after a crash; None: no
            checkpoints.
        keep_zeros_in: layers whose zeros stay zero. In other layers a zero is an ordinary weight,
            such as a gate that starts closed or a last layer that is initialized to zero.
        tensor_names: names of the tensors to train, instead of those that ``settings`` selects.
        whole_lists: never split a group between two batches, even if the task is not ranking.
        auxiliary: a module of the loss that is trained too; it is not part of the result.
        device: where to train; the module is moved back afterwards.
        after_step: called after every optimizer step with the learning rate, with gradients
            disabled; it may change the module's parameters.
        keep_last_epoch: return the last epoch even if it is not the best one. This is needed if
            ``after_step`` lowers quality, because otherwise the state before training would be
            selected.

    Returns:
        All epochs, starting with the state before training.

    Raises:
        TrainingFailed: the loss is no longer finite, or there is nothing to train.
        RowsMissing: there are ``negatives`` and no ``items``.
        StepRefused: the device does not exist.
    """
    with move_to(module, device), move_to(auxiliary or nn.Identity(), device):
        train_rows = Rows(rows, signature) if isinstance(rows, Split) else rows
        run = _Run(
            module,
            signature,
            train_rows,
            validation,
            loss,
            settings,
            seed,
            keep_zeros_in,
            tensor_names,
        )
        run.whole_lists, run.after_step, run.keep_last_epoch = (
            whole_lists,
            after_step,
            keep_last_epoch,
        )
        if auxiliary is not None:
            run.add_auxiliary(auxiliary)
        run.sampler = build_sampler(items, signature, train_rows, settings.negatives)
        return _run_to_the_end(run, checkpoints)


def _run_to_the_end(run: "_Run", checkpoints: str | None) -> tuple[Epoch, ...]:
    """Run a training, starting from its checkpoint if there is one; return all epochs."""
    progress = read_progress(checkpoints, run.state()) if checkpoints else None
    if progress is None:
        run.begin()
    else:
        run.resume(progress)
    while not run.is_over():
        run.epoch()
        if checkpoints is not None:
            run.store_checkpoint(checkpoints)
    run.finish()
    return tuple(run.epochs)


class _Run:
    """A training in progress; its attributes include all state that a checkpoint must hold.

    Attributes that are not arguments of ``train``:
        leaves: the trained tensors by name: leaf tensors of autograd, copies of the original ones.
        auxiliary: the trained tensors of the auxiliary module, by name.
        statistics: names of buffers that the forward pass changes, such as those of norms.
        tables: the trained weights of uncompressed tables.
        packed: the packed (compressed) tables of which a tensor is trained.
        nonzero: by name, which weights of a pruned layer are not zero; the others stay zero.
        scales: initial values of trained scales, by name.
        max_steps: optimizer steps of all epochs; None until the cosine schedule needs it.
        epochs: the finished epochs.
        best: the tensors after the best epoch, by name.
        rate_factor: factor of the learning rate in the ``plateau`` schedule.
        epochs_since_best: number of epochs since the best one.
        steps: number of optimizer steps so far.
    """

    def __init__(
        self,
        module: nn.Module,
        signature: Signature,
        rows: Rows | JoinedRows,
        validation: Split,
        loss: Loss,
        settings: Training,
        seed: int,
        keep_zeros_in: Collection[str] = (),
        tensor_names: Collection[str] | None = None,
    ) -> None:
        self.module, self.signature, self.rows = module, signature, rows
        self.validation, self.loss, self.settings, self.seed = validation, loss, settings, seed
        names = (
            trainable_tensors(module, tables=settings.tables)
            if tensor_names is None
            else tuple(tensor_names)
        )
        if not names:
            raise TrainingFailed("nothing_trainable")
        _require_float_layers(module, settings)
        self.leaves = replace_trained_tensors(module, names)
        self.auxiliary: dict[str, Tensor] = {}
        self.device = find_device(module)
        self.whole_lists = False
        self.statistics = replace_buffers(module)
        self.tables = [leaf for name, leaf in self.leaves.items() if is_table(module, name)]
        owners = (find_packed_owner(module, name) for name in self.leaves)
        self.packed = list(dict.fromkeys(owner for owner in owners if owner is not None))
        self.nonzero = {
            name: leaf.detach() != 0
            for name, leaf in self.leaves.items()
            if name.rpartition(".")[0] in keep_zeros_in and leaf.dim() == 2
        }
        self.scales = {
            name: leaf.detach().clone()
            for name, leaf in self.leaves.items()
            if not isinstance(leaf, nn.Parameter) and name.endswith("scale")
        }
        of_tables = {id(table) for table in self.tables}
        of_tables |= {id(leaf) for n, leaf in self.leaves.items() if find_packed_owner(module, n)}
        decayed = [x for x in self.leaves.values() if x.dim() == 2 and id(x) not in of_tables]
        others = [x for x in self.leaves.values() if x.dim() != 2 or id(x) in of_tables]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
        )
        self.max_steps: int | None = None
        self.epochs: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.rate_factor, self.epochs_since_best, self.steps = 1.0, 0, 0
        self.after_step: Callable[[float], None] | None = None
        self.keep_last_epoch = False
        self.sampler: ItemSampler | None = None

    def add_auxiliary(self, auxiliary: nn.Module) -> None:
        """Train the parameters of another module too."""
        self.auxiliary = {f"@auxiliary/{name}": leaf for name, leaf in auxiliary.named_parameters()}
        self.optimizer.add_param_group(
            {"params": list(self.auxiliary.values()), "weight_decay": 0.0}
        )

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that training changes, by name."""
        statistics = {name: self.module.get_buffer(name) for name in self.statistics}
        return {**self.leaves, **self.auxiliary, **statistics}

    def begin(self) -> None:
        """Evaluate the state before training, the first candidate for the best epoch."""
        self.epochs = [Epoch(0, math.nan, self._measure_quality())]
        self.best = _copy_tensors(self.state())

    def is_over(self) -> bool:
        """Whether all epochs are done, or too many in a row brought no improvement."""
        is_complete = len(self.epochs) > self.settings.epochs
        return is_complete or (
            self.epochs_since_best >= self.settings.patience and not self.keep_last_epoch
        )

    def epoch(self) -> None:
        """Train for one pass over the training rows, and evaluate on the validation rows."""
        number = len(self.epochs)
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        self.module.train()
        total = rows = 0.0
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed + data_parallel.rank())  # dropout
            if self.sampler is not None:
                self.sampler.seed(seed, data_parallel.rank())
            for row_numbers in self._iterate_batches(seed):
                # ``order_rows``: ``rows.take`` may need rows with labels before those without.
                total += self._take_step(self.rows.order_rows(row_numbers)) * len(row_numbers)
                rows += len(row_numbers)
        self.module.eval()
        data_parallel.average_buffers(self.module.get_buffer(name) for name in self.statistics)
        result = Epoch(number, total / rows, self._measure_quality())
        log.info("epoch %d: loss %.5f, validation %.5f", number, result.loss, result.quality)
        if result.quality > max(epoch.quality for epoch in self.epochs):
            self.best, self.epochs_since_best = _copy_tensors(self.state()), 0
        else:
            self.epochs_since_best += 1
            if self.settings.schedule == "plateau":
                self.rate_factor /= 10
        self.epochs.append(result)

    def finish(self) -> None:
        """Restore the best epoch, unless the last one is kept; clear gradients, set eval mode."""
        with torch.no_grad():
            for name, tensor in self.state().items() if not self.keep_last_epoch else ():
                tensor.copy_(self.best[name])
        for leaf in self.leaves.values():
            leaf.grad = None
            if not isinstance(leaf, nn.Parameter):
                leaf.requires_grad_(False)
        self.module.eval()

    def progress(self) -> TrainingProgress:
        """Return the state that is needed to resume after this epoch."""
        moments = {
            f"{name}/{moment}": value
            for name, leaf in (*self.leaves.items(), *self.auxiliary.items())
            for moment, value in self.optimizer.state[leaf].items()
        }
        return TrainingProgress(
            tensors={
                **{f"now/{name}": tensor.detach() for name, tensor in self.state().items()},
                **{f"best/{name}": tensor for name, tensor in self.best.items()},
                **{f"moments/{name}": tensor for name, tensor in moments.items()},
            },
            json_values={
                "epochs": [[epoch.number, epoch.loss, epoch.quality] for epoch in self.epochs],
                "factor": self.rate_factor,
                "stale": self.epochs_since_best,
                "steps": self.steps,
            },
        )

    def resume(self, progress: TrainingProgress) -> None:
        """Continue a training from a checkpoint."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(progress.tensors[f"now/{name}"])
        self.best = {name: progress.tensors[f"best/{name}"] for name in self.state()}
        for name, leaf in (*self.leaves.items(), *self.auxiliary.items()):
            prefix = f"moments/{name}/"
            self.optimizer.state[leaf] = {  # the step count is on the CPU on every device
                key.removeprefix(prefix): value.to(leaf.device) if value.dim() else value
                for key, value in progress.tensors.items()
                if key.startswith(prefix)
            }
        json_values = progress.json_values
        self.epochs = [Epoch(*epoch) for epoch in json_values["epochs"]]
        self.rate_factor, self.epochs_since_best, self.steps = (
            json_values["factor"],
            json_values["stale"],
            json_values["steps"],
        )
        log.info("resuming after epoch %d", self.epochs[-1].number)

    def store_checkpoint(self, folder: str) -> None:
        """Store a checkpoint; only the first rank writes."""
        if data_parallel.rank() == 0:
            store_progress(folder, self.progress())

    def _measure_quality(self) -> float:
        """Return the validation metric, the same on all ranks."""
        return data_parallel.broadcast_from_first_rank(
            quality(self.module, self.signature, self.validation, self.rows), self.device
        )

    def _compute_gradients(self, row_numbers: Tensor) -> Tensor:
        """Compute gradients on some rows; return the loss without the table penalty."""
        if not len(row_numbers):
            return torch.zeros((), device=self.device)
        sampled = None if self.sampler is None else self.sampler.draw()
        batch = to_device(replace(self.rows.take(row_numbers), sampled=sampled), self.device)
        with self._create_precision_context():
            output = training_output(self.module, batch.inputs, self.signature, batch.sampled)
        loss = self.loss(output.float(), batch, row_numbers)
        total = loss
        for table in self._get_penalized_weights():
            total = total + self.settings.table_l2 / 2 * table.square().sum()
        torch.autograd.backward(total)
        return loss.detach()

    def _take_step(self, row_numbers: Tensor) -> float:
        """Take one optimizer step on a batch; return its loss.

        Raises:
            TrainingFailed: the loss is not finite.
        """
        lists = self.rows.group if self.whole_lists or self.signature.has_lists else None
        rank_rows, weight = data_parallel.rank_share(
            row_numbers, None if lists is None else lists[row_numbers]
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss = data_parallel.sum_gradients(
            self._list_optimized_tensors(), weight, self._compute_gradients(rank_rows)
        )
        if not bool(loss.isfinite()):
            raise TrainingFailed("diverged", loss=float(loss), epoch=len(self.epochs))
        rate = self._compute_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        with torch.no_grad():
            if self.after_step is not None:
                self.after_step(rate)
            for name, mask in self.nonzero.items():  # pruned weights stay zero
                self.leaves[name].mul_(mask)
            for name, initial in self.scales.items():
                leaf = self.leaves[name]
                leaf.copy_(leaf.clamp(initial / MAX_SCALE_FACTOR, initial * MAX_SCALE_FACTOR))
        return float(loss)

    def _list_optimized_tensors(self) -> list[Tensor]:
        """Return every tensor that the optimizer changes."""
        return [leaf for group in self.optimizer.param_groups for leaf in group["params"]]

    def _iterate_batches(self, seed: int) -> Iterator[Tensor]:
        """Yield the row numbers of each batch of an epoch."""
        return shuffled_rows(
            self.rows, self.signature, self.settings.batch, seed, whole_lists=self.whole_lists
        )

    def _create_precision_context(self) -> AbstractContextManager[None]:
        """Return the context that sets the precision of the forward pass."""
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _get_penalized_weights(self) -> list[Tensor]:
        """Return the weights of trained tables for the penalty; packed tables are dequantized."""
        if not self.settings.table_l2:
            return []
        dequantized = (table(torch.arange(table.rows, device=self.device)) for table in self.packed)
        return [*self.tables, *dequantized]

    def _compute_rate(self) -> float:
        """Return Adam's learning rate for the next optimizer step."""
        settings = self.settings
        warmup = min(1.0, (self.steps + 1) / settings.warmup) if settings.warmup else 1.0
        if settings.schedule == "plateau":
            return settings.learning_rate * warmup * self.rate_factor
        if self.max_steps is None:  # only the cosine schedule needs it; counting shuffles an epoch
            self.max_steps = settings.epochs * sum(1 for _ in self._iterate_batches(self.seed))
        decay = (1 + math.cos(math.pi * min(1.0, self.steps / self.max_steps))) / 2
        return settings.learning_rate * warmup * decay


def _require_float_layers(module: nn.Module, settings: Training) -> None:
    """Raise for mixed precision if a packed layer would receive bfloat16 inputs.

    Raises:
        TrainingFailed: names the layer.
    """
    for name, part in module.named_modules():
        if settings.precision != "float32" and isinstance(part, PackedLinear):
            raise TrainingFailed(
                "float_layers_needed",
                precision=settings.precision,
                layer=name,
                format=part.storage.name,
            )


def _copy_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
