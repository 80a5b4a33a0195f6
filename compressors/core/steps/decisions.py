"""Decisions: which units a step changes, and why; and functions that select units by name."""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import nn

from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import (
    LinearFormat,
    TableFormat,
    TensorSpec,
    layout_bytes,
)
from compressors.core.modules.table_weight import TIED
from compressors.core.units import Unit
from compressors.errors.compression import NothingToCompress

Payload = TypeVar("Payload", covariant=True)
EXCEPT = "!"
"""Prefix of a name pattern that excludes units."""


@dataclass(frozen=True)
class Decision:
    """Whether a step changes a unit, and why.

    Attributes:
        status: ``taken``: the step changes the unit. ``skipped``: it does not. ``deferred``: the
            step decides only while it runs.
        reasons: why. The plan line lists them after the reasons of earlier steps.
        bytes: for a deferred unit, the smallest and the largest number of bytes that the unit with
            its parts may have after the step.
    """

    status: Literal["taken", "skipped", "deferred"]
    reasons: tuple[Reason, ...]
    bytes: tuple[int, int] | None = None

    @property
    def selected(self) -> bool:
        """Whether the step changes the unit, or may change it."""
        return self.status != "skipped"

    def replace_reasons(self, *reasons: Reason) -> "Decision":
        """Return the decision with only these reasons if the unit is selected, else unchanged."""
        return replace(self, reasons=reasons) if self.selected else self


@dataclass(frozen=True)
class StepPlan(Generic[Payload]):
    """The decisions of a step for one model, and data for ``apply``.

    Attributes:
        decisions: by unit name. Units of a role that the step does not change may be missing.
        payload: data that ``plan`` passes to ``apply`` and ``dry_run`` of the same step. It refers
            to units by name, because both receive another copy of the module tree.
    """

    decisions: Mapping[str, Decision]
    payload: Payload

    def selects(self, name: str) -> bool:
        """Whether the step changes a unit, or may change it."""
        return name in self.decisions and self.decisions[name].selected

    def units(self, module: nn.Module) -> list[Unit]:
        """Return the selected units of a module, in the order of its submodules."""
        return selected_units(Unit.of(module), self.decisions)


class AppliedStep(NamedTuple):
    """The result of a step.

    Attributes:
        model: the compressed model.
        outcomes: by unit name, a decision made while the step ran. Its reasons follow those of the
            plan. ``taken`` and ``skipped`` resolve a deferred decision; ``skipped`` also withdraws
            a planned change. If the outcome is ``deferred`` or missing, the runner compares the
            unit before and after the step to decide whether it is ``taken``.
    """

    model: Model
    outcomes: Mapping[str, Decision] = MappingProxyType({})


def choose_tables(
    units: tuple[Unit, ...],
    patterns: tuple[str, ...],
    min_rows: int,
    kind: str,
    storage: TableFormat | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    with_heads: bool = False,
) -> dict[str, Decision]:
    """Decide which tables a step changes, with a reason for each table.

    Args:
        units: the units of the model.
        patterns: patterns of table names; one that begins with ``!`` excludes the matching units.
        min_rows: tables with fewer rows are skipped.
        kind: the step's ``kind``, for the reasons.
        storage: the new format; tables that it would not make smaller are skipped. None: do not
            compare bytes.
        settings: arguments of the format's layout.
        with_heads: whether the step replaces the table's module, so that output heads with the same
            weight multiply by the new table; else tables with such heads are skipped.

    Raises:
        NothingToCompress: a pattern matches no table.
    """
    tables = [unit for unit in units if unit.role == "table"]
    require_matches(patterns, tables, kind, "table")
    decisions = {}
    for unit in tables:
        why = _explain_skipping(unit, patterns, with_heads=with_heads)
        if why is None and unit.rows < min_rows:
            why = Reason("too_few_rows", rows=unit.rows, min_rows=min_rows)
        if why is None and storage is not None:
            rows, dim = unit.weight.shape
            why = _explain_not_smaller(unit, kind, storage.layout(rows, dim, settings or {}))
        decisions[unit.name] = _build_decision(why, kind)
    return decisions


def choose_dense(
    units: tuple[Unit, ...],
    patterns: tuple[str, ...],
    kind: str,
    storage: LinearFormat | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Decision]:
    """Decide which dense layers a step changes, with a reason for each layer.

    Args:
        units: the units of the model.
        patterns: patterns of layer names; one that begins with ``!`` excludes the matching units.
        kind: the step's ``kind``, for the reasons.
        storage: the new format; layers that it would not make smaller are skipped. None: do not
            compare bytes.
        settings: arguments of the format's layout.

    Raises:
        NothingToCompress: a pattern matches no dense layer.
    """
    layers = [unit for unit in units if unit.role == "dense"]
    require_matches(patterns, layers, kind, "dense layer")
    decisions = {}
    for unit in layers:
        why = _explain_skipping(unit, patterns)
        if why is None and storage is not None:
            outputs, inputs = unit.weight.shape
            layout = storage.layout(inputs, outputs, settings or {}, bias=unit.bias is not None)
            why = _explain_not_smaller(unit, kind, layout)
        decisions[unit.name] = _build_decision(why, kind)
    return decisions


