"""Remove whole layers: cross layers, hidden layers, attention blocks.

The search is greedy: remove the layer without which the network scores best on the validation rows,
then repeat with the remaining layers.

Source: Men et al. 2024, https://arxiv.org/abs/2403.03853 (layers are redundant; removing beats
narrowing). Differs: they rank layers once by how much each changes the direction of its input; here
the network is measured without each layer, which is affordable because click models are small.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from compressors.contracts import Bench, Part, Signature
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.steps.decisions import Applied, Decision, StepPlan, choose_dense
from compressors.core.steps.step import Effect, StepSettings
from compressors.core.units import Unit
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import RowsMissing
from compressors.errors.widths import NotAMember
from compressors.metrics.validation_score import quality
from compressors.prune.structure.config_depth import Stack, find_stacks, without_member


class Stacks(NamedTuple):
    """The stacks with removable layers, found with the inputs of a signature."""

    signature: Signature
    stacks: tuple[Stack, ...]


class DropLayers(StepSettings):
    """Remove whole layers, as many as the configuration can count."""

    effect: ClassVar[Effect] = "values"

    kind: Literal["drop_layers"] = "drop_layers"
    layers: tuple[str, ...] = Field(
        ("*",),
        description="Dense layers that may go: module names, with * for any characters. A number "
        "of the configuration is lowered only if all layers it counts are among them.",
    )
    count: int = Field(
        1, ge=1, description="Layers removed for each number or list that counts them, at most."
    )
    importance: Literal["quality", "random"] = Field(
        "quality",
        description="Which go first: those without which the metric on validation rows is "
        "highest, or those that chance says (the honest baseline).",
    )
    most_loss: float | None = Field(
        None,
        ge=0,
        description="By how much the metric on validation rows may fall, for all that go "
        "together; none: at any cost.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Validation rows, if the measured quality selects or limits the removed layers."""
        return ("validation",) if self._measures else ()

    @property
    def _measures(self) -> bool:
        return self.importance == "quality" or self.most_loss is not None

    def plan(self, model: Model, bench: Bench) -> StepPlan[Stacks]:
        """Select the layers that may be removed; give a reason for each other layer.

        Raises:
            NothingToCompress: quality must be measured, and the task has no metric of single rows.
        """
        if self._measures and not bench.signature.scores_rows:
            raise NothingToCompress("row_metric_for_layers_missing", step=self.kind)
        stacks, decisions = self._stacks(model, bench.signature)
        return StepPlan(decisions, Stacks(bench.signature, tuple(stacks)))

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Stacks]) -> Applied:
        """Remove layers one at a time, each time the one whose removal costs least.

        Raises:
            CompressionError: the bench lacks validation rows.
        """
        if self._measures and bench.validation is None:
            raise RowsMissing("validation_rows_missing", step=self.kind)
        names = [unit.name for unit in Unit.of(model.module)]
        before = self._quality(model, bench)
        drawn = torch.Generator().manual_seed(bench.seed)
        outcomes: dict[str, Decision] = {}
        for stack in plan.payload.stacks:
            now, left, changes = stack, list(range(stack.members)), list[Reason]()
            for _ in range(self.count):
                tried = _tried(model, bench.signature, now)
                if not tried:
                    break
                if self.importance == "random":
                    members = sorted(tried)
                    gone = members[int(torch.randint(len(members), (1,), generator=drawn))]
                    qualities = {gone: self._quality(tried[gone][0], bench)}
                else:
                    qualities = {
                        m: self._quality(candidate, bench) for m, (candidate, _) in tried.items()
                    }
                    gone = max(qualities, key=lambda member: (qualities[member], -member))
                metric, change = bench.signature.single_output.metric, qualities[gone] - before
                if self.most_loss is not None and qualities[gone] < before - self.most_loss:
                    layer = left[gone]
                    changes.append(Reason("layer_kept", layer=layer, metric=metric, change=change))
                    break
                model, now = tried[gone]
                layer = left.pop(gone)
                changes.append(
                    Reason("layer_removed_measured", layer=layer, metric=metric, change=change)
                    if self._measures
                    else Reason("layer_removed", layer=layer)
                )
            outcomes |= _outcomes(names, stack, left, changes)
        return Applied(model, outcomes)

    def dry_run(self, model: Model, plan: StepPlan[Stacks]) -> Model:
        """Remove the last removable layers of every stack: as many as ``apply`` may remove."""
        for stack in plan.payload.stacks:
            now = stack
            for _ in range(self.count):
                tried = _tried(model, plan.payload.signature, now)
                if tried:
                    model, now = tried[max(tried)]
        return model

    def _quality(self, model: Model, bench: Bench) -> float:
        if not self._measures or bench.validation is None:
            return 0.0
        return quality(model.module, bench.signature, bench.validation)

    def _stacks(
        self, model: Model, signature: Signature
    ) -> tuple[list[Stack], dict[str, Decision]]:
        """The stacks with removable layers, and the decision of every dense layer."""
        units = Unit.of(model.module)
        selected = choose_dense(units, self.layers, self.kind)
        why = Reason("no_layer_count")
        decisions = {
            n: Decision("skipped", (why,)) if c.selected else c for n, c in selected.items()
        }
        stacks: list[Stack] = []
        taken: set[str] = set()
        for stack in find_stacks(model):
            inside = [u.name for u in units if stack.member_of(u.name) is not None]
            dense = [name for name in inside if name in selected]
            if not dense or taken & set(inside):
                continue
            reason = _why_not(model, signature, stack, selected, dense)
            for name in inside:
                if reason is not None and (name not in selected or selected[name].selected):
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
                taken |= set(inside)
        return stacks, decisions


