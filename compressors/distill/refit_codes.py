"""Refit packed tables (stored as codes): train their codebooks or scales, and select new codes.

If a codebook or scale is fitted to a table's weights, all weights have equal importance, but some
weights are more important for the task. So each round has two parts. First, codebooks, scales and
offsets are trained by gradients of the loss on the original's predictions and on the labels. Then
new codes are selected, so that each row is near the minimum of a quadratic approximation of the
loss (``code_reassignment.py``). Its curvature is computed from squared gradients, the diagonal of
the empirical Fisher matrix.

Sources: Stock et al. 2020, https://arxiv.org/abs/1907.05686 (codebooks trained with the original as
teacher); Malinovskii et al. 2024, https://arxiv.org/abs/2405.14852 (alternating codes and
codebooks, few codes at a time). Differs: codes are selected by a second-order approximation of the
loss, which needs no rows of the original table. Rows are ranked by how much new codes would
decrease the approximated loss. The first ``share`` of them receives new codes, if the measured loss
decreases too. The result is the state with the best validation metric, which may be the initial
state.
"""

import logging
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import Bag, PackedTable
from compressors.core.steps.decisions import (
    AppliedStep,
    Decision,
    StepPlan,
    is_among,
    require_matches,
)
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit
from compressors.distill.code_reassignment import FormatWithCodes, propose, reassign_codes
from compressors.distill.soft_labels import soft_label_loss
from compressors.distill.training.settings import Temperature, Training
from compressors.distill.training.trainable import trainable_tensors
from compressors.distill.training.training_steps import (
    list_pruned_layers,
    nothing_to_train,
    require_loss,
    train_model,
)
from compressors.errors.steps import RowsMissing
from compressors.metrics.validation_score import quality
from compressors.quantize.calibration.loss_gradients import loss_gradients, mean_loss
from compressors.quantize.kernels.levels import SMALLEST

log = logging.getLogger(__name__)
ATTEMPTS = 5
"""Number of shares of rows that are tried until the loss decreases.

Each share is a quarter of the one before.
"""


