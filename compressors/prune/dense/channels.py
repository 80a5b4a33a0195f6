"""Structured pruning: remove whole output channels of dense layers.

The matrices become smaller, which is faster on every target. Removing an output channel also
removes the matching input of every layer that consumes it
(``compressors.prune.structure.channel_consumers``). The layer's width is a number in the
architecture's configuration. That number becomes smaller, so the result is stored and built like
any other network. If the number counts groups of channels, such as attention heads, whole groups
are removed.

Sources: those of ``compressors.prune.dense.importance``, and Frankle and Carbin 2019,
https://arxiv.org/abs/1803.03635, sec. 2 (iterative pruning: prune and train in turn, the same share
of the remaining channels each time).
Differs: layers that share one number of the configuration lose the same number of channels, and a
target may be given in multiply-adds.
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
from compressors.core.steps.decisions import Applied, Decision, StepPlan, choose_dense
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit, private_copy
from compressors.distill.soft_labels import mixed_loss
from compressors.distill.training.settings import Training
from compressors.distill.training.training_steps import choose_trainable, pruned_layers, train_model
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.prune.dense import kept_shares
from compressors.prune.dense.importance import Importance, kept_units, per_unit, sizes_of
from compressors.prune.dense.kept_shares import Counts
from compressors.prune.dense.reconstruct import reconstruct
from compressors.prune.structure.channel_consumers import Readers
from compressors.prune.structure.config_widths import Width
from compressors.prune.structure.narrowing import Cut, left_of, without_channels
from compressors.prune.structure.prunable_widths import PrunableWidths, prunable_widths

CUTS = frozenset({"channels_cut", "one_threshold", "inputs_follow"})
"""Reasons of layers that become narrower."""


class Proved(NamedTuple):
    """The widths that can be narrowed, proved with the inputs of a signature."""

    signature: Signature
    prunable: PrunableWidths


class Channels(StepSettings):
    """Remove whole output channels of dense layers, and the inputs that read them."""

    effect: ClassVar[Effect] = "values"

    kind: Literal["channels"] = "channels"
    layers: tuple[str, ...] = Field(
        ("*",), description="Dense layers to narrow: module names, with * for any characters."
    )
    keep: float = Field(0.5, gt=0, lt=1, description="Share of the channels that stay.")
    multiple: int = Field(8, ge=1, description="Widths are rounded to a multiple of this.")
    importance: Importance = Field(
        "l2",
        description="What a channel is judged by: the L1 or L2 norm of its weights, the loss's "
        "gradient times its weights on training rows, what it adds to the layers that read it on "
        "calibration rows, or chance (the honest baseline).",
    )
    rows: int = Field(
        8192, ge=1, description="Rows read for gradient, activation and reconstruct, at most."
    )
    scope: Literal["layer", "global"] = Field(
        "layer",
        description="Every width keeps the same share, or one threshold decides over all widths, "
        "importance being divided by its mean over each.",
    )
    least: float = Field(
        0.1, gt=0, le=1, description="Share of its channels that each width keeps under 'global'."
    )
    flops: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="In place of keep: share of all dense layers' multiply-adds that stays, at "
        "most, after rounding.",
    )
    reconstruct: bool = Field(
        False,
        description="Solve the layers that read fewer channels again, so that on calibration rows "
        "they answer as before.",
    )
    rounds: int = Field(
        1, ge=1, description="Cut in so many rounds; each evaluates the remaining channels again."
    )
    training: Training | None = Field(
        None, description="How the network is trained after each round; none: not at all."
    )
    soft_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="In training, weight of the original's predictions against the labels.",
    )
    temperature: float = Field(
        1.0,
        ge=0.1,
        le=100,
        description="Divides both predictions before they are compared.",
    )

    @model_validator(mode="after")
    def _teaching_needs_training(self) -> Self:
        if self.soft_share and self.training is None:
            raise value_error("soft_share_without_training")
        return self

    @property
    def trains(self) -> bool:
        """A run is slow if the network is trained after each round."""
        return self.training is not None

    @property
    def needs(self) -> tuple[Part, ...]:
        """Rows to measure importance on, and rows to train on."""
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

    def plan(self, model: Model, bench: Bench) -> StepPlan[Proved]:
        """Select the layers to narrow and their consumers; give a reason for each other layer.

        Raises:
            NothingToCompress: importance is ``gradient``, and the signature's task has no loss.
            CompressionError: not even the smallest widths reach the target.
        """
        if self.importance == "gradient" and not bench.signature.scores_rows:
            raise NothingToCompress("loss_missing", step=self.kind)
        prunable = self._found(model, bench.signature)
        decisions = dict(prunable.decisions)
        proved = Proved(bench.signature, prunable)
        if not prunable.readers:
            return StepPlan(decisions, proved)
        counts, left = self._predicted(model, bench.signature, prunable.widths)
        for item in prunable.readers:
            for maker in item.width.makers:
                reasons = self._reasons(item.width, maker, counts[item.width.path], left)
                decisions[maker] = _taken(decisions[maker], *reasons)
            for reader in item.width.readers:
                if reader in decisions:
                    makers = tuple(maker for maker, name in item.reads if name == reader)
                    follows = Reason("inputs_follow", makers=makers)
                    decisions[reader] = _taken(decisions[reader], follows)
        if self.training is not None:
            trained = choose_trainable(model, bench, self.kind, tables=self.training.tables)
            for name, decision in trained.items():
                if decision.selected:
                    after_round = Reason("trained_each_round")
                    decisions[name] = _taken(decisions.get(name, decision), after_round)
        return StepPlan(decisions, proved)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Proved]) -> Applied:
        """Prune every selected width and check that only the pruned channels are missing.

        Raises:
            CompressionError: the narrower network differs from the old one without those channels,
                all gradients are zero, the target cannot be reached, or training diverged.
        """
        signature, prunable = plan.payload
        learned: dict[str, tuple[Reason, ...]] = {}
        first = {width.path: width.value for width in prunable.widths}
        whole = sum(kept_shares.multiply_adds(model.module, signature).values())
        readers = prunable.readers
        for number in range(1, self.rounds + 1):
            sizes = sizes_of(model, bench, self.importance, self.rows)
            importance = {
                maker: total
                for item in readers
                for maker, total in per_unit(item, sizes, self.importance).items()
            }
            part = number / self.rounds
            counts = self._counts(model, signature, readers, importance, first, whole, part)
            before = private_copy(model.module).eval()
            kept = _kept(readers, importance, counts)
            model = self._cut(model, signature, readers, kept, counts)
            if self.reconstruct:
                layers = sorted({name for width in prunable.widths for name in width.readers})
                outputs = {m: kept[m][own] for item in readers for m, own in item.units.items()}
                reconstruct(model.module, before, bench, layers, outputs, self.rows)
            if self.training is not None:
                model, trained = self._trained(model, bench, self.training, number)
                learned = {
                    name: (Reason("last_round", what=outcome.reasons),)
                    for name, outcome in trained.items()
                }
            if number < self.rounds:
                readers = tuple(left_of(item, model, signature, kept) for item in readers)
        if self.scope == "layer":
            return Applied(model, _deferred(learned))
        share = sum(kept_shares.multiply_adds(model.module, signature).values()) / whole
        work_left = Reason("multiply_adds_left", share=share)
        cut = {
            maker: (
                _fewer(width, maker, width.value, counts[width.path]),
                work_left,
                *learned.get(maker, ()),
            )
            for width in prunable.widths
            for maker in width.makers
        }
        return Applied(model, _deferred({**learned, **cut}))

    def dry_run(self, model: Model, plan: StepPlan[Proved]) -> Model:
        """Prune the last channels of every width: as many as ``apply`` would prune.

        With ``scope`` ``global`` that number depends on the values of the weights, so the same
        share of every width is pruned instead.
        """
        signature, prunable = plan.payload
        counts, _ = self._predicted(model, signature, prunable.widths)
        alike = {
            maker: torch.zeros(item.width.value)
            for item in prunable.readers
            for maker in item.width.makers
        }
        kept = _kept(prunable.readers, alike, counts)
        return self._cut(model, signature, prunable.readers, kept, counts)

    def _reasons(self, width: Width, maker: str, count: int, left: float) -> list[Reason]:
        step, importance = self.kind, self.importance
        if self.scope == "global":
            place = width.description()
            reasons = [Reason("one_threshold", step=step, width=place, importance=importance)]
        else:
            fewer = _fewer(width, maker, width.value, count)
            reasons = [Reason("channels_cut", step=step, what=fewer, importance=importance)]
            if self.flops is not None:
                reasons.append(Reason("multiply_adds_left", share=left))
        if self.rounds > 1:
            reasons.append(Reason("in_rounds", rounds=self.rounds))
        return reasons

    def _predicted(
        self, model: Model, signature: Signature, widths: tuple[Width, ...]
    ) -> tuple[Counts, float]:
        """Units left if every width keeps the same share, and the share of multiply-adds left."""
        first = {width.path: width.value for width in widths}
        work = kept_shares.multiply_adds(model.module, signature)
        whole = sum(work.values())
        counts = self._equal(model, work, widths, first, whole, 1.0)
        return counts, kept_shares.remaining_multiply_adds(
            work, model.module, widths, counts
        ) / whole

    def _equal(
        self,
        model: Model,
        work: Mapping[str, float],
        widths: tuple[Width, ...],
        first: Counts,
        whole: float,
        part: float,
    ) -> Counts:
        if self.flops is None:
            return kept_shares.equal_shares(widths, first, self.keep**part, self.multiple)
        return kept_shares.largest_within(
            lambda k: kept_shares.equal_shares(
                widths, first, (k + 1) / kept_shares.STEPS, self.multiple
            ),
            kept_shares.STEPS,
            lambda counts: kept_shares.remaining_multiply_adds(work, model.module, widths, counts),
            whole * self.flops**part,
            "multiply-adds",
        )

    def _counts(
        self,
        model: Model,
        signature: Signature,
        readers: tuple[Readers, ...],
        importance: Mapping[str, Tensor],
        first: Counts,
        whole: float,
        part: float,
    ) -> Counts:
        """Number of units that every width keeps after the fraction ``part`` of all rounds."""
        widths = tuple(item.width for item in readers)
        work = kept_shares.multiply_adds(model.module, signature)
        if self.scope == "layer":
            return self._equal(model, work, widths, first, whole, part)
        curves = kept_shares.curves_of(readers, importance)
        floors = {path: value * self.least for path, value in first.items()}

        def channels(counts: Counts) -> float:
            return sum(counts[w.path] * sum(w.makers.values()) for w in widths)

        def left(counts: Counts) -> float:
            return kept_shares.remaining_multiply_adds(work, model.module, widths, counts)

        if self.flops is None:
            cost, limit, what = channels, channels(first) * self.keep**part, "channels"
        else:
            cost, limit, what = left, whole * self.flops**part, "multiply-adds"
        return kept_shares.by_threshold(curves, widths, floors, self.multiple, cost, limit, what)

    def _cut(
        self,
        model: Model,
        signature: Signature,
        readers: tuple[Readers, ...],
        kept: Mapping[str, Tensor],
        counts: Counts,
    ) -> Model:
        cuts = [Cut(item.width, item, counts[item.width.path]) for item in readers]
        try:
            narrow, gap = without_channels(model, signature, cuts, kept)
        except Exception as fault:  # any exception of the class means: these widths are fixed
            if is_out_of_memory(fault):
                raise
            raise StepRefused(
                "widths_fail",
                widths={c.width.description(): c.count for c in cuts},
                problem=str(fault),
                layers=tuple(sorted(kept)),
            ) from fault
        if gap is not None:
            raise StepRefused("channels_read_elsewhere", gap=gap, layers=tuple(sorted(kept)))
        return narrow

    def _found(self, model: Model, signature: Signature) -> PrunableWidths:
        decisions = choose_dense(Unit.of(model.module), self.layers, self.kind)
        searched = self.flops is not None or self.scope == "global"
        share = self.flops or self.keep
        return prunable_widths(model, signature, decisions, share, self.multiple, searched=searched)

    def _trained(self, model: Model, bench: Bench, training: Training, number: int) -> Applied:
        loss = mixed_loss(bench, self.soft_share, self.temperature, self.kind)
        if bench.checkpoints is not None:  # one checkpoint folder per round
            place = f"{bench.checkpoints}/round-{number}"
            bench = bench.model_copy(update={"checkpoints": place})
        return train_model(model, bench, loss, training, pruned_layers(model))


def _kept(
    readers: tuple[Readers, ...], importance: Mapping[str, Tensor], counts: Counts
) -> dict[str, Tensor]:
    """Units that are kept, by maker: bool ``(units,)`` each."""
    kept: dict[str, Tensor] = {}
    for item in readers:
        kept |= kept_units(item, importance, counts[item.width.path])
    return kept


def _deferred(learned: Mapping[str, tuple[Reason, ...]]) -> dict[str, Decision]:
    return {name: Decision("deferred", reasons) for name, reasons in learned.items()}


def _fewer(width: Width, maker: str, before: int, after: int) -> Reason:
    """Reason such as ``16 -> 8 outputs (hidden[0])`` or ``32 -> 16 outputs (heads 4 -> 2)``."""
    size = width.makers[maker]
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


def _taken(decision: Decision, *reasons: Reason) -> Decision:
    """Decide to prune or train a layer; the reasons of a decision to prune are kept."""
    is_cut = decision.selected and decision.reasons[0].code in CUTS
    return Decision("taken", (*decision.reasons, *reasons) if is_cut else reasons)
