"""Structured pruning: remove whole output channels of dense layers.

The matrices become smaller, which is faster on every target. Removing an output channel also
removes the matching input of every layer that consumes it
(``compressors.prune.structure.channel_consumers``). The layer's width is a number in the
architecture's configuration (an argument of the model class); its place there is the ``path`` of
the width. That number becomes smaller, so the result is stored and built like any other network. In
this file a *group* is one channel, or several that the number counts as one, such as an attention
head; whole groups are removed. A *producer* is a layer that outputs a group, and a *consumer* a
layer or norm that takes it as input.

Sources: those of ``compressors.prune.dense.importance``, and Frankle and Carbin 2019,
https://arxiv.org/abs/1803.03635, sec. 2 (prune the same share and train, in turn).
Differs: layers that share a number of the configuration lose the same number of channels, which may
follow from a share of the multiply-adds.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compressors.contracts import Bench, Part, Signature, is_out_of_memory
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import value_error
from compressors.core.model import Model
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit, private_copy
from compressors.distill.soft_labels import build_mixed_loss
from compressors.distill.training.settings import SoftShare, Temperature, Training
from compressors.distill.training.training_steps import (
    choose_trainable,
    list_pruned_layers,
    train_model,
)
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.prune.dense import kept_shares
from compressors.prune.dense.importance import (
    Importance,
    group_importance,
    select_kept_groups,
    weight_importance,
)
from compressors.prune.dense.kept_shares import Counts
from compressors.prune.dense.reconstruct import reconstruct
from compressors.prune.structure.channel_consumers import WidthConsumers
from compressors.prune.structure.config_widths import Width
from compressors.prune.structure.narrowing import WidthCut, remaining_consumers, remove_channels
from compressors.prune.structure.prunable_widths import PrunableWidths, prunable_widths

NARROWING_CODES = frozenset({"channels_cut", "one_threshold", "inputs_follow"})
"""Reason codes that say that a layer becomes narrower."""


class CheckedWidths(NamedTuple):
    """The widths that can be narrowed, and the signature that they were checked with."""

    signature: Signature
    prunable: PrunableWidths


class Channels(StepSettings):
    """Remove whole output channels of dense layers, and the inputs that consume them."""

    effect: ClassVar[Effect] = "values"  # layers keep their format and become narrower

    kind: Literal["channels"] = "channels"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to narrow: module names, with * for any characters."
    )
    keep: float = Field(
        0.5, gt=0, lt=1, description="Share of the channels to keep. Not used with flops."
    )
    multiple: int = Field(8, ge=1, description="Widths are rounded to a multiple of this.")
    importance: Importance = Field(
        "l2",
        description="Channel score. l1, l2: norm of its weights. gradient: weights times the "
        "gradient of the loss on training rows. activation: contribution to the consuming layers "
        "on calibration rows. random: a baseline for comparison.",
    )
    rows: int = Field(
        8192, ge=1, description="Largest number of rows read for gradient, activation, reconstruct."
    )
    scope: Literal["layer", "global"] = Field(
        "layer",
        description="layer: every width keeps the same share. global: one threshold for all "
        "widths, after importance is divided by its mean over each width.",
    )
    least: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Smallest share of its channels that each width keeps if scope is global.",
    )
    flops: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Instead of keep: largest share of the multiply-adds of all dense layers that "
        "may remain after rounding. Empty: keep decides.",
    )
    reconstruct: bool = Field(
        False,
        description="Refit the consuming layers by least squares so that their outputs on "
        "calibration rows change least.",
    )
    rounds: int = Field(
        1, ge=1, description="Number of pruning rounds; channels are scored again in each round."
    )
    training: Training | None = Field(
        None, description="Training after each round. Empty: no training."
    )
    soft_share: SoftShare = 0.0  # weight of the original model's predictions in the training loss
    temperature: Temperature = 1.0

    @model_validator(mode="after")
    def _require_training_for_soft_labels(self) -> Self:
        if self.soft_share and self.training is None:
            raise value_error("soft_share_without_training")
        return self

    @property
    def trains(self) -> bool:
        """Whether the network is trained after each round, which makes a run slow."""
        return self.training is not None

    @property
    def needs(self) -> tuple[Part, ...]:
        """The splits that importance, reconstruction and training read."""
        parts: list[Part] = []
        if self.importance == "gradient" or self.training is not None:
            parts.append("train")
        if self.importance == "activation" or self.reconstruct:
            parts.append("calibration")
        if self.training is not None:
            parts.append("validation")
        if self.soft_share:
            parts.append("soft_labels")
        return tuple(parts)

    def plan(self, model: Model, bench: Bench) -> StepPlan[CheckedWidths]:
        """Select the layers to narrow and their consumers; give a reason for each other layer.

        Raises:
            NothingToCompress: a pattern matches no layer, or importance is ``gradient`` and the
                signature's task has no loss.
            StepRefused: even the smallest widths need more multiply-adds than ``flops`` allows.
        """
        if self.importance == "gradient" and not bench.signature.scores_rows:
            raise NothingToCompress("loss_missing", step=self.kind)
        prunable = self._find_prunable_widths(model, bench.signature)
        decisions = dict(prunable.decisions)
        checked = CheckedWidths(bench.signature, prunable)
        if not prunable.consumers:
            return StepPlan(decisions, checked)
        counts, work_share = self._estimate(model, bench.signature, prunable.widths)
        for item in prunable.consumers:
            for producer in item.width.producers:
                reasons = self._explain(item.width, producer, counts[item.width.path], work_share)
                decisions[producer] = _take(decisions[producer], *reasons)
            for consumer in item.width.consumers:
                if consumer in decisions:
                    producers = tuple(
                        producer for producer, name in item.connections if name == consumer
                    )
                    follows = Reason("inputs_follow", producers=producers)
                    decisions[consumer] = _take(decisions[consumer], follows)
        if self.training is not None:
            trained = choose_trainable(model, bench, self.kind, self.training)
            for name, decision in trained.items():
                if decision.selected:
                    after_round = Reason("trained_each_round")
                    decisions[name] = _take(decisions.get(name, decision), after_round)
        return StepPlan(decisions, checked)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[CheckedWidths]) -> AppliedStep:
        """Prune every selected width and check that only the pruned channels are missing.

        Raises:
            RowsMissing: the bench lacks rows or soft labels that the settings need.
            StepRefused: the narrower network fails or differs from the old one without those
                channels, every importance is zero, or ``flops`` cannot be reached.
            NotAWidth: after a round, the remaining channels are not consumed as before.
            TrainingFailed: training diverged, or nothing can be trained.
        """
        signature, prunable = plan.payload
        training_reasons: dict[str, tuple[Reason, ...]] = {}
        initial = {width.path: width.value for width in prunable.widths}
        initial_work = sum(kept_shares.multiply_adds(model.module, signature).values())
        consumers = prunable.consumers
        for number in range(1, self.rounds + 1):
            scores = weight_importance(model, bench, self.importance, self.rows)
            importance = {
                producer: total
                for item in consumers
                for producer, total in group_importance(item, scores, self.importance).items()
            }
            progress = number / self.rounds
            counts = self._compute_counts(
                model, signature, consumers, importance, initial, initial_work, progress
            )
            before = private_copy(model.module).eval()
            kept_by_producer = _select_by_producer(consumers, importance, counts)
            model = self._narrow(model, signature, consumers, kept_by_producer, counts)
            if self.reconstruct:
                layers = sorted({name for width in prunable.widths for name in width.consumers})
                outputs = {  # by producer, which of its output channels stay
                    producer: kept_by_producer[producer][groups]
                    for item in consumers
                    for producer, groups in item.groups.items()
                }
                reconstruct(model.module, before, bench, layers, outputs, self.rows)
            if self.training is not None:
                model, trained = self._train(model, bench, self.training, number)
                training_reasons = {
                    name: (Reason("last_round", what=outcome.reasons),)
                    for name, outcome in trained.items()
                }
            if number < self.rounds:
                consumers = tuple(
                    remaining_consumers(item, model, signature, kept_by_producer)
                    for item in consumers
                )
        if self.scope == "layer":
            return AppliedStep(model, _build_deferred_outcomes(training_reasons))
        final_work = sum(kept_shares.multiply_adds(model.module, signature).values())
        work_left = Reason("multiply_adds_left", share=final_work / initial_work)
        narrowed = {
            producer: (
                _build_width_reason(width, producer, width.value, counts[width.path]),
                work_left,
                *training_reasons.get(producer, ()),
            )
            for width in prunable.widths
            for producer in width.producers
        }
        return AppliedStep(model, _build_deferred_outcomes({**training_reasons, **narrowed}))

    def dry_run(self, model: Model, plan: StepPlan[CheckedWidths]) -> Model:
        """Prune the last channels of every width: as many as ``apply`` would prune.

        If ``scope`` is ``global``, the number for each width depends on the values of the weights.
        Then the same share of every width is pruned instead.
        """
        signature, prunable = plan.payload
        counts, _ = self._estimate(model, signature, prunable.widths)
        equal_importance = {
            producer: torch.zeros(item.width.value)
            for item in prunable.consumers
            for producer in item.width.producers
        }
        kept_by_producer = _select_by_producer(prunable.consumers, equal_importance, counts)
        return self._narrow(model, signature, prunable.consumers, kept_by_producer, counts)

    def _explain(self, width: Width, producer: str, count: int, work_share: float) -> list[Reason]:
        """Return the plan's reasons for a producer; ``work_share`` of all multiply-adds remains."""
        step, importance = self.kind, self.importance
        if self.scope == "global":
            argument = width.description()
            reasons = [Reason("one_threshold", step=step, width=argument, importance=importance)]
        else:
            fewer = _build_width_reason(width, producer, width.value, count)
            reasons = [Reason("channels_cut", step=step, what=fewer, importance=importance)]
            if self.flops is not None:
                reasons.append(Reason("multiply_adds_left", share=work_share))
        if self.rounds > 1:
            reasons.append(Reason("in_rounds", rounds=self.rounds))
        return reasons

    def _estimate(
        self, model: Model, signature: Signature, widths: tuple[Width, ...]
    ) -> tuple[Counts, float]:
        """Estimate the result if every width keeps the same share.

        Returns:
            The number of groups that each width keeps, and the share of multiply-adds that remains.
        """
        initial = {width.path: width.value for width in widths}
        work = kept_shares.multiply_adds(model.module, signature)
        initial_work = sum(work.values())
        counts = self._share_counts(model, work, widths, initial, initial_work, progress=1.0)
        remaining = kept_shares.remaining_multiply_adds(work, model.module, widths, counts)
        return counts, remaining / initial_work

    def _share_counts(
        self,
        model: Model,
        work: Mapping[str, float],
        widths: tuple[Width, ...],
        initial: Counts,
        initial_work: float,
        progress: float,
    ) -> Counts:
        """Return the number of groups that every width keeps if all keep the same share.

        ``work`` has the present multiply-adds for one row, by layer. For the other arguments see
        ``_compute_counts``.
        """
        if self.flops is None:
            return kept_shares.equal_shares(widths, initial, self.keep**progress, self.multiple)
        return kept_shares.largest_counts_within(
            lambda k: kept_shares.equal_shares(
                widths, initial, (k + 1) / kept_shares.SEARCH_STEPS, self.multiple
            ),
            kept_shares.SEARCH_STEPS,
            lambda counts: kept_shares.remaining_multiply_adds(work, model.module, widths, counts),
            initial_work * self.flops**progress,
            "multiply-adds",
        )

    def _compute_counts(
        self,
        model: Model,
        signature: Signature,
        consumers: tuple[WidthConsumers, ...],
        importance: Mapping[str, Tensor],
        initial: Counts,
        initial_work: float,
        progress: float,
    ) -> Counts:
        """Return the number of groups that every width keeps after a round.

        Args:
            model: the present network.
            signature: describes its inputs.
            consumers: the consumers of the present widths.
            importance: by producer, float ``(groups,)``.
            initial: number of groups of each width before the first round.
            initial_work: multiply-adds of all dense layers for one row before the first round.
            progress: round number / number of rounds; after the round, ``keep ** progress`` of the
                initial channels (or ``flops ** progress`` of the multiply-adds) remain.
        """
        widths = tuple(item.width for item in consumers)
        work = kept_shares.multiply_adds(model.module, signature)
        if self.scope == "layer":
            return self._share_counts(model, work, widths, initial, initial_work, progress)
        normalized = kept_shares.normalized_importance(consumers, importance)
        floors = {path: value * self.least for path, value in initial.items()}

        def channels(counts: Counts) -> float:
            return sum(counts[w.path] * sum(w.producers.values()) for w in widths)

        def multiply_adds(counts: Counts) -> float:
            return kept_shares.remaining_multiply_adds(work, model.module, widths, counts)

        if self.flops is None:
            cost, cost_unit = channels, "channels"
            max_cost = channels(initial) * self.keep**progress
        else:
            cost, cost_unit = multiply_adds, "multiply-adds"
            max_cost = initial_work * self.flops**progress
        return kept_shares.counts_by_threshold(
            normalized, widths, floors, self.multiple, cost, max_cost, cost_unit
        )

    def _narrow(
        self,
        model: Model,
        signature: Signature,
        consumers: tuple[WidthConsumers, ...],
        kept_by_producer: Mapping[str, Tensor],
        counts: Counts,
    ) -> Model:
        """Build the network with the kept groups and check it.

        Raises:
            StepRefused: the narrower network fails, or code other than layers reads the channels.
        """
        cuts = [WidthCut(item.width, item, counts[item.width.path]) for item in consumers]
        try:
            narrower, gap = remove_channels(model, signature, cuts, kept_by_producer)
        except Exception as fault:  # the class or torch may raise any exception
            if is_out_of_memory(fault):
                raise
            raise StepRefused(
                "widths_fail",
                widths={c.width.description(): c.count for c in cuts},
                problem=str(fault),
                layers=tuple(sorted(kept_by_producer)),
            ) from fault
        if gap is not None:  # a description of the difference between the networks' scores
            raise StepRefused(
                "channels_read_elsewhere", gap=gap, layers=tuple(sorted(kept_by_producer))
            )
        return narrower

    def _find_prunable_widths(self, model: Model, signature: Signature) -> PrunableWidths:
        """Find the widths that can be pruned; see ``prunable_widths``."""
        decisions = choose_dense(Unit.of(model.module), self.layers, self.kind)
        # Whether a search determines the share of each width, so that it may be below ``share``.
        is_searched = self.flops is not None or self.scope == "global"
        arguments = (decisions, self.flops or self.keep, self.multiple)
        return prunable_widths(model, signature, *arguments, share_is_searched=is_searched)

    def _train(self, model: Model, bench: Bench, training: Training, number: int) -> AppliedStep:
        loss = build_mixed_loss(bench, self.soft_share, self.temperature, self.kind, model.original)
        if bench.checkpoints is not None:  # one checkpoint folder per round
            folder = f"{bench.checkpoints}/round-{number}"
            bench = bench.model_copy(update={"checkpoints": folder})
        return train_model(model, bench, loss, training, keep_zeros_in=list_pruned_layers(model))