class RefitCodes(StepSettings):
    """Train codebooks or scales of packed tables on the task and select codes again, in turn."""

    effect: ClassVar[Effect] = "values"  # units keep their format; codes and weights change
    recovers_quality: ClassVar[bool] = True
    trains_towers: ClassVar[bool] = True  # the step can train a model with two towers

    kind: Literal["refit_codes"] = "refit_codes"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to refit: module names, with * for any characters."
    )
    rounds: int = Field(
        4, ge=1, description="Rounds of training codebooks or scales and then selecting codes."
    )
    share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Of the rows for which better codes are found, the share that receives them in "
        "a round; fewer if the loss does not decrease. 0: train only codebooks and scales.",
    )
    dense: bool = Field(False, description="Train dense layers too.")
    soft_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Weight of the teacher's predictions; the labels get the rest.",
    )
    temperature: Temperature = 1.0
    training: Training = Field(
        default_factory=lambda: Training(epochs=3, learning_rate=3e-4, patience=1),
        description="Settings of the training in each round. Set table_l2 to the penalty of the "
        "original training; 'tables' has no effect here.",
    )

    @property
    def trains(self) -> bool:
        """True: the step trains the network."""
        return True

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows with soft labels, validation rows, and what the training needs."""
        return ("train", "validation", "soft_labels", *self.training.needs)

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the tables with codes and, if ``dense`` is set, the dense layers.

        Raises:
            NothingToCompress: the task has no training loss, or a pattern matches no table.
        """
        require_loss(bench, self.kind, self.training)
        dense = trainable_tensors(model.module, tables=False) if self.dense else ()
        decisions = {}
        units = Unit.of(model.module)
        require_matches(self.tables, [u for u in units if u.role == "table"], self.kind, "table")
        for unit in units:
            if unit.role == "dense":
                is_trained = any(name.startswith(f"{unit.name}.") for name in dense)
                if not self.dense:
                    reason = Reason("dense_not_trained", step=self.kind)
                elif is_trained:
                    reason = Reason("trained_with_codes", step=self.kind)
                else:
                    reason = nothing_to_train(unit, self.kind)
                decisions[unit.name] = Decision("taken" if is_trained else "skipped", (reason,))
            elif not is_among(unit, self.tables):
                decisions[unit.name] = Decision(
                    "skipped", (Reason("not_matched", patterns=self.tables),)
                )
            elif _find_table_with_codes(unit) is None:
                decisions[unit.name] = Decision(
                    "skipped", (Reason("no_codes", format=unit.format),)
                )
            else:
                refitted = Reason("refitted", step=self.kind, rounds=self.rounds)
                decisions[unit.name] = Decision("taken", (refitted,))
        return StepPlan(decisions, None)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Alternate training and code selection, and return the network in its best state.

        Raises:
            RowsMissing: the bench lacks rows or soft labels.
            TrainingFailed: training diverged, or nothing can be trained.
        """
        if bench.train is None or bench.validation is None:
            raise RowsMissing("training_needs_rows")
        loss = soft_label_loss(
            bench, self.soft_share, self.temperature, self.kind, original=model.original
        )
        units_with_codes = (
            (unit.name, _find_table_with_codes(unit)) for unit in plan.units(model.module)
        )
        tables = {name: table for name, table in units_with_codes if table is not None}
        stored_types = {name: _get_learned_dtypes(table) for name, table in tables.items()}
        names = _list_learned_names(model, tables)
        if self.dense:
            names += trainable_tensors(model.module, tables=False)
        best, best_state = (
            quality(model.module, bench.signature, bench.validation, bench.train),
            _collect_tensors(model),
        )
        for number in range(self.rounds):
            for table in tables.values():
                _cast(table, dict.fromkeys(_get_learned_dtypes(table), torch.float32))
            round_bench = bench.model_copy(
                update={"seed": bench.seed + number, **_choose_checkpoint_folder(bench, number)}
            )
            train_model(
                model,
                round_bench,
                loss,
                self.training,
                keep_zeros_in=list_pruned_layers(model),
                tensor_names=names,
            )
            rows = 0
            for phase in ("codebooks", "codes"):
                if phase == "codes" and self.share:
                    rows = self._reassign_codes(model, bench, tables)
                for name, table in tables.items():
                    _cast(table, stored_types[name])
                metric = quality(model.module, bench.signature, bench.validation, bench.train)
                log.info("round %d, %s: validation %.5f", number + 1, phase, metric)
                if metric > best:
                    best, best_state = metric, _collect_tensors(model)
            if not rows:  # no code changed, so another round would only repeat the training
                break
        _restore(model, best_state)
        return AppliedStep(model)

    def _reassign_codes(self, model: Model, bench: Bench, tables: dict[str, PackedTable]) -> int:
        """Assign new codes to the rows with the largest gains; return how many rows changed.

        A row's gain, the estimated decrease of the loss, assumes that only this row changes. If the
        loss does not decrease when all of these rows change, fewer rows are tried.

        Raises:
            RowsMissing: there are no training rows or soft labels.
        """
        if bench.train is None:
            raise RowsMissing("train_rows_missing", step=self.kind)
        module, signature = model.module, bench.signature
        # Only soft labels are used. Their gradient is zero if the rows equal those of the original,
        # while labels and penalties would move the rows away from the original.
        loss = soft_label_loss(bench, 1.0, self.temperature, self.kind, original=model.original)
        loss_before = mean_loss(module, signature, bench.train, loss)
        gradients = loss_gradients(module, signature, bench.train, loss, tables)
        proposals = {name: propose(table, *gradients[name]) for name, table in tables.items()}
        old_codes = {name: table.get_buffer("codes") for name, table in tables.items()}
        share = self.share
        for _ in range(ATTEMPTS):
            rows = 0
            for name, table in tables.items():
                table.codes = old_codes[name]
                table.codes, count = reassign_codes(table, proposals[name], share)
                rows += count
            loss_after = mean_loss(module, signature, bench.train, loss)
            log.info("%d rows with new codes: loss %.6f -> %.6f", rows, loss_before, loss_after)
            if loss_after < loss_before:
                return rows
            if not rows:
                break
            share /= 4
        for name, table in tables.items():
            table.codes = old_codes[name]
        return 0


def _find_table_with_codes(unit: Unit) -> PackedTable | None:
    """Return the packed table of a unit if its codes can be selected again; otherwise None."""
    # A ``Bag`` is a compressed EmbeddingBag: a table whose looked-up rows are reduced.
    table = unit.module.table if isinstance(unit.module, Bag) else unit.module
    if isinstance(table, PackedTable) and isinstance(table.storage, FormatWithCodes):
        return table
    return None


def _list_learned_names(model: Model, tables: dict[str, PackedTable]) -> tuple[str, ...]:
    """Return the full names in the model of the tables' learned tensors.

    Learned tensors are those that training may change: codebooks, scales and offsets, not codes.
    """
    selected = set(tables.values())
    return tuple(
        f"{path}.{name}"
        for path, module in model.module.named_modules()
        if isinstance(module, PackedTable) and module in selected
        for name in _get_learned_dtypes(module)
    )


def _get_learned_dtypes(table: PackedTable) -> dict[str, torch.dtype]:
    """Return the dtypes of a table's learned tensors, by name."""
    buffers = dict(table.named_buffers())
    return {name: buffers[name].dtype for name in table.storage.learned if name in buffers}


def _cast(table: PackedTable, types: dict[str, torch.dtype]) -> None:
    """Cast a table's tensors to other dtypes, clamping values to the range of the dtype.

    TensorRT requires positive scales, so a scale is at least the smallest value of its dtype.
    """
    for name, dtype in types.items():
        tensor = table.get_buffer(name)
        if tensor.dtype != dtype:
            largest = torch.finfo(dtype).max
            least = SMALLEST.get(dtype, 0.0) if name == "scale" else -largest
            setattr(table, name, tensor.float().clamp(least, largest).to(dtype))


def _choose_checkpoint_folder(bench: Bench, number: int) -> dict[str, str]:
    """Return the folder where a round stores its progress, as a field of the bench."""
    return {"checkpoints": f"{bench.checkpoints}/round-{number}"} if bench.checkpoints else {}


State = list[tuple[nn.Module, str, Tensor]]
"""The tensors of a model: each with the module that has it, and its name in that module."""


def _collect_tensors(model: Model) -> State:
    """Return all tensors of a model, not copied: training replaces tensors by new ones."""
    return [
        (module, name, tensor)
        for module in model.module.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def _restore(model: Model, state: State) -> None:
    """Assign the tensors of a state to their modules, and set evaluation mode."""
    for module, name, tensor in state:
        setattr(module, name, tensor)
    model.module.eval()
