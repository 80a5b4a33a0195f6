"""Replace a row-wise table format by a more precise one that takes no more bytes.

In rows of few numbers, scales and offsets take more bytes than codes: a row of one number takes 3
bytes as ``rowwise_int4`` and 2 as ``float16``. Such a table is stored in the more precise format,
and its plan line gives the reason. Formats are compared by their exact bytes, and by their
precision for arbitrary rows: float16 before 8 bits, 8 bits before 4, 4 before 2.

Methods with codebooks are not replaced, because their quality depends on the fit to the table. But
if a more precise row-wise format takes no more bytes, as for a short table with large codebooks,
the plan line names that format.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from compressors.contracts.reasons import Reason
from compressors.core.modules.formats import TableFormat, layout_bytes
from compressors.core.steps.step import StepSettings, TableStep
from compressors.quantize.dense.float16 import LARGEST as LARGEST_FLOAT16
from compressors.quantize.dense.float16 import TABLE_FORMAT
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

RANK = {
    "float16": 4,
    "rowwise_int8": 3,
    "float8_e4m3": 3,
    "rowwise_int4": 2,
    "rowwise_int2": 1,
}
"""Precision of each row-wise format for arbitrary rows; higher is more precise."""

CODEBOOK_RANK = 2
"""Precision of methods with codebooks, on the scale of ``RANK``: about as precise as 4 bits."""


class Float16Rows(StepSettings):
    """Table step that replaces the step of a recipe for tables that float16 stores better.

    Recipes cannot name it: their ``float16`` (``dense/float16.py``) also converts layers.
    """

    kind: Literal["float16"] = "float16"
    tables: tuple[str, ...] = ("*",)
    min_rows: int = 1

    @property
    def storage(self) -> TableFormat:
        """The format that the step writes."""
        return TABLE_FORMAT

    def settings(self) -> dict[str, Any]:
        """Return no settings: the format has none."""
        return {}

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Return no parameters: each weight is rounded independently."""
        return {}

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round a block of rows, float ``(rows, dim)``, to float16."""
        return {"weight": block.to(torch.float16)}


def table_bytes(step: TableStep, rows: int, dim: int) -> int:
    """Return the bytes of all stored tensors of a ``rows x dim`` table in a step's format."""
    return layout_bytes(step.storage.layout(rows, dim, step.settings()))


def best_format(step: TableStep, weight: Tensor) -> tuple[TableStep, tuple[Reason, ...]]:
    """Select the given step, or one with a more precise format that takes no more bytes.

    Args:
        step: the method in the recipe.
        weight: the table, float ``(rows, dim)``.

    Returns:
        The selected step, and the reasons for the plan. If ``step`` is a method with a codebook, it
        is returned, and the reasons name a more precise format that is no larger, if there is one.
    """
    rows, dim = weight.shape
    reasons: tuple[Reason, ...] = (Reason("selected", step=step.kind),)
    if isinstance(step, RowwiseInt8):
        step, reasons_of_scale = step.for_table(weight)
        reasons += reasons_of_scale
    size = table_bytes(step, rows, dim)
    rank = RANK.get(step.kind, CODEBOOK_RANK)
    # ``bfloat16`` is selected for its range, which no other format has, so it is not replaced.
    better = [
        (table_bytes(other, rows, dim), -RANK[other.kind], other)
        for other in (Float16Rows(), RowwiseInt8(), RowwiseInt4())
        if RANK[other.kind] > rank and step.kind != "bfloat16"
    ]
    # The fewest bytes first; of formats with equal bytes, the more precise one first.
    no_larger = sorted((item for item in better if item[0] <= size), key=lambda item: item[:2])
    for other_size, _, other in no_larger:
        if other.kind == "float16" and float(weight.abs().max()) > LARGEST_FLOAT16:
            continue
        if step.kind not in RANK:
            smaller_format = Reason(
                "other_format_smaller", format=other.kind, bytes=other_size, step_bytes=size
            )
            return step, (Reason("selected", step=step.kind), smaller_format)
        better_format = Reason(
            "better_format",
            format=other.kind,
            bytes=other_size,
            step=step.kind,
            step_bytes=size,
            rows=rows,
            dim=dim,
        )
        return other, (better_format,)
    return step, reasons
