"""Distillation: train a pruned or smaller network to reproduce the original's predictions.

Soft labels are the predictions of the teacher, which is the bundle that the recipe starts from, for
every training row. With several teachers they are the mean of all predictions. They are computed
once, stored, and mixed with the hard labels.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531 (soft targets with a temperature).
Differs: for click models the loss is binary, the soft form of their training loss; for ranking the
softmax runs over each list instead of classes. Other losses: ``losses.py``.
"""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error
from compressors.core.model import Model
from compressors.core.placement import moved_to
from compressors.core.steps.decisions import Applied, StepPlan
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import private_copy
from compressors.distill.auxiliary_losses import (
    AuxiliaryLosses,
    record_outputs,
    require_layers,
    widths_of,
    with_hint_loss,
)
from compressors.distill.losses import OF_LISTS, SoftLoss
from compressors.distill.soft_labels import SoftLabelSettings, soft_label_loss, soft_label_rows
from compressors.distill.student import student_decisions, student_dry_run, student_of
from compressors.distill.training.settings import Training
from compressors.distill.training.trainable import trainable
from compressors.distill.training.training_steps import choose_trainable, pruned_layers, train_model
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import DistillationRefused

PROBED = 8
"""Rows of the forward pass that measures the widths of hinted layers."""


class Distill(StepSettings):
    """Train dense layers to answer as the original does, mixed with the labels."""

    effect: ClassVar[Effect] = "values"
    recovers_quality: ClassVar[bool] = True

    kind: Literal["distill"] = "distill"
    soft_share: float = Field(
        0.5, gt=0, le=1, description="Weight of the teacher's predictions against the labels."
    )
    temperature: float = Field(
        1.0,
        ge=0.1,
        le=100,
        description="Divides both predictions before they are compared.",
    )
    loss: SoftLoss = Field(
        "task",
        description="How predictions are compared. task: pointwise for clicks, listwise for "
        "ranking. pointwise: each row's own. Over lists (groups; without a group column the batch "
        "is one): margin (differences of two rows), listwise (softmax shares), rankdistil (the "
        "top of the teacher's list), calibrated_listwise (shares of probabilities).",
    )
    top: int = Field(10, ge=1, description="Of rankdistil: how many rows of a list are its top.")
    rows: SoftLabelSettings = Field(
        "train",
        description="train: rows with labels. traffic: logged requests without labels (soft_share "
        "1). both: labels where there are.",
    )
    hints: tuple[str, ...] = Field(
        (),
        description="Layers of the original whose outputs are shown to the layers of the same "
        "name, through a linear map that is dropped afterwards.",
    )
    hint_share: float = Field(
        0.1, gt=0, le=100, description="Weight of the hints next to the soft labels."
    )
    auxiliary: str | None = Field(
        None,
        description="A layer on top of which a linear head learns the teacher's predictions; it is "
        "dropped afterwards; the network's own output then learns the labels alone.",
    )
    dense: bool = Field(
        True, description="Train dense layers. False: tables alone (set 'tables' of the training)."
    )
    student: dict[str, Any] | None = Field(
        None,
        description="Keyword arguments of the architecture that differ in a smaller student, such "
        'as {"hidden": [64, 32]}. Without it the network is trained as it stands, for instance '
        "after pruning.",
    )
    training: Training = Field(default_factory=Training, description="How it is trained.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rows == "traffic" and self.soft_share < 1:
            raise value_error("traffic_without_labels")
        if self.auxiliary is not None and (self.soft_share == 1 or self.rows == "traffic"):
            raise value_error("auxiliary_without_labels")
        if self.temperature != 1 and self.loss == "margin":
            raise value_error("temperature_of_margin")
        if not self.dense and not self.training.tables:
            raise value_error("nothing_to_train")
        if not self.dense and self.student is not None:
            raise value_error("student_without_dense")
        return self

    @property
    def trains(self) -> bool:
        """A run is slow: the network is trained."""
        return True

    @property
    def reads_original(self) -> bool:
        """Hints are outputs of the original's layers."""
        return bool(self.hints)

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, soft labels for them, and validation rows for early stopping."""
        parts: dict[SoftLabelSettings, tuple[Part, ...]] = {
            "train": ("train", "validation", "soft_labels"),
            "traffic": ("traffic", "validation", "traffic_soft_labels"),
            "both": ("train", "traffic", "validation", "soft_labels", "traffic_soft_labels"),
        }
        return parts[self.rows]

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """What is trained, and how each layer changes in a smaller student."""
        if self.loss == "calibrated_listwise" and bench.signature.single_output.form == "score":
            raise NothingToCompress("loss_without_probability", step=self.kind)
        require_layers(model.module, self._watched())
        tables, reasons = self.training.tables, self._reasons(bench)
        decisions = choose_trainable(
            model,
            bench,
            self.kind,
            tables=tables,
            dense=self.dense,
            reasons=reasons,
        )
        if self.student is not None:
            smaller = student_decisions(model, self.student, tables=tables, reasons=reasons)
            decisions = {**decisions, **smaller}
        return StepPlan(decisions, None)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> Applied:
        """Train on soft and hard labels, and leave the network as it was in its best epoch.

        Raises:
            CompressionError: the bench lacks rows, the student cannot be built, there are hints but
                no original, or training diverged.
        """
        rows = soft_label_rows(bench, self.rows, self.kind)
        original = None if model.original is None else private_copy(model.original).eval()
        pruned = pruned_layers(model) if self.student is None else ()
        if self.student is not None:
            model = student_of(model, self.student, bench.seed)
        watched = self._watched()
        probe = rows.take(torch.arange(min(PROBED, len(rows))))
        widths = widths_of(model.module, watched, probe, self.auxiliary) if watched else {}
        teacher_widths: dict[str, int] = {}
        if self.hints:
            if original is None:
                raise DistillationRefused("hints_need_original", step=self.kind)
            require_layers(original, self.hints, "original")
            teacher_widths = widths_of(original, self.hints, probe)
        auxiliary = AuxiliaryLosses(self.hints, self.auxiliary, widths, teacher_widths, bench.seed)
        loss = soft_label_loss(
            bench,
            self.soft_share,
            self.temperature,
            self.kind,
            name=self.loss,
            top=self.top,
            rows=self.rows,
            predictions=None if self.auxiliary is None else auxiliary.predictions,
        )
        teaching = original if self.hints and original is not None else nn.Identity()
        with (
            record_outputs(model.module, watched) as auxiliary.seen,
            moved_to(teaching, bench.device),
        ):
            if self.hints:
                loss = with_hint_loss(loss, auxiliary, teaching, self.hints, self.hint_share)
            return train_model(
                model,
                bench,
                loss,
                self.training,
                pruned,
                only=None if self.dense else trainable(model.module, tables=True, dense=False),
                rows=rows,
                whole_lists=self.loss in OF_LISTS,
                auxiliary=auxiliary if watched else None,
            )

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """The student, if it is a smaller one; training changes no shape."""
        return model if self.student is None else student_dry_run(model, self.student)

    def _watched(self) -> tuple[str, ...]:
        """The layers whose outputs are recorded."""
        return tuple(dict.fromkeys((*self.hints, *filter(None, (self.auxiliary,)))))

    def _reasons(self, bench: Bench) -> tuple[Reason, ...]:
        """What the step learns from, for the plan."""
        rows = bench.train.rows if bench.train and self.rows != "traffic" else 0
        traffic = bench.traffic.rows if bench.traffic and self.rows != "train" else 0
        if rows and traffic:
            learned = Reason("trained_on_both", step=self.kind, rows=rows, traffic=traffic)
        elif traffic:
            learned = Reason("trained_on_traffic", step=self.kind, traffic=traffic)
        else:
            learned = Reason("trained_on_rows", step=self.kind, rows=rows)
        if not bench.teachers:
            return (learned,)
        return learned, Reason("several_teachers", teachers=1 + len(bench.teachers))
