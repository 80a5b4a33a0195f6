"""Build a step's plan: one line for every table and dense layer, with bytes and reasons."""

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from compressors.contracts import DROPPED, Plan, PlanLine
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.output_calibration import recalibration_of
from compressors.core.steps.decisions import Decision
from compressors.core.units import Unit, innermost, stored_bytes

OUTPUT = "(output)"
"""The plan's name for the map after a network's output."""

SHOWN = 3
"""Most folded norms that a plan names."""


def build_plan(
    kind: str,
    source: Model,
    decisions: Mapping[str, Decision],
    before: tuple[Unit, ...],
    after: tuple[Unit, ...],
    sizes: tuple[int, int],
    output: PlanLine | None = None,
    folded: Collection[str] = (),
    warnings: Mapping[str, Reason] | None = None,
) -> Plan:
    """Build the plan after a step: lines of earlier steps, updated by this step's decisions.

    Args:
        kind: the step's tag.
        source: the model before the step, for its plan so far.
        decisions: whether the step takes each unit, and why.
        before: the units before the step.
        after: the units after the step; missing ones were dropped.
        sizes: bytes of all tensors before and after the step.
        output: the line of a map that follows the network's output.
        folded: the norms that were folded into adjacent layers.
        warnings: by unit that the step changed; other units of unchanged format keep theirs.
    """
    now = {unit.name: unit for unit in after}
    old = {unit.name for unit in before}
    lines = []
    for unit in before:
        earlier = source.plan.of(unit.name) if source.plan else None
        decision, new = decisions[unit.name], now.get(unit.name)
        steps = earlier.steps if earlier else ()
        lines.append(
            PlanLine(
                module=unit.name,
                role=unit.role,
                format=new.format if new else DROPPED,
                bytes_before=earlier.bytes_before if earlier else unit.bytes,
                bytes_after=new.bytes if new else 0,
                steps=(*steps, kind) if decision.selected else steps,
                reasons=_reasons(earlier, decision),
                warnings=_warnings(earlier, new, unit.name, warnings or {}),
            )
        )
        # The parts of a composed table. Its bytes before composition remain on its line.
        lines += [
            PlanLine(
                module=part.name,
                role=part.role,
                format=part.format,
                bytes_before=0,
                bytes_after=part.bytes,
                reasons=(Reason("part_of", unit=unit.name),),
                warnings=_warnings(None, part, part.name, warnings or {}),
            )
            for part in after
            if part.name not in old and innermost(part.name, old) == unit.name
        ]
    # A unit that an earlier step dropped keeps its line.
    lines += [line for line in (source.plan.lines if source.plan else ()) if line.format == DROPPED]
    lines += [] if output is None else [output]
    output_bytes = 0 if output is None else output.bytes_after
    other = source.plan.of("(other)") if source.plan else None
    rest_before = sizes[0] - sum(unit.bytes for unit in before)
    lines.append(
        PlanLine(
            module="(other)",
            role="other",
            format="as trained",
            bytes_before=other.bytes_before if other else max(rest_before, 0),
            bytes_after=max(sizes[1] - sum(unit.bytes for unit in after) - output_bytes, 0),
            reasons=_rest(folded),
        )
    )
    return Plan(lines=tuple(lines), reasons=source.plan.reasons if source.plan else ())


def output_line(
    kind: str, source: Model, module: nn.Module, decision: Decision | None
) -> PlanLine | None:
    """Return the plan line of the map after a network's output; None if no step changed it.

    Args:
        kind: the step's tag.
        source: the model before the step, for its plan so far.
        module: the network after the step.
        decision: about the map; None for a step that does not change it.
    """
    if decision is None:
        return source.plan.of(OUTPUT) if source.plan else None
    recalibration = recalibration_of(module)
    return PlanLine(
        module=OUTPUT,
        role="other",
        format="as trained" if recalibration is None else recalibration.method,
        bytes_before=0,
        bytes_after=0 if recalibration is None else stored_bytes(recalibration),
        steps=() if recalibration is None else (kind,),
        reasons=decision.reasons,
    )


def with_remarks(
    plan: Plan,
    kind: str,
    skipped: Mapping[str, Reason],
    decisions: Mapping[str, Decision],
    learned: Mapping[str, tuple[Reason, ...]],
) -> Plan:
    """Add remarks to a plan: skipped units, and whether the step changed nothing.

    Args:
        plan: the plan after the step.
        kind: the step's tag.
        skipped: units that the step left unchanged, with the reasons.
        decisions: the result for every unit after the step.
        learned: by unit, what the step found out while it worked.
    """
    remarks = [Reason("unit_skipped", step=kind, unit=n, why=why) for n, why in skipped.items()]
    output = plan.of(OUTPUT) if OUTPUT in decisions else None
    if output is not None:
        if kind not in output.steps:
            remarks.append(Reason("step_changed_nothing", step=kind, why=output.reasons))
    elif decisions and not any(decision.selected for decision in decisions.values()):
        whys = _once(learned[name] for name in decisions if name in learned)
        remarks.append(
            Reason("step_changed_nothing", step=kind, why=whys)
            if whys
            else Reason("step_found_nothing", step=kind)
        )
    else:
        remarks += [
            Reason("training_changed_nothing", step=kind, why=why)
            for why in _once(learned.values())
            if any(reason.code == "training_unchanged" for reason in why.walk())
        ]
    return plan.model_copy(update={"reasons": (*plan.reasons, *remarks)})


def _once(lists: Iterable[tuple[Reason, ...]]) -> tuple[Reason, ...]:
    """Return the reasons of all lists without repetition, in order."""
    return tuple(dict.fromkeys(reason for reasons in lists for reason in reasons))


def _warnings(
    earlier: PlanLine | None, new: Unit | None, name: str, warnings: Mapping[str, Reason]
) -> tuple[Reason, ...]:
    if name in warnings:
        return (warnings[name],)
    same = earlier is not None and new is not None and earlier.format == new.format
    return earlier.warnings if earlier is not None and same else ()


def _rest(folded: Collection[str]) -> tuple[Reason, ...]:
    """Return the reasons of the last line: what it covers, and the norms folded away."""
    rest, norms = Reason("outside_units"), tuple(sorted(folded))
    if not norms:
        return (rest,)
    if len(norms) > SHOWN:
        return rest, Reason("many_folded_norms", count=len(norms), norms=norms[:SHOWN])
    return rest, Reason("folded_norms", count=len(norms), norms=norms)


def _reasons(earlier: PlanLine | None, decision: Decision) -> tuple[Reason, ...]:
    """Return the reasons of all changes of a unit; if unchanged, every reason against one."""
    if earlier is None:
        return decision.reasons
    if decision.selected:
        return (*earlier.reasons, *decision.reasons) if earlier.steps else decision.reasons
    return earlier.reasons if earlier.steps else (*earlier.reasons, *decision.reasons)
