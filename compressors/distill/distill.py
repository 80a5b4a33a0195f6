"""Distillation: train a pruned or smaller network to reproduce the original's predictions.

Soft labels are the predictions of the teacher for every training row. The teacher is the bundle
that the recipe starts from (the original). With several teachers, soft labels are the mean of their
predictions. Soft labels are computed once and stored. The training loss is a weighted sum of the
loss on soft labels and the loss on labels.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531 (soft targets with a temperature).
Differs: for CTR models, the loss on soft labels is binary cross entropy with probabilities as
labels; for ranking models, the softmax is over each list instead of over classes. Other losses are
in ``losses.py``.
"""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error
from compressors.core.model import Model
from compressors.core.placement import move_to
from compressors.core.steps.decisions import AppliedStep, StepPlan
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import private_copy
from compressors.distill.auxiliary_losses import (
    AuxiliaryLosses,
    add_hint_loss,
    measure_widths,
    record_outputs,
    require_layers,
)
from compressors.distill.losses import LIST_LOSSES, SoftLoss
from compressors.distill.soft_labels import TrainingRows, soft_label_loss, soft_label_rows
from compressors.distill.student import build_student, student_decisions, student_dry_run
from compressors.distill.training.settings import Temperature, Training
from compressors.distill.training.trainable import trainable_tensors
from compressors.distill.training.training_steps import (
    choose_trainable,
    list_pruned_layers,
    train_model,
)
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import DistillationRefused

PROBE_ROWS = 8
"""Rows of the forward pass that measures the output widths of layers with hints or a head."""


