"""The plan of a step: one line for every table and dense layer, with bytes and reason."""

from collections.abc import Collection, Mapping

from compressors.contracts import DROPPED, Plan, PlanLine
from compressors.core.model import Model
from compressors.core.units import Choice, Unit, innermost

OUTPUT = "(output)"
"""What the plan calls the map after a network's output."""

UNCHANGED = "was better than the start"
"""How a step's note ends whose training restored its start."""


def build_plan(
    kind: str,
    source: Model,
    choices: Mapping[str, Choice],
    before: tuple[Unit, ...],
    after: tuple[Unit, ...],
    sizes: tuple[int, int],
    output: PlanLine | None = None,
    folded: Collection[str] = (),
    warnings: Mapping[str, str] | None = None,
) -> Plan:
    """What earlier steps decided stays, what this one decided is new.

    Args:
        kind: the step's tag.
        source: the model before, for its plan so far.
        choices: what the step takes, for every unit, and why.
        before: the units before.
        after: the units now; those that are missing were dropped.
        sizes: bytes of all tensors before and now.
        output: the line of a map behind the network's output.
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
                reason=_reason(earlier, choice),
                warning=_warning(earlier, new, unit.name, warnings or {}),
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
                reason=f"a part of {unit.name}",
                warning=(warnings or {}).get(part.name),
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
            reason=_rest(folded),
        )
    )
    earlier_remarks = source.plan.remarks if source.plan else ()
    return Plan(lines=tuple(lines), remarks=earlier_remarks)


def with_remarks(
    plan: Plan,
    kind: str,
    skipped: Mapping[str, str],
    choices: Mapping[str, Choice],
    notes: Mapping[str, str],
    *,
    changes_output: bool = False,
) -> Plan:
    """The plan with remarks: what this step had to skip, and whether it changed nothing.

    Args:
        plan: after the step.
        kind: the step's tag.
        skipped: units it had to leave as they are, with the reasons.
        choices: what became of every unit, after the step.
        notes: by unit, what the step found while it worked.
        changes_output: the step changes no unit, but what follows the network's output.
    """
    found = [f"{kind} skipped {name!r}: {why}" for name, why in skipped.items()]
    output = plan.of(OUTPUT) if changes_output else None
    if output is not None:
        if kind not in output.steps:
            found.append(f"{kind} changed nothing: {output.reason}")
    elif choices and not any(choice.take for choice in choices.values()):
        whys = dict.fromkeys(notes[name] for name in choices if name in notes)
        found.append(f"{kind} changed nothing: {'; '.join(whys) or 'nothing better was found'}")
    else:
        whys = dict.fromkeys(
            part for note in notes.values() for part in note.split("; ") if part.endswith(UNCHANGED)
        )
        found += [f"The training of {kind} changed nothing: {why}" for why in whys]
    return plan.model_copy(update={"remarks": (*plan.remarks, *found)})


def _warning(
    earlier: PlanLine | None, new: Unit | None, name: str, warnings: Mapping[str, str]
) -> str | None:
    if name in warnings:
        return warnings[name]
    same = earlier is not None and new is not None and earlier.format == new.format
    return earlier.warning if earlier is not None and same else None


def _rest(folded: Collection[str]) -> str:
    """What the last line stands for, and which norms are no longer in it."""
    rest = "norms, biases outside dense layers, buffers"
    if not folded:
        return rest
    first = ", ".join(sorted(folded)[:3]) + (" and more" if len(folded) > 3 else "")
    return f"{rest}; {len(folded)} of the norms became part of a layer: {first}"


def _reason(earlier: PlanLine | None, choice: Choice) -> str:
    """What was done to a unit so far; where nothing was, every reason why not."""
    if earlier is None:
        return choice.reason
    if choice.take:
        return f"{earlier.reason}; {choice.reason}" if earlier.steps else choice.reason
    return earlier.reason if earlier.steps else f"{earlier.reason}; {choice.reason}"