def _explain_not_smaller(unit: Unit, kind: str, layout: Mapping[str, TensorSpec]) -> Reason | None:
    """Return the reason if a unit would not have fewer bytes in a layout, else None."""
    size = layout_bytes(layout)
    if size < unit.bytes:
        return None
    return Reason("not_smaller", step=kind, bytes=size, present=unit.bytes)


def selected_units(units: Iterable[Unit], decisions: Mapping[str, Decision]) -> list[Unit]:
    """Return the units that a step changes, or may change, in unchanged order."""
    return [unit for unit in units if unit.name in decisions and decisions[unit.name].selected]


def defer(
    units: Iterable[Unit],
    decisions: Mapping[str, Decision],
    reason: Reason,
    fewest_bytes: Callable[[Unit], int],
) -> dict[str, Decision]:
    """Defer the decisions of the selected units: each may also stay as it is.

    Args:
        units: the units of the model.
        decisions: by unit; the decisions of other units are returned unchanged.
        reason: why the units are selected.
        fewest_bytes: returns the smallest number of bytes of a unit after the step. The lower bound
            is at most the unit's present bytes.
    """
    result = dict(decisions)
    for unit in selected_units(units, decisions):
        bounds = min(fewest_bytes(unit), unit.bytes), unit.bytes
        result[unit.name] = Decision("deferred", (reason,), bounds)
    return result


def _build_decision(why_skipped: Reason | None, kind: str) -> Decision:
    if why_skipped is None:
        return Decision("taken", (Reason("selected", step=kind),))
    return Decision("skipped", (why_skipped,))


def _explain_skipping(
    unit: Unit, patterns: tuple[str, ...], *, with_heads: bool = False
) -> Reason | None:
    """Return why a unit is not selected, or None.

    It is already compressed, shares its weight, has custom code, or is excluded by the patterns.
    """
    if unit.format not in ("float32", TIED):  # TIED: has the weight of a table, see below
        return Reason("already_stored", format=unit.format)
    if unit.shared_with is not None and not (with_heads and unit.shares_with_heads):
        return Reason("shares_weight", unit=unit.shared_with)
    if (why := _describe_custom_behaviour(unit.module)) is not None:
        return why
    if not is_among(unit, patterns):
        return Reason("not_matched", patterns=patterns)
    return None


def _describe_custom_behaviour(module: nn.Module) -> Reason | None:
    """Return how a layer differs from its torch class (custom forward code or hooks), or None.

    A compressed layer computes what the torch class computes, so it cannot replace such a layer.
    """
    for base in (nn.Linear, nn.Embedding, nn.EmbeddingBag):
        if isinstance(module, base) and type(module).forward is not base.forward:
            return Reason("custom_forward", module_class=type(module).__name__)
    if module._forward_hooks or module._forward_pre_hooks:
        return Reason("has_hooks")
    return None


def is_among(unit: Unit, patterns: Collection[str]) -> bool:
    """Whether a unit matches a pattern and no excluding pattern (``!``).

    If all patterns are excluding ones, every unit that matches none of them is included.
    """
    included = [pattern for pattern in patterns if not pattern.startswith(EXCEPT)]
    if any(is_named(unit, p.removeprefix(EXCEPT)) for p in patterns if p.startswith(EXCEPT)):
        return False
    return any(is_named(unit, pattern) for pattern in included or ("*",))


def is_named(unit: Unit, pattern: str) -> bool:
    """Whether a pattern matches the name of a unit, or of the unit of which it is a part."""
    names = (unit.name,) if unit.part_of is None else (unit.name, unit.part_of)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def require_matches(patterns: tuple[str, ...], units: list[Unit], kind: str, role: str) -> None:
    """Raise if a name pattern matches no unit; ``*`` and excluding patterns (``!``) may match none.

    Args:
        patterns: the name patterns of a step.
        units: the units of the role that the patterns are about.
        kind: the step's ``kind``, for the message.
        role: the role, for the message.

    Raises:
        NothingToCompress: a pattern matches no unit; the error lists the names of the units.
    """
    for pattern in patterns:
        if pattern.startswith(EXCEPT):
            continue
        if pattern != "*" and not any(is_named(unit, pattern) for unit in units):
            raise NothingToCompress(
                "name_unmatched",
                step=kind,
                role=role,
                pattern=pattern,
                names=tuple(unit.name for unit in units),
            )
