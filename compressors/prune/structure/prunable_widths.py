"""Find the widths of a network that can be pruned, with a check of each of them.

Layers whose width cannot be pruned get a reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from compressors.contracts import Signature
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.steps.decisions import Decision
from compressors.core.units import table_rows
from compressors.errors.widths import NotAWidth
from compressors.prune.dense.kept_shares import kept_width, multiple_of
from compressors.prune.structure.channel_consumers import Readers, layouts, readers_of, trace
from compressors.prune.structure.config_widths import Width, find_widths
from compressors.prune.structure.narrowing import Cut, prove


@dataclass(frozen=True)
class PrunableWidths:
    """The prunable widths with their consumers, and the decision of every dense layer."""

    readers: tuple[Readers, ...]
    decisions: dict[str, Decision]

    @property
    def widths(self) -> tuple[Width, ...]:
        """The widths without their consumers."""
        return tuple(item.width for item in self.readers)


def prunable_widths(
    model: Model,
    signature: Signature,
    decisions: Mapping[str, Decision],
    share: float,
    multiple: int,
    *,
    searched: bool,
) -> PrunableWidths:
    """Find and check the widths that can be pruned.

    Args:
        model: the network; it is not changed.
        signature: the inputs of the network.
        decisions: the dense layers that the step selects.
        share: the approximate share of its units that a width keeps.
        multiple: the number of channels stays a multiple of this.
        searched: whether a width may keep fewer units than that share.
    """
    result = dict(decisions)
    widths, reasons = find_widths(model)
    proved: list[Readers] = []
    taken: set[str] = set()
    for width in widths.values():
        if taken & width.makers.keys():  # another number is the width of these layers
            continue
        try:
            _require_choices(width, decisions)
            count = _tried(width, share, multiple, searched=searched)
            proved.append(_proved(model, signature, width, count))
        except NotAWidth as fault:
            for name in width.makers:  # of two numbers the first is more likely the width
                reasons.setdefault(name, (fault.reason,))
        else:
            taken |= width.makers.keys()
    for name, decision in decisions.items():
        if decision.selected and name not in taken:
            result[name] = Decision("skipped", reasons[name])
    return PrunableWidths(tuple(proved), result)


def _require_choices(width: Width, decisions: Mapping[str, Decision]) -> None:
    for name in width.makers:
        if not decisions[name].selected:
            why = decisions[name].reasons
            raise NotAWidth(Reason("shares_width", width=width.description(), layer=name, why=why))


def _tried(width: Width, share: float, multiple: int, *, searched: bool) -> int:
    """The number of units that a width is reduced to in its check."""
    step = multiple_of(width, multiple)
    count = kept_width(width.value, share, step)
    if count >= width.value and searched:
        count = step
    if count >= width.value:
        if max(width.makers.values()) > 1:
            no_fewer = Reason(
                "no_fewer_groups",
                groups=width.value,
                width=width.description(),
                share=share,
                multiple=step,
            )
        else:
            no_fewer = Reason("no_fewer_channels", channels=width.value, share=share, multiple=step)
        raise NotAWidth(no_fewer)
    return count


def _proved(model: Model, signature: Signature, width: Width, count: int) -> Readers:
    """The consumers of a width, for the first order of its channels that passes the check.

    Raises:
        NotAWidth: no order passes; the reason is that of the first order.
    """
    traces = trace(model.module, signature, table_rows(model.module), width)
    faults: list[NotAWidth] = []
    for units in layouts(width):
        try:
            readers = readers_of(width, traces, units)
            prove(model, signature, Cut(width, readers, count))
        except NotAWidth as fault:
            faults.append(fault)
        else:
            return readers
    raise faults[0]
