"""Remove whole layers: cross layers, hidden layers, attention blocks.

A *stack* is a set of layers that one argument of the model class counts (``cross_layers=3``) or
lists (``hidden=[64, 32]``). A *member* is one position of a stack: all modules that disappear if
the number is one less or the list one entry shorter. A cross layer of two factors, for example, is
one member of two modules.

With importance ``quality`` the search is greedy: it removes the member without which the network
scores best on the validation rows, then repeats with the remaining members. With ``random`` it
removes randomly selected members.

Source: Men et al. 2024, https://arxiv.org/abs/2403.03853 (layers are redundant; removing layers is
better than narrowing them). Differs: the paper ranks layers once by how much each changes the
direction of its input. Here the quality of the network is measured without each layer, which takes
little time because CTR models are small.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from compressors.contracts import Bench, Part, Signature
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.steps.decisions import AppliedStep, Decision, StepPlan, choose_dense
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import RowsMissing
from compressors.errors.widths import NotAMember
from compressors.metrics.validation_score import quality
from compressors.prune.structure.config_depth import Stack, find_stacks, remove_member


class RemovableStacks(NamedTuple):
    """The stacks with removable members, and the signature that they were checked with."""

    signature: Signature
    stacks: tuple[Stack, ...]


class DropLayers(StepSettings):
    """Remove whole layers that an argument of the model class counts or lists."""

    effect: ClassVar[Effect] = "values"  # layers keep their format; some are removed

    kind: Literal["drop_layers"] = "drop_layers"
    layers: tuple[str, ...] = Field(
        ("*",),
        description="Dense layers that may be removed: module names, with * for any characters. "
        "Layers that one argument of the model class counts are removed only if all of them match.",
    )
    count: int = Field(
        1,
        ge=1,
        description="Largest number of layers to remove for each argument that counts or lists "
        "layers. One layer always stays.",
    )
    importance: Literal["quality", "random"] = Field(
        "quality",
        description="Order of removal. quality: first the layer without which the metric on "
        "validation rows is highest. random: any layer (a baseline for comparison).",
    )
    most_loss: float | None = Field(
        None,
        ge=0,
        description="Largest allowed decrease of the metric on validation rows, for all removed "
        "layers together. Empty: no limit.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Validation rows, if measured quality selects or limits the removed layers."""
        return ("validation",) if self._needs_quality else ()

    @property
    def _needs_quality(self) -> bool:
        return self.importance == "quality" or self.most_loss is not None

    def plan(self, model: Model, bench: Bench) -> StepPlan[RemovableStacks]:
        """Select the stacks whose members may be removed; give a reason for each other layer.

        Raises:
            NothingToCompress: quality must be measured, and the task has no metric of single rows.
        """
        if self._needs_quality and not bench.signature.scores_rows:
            raise NothingToCompress("row_metric_for_layers_missing", step=self.kind)
        stacks, decisions = self._find_removable_stacks(model, bench.signature)
        return StepPlan(decisions, RemovableStacks(bench.signature, tuple(stacks)))

    def apply(self, model: Model, bench: Bench, plan: StepPlan[RemovableStacks]) -> AppliedStep:
        """Remove up to ``count`` members of each stack, one at a time.

        Raises:
            RowsMissing: quality must be measured, and the bench has no validation rows.
        """
        if self._needs_quality and bench.validation is None:
            raise RowsMissing("validation_rows_missing", step=self.kind)
        names = [unit.name for unit in Unit.of(model.module)]
        baseline_quality = self._measure_quality(model, bench)
        generator = torch.Generator().manual_seed(bench.seed)
        outcomes: dict[str, Decision] = {}
        for original_stack in plan.payload.stacks:
            stack = original_stack
            remaining = list(range(stack.members))  # original numbers of the remaining members
            changes = list[Reason]()
            for _ in range(self.count):
                candidates = _build_candidates(model, bench.signature, stack)
                if not candidates:
                    break
                if self.importance == "random":
                    members = sorted(candidates)
                    index = int(torch.randint(len(members), (1,), generator=generator))
                    selected = members[index]
                    qualities = {selected: self._measure_quality(candidates[selected][0], bench)}
                else:
                    qualities = {
                        member: self._measure_quality(candidate, bench)
                        for member, (candidate, _) in candidates.items()
                    }
                    # Of members with equal quality, the first one is removed.
                    selected = max(qualities, key=lambda member: (qualities[member], -member))
                metric = bench.signature.judged_by
                change = qualities[selected] - baseline_quality
                layer = remaining[selected]
                if (
                    self.most_loss is not None
                    and qualities[selected] < baseline_quality - self.most_loss
                ):
                    changes.append(Reason("layer_kept", layer=layer, metric=metric, change=change))
                    break
                model, stack = candidates[selected]
                del remaining[selected]
                changes.append(
                    Reason("layer_removed_measured", layer=layer, metric=metric, change=change)
                    if self._needs_quality
                    else Reason("layer_removed", layer=layer)
                )
            outcomes |= _build_outcomes(names, original_stack, remaining, changes)
        return AppliedStep(model, outcomes)

    def dry_run(self, model: Model, plan: StepPlan[RemovableStacks]) -> Model:
        """Remove the last removable members of every stack: as many as ``apply`` may remove."""
        for original_stack in plan.payload.stacks:
            stack = original_stack
            for _ in range(self.count):
                candidates = _build_candidates(model, plan.payload.signature, stack)
                if candidates:
                    model, stack = candidates[max(candidates)]
        return model

    def _measure_quality(self, model: Model, bench: Bench) -> float:
        """Return the metric on the validation rows; 0 if quality need not be measured."""
        if not self._needs_quality or bench.validation is None:
            return 0.0
        return quality(model.module, bench.signature, bench.validation)

    def _find_removable_stacks(
        self, model: Model, signature: Signature
    ) -> tuple[list[Stack], dict[str, Decision]]:
        """Find the stacks with removable members.

        Returns:
            The stacks, and the decision of every dense layer and of every other unit (such as a
            table) in a stack that contains dense layers.
        """
        units = Unit.of(model.module)
        choices = choose_dense(units, self.layers, self.kind)
        uncounted = Decision("skipped", (Reason("no_layer_count"),))
        decisions = {
            name: uncounted if choice.selected else choice for name, choice in choices.items()
        }
        stacks: list[Stack] = []
        assigned: set[str] = set()  # units of the stacks selected so far
        for stack in find_stacks(model):
            in_stack = [unit.name for unit in units if stack.find_member(unit.name) is not None]
            dense = [name for name in in_stack if name in choices]
            if not dense or assigned & set(in_stack):
                continue
            reason = _explain_not_removable(model, signature, stack, choices, dense)
            for name in in_stack:
                if reason is not None and (name not in choices or choices[name].selected):
                    decisions[name] = Decision("skipped", (reason,))
                elif reason is None:
                    dropped = Reason(
                        "layers_dropped",
                        step=self.kind,
                        count=min(self.count, stack.members - 1),
                        members=stack.members,
                        argument=stack.description(),
                        importance=self.importance,
                    )
                    decisions[name] = Decision("taken", (dropped,))
            if reason is None:
                stacks.append(stack)
                assigned |= set(in_stack)
        return stacks, decisions


