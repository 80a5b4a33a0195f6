"""Compare the decisions of a step's plan with its result, and resolve them.

A plan decides for each unit that the step changes it (``taken``), does not (``skipped``) or decides
while it runs (``deferred``). Units that are ``taken`` or ``deferred`` are *selected*. An *outcome*
is a decision that the step returns after it ran; most units have none. The final decision of a
unit, ``taken`` or ``skipped``, follows from both and from what has changed.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from compressors.contracts.reasons import Reason
from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.factored import FactoredLinear
from compressors.core.modules.formats import Bag
from compressors.core.modules.table_weight import TIED, TiedHead
from compressors.core.plan_lines import is_output_line
from compressors.core.steps.decisions import Decision
from compressors.core.steps.step import Effect
from compressors.core.units import Unit
from compressors.errors.compression import ContractBroken


def resolve_decisions(
    kind: str,
    effect: Effect,
    planned: Mapping[str, Decision],
    outcomes: Mapping[str, Decision],
    before: tuple[Unit, ...],
    after: tuple[Unit, ...],
) -> dict[str, Decision]:
    """Return the final decision of every unit, ``taken`` or ``skipped``, with all reasons.

    Args:
        kind: the step's ``kind``.
        effect: how the step changes a selected unit. ``format``: it is stored in another format.
            ``values``: its format stays; its weights change, or it becomes narrower or is removed.
            ``parts``: smaller units replace it. ``output``: no unit changes; the step adds or
            replaces a calibration map: the function that recalibrates the network's output.
        planned: the plan's decision for every unit, and for every calibration map that the step
            changes, by the name of its plan line.
        outcomes: by the same names, the decisions that the step returned after it ran.
        before: the units before the step.
        after: the units after the step.

    Raises:
        ContractBroken: the result contradicts the plan or an outcome.
    """
    units_after = {unit.name: unit for unit in after}
    final = dict(planned)
    for unit in before:
        decision, outcome = planned[unit.name], outcomes.get(unit.name)
        new = units_after.get(unit.name)
        if new is None and not (effect == "values" and decision.selected):
            raise ContractBroken("unit_lost", step=kind, unit=unit.name)
        if new is not None and effect == "values" and new.format != unit.format:
            raise ContractBroken("format_changed", step=kind, unit=unit.name)
        is_changed = new is None or _is_changed(effect, unit, new)
        if is_changed and (not decision.selected or _has_status(outcome, "skipped")):
            raise ContractBroken("unit_changed", step=kind, unit=unit.name)
        must_change = effect == "format" and decision.status == "taken" and outcome is None
        if not is_changed and (must_change or _has_status(outcome, "taken")):
            raise ContractBroken("unit_kept", step=kind, unit=unit.name)
        if decision.bytes is not None:
            _require_bounds(kind, unit.name, decision.bytes, after)
        final[unit.name] = _build_final_decision(
            effect, decision, outcome, unit, is_changed=is_changed
        )
    # A calibration map is no unit, so there are no tensors to compare.
    final |= {name: outcomes[name] for name in planned if is_output_line(name) and name in outcomes}
    _require_no_other_units(kind, effect, planned, before, after)
    return final


def _has_status(outcome: Decision | None, status: str) -> bool:
    return outcome is not None and outcome.status == status


def _is_changed(effect: Effect, old: Unit, new: Unit) -> bool:
    """Whether a unit has another format, or with effect ``values`` or ``parts`` other tensors."""
    if effect in ("format", "output") or old.format != new.format:
        return old.format != new.format
    if new.format == TIED and isinstance(new.module, TiedHead):  # has a table's weight
        return old.module.bias is not new.module.bias
    return not _have_equal_tensors(old.module, new.module)


def _build_final_decision(
    effect: Effect,
    planned: Decision,
    outcome: Decision | None,
    unit: Unit,
    *,
    is_changed: bool,
) -> Decision:
    """Return ``taken`` if the unit changed, else ``skipped``, with reasons of plan and outcome."""
    outcome_reasons = () if outcome is None else outcome.reasons
    if not planned.selected:
        return replace(planned, reasons=(*planned.reasons, *outcome_reasons))
    if is_changed:
        return Decision("taken", (*planned.reasons, *outcome_reasons))
    if effect == "format":
        unchanged = Reason("kept_format", format=unit.format)
        return Decision("skipped", (unchanged, *outcome_reasons))
    return Decision("skipped", (*planned.reasons, Reason("nothing_better"), *outcome_reasons))


def _require_bounds(kind: str, name: str, bounds: tuple[int, int], after: tuple[Unit, ...]) -> None:
    """Raise ``ContractBroken`` if a unit with its parts has bytes outside ``[least, most]``."""
    size = sum(
        unit.bytes for unit in after if unit.name == name or unit.name.startswith(f"{name}.")
    )
    least, most = bounds
    if not least <= size <= most:
        raise ContractBroken(
            "bytes_out_of_bounds", step=kind, unit=name, bytes=size, least=least, most=most
        )


def _require_no_other_units(
    kind: str,
    effect: Effect,
    planned: Mapping[str, Decision],
    before: tuple[Unit, ...],
    after: tuple[Unit, ...],
) -> None:
    """Raise ``ContractBroken`` if the result has a new unit that is not part of a selected one."""
    names_before = {unit.name for unit in before}
    selected = {name for name, decision in planned.items() if decision.selected}
    added = sorted(
        unit.name
        for unit in after
        if unit.name not in names_before
        and not (effect == "parts" and _is_part_of_any(unit.name, selected))
    )
    if added:
        raise ContractBroken("unit_added", step=kind, unit=added[0])


def _is_part_of_any(name: str, owners: Collection[str]) -> bool:
    """Whether a unit's name is inside one of the modules ``owners``."""
    return any(name.startswith(f"{owner}.") for owner in owners)


def _have_equal_tensors(old: nn.Module, new: nn.Module) -> bool:
    """Whether two modules have equal tensors; tensors in the same memory count as equal.

    Composed tables and factored layers are built from smaller ones, their parts. Parts are separate
    units and are not compared.
    """
    first, second = _get_direct_tensors(old), _get_direct_tensors(new)
    return first.keys() == second.keys() and all(
        tensor.data_ptr() == second[name].data_ptr()
        or (tensor.shape == second[name].shape and torch.equal(tensor, second[name]))
        for name, tensor in first.items()
    )


def _get_direct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a unit's tensors by name, without those of its parts."""
    table = module.table if isinstance(module, Bag) else module
    if isinstance(table, ComposedTable | FactoredLinear):
        return dict(table.named_buffers(recurse=False))
    return dict(module.state_dict())