def _select_by_producer(
    consumers: tuple[WidthConsumers, ...], importance: Mapping[str, Tensor], counts: Counts
) -> dict[str, Tensor]:
    """Select the groups that are kept, by producer: bool ``(groups,)`` each."""
    kept_by_producer: dict[str, Tensor] = {}
    for item in consumers:
        kept_by_producer |= select_kept_groups(item, importance, counts[item.width.path])
    return kept_by_producer


def _build_deferred_outcomes(reasons: Mapping[str, tuple[Reason, ...]]) -> dict[str, Decision]:
    """Build outcomes with these reasons.

    "deferred": whether a layer changed is decided after the step by comparing its tensors.
    """
    return {name: Decision("deferred", why) for name, why in reasons.items()}


def _build_width_reason(width: Width, producer: str, before: int, after: int) -> Reason:
    """Build a reason, such as "16 -> 8 outputs (hidden[0])"; arguments are numbers of groups."""
    size = width.producers[producer]
    if size == 1:
        return Reason("fewer_channels", before=before, after=after, width=width.description())
    return Reason(
        "fewer_groups",
        before=before * size,
        after=after * size,
        width=width.description(),
        units_before=before,
        units_after=after,
    )


def _take(decision: Decision, *reasons: Reason) -> Decision:
    """Decide to prune or train a layer; earlier reasons stay if they say that it is pruned."""
    is_pruned = decision.selected and decision.reasons[0].code in NARROWING_CODES
    return Decision("taken", (*decision.reasons, *reasons) if is_pruned else reasons)
