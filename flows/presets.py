"""The presets: named recipes, from ``safe`` to ``smallest``.

A preset is a list of choices that are applied in order. A choice has one or more options; an option
is a group of steps that are applied together. The first option that fits the model and the quality
budget is applied. If none fits, the choice is skipped.

No preset's result has more bytes than that of the preset before it (``PREVIOUS_PRESET``), because
``flows/recipe.py`` compares the two results and uses the smaller one.
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
"""Steps that are useful only together: if one cannot be applied, all are skipped."""


@dataclass(frozen=True)
class Choice:
    """A part of a recipe with several options; the first that fits model and budget is applied.

    Attributes:
        options: groups of steps, in order of preference.
        last_option_is_exempt: whether the last option ignores the default budget of the preset, for
            example because the previous preset applies it too. It does not ignore a budget that
            the order sets.
        only_remaining_units: whether the steps apply only to units that earlier steps have not
            changed. If there are none, reports do not mention the steps.
    """

    options: tuple[Group, ...]
    last_option_is_exempt: bool = False
    only_remaining_units: bool = False


def _build_single_step(step: AnyStep) -> Choice:
    """Return a choice with one step, which the default budget does not exclude."""
    return Choice(((step,),), last_option_is_exempt=True)


SHARE_RARE_ROWS = Choice(
    tuple((PruneRows(min_lookups=count, pruned="shared"),) for count in (2, 1)),
)
"""Replace rarely used table rows by one shared row.

The first option replaces rows that training data looks up at most once, the second one only rows
that it never looks up.
"""

ONE_SCALE_ERROR = 0.05
"""Largest error of a table with one scale, as a share of its weights.

With one scale for all rows, the tables of the reference models (``examples/``) have errors of 0.8
to 4.3 %, with one for each row 0.3 to 0.6 %. A layer that reads several tables with one input scale
rounds all of them by the scale of the widest, so its inputs do not become less precise.
"""

_INT8_TABLES = RowwiseInt8(one_scale_error=ONE_SCALE_ERROR)
_INT8_LAYERS = _build_single_step(StaticInt8(input_scales="tables"))
"""Layers in int8; those that read tables with one scale read their codes."""

_KEEP_65_PERCENT = (Channels(keep=0.65), Distill())
_KEEP_25_PERCENT = (Channels(keep=0.25), Distill())
_REMAINING_LAYERS_TO_FLOAT16 = Choice(
    ((Float16(),),), last_option_is_exempt=True, only_remaining_units=True
)

_REMAINING_TABLES_TO_INT8 = Choice(
    ((_INT8_TABLES,),), last_option_is_exempt=True, only_remaining_units=True
)
"""Store in int8 the tables that int4 cannot store.

These are tables whose weight is an operand of a matrix product, such as a tied output layer.
"""

PRESETS: dict[Preset, tuple[Choice, ...]] = {
    "safe": (_build_single_step(RowwiseInt8()), _build_single_step(Float16())),
    "fast": (
        _build_single_step(_INT8_TABLES),
        _build_single_step(Fold()),  # fold norms into dense layers, and remove dead channels
        _INT8_LAYERS,
        _REMAINING_LAYERS_TO_FLOAT16,
    ),
    "small": (
        SHARE_RARE_ROWS,
        Choice((_KEEP_25_PERCENT,)),
        Choice(((RowwiseInt4(),), (_INT8_TABLES,)), last_option_is_exempt=True),
        _REMAINING_TABLES_TO_INT8,
        _build_single_step(Fold()),
        _INT8_LAYERS,
        _REMAINING_LAYERS_TO_FLOAT16,
    ),
    # Differs from small: if keeping a quarter of the channels is over the budget, 65 % are kept; up
    # to three more rounds keep 65 % of the remaining channels and distill; the ranges of int4 rows
    # are fitted by least squares; the scores are recalibrated at the end, by the method with the
    # smallest cross-validated log loss ("best").
    "smallest": (
        SHARE_RARE_ROWS,
        Choice((_KEEP_25_PERCENT, _KEEP_65_PERCENT)),
        *(Choice((_KEEP_65_PERCENT,)) for _ in range(3)),
        Choice(
            ((RowwiseInt4(clipping="least_squares"),), (_INT8_TABLES,)), last_option_is_exempt=True
        ),
        _REMAINING_TABLES_TO_INT8,
        _build_single_step(Fold()),
        _INT8_LAYERS,
        _REMAINING_LAYERS_TO_FLOAT16,
        _build_single_step(Recalibrate(method="best")),
    ),
}

PREVIOUS_PRESET: dict[Preset, Preset] = {"fast": "safe", "small": "fast", "smallest": "small"}
"""For each preset, the one whose result is never smaller (see the module docstring)."""