def _explain_not_removable(
    model: Model,
    signature: Signature,
    stack: Stack,
    choices: Mapping[str, Decision],
    dense: list[str],
) -> Reason | None:
    """Return why no member of a stack can be removed; None if one can.

    Args:
        model: the network; it is not changed.
        signature: describes the inputs of the network.
        stack: the stack.
        choices: whether the setting ``layers`` selects each dense layer.
        dense: names of the dense layers in the stack.
    """
    for name in dense:
        if not choices[name].selected:
            why = choices[name].reasons
            return Reason("shares_count", argument=stack.description(), layer=name, why=why)
    # The removal of a member gives later members the names of earlier ones, so earlier steps must
    # have changed all members in the same way.
    steps: dict[str, set[tuple[str, ...]]] = {}
    for name in dense:
        line = model.plan.of(name) if model.plan else None
        position = _name_in_first_member(stack, name)
        steps.setdefault(position, set()).add(line.steps if line else ())
    for step_lists in steps.values():
        if len(step_lists) > 1:
            return Reason("treated_differently", argument=stack.description())
    faults: list[Reason] = []
    if not _build_candidates(model, signature, stack, faults):
        return faults[0]
    return None


def _name_in_first_member(stack: Stack, name: str) -> str:
    """Return the name that a layer of a stack would have if its member were the first."""
    new_name: str | None = name
    while new_name is not None and stack.find_member(new_name):
        new_name = stack.name_after_removal(new_name, 0)
    return new_name or name


def _build_candidates(
    model: Model, signature: Signature, stack: Stack, faults: list[Reason] | None = None
) -> dict[int, tuple[Model, Stack]]:
    """Build the network and the stack without each removable member, by the member's number.

    The only member of a stack is never removed. ``faults`` receives the reasons why members cannot
    be removed.
    """
    candidates: dict[int, tuple[Model, Stack]] = {}
    for member in range(stack.members if stack.members > 1 else 0):
        try:
            candidates[member] = remove_member(model, signature, stack, member)
        except NotAMember as fault:
            if faults is not None:
                faults.append(fault.reason)
    return candidates


def _build_outcomes(
    names: list[str], stack: Stack, remaining: list[int], changes: list[Reason]
) -> dict[str, Decision]:
    """Return the outcome for every unit of a stack, by its name before the step.

    Args:
        names: all units of the network before the step.
        stack: the stack before the step.
        remaining: original numbers of the members that remain, in their order.
        changes: removed members, and the member at which the search stopped.
    """
    outcomes = {}
    for name in names:
        member = stack.find_member(name)
        if member is None or not changes:
            continue
        reasons = list(changes)
        if member >= len(remaining):
            reasons.append(Reason("place_removed"))
        elif remaining[member] != member:
            reasons.append(Reason("moved_from", layer=remaining[member]))
        # "deferred": whether the unit changed is decided after the step by comparing its tensors,
        # because a later member may have moved to this name or the member may be unchanged.
        outcomes[name] = Decision("deferred", tuple(reasons))
    return outcomes
