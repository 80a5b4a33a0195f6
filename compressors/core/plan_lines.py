"""The plan of a step: one line for every table and dense layer, with bytes and reason."""

from collections.abc import Collection, Iterable, Mapping

from compressors.contracts import DROPPED, Plan, PlanLine
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.units import Choice, Unit, innermost

OUTPUT = "(output)"
"""What the plan calls the map after a network's output."""

SHOWN = 3
"""How many folded norms a plan names."""


def build_plan(
    kind: str,
    source: Model,
    choices: Mapping[str, Choice],
    before: tuple[Unit, ...],
    after: tuple[Unit, ...],
    sizes: tuple[int, int],
    output: PlanLine | None = None,
    folded: Collection[str] = (),
    warnings: Mapping[str, Reason] | None = None,
) -> Plan:
    """What earlier steps decided stays, what this one decided is new.

    Args:
        kind: the step's tag.
        source: the model before, for its plan so far.
        choices: what the step takes, for every unit, and why.
        before: the units before.
        after: the units now; those that are missing were dropped.
        sizes: bytes of all tensors before and now.
        output: the line of a map that follows the network's output.
        folded: the norms that are part of the layers next to them now.
        warnings: of units that the step changed; other units of unchanged format keep theirs.
    """
    now = {unit.name: unit for unit in after}
    old = {unit.name for unit in before}
    lines = []
    for unit in before:
        earlier = source.plan.of(unit.name) if source.plan else None
        choice, new = choices[unit.name], now.get(unit.name)
        steps = earlier.steps if earlier else ()
        lines.append(
            PlanLine(
                module=unit.name,
                role=unit.role,
                format=new.format if new else DROPPED,
                bytes_before=earlier.bytes_before if earlier else unit.bytes,
                bytes_after=new.bytes if new else 0,
                steps=(*steps, kind) if choice.take else steps,
                reasons=_reasons(earlier, choice),
                warnings=_warnings(earlier, new, unit.name, warnings or {}),
            )
        )
        # The tables that this one is made of now. What it weighed before stays on its own line.
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
    # What an earlier step dropped keeps its line.
    lines += [line for line in (source.plan.lines if source.plan else ()) if line.format == DROPPED]
    lines += [] if output is None else [output]
    behind = 0 if output is None else output.bytes_after
    other = source.plan.of("(other)") if source.plan else None
    rest_before = sizes[0] - sum(unit.bytes for unit in before)
    lines.append(
        PlanLine(
            module="(other)",
            role="other",
            format="as trained",
            bytes_before=other.bytes_before if other else max(rest_before, 0),
            bytes_after=max(sizes[1] - sum(unit.bytes for unit in after) - behind, 0),
            reasons=_rest(folded),
        )
    )
    return Plan(lines=tuple(lines), reasons=source.plan.reasons if source.plan else ())


def with_remarks(
    plan: Plan,
    kind: str,
    skipped: Mapping[str, Reason],
    choices: Mapping[str, Choice],
    notes: Mapping[str, tuple[Reason, ...]],
    *,
    changes_output: bool = False,
) -> Plan:
    """The plan with the units this step had to skip, and whether it changed nothing.

    Args:
        plan: after the step.
        kind: the step's tag.
        skipped: units it had to leave as they are, with the reasons.
        choices: what became of every unit, after the step.
        notes: by unit, what the step found while it worked.
        changes_output: the step changes no unit, but what follows the network's output.
    """
    found = [Reason("unit_skipped", step=kind, unit=n, why=why) for n, why in skipped.items()]
    output = plan.of(OUTPUT) if changes_output else None
    if output is not None:
        if kind not in output.steps:
            found.append(Reason("step_changed_nothing", step=kind, why=output.reasons))
    elif choices and not any(choice.take for choice in choices.values()):
        whys = _once(notes[name] for name in choices if name in notes)
        found.append(
            Reason("step_changed_nothing", step=kind, why=whys)
            if whys
            else Reason("step_found_nothing", step=kind)
        )
    else:
        found += [
            Reason("training_changed_nothing", step=kind, why=why)
            for why in _once(notes.values())
            if any(reason.code == "training_unchanged" for reason in why.walk())
        ]
    return plan.model_copy(update={"reasons": (*plan.reasons, *found)})


def _once(notes: Iterable[tuple[Reason, ...]]) -> tuple[Reason, ...]:
    """The reasons of some notes, each once."""
    return tuple(dict.fromkeys(reason for note in notes for reason in note))


def _warnings(
    earlier: PlanLine | None, new: Unit | None, name: str, warnings: Mapping[str, Reason]
) -> tuple[Reason, ...]:
    if name in warnings:
        return (warnings[name],)
    same = earlier is not None and new is not None and earlier.format == new.format
    return earlier.warnings if earlier is not None and same else ()


def _rest(folded: Collection[str]) -> tuple[Reason, ...]:
    """What the last line stands for, and which norms are no longer in it."""
    rest, norms = Reason("outside_units"), tuple(sorted(folded))
    if not norms:
        return (rest,)
    if len(norms) > SHOWN:
        return rest, Reason("many_folded_norms", count=len(norms), norms=norms[:SHOWN])
    return rest, Reason("folded_norms", count=len(norms), norms=norms)


def _reasons(earlier: PlanLine | None, choice: Choice) -> tuple[Reason, ...]:
    """What was done to a unit so far; where nothing was, every reason why not."""
    if earlier is None:
        return choice.reasons
    if choice.take:
        return (*earlier.reasons, *choice.reasons) if earlier.steps else choice.reasons
    return earlier.reasons if earlier.steps else (*earlier.reasons, *choice.reasons)