class Distill(StepSettings):
    """Train a network on the teacher's predictions and on the labels."""

    effect: ClassVar[Effect] = "values"  # units keep their format; weights and widths change
    recovers_quality: ClassVar[bool] = True
    trains_towers: ClassVar[bool] = True  # the step can train a model with two towers

    kind: Literal["distill"] = "distill"
    soft_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Weight of the teacher's predictions; the labels get the rest.",
    )
    temperature: Temperature = 1.0
    loss: SoftLoss = Field(
        "task",
        description="Loss on the teacher's predictions. task: pointwise for CTR, listwise for "
        "ranking. pointwise: each row. margin: differences of two rows of a list. listwise: "
        "softmax over a list. rankdistil: the top rows of the teacher's list. "
        "calibrated_listwise: probabilities as shares of their sum over a list. A list is a group, "
        "or the batch without a group column.",
    )
    top: int = Field(10, ge=1, description="Number of top rows of a list for rankdistil.")
    rows: TrainingRows = Field(
        "train",
        description="Rows to train on. train: rows with labels. traffic: logged requests without "
        "labels (requires soft_share 1). both: all of them.",
    )
    hints: tuple[str, ...] = Field(
        (),
        description="Layers whose outputs the student learns to reproduce, through a linear "
        "projection that is discarded after training.",
    )
    hint_share: float = Field(
        0.1, gt=0, le=100, description="Weight of the hint loss, added to the other losses."
    )
    auxiliary: str | None = Field(
        None,
        description="Layer on top of which a linear head learns the teacher's predictions; the "
        "network's output then learns only the labels. The head is discarded after training.",
    )
    dense: bool = Field(
        True,
        description="Train dense layers. False: train only tables (set 'tables' of the training).",
    )
    student: dict[str, Any] | None = Field(
        None,
        description="Arguments of the model class that differ in a smaller student, such as "
        '{"hidden": [64, 32]}. Empty: train the present network, for example after pruning.',
    )
    training: Training = Field(default_factory=Training, description="Settings of the training.")

    @model_validator(mode="after")
    def _require_consistent_settings(self) -> Self:
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
        """True: the step trains the network."""
        return True

    @property
    def reads_original(self) -> bool:
        """Whether the step reads the original network: hints are outputs of its layers."""
        return bool(self.hints)

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, soft labels for them, validation rows, and what the training needs."""
        parts: dict[TrainingRows, tuple[Part, ...]] = {
            "train": ("train", "validation", "soft_labels"),
            "traffic": ("traffic", "validation", "traffic_soft_labels"),
            "both": ("train", "traffic", "validation", "soft_labels", "traffic_soft_labels"),
        }
        return (*parts[self.rows], *self.training.needs)

    def plan(self, model: Model, bench: Bench) -> StepPlan[None]:
        """Select the units to train; with a student, also the units that it lacks or that shrink.

        Raises:
            NothingToCompress: the task has no training loss; ``calibrated_listwise`` is set, and an
                output has the form ``score``; or a model with two towers cannot use a setting.
            DistillationRefused: a named layer does not exist, or the student cannot be built.
        """
        forms = [output.form for output in bench.signature.outputs]
        if self.loss == "calibrated_listwise" and "score" in forms:
            raise NothingToCompress("loss_without_probability", step=self.kind)
        self._require_tower_settings(bench)
        require_layers(model.module, self._list_recorded_layers())
        reasons = self._describe_training(bench)
        decisions = choose_trainable(
            model,
            bench,
            self.kind,
            self.training,
            dense=self.dense,
            reasons=reasons,
        )
        if self.student is not None:
            smaller = student_decisions(
                model, self.student, tables=self.training.tables, reasons=reasons
            )
            decisions = {**decisions, **smaller}
        return StepPlan(decisions, None)  # None: ``apply`` needs no data from the plan

    def apply(self, model: Model, bench: Bench, plan: StepPlan[None]) -> AppliedStep:
        """Train on soft labels and labels, and return the network of the best epoch.

        Raises:
            RowsMissing: the bench lacks rows or soft labels.
            DistillationRefused: the student cannot be built, a layer's output cannot be used, or
                there are hints but no original.
            TrainingFailed: training diverged, or nothing can be trained.
        """
        rows = soft_label_rows(bench, self.rows, self.kind)
        original = None if model.original is None else private_copy(model.original).eval()
        keep_zeros_in = list_pruned_layers(model) if self.student is None else ()
        if self.student is not None:
            model = build_student(model, self.student, bench.seed)
        recorded_layers = self._list_recorded_layers()
        probe = rows.take(torch.arange(min(PROBE_ROWS, len(rows))))
        student_widths = (
            measure_widths(model.module, recorded_layers, probe, bench.signature, self.auxiliary)
            if recorded_layers
            else {}
        )
        teacher_widths: dict[str, int] = {}
        if self.hints:
            if original is None:
                raise DistillationRefused("hints_need_original", step=self.kind)
            require_layers(original, self.hints, "original")
            teacher_widths = measure_widths(original, self.hints, probe, bench.signature)
        auxiliary_losses = AuxiliaryLosses(
            self.hints,
            self.auxiliary,
            student_widths,
            teacher_widths,
            bench.seed,
            num_outputs=len(bench.signature.outputs),
        )
        loss = soft_label_loss(
            bench,
            self.soft_share,
            self.temperature,
            self.kind,
            name=self.loss,
            top=self.top,
            rows=self.rows,
            predictions=None if self.auxiliary is None else auxiliary_losses.predictions,
            original=original,
        )
        teacher = original if self.hints and original is not None else nn.Identity()
        with (
            record_outputs(model.module, recorded_layers) as auxiliary_losses.outputs,
            move_to(teacher, bench.device),
        ):
            if self.hints:
                loss = add_hint_loss(
                    loss, auxiliary_losses, teacher, self.hints, self.hint_share, bench.signature
                )
            return train_model(
                model,
                bench,
                loss,
                self.training,
                keep_zeros_in=keep_zeros_in,
                tensor_names=None
                if self.dense
                else trainable_tensors(model.module, tables=True, dense=False),
                rows=rows,
                whole_lists=self.loss in LIST_LOSSES and bench.signature.scores_rows,
                auxiliary=auxiliary_losses if recorded_layers else None,
            )

    def dry_run(self, model: Model, plan: StepPlan[None]) -> Model:
        """Build the smaller student, if there is one; training changes no shapes."""
        return model if self.student is None else student_dry_run(model, self.student)

    def _require_tower_settings(self, bench: Bench) -> None:
        """Raise ``NothingToCompress`` for a setting that a model with two towers cannot use."""
        if bench.signature.scores_rows:  # one score per row: the model has no towers
            return
        expected: dict[str, tuple[object, ...]] = {
            "loss": ("task", "listwise", "margin"),
            "rows": ("train",),
            "auxiliary": (None,),
            "hints": ((),),
        }
        for setting, values in expected.items():
            if (value := getattr(self, setting)) not in values:
                raise NothingToCompress(
                    "towers_setting",
                    step=self.kind,
                    setting=setting,
                    value=value,
                    expected=tuple(map(str, values)),
                )
        if bench.teachers:
            raise NothingToCompress(
                "towers_setting",
                step=self.kind,
                setting="teachers",
                value=len(bench.teachers),
                expected=("no further teacher",),
            )

    def _list_recorded_layers(self) -> tuple[str, ...]:
        """Return the layers whose outputs are recorded: those with hints or an auxiliary head."""
        return tuple(dict.fromkeys((*self.hints, *filter(None, (self.auxiliary,)))))

    def _describe_training(self, bench: Bench) -> tuple[Reason, ...]:
        """Return reasons for the plan: the rows and teachers that the step trains on."""
        rows = bench.train.rows if bench.train and self.rows != "traffic" else 0
        traffic = bench.traffic.rows if bench.traffic and self.rows != "train" else 0
        if rows and traffic:
            rows_reason = Reason("trained_on_both", step=self.kind, rows=rows, traffic=traffic)
        elif traffic:
            rows_reason = Reason("trained_on_traffic", step=self.kind, traffic=traffic)
        else:
            rows_reason = Reason("trained_on_rows", step=self.kind, rows=rows)
        if not bench.teachers:
            return (rows_reason,)
        return rows_reason, Reason("several_teachers", teachers=1 + len(bench.teachers))
