"""Find the widths of a network that can be pruned, and check each of them.

A *width* is a number in the network's configuration that sets the number of channels of one or more
layers, its *producers* (``config_widths.py``). Its *consumers* are the layers and norms that take
the channels as inputs. A *group* is one channel, or several that the width counts as one, such as
an attention head. Layers whose width cannot be pruned get a reason.
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
from compressors.prune.structure.channel_consumers import (
    WidthConsumers,
    channel_layouts,
    find_consumers,
    trace,
)
from compressors.prune.structure.config_widths import Width, find_widths
from compressors.prune.structure.narrowing import WidthCut, require_narrowable


@dataclass(frozen=True)
class PrunableWidths:
    """The prunable widths with their consumers, and the decision for every dense layer.

    Attributes:
        consumers: the consumers of each prunable width.
        decisions: by name of a dense layer.
    """

    consumers: tuple[WidthConsumers, ...]
    decisions: dict[str, Decision]

    @property
    def widths(self) -> tuple[Width, ...]:
        """The widths without their consumers."""
        return tuple(item.width for item in self.consumers)


def prunable_widths(
    model: Model,
    signature: Signature,
    decisions: Mapping[str, Decision],
    share: float,
    multiple: int,
    *,
    share_is_searched: bool,
) -> PrunableWidths:
    """Find and check the widths that can be pruned.

    Args:
        model: the network; it is not changed.
        signature: describes the inputs of the network.
        decisions: the dense layers that the step selects.
        share: the approximate share of its groups that each width keeps.
        multiple: the number of channels stays a multiple of this.
        share_is_searched: whether the step searches how many groups each width keeps, so that a
            width may keep fewer than that share.

    Returns:
        The prunable widths, and for every dense layer the decision: unchanged, or ``skipped`` with
        the reason if the width of a selected layer cannot be pruned.
    """
    result = dict(decisions)
    widths, reasons = find_widths(model)
    prunable: list[WidthConsumers] = []
    pruned: set[str] = set()  # layers of the prunable widths
    for width in widths.values():
        if pruned & width.producers.keys():  # another number is already the width of these layers
            continue
        try:
            _require_all_selected(width, decisions)
            count = _count_to_check(width, share, multiple, share_is_searched=share_is_searched)
            prunable.append(_find_consumers(model, signature, width, count))
        except NotAWidth as fault:
            for name in width.producers:  # of two numbers the first is more likely the width
                reasons.setdefault(name, (fault.reason,))
        else:
            pruned |= width.producers.keys()
    for name, decision in decisions.items():
        if decision.selected and name not in pruned:
            result[name] = Decision("skipped", reasons[name])
    return PrunableWidths(tuple(prunable), result)


def _require_all_selected(width: Width, decisions: Mapping[str, Decision]) -> None:
    """Raise if the step does not select every layer of a width.

    Raises:
        NotAWidth: names the first layer that is not selected.
    """
    for name in width.producers:
        if not decisions[name].selected:
            why = decisions[name].reasons
            raise NotAWidth(Reason("shares_width", width=width.description(), layer=name, why=why))


def _count_to_check(width: Width, share: float, multiple: int, *, share_is_searched: bool) -> int:
    """Return the number of groups to which the check reduces a width.

    Raises:
        NotAWidth: with this share no group would be removed.
    """
    groups_per_multiple = multiple_of(width, multiple)
    count = kept_width(width.value, share, groups_per_multiple)
    if count >= width.value and share_is_searched:
        count = groups_per_multiple
    if count >= width.value:
        if max(width.producers.values()) > 1:
            no_fewer = Reason(
                "no_fewer_groups",
                groups=width.value,
                width=width.description(),
                share=share,
                multiple=groups_per_multiple,
            )
        else:
            no_fewer = Reason(
                "no_fewer_channels", channels=width.value, share=share, multiple=groups_per_multiple
            )
        raise NotAWidth(no_fewer)
    return count


def _find_consumers(model: Model, signature: Signature, width: Width, count: int) -> WidthConsumers:
    """Return the consumers of a width, for the first layout of its channels that passes the check.

    A layout assigns each channel to a group; the network does not record it.

    Raises:
        NotAWidth: no layout passes; the reason is that of the first layout.
    """
    traces = trace(model.module, signature, table_rows(model.module), width)
    faults: list[NotAWidth] = []
    for groups in channel_layouts(width):
        try:
            consumers = find_consumers(width, traces, groups)
            require_narrowable(model, signature, WidthCut(width, consumers, count))
        except NotAWidth as fault:
            faults.append(fault)
        else:
            return consumers
    raise faults[0]
