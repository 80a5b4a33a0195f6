"""The presets: named recipes, each no larger than the one before it.

A preset is a list of choices, applied in order. A choice has one or more options, and the first
option that fits the model and the quality budget is applied. The last option of a choice marked
``base`` is the earlier preset's option for the same tables or layers, so it is applied at any cost
in quality, unless the order sets a budget. A cut that is over the budget therefore falls back to
the earlier preset's option. ``flows.recipe`` compares the bytes at the end: if the earlier preset's
result is still smaller, that result is used.
"""

from dataclasses import dataclass

from compressors.core.registries import AnyStep
from compressors.distill.distill import Distill
from compressors.distill.recalibrate import Recalibrate
from compressors.prune.dense.channels import Channels
from compressors.prune.tables.prune_rows import PruneRows
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.rewrite.fold import Fold
from flows.terms import Preset

Group = tuple[AnyStep, ...]
"""Steps that only make sense together: where one has nothing to do, all are left out."""


@dataclass(frozen=True)
class PresetOptions:
    """Options for one part of a recipe; the first that fits model and budget is applied.

    Attributes:
        options: groups of steps, in order of preference.
        base: whether the last option is the earlier preset's, so that a default budget does not
            judge it.
        rest: whether it applies only to units that other steps left, so that having nothing to do
            is not reported.
    """

    options: tuple[Group, ...]
    base: bool = False
    rest: bool = False


def _always(step: AnyStep) -> PresetOptions:
    return PresetOptions(((step,),), base=True)


RARE_ROWS = PresetOptions(
    tuple((PruneRows(min_lookups=fewest, pruned="shared"),) for fewest in (2, 1)),
)
"""Rows that training looks up at most once share one row; else those that it never looks up."""

_CUT = (Channels(keep=0.65), Distill())
_QUARTER = (Channels(keep=0.25), Distill())
_REST = PresetOptions(((Float16(),),), base=True, rest=True)

PRESETS: dict[Preset, tuple[PresetOptions, ...]] = {
    "safe": (_always(RowwiseInt8()), _always(Float16())),
    "fast": (_always(RowwiseInt8()), _always(Fold()), _always(StaticInt8()), _REST),
    "small": (
        RARE_ROWS,
        PresetOptions((_QUARTER,)),
        PresetOptions(((RowwiseInt4(),), (RowwiseInt8(),)), base=True),
        _always(Fold()),
        _always(StaticInt8()),
        _REST,
    ),
    # The steps of small, then cuts of a third of the rest, each recovered before the next.
    "smallest": (
        RARE_ROWS,
        PresetOptions((_QUARTER, _CUT)),
        *(PresetOptions((_CUT,)) for _ in range(3)),
        PresetOptions(((RowwiseInt4(clipping="least_squares"),), (RowwiseInt8(),)), base=True),
        _always(Fold()),
        _always(StaticInt8()),
        _REST,
        _always(Recalibrate(method="best")),
    ),
}

BEFORE: dict[Preset, Preset] = {"fast": "safe", "small": "fast", "smallest": "small"}
"""The preset before each: no preset's result has more bytes than that of the one before it."""
