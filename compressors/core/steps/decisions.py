"""Decisions: which units a step changes, with reasons, and the functions that select units."""

import fnmatch
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import nn

from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.formats import LinearFormat
from compressors.core.units import Unit
from compressors.errors.compression import NothingToCompress

Payload = TypeVar("Payload", covariant=True)
EXCEPT = "!"
"""Prefix of a name pattern that excludes units."""


@dataclass(frozen=True)
class Decision:
    """Whether a step changes a unit, and why.

    ``taken``: the step changes it. ``skipped``: the step does not. ``deferred``: the step learns
    it while it works.

    Attributes:
        status: one of these.
        reasons: why; in the plan they follow those of earlier steps.
        bytes: of a deferred unit: its fewest and most bytes after the step, with its parts.
    """

    status: Literal["taken", "skipped", "deferred"]
    reasons: tuple[Reason, ...]
    bytes: tuple[int, int] | None = None

    @property
    def selected(self) -> bool:
        """Whether the step changes the unit, or may change it."""
        return self.status != "skipped"

    def because(self, *reasons: Reason) -> "Decision":
        """Return the decision with other reasons if the unit is selected, else unchanged."""
        return replace(self, reasons=reasons) if self.selected else self


@dataclass(frozen=True)
class StepPlan(Generic[Payload]):
    """The decisions of a step for one model, and what it computed to make them.

    Attributes:
        decisions: by unit. Units of a role that the step does not change may be missing.
        payload: for ``apply`` and ``dry_run`` of the same step. It names units and contains no
            module of the model, because both receive another copy of the module tree.
    """

    decisions: Mapping[str, Decision]
    payload: Payload

    def selects(self, name: str) -> bool:
        """Whether the step changes a unit, or may change it."""
        return name in self.decisions and self.decisions[name].selected

    def units(self, module: nn.Module) -> list[Unit]:
        """Return the selected units of a module, in the order of its submodules."""
        return [unit for unit in Unit.of(module) if self.selects(unit.name)]


class Applied(NamedTuple):
    """The result of a step.

    Attributes:
        model: the compressed model.
        outcomes: by unit, what the step found out about it while it worked. The reasons are listed
            after those of the plan. ``taken`` and ``skipped`` resolve a deferred decision;
            ``skipped`` also withdraws a taken one. With ``deferred``, or without an outcome, the
            runner compares the unit with the one before the step.
    """

    model: Model
    outcomes: Mapping[str, Decision] = MappingProxyType({})


def choose_tables(
    units: tuple[Unit, ...], patterns: tuple[str, ...], min_rows: int, kind: str
) -> dict[str, Decision]:
    """Choose the tables that a step takes, with a reason for each table.

    A pattern that begins with ``!`` excludes the units that it matches.
    """
    tables = [unit for unit in units if unit.role == "table"]
    require_matches(patterns, tables, kind, "table")
    decisions = {}
    for unit in tables:
        why = _why_skipped(unit, patterns)
        if why is None and unit.rows < min_rows:
            why = Reason("too_few_rows", rows=unit.rows, min_rows=min_rows)
        decisions[unit.name] = _taken_unless(why, kind)
    return decisions


def choose_dense(
    units: tuple[Unit, ...],
    patterns: tuple[str, ...],
    kind: str,
    storage: LinearFormat | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Decision]:
    """Choose the dense layers that a step takes, with a reason for each layer.

    A pattern that begins with ``!`` excludes the units that it matches. With ``storage`` and
    its ``settings``, the format a layer would have, a layer is not taken if that is not smaller.
    """
    layers = [unit for unit in units if unit.role == "dense"]
    require_matches(patterns, layers, kind, "dense layer")
    decisions = {}
    for unit in layers:
        why = _why_skipped(unit, patterns)
        if why is None and storage is not None:
            outputs, inputs = unit.weight.shape
            layout = storage.layout(
                inputs, outputs, settings or {}, bias=unit.bias is not None
            ).values()
            size = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout)
            if size >= unit.bytes:
                why = Reason("not_smaller", step=kind, bytes=size, present=unit.bytes)
        decisions[unit.name] = _taken_unless(why, kind)
    return decisions


def _taken_unless(why: Reason | None, kind: str) -> Decision:
    if why is None:
        return Decision("taken", (Reason("selected", step=kind),))
    return Decision("skipped", (why,))


def _why_skipped(unit: Unit, patterns: tuple[str, ...]) -> Reason | None:
    if unit.format != "float32":
        return Reason("already_stored", format=unit.format)
    if unit.shared_with is not None:
        return Reason("shares_weight", unit=unit.shared_with)
    if (why := _own_code(unit.module)) is not None:
        return why
    if not is_among(unit, patterns):
        return Reason("not_matched", patterns=patterns)
    return None


def _own_code(module: nn.Module) -> Reason | None:
    """Return why a layer behaves unlike its torch class, which its replacement copies, or None."""
    for base in (nn.Linear, nn.Embedding, nn.EmbeddingBag):
        if isinstance(module, base) and type(module).forward is not base.forward:
            return Reason("custom_forward", module_class=type(module).__name__)
    if module._forward_hooks or module._forward_pre_hooks:
        return Reason("has_hooks")
    return None


def is_among(unit: Unit, patterns: Collection[str]) -> bool:
    """Whether a unit matches a pattern of a step and no excluding pattern (``!``)."""
    included = [pattern for pattern in patterns if not pattern.startswith(EXCEPT)]
    if any(is_named(unit, p.removeprefix(EXCEPT)) for p in patterns if p.startswith(EXCEPT)):
        return False
    return any(is_named(unit, pattern) for pattern in included or ("*",))


def is_named(unit: Unit, pattern: str) -> bool:
    """Whether a pattern matches the name of a unit, or of the unit it is a part of."""
    names = (unit.name,) if unit.part_of is None else (unit.name, unit.part_of)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def require_matches(patterns: tuple[str, ...], units: list[Unit], kind: str, what: str) -> None:
    """Raise if a name pattern matches no unit.

    Raises:
        NothingToCompress: a pattern matches none; lists the names of the units.
    """
    for pattern in patterns:
        if pattern.startswith(EXCEPT):
            continue
        if pattern != "*" and not any(is_named(unit, pattern) for unit in units):
            raise NothingToCompress(
                "name_unmatched",
                step=kind,
                role=what,
                pattern=pattern,
                names=tuple(unit.name for unit in units),
            )