def _why_not(
    model: Model,
    signature: Signature,
    stack: Stack,
    selected: Mapping[str, Decision],
    dense: list[str],
) -> Reason | None:
    """The reason why no layer of a stack can be removed, or None."""
    for name in dense:
        if not selected[name].selected:
            why = selected[name].reasons
            return Reason("shares_count", argument=stack.description(), layer=name, why=why)
    # Layers move up, so earlier steps must have treated all members of the stack alike.
    steps: dict[str, set[tuple[str, ...]]] = {}
    for name in dense:
        line = model.plan.of(name) if model.plan else None
        place = _place(stack, name)
        steps.setdefault(place, set()).add(line.steps if line else ())
    for treatments in steps.values():
        if len(treatments) > 1:
            return Reason("treated_differently", argument=stack.description())
    faults: list[Reason] = []
    if not _tried(model, signature, stack, faults):
        return faults[0]
    return None


def _place(stack: Stack, name: str) -> str:
    """The place of a layer within its member, the same for all members of the stack."""
    first: str | None = name
    while first is not None and stack.member_of(first):
        first = stack.moved(first, 0)
    return first or name


def _tried(
    model: Model, signature: Signature, stack: Stack, faults: list[Reason] | None = None
) -> dict[int, tuple[Model, Stack]]:
    """The network without each removable member, by member; a last member is never removed."""
    tried: dict[int, tuple[Model, Stack]] = {}
    for member in range(stack.members if stack.members > 1 else 0):
        try:
            tried[member] = without_member(model, signature, stack, member)
        except NotAMember as fault:
            if faults is not None:
                faults.append(fault.reason)
    return tried


def _outcomes(
    names: list[str], stack: Stack, left: list[int], changes: list[Reason]
) -> dict[str, Decision]:
    """The changes of every layer of a stack, by its name before the step."""
    outcomes = {}
    for name in names:
        member = stack.member_of(name)
        if member is None or not changes:
            continue
        reasons = list(changes)
        if member >= len(left):
            reasons.append(Reason("place_removed"))
        elif left[member] != member:
            reasons.append(Reason("moved_from", layer=left[member]))
        outcomes[name] = Decision("deferred", tuple(reasons))
    return outcomes
