"""Build a step's plan: one line for every table and dense layer, with bytes and reasons."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from compressors.contracts import DROPPED, Plan, PlanLine
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.output_calibration import list_recalibrations
from compressors.core.steps.decisions import Decision
from compressors.core.units import Unit, innermost, stored_bytes

OUTPUT = "(output)"
"""Name of the plan line for the calibration map: the function that recalibrates the output."""


def output_line_name(output: str | None) -> str:
    """Return the name of the plan line for the calibration map of an output.

    Args:
        output: the output's name; None if the network has only one output.
    """
    return OUTPUT if output is None else f"(output {output})"


def is_output_line(name: str) -> bool:
    """Whether a plan line is that of a calibration map; units have no parentheses in their name."""
    return name.startswith("(output")


OTHER = "(other)"
"""Name of the plan line for all tensors outside of units, such as those of norms."""

MAX_LISTED_NORMS = 3
"""Largest number of folded norms that a plan lists by name."""


def build_plan(
    kind: str,
    source: Model,
    decisions: Mapping[str, Decision],
    before: tuple[Unit, ...],
    after: tuple[Unit, ...],
    sizes: tuple[int, int],
    outputs: Sequence[PlanLine] = (),
    folded: Collection[str] = (),
    warnings: Mapping[str, Reason] | None = None,
) -> Plan:
    """Build the plan after a step: the lines of the plan so far, updated by the step's decisions.

    Args:
        kind: the step's ``kind``.
        source: the model before the step, for its plan so far.
        decisions: by name of every unit, whether the step changes the unit, and why.
        before: the units before the step.
        after: the units after the step; missing ones were dropped.
        sizes: bytes of all tensors before and after the step.
        outputs: the lines of the calibration maps.
        folded: names of the norms that were folded into adjacent layers.
        warnings: by unit name, a warning about a unit that the step changed. Other units of
            unchanged format keep the warnings of earlier steps.
    """
    units_after = {unit.name: unit for unit in after}
    names_before = {unit.name for unit in before}
    lines = []
    for unit in before:
        earlier = source.plan.of(unit.name) if source.plan else None
        decision, new = decisions[unit.name], units_after.get(unit.name)
        steps = earlier.steps if earlier else ()
        lines.append(
            PlanLine(
                module=unit.name,
                role=unit.role,
                format=new.format if new else DROPPED,
                bytes_before=earlier.bytes_before if earlier else unit.bytes,
                bytes_after=new.bytes if new else 0,
                steps=(*steps, kind) if decision.selected else steps,
                reasons=_combine_reasons(earlier, decision),
                warnings=_select_warnings(earlier, new, unit.name, warnings or {}),
            )
        )
        # The parts (smaller tables) of a composed table; ``bytes_before`` is on the table's line.
        lines += [
            PlanLine(
                module=part.name,
                role=part.role,
                format=part.format,
                bytes_before=0,
                bytes_after=part.bytes,
                reasons=(Reason("part_of", unit=unit.name),),
                warnings=_select_warnings(None, part, part.name, warnings or {}),
            )
            for part in after
            if part.name not in names_before and innermost(part.name, names_before) == unit.name
        ]
    # A unit that an earlier step dropped keeps its line.
    lines += [line for line in (source.plan.lines if source.plan else ()) if line.format == DROPPED]
    lines += outputs
    output_bytes = sum(line.bytes_after for line in outputs)
    other = source.plan.of(OTHER) if source.plan else None
    other_before = sizes[0] - sum(unit.bytes for unit in before)
    lines.append(
        PlanLine(
            module=OTHER,
            role="other",
            format="as trained",
            bytes_before=other.bytes_before if other else max(other_before, 0),
            bytes_after=max(sizes[1] - sum(unit.bytes for unit in after) - output_bytes, 0),
            reasons=_describe_other_tensors(folded),
        )
    )
    return Plan(lines=tuple(lines), reasons=source.plan.reasons if source.plan else ())


def output_lines(
    kind: str, source: Model, module: nn.Module, decisions: Mapping[str, Decision]
) -> tuple[PlanLine, ...]:
    """Return the plan lines of the calibration maps; none if no step so far has changed one.

    Args:
        kind: the step's ``kind``.
        source: the model before the step, for its plan so far.
        module: the network after the step.
        decisions: the step's decisions, those about maps by the names of their plan lines.
    """
    earlier = source.plan.lines if source.plan else ()
    lines = {line.module: line for line in earlier if is_output_line(line.module)}
    maps = {output_line_name(item.name): item for item in list_recalibrations(module)}
    for name, decision in decisions.items():
        if is_output_line(name):
            recalibration = maps.get(name)
            lines[name] = PlanLine(
                module=name,
                role="other",
                format="as trained" if recalibration is None else recalibration.method,
                bytes_before=0,
                bytes_after=0 if recalibration is None else stored_bytes(recalibration),
                steps=() if recalibration is None else (kind,),
                reasons=decision.reasons,
            )
    return tuple(lines.values())


def add_remarks(
    plan: Plan,
    kind: str,
    skipped: Mapping[str, Reason],
    decisions: Mapping[str, Decision],
    outcome_reasons: Mapping[str, tuple[Reason, ...]],
) -> Plan:
    """Add remarks to a plan's reasons: skipped units, and whether the step changed nothing.

    Args:
        plan: the plan after the step.
        kind: the step's ``kind``.
        skipped: by unit name, why the step did not change the unit.
        decisions: the final decision for every unit.
        outcome_reasons: by unit name, the reasons that the step returned after it ran.
    """
    remarks = [
        Reason("unit_skipped", step=kind, unit=name, why=why) for name, why in skipped.items()
    ]
    outputs = [plan.of(name) for name in decisions if is_output_line(name)]
    if outputs:
        lines = [line for line in outputs if line is not None]
        if not any(kind in line.steps for line in lines):
            why = _remove_repetition(line.reasons for line in lines)
            remarks.append(Reason("step_changed_nothing", step=kind, why=why))
    elif decisions and not any(decision.selected for decision in decisions.values()):
        why_nothing = _remove_repetition(
            outcome_reasons[name] for name in decisions if name in outcome_reasons
        )
        remarks.append(
            Reason("step_changed_nothing", step=kind, why=why_nothing)
            if why_nothing
            else Reason("step_found_nothing", step=kind)
        )
    else:
        remarks += [
            Reason("training_changed_nothing", step=kind, why=why)
            for why in _remove_repetition(outcome_reasons.values())
            if any(reason.code == "training_unchanged" for reason in why.walk())
        ]
    return plan.model_copy(update={"reasons": (*plan.reasons, *remarks)})


def _remove_repetition(lists: Iterable[tuple[Reason, ...]]) -> tuple[Reason, ...]:
    """Return the reasons of all lists without repetition, in order."""
    return tuple(dict.fromkeys(reason for reasons in lists for reason in reasons))


def _select_warnings(
    earlier: PlanLine | None, new: Unit | None, name: str, warnings: Mapping[str, Reason]
) -> tuple[Reason, ...]:
    """Return a unit's new warning, or the earlier ones if its format has not changed.

    Args:
        earlier: the unit's line in the plan so far.
        new: the unit after the step; None if it was removed.
        name: the unit's name.
        warnings: by unit name, the new warnings.
    """
    if name in warnings:
        return (warnings[name],)
    same_format = earlier is not None and new is not None and earlier.format == new.format
    return earlier.warnings if earlier is not None and same_format else ()


def _describe_other_tensors(folded: Collection[str]) -> tuple[Reason, ...]:
    """Return the reasons of the line ``(other)``: what it covers, and the folded norms."""
    coverage, norms = Reason("outside_units"), tuple(sorted(folded))
    if not norms:
        return (coverage,)
    if len(norms) > MAX_LISTED_NORMS:
        listed = norms[:MAX_LISTED_NORMS]
        return coverage, Reason("many_folded_norms", count=len(norms), norms=listed)
    return coverage, Reason("folded_norms", count=len(norms), norms=norms)


def _combine_reasons(earlier: PlanLine | None, decision: Decision) -> tuple[Reason, ...]:
    """Return the reasons of every step that changed a unit; if none did, why each one did not."""
    if earlier is None:
        return decision.reasons
    if decision.selected:
        return (*earlier.reasons, *decision.reasons) if earlier.steps else decision.reasons
    return earlier.reasons if earlier.steps else (*earlier.reasons, *decision.reasons)
