"""Which widths of a network can be cut, each proved, and why the other layers stay."""

from collections.abc import Mapping
from dataclasses import dataclass

from compressors.contracts import Schema
from compressors.dense.narrowing import Cut, prove
from compressors.dense.shares import multiple_of, narrower
from compressors.model import Model
from compressors.readers import Readers, layouts, readers_of, trace
from compressors.units import Choice, table_rows
from compressors.widths import NotAWidth, Width, find_widths


@dataclass(frozen=True)
class Found:
    """The widths that can be cut, and what is said of every dense layer."""

    readers: tuple[Readers, ...]
    choices: dict[str, Choice]

    @property
    def widths(self) -> tuple[Width, ...]:
        """The widths alone."""
        return tuple(item.width for item in self.readers)


def cuttable(
    model: Model,
    schema: Schema,
    choices: Mapping[str, Choice],
    share: float,
    multiple: int,
    *,
    searched: bool,
) -> Found:
    """The widths that can be cut.

    Args:
        model: left as it is.
        schema: of its inputs.
        choices: which dense layers are wanted.
        share: of its units that a width keeps, about.
        multiple: of channels.
        searched: whether a width may be told to keep fewer than that.
    """
    told = dict(choices)
    widths, reasons = find_widths(model)
    found: list[Readers] = []
    taken: set[str] = set()
    for width in widths.values():
        if taken & width.makers.keys():  # another number cuts these layers
            continue
        try:
            _need_choices(width, choices)
            count = _tried(width, share, multiple, searched=searched)
            found.append(_proved(model, schema, width, count))
        except NotAWidth as fault:
            for name in width.makers:  # of two numbers the first is more likely its width
                reasons.setdefault(name, str(fault))
        else:
            taken |= width.makers.keys()
    for name, choice in choices.items():
        if choice.take and name not in taken:
            told[name] = Choice(False, reasons[name])
    return Found(tuple(found), told)


def _need_choices(width: Width, choices: Mapping[str, Choice]) -> None:
    for name in width.makers:
        if not choices[name].take:
            raise NotAWidth(f"shares {width.spoken()} with {name!r}: {choices[name].reason}")


def _tried(width: Width, share: float, multiple: int, *, searched: bool) -> int:
    """How many units a width is proved with."""
    step = multiple_of(width, multiple)
    count = narrower(width.value, share, step)
    if count >= width.value and searched:
        count = step
    if count >= width.value:
        grouped = max(width.makers.values()) > 1
        units = f"groups of channels ({width.spoken()})" if grouped else "channels"
        raise NotAWidth(
            f"{width.value} {units}: {share:.0%} of them, as a multiple of {step}, is no fewer"
        )
    return count


def _proved(model: Model, schema: Schema, width: Width, count: int) -> Readers:
    """Who reads a width, in the first order of its channels that holds.

    Raises:
        NotAWidth: none does, with the reason of the first.
    """
    traces = trace(model.module, schema, table_rows(model.module), width)
    faults: list[NotAWidth] = []
    for units in layouts(width):
        try:
            readers = readers_of(width, traces, units)
            prove(model, schema, Cut(width, readers, count))
        except NotAWidth as fault:
            faults.append(fault)
        else:
            return readers
    raise faults[0]
